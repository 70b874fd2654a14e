from .matcher import HungarianMatcher
from .set_criterion import SetCriterion

__all__ = ["HungarianMatcher", "SetCriterion"]
