"""Parameter-space saliency: which parameters made a network misclassify an image, and can they be repaired."""

from pss.gradients import parameter_saliency, profile
from pss.units import Units

__all__ = ["Units", "parameter_saliency", "profile"]
__version__ = "0.1.0"
