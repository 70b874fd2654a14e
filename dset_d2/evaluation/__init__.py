"""Evaluators beside Detectron2's."""

from .fast_coco import FastCOCOEvaluator

__all__ = ["FastCOCOEvaluator"]
