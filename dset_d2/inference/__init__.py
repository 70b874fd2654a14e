"""Trained models as they are deployed."""

from .predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
