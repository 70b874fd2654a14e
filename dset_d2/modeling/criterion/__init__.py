from .dfine_criterion import DFINECriterion
from .matcher import HungarianMatcher
from .set_criterion import SetCriterion
from .token_criterion import TokenCriterion, TokenMatcher

__all__ = ["DFINECriterion", "HungarianMatcher", "SetCriterion", "TokenCriterion", "TokenMatcher"]
