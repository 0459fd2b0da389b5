"""Features of any network by the names of its modules: recorded, and where to record them."""

from .features import FeatureTaps
from .suggest import suggest_taps

__all__ = ["FeatureTaps", "suggest_taps"]
