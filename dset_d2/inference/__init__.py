"""Trained models as they are deployed."""

from .export import ExportedDetector, ExportInfo, export_detector
from .optimize import optimize_for_inference
from .predictor import Prediction, Predictor

__all__ = [
    "ExportInfo",
    "ExportedDetector",
    "Prediction",
    "Predictor",
    "export_detector",
    "optimize_for_inference",
]
