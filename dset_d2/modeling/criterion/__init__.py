from .dfine_criterion import DFINECriterion
from .matcher import HungarianMatcher
from .set_criterion import SetCriterion

__all__ = ["DFINECriterion", "HungarianMatcher", "SetCriterion"]
