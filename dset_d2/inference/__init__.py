"""Trained models as they are deployed."""

from .export import ExportedDetector, ExportInfo, export_detector
from .optimize import deployed_parameters, optimize_for_inference
from .predictor import Prediction, Predictor

__all__ = [
    "ExportInfo",
    "ExportedDetector",
    "Prediction",
    "Predictor",
    "deployed_parameters",
    "export_detector",
    "optimize_for_inference",
]
