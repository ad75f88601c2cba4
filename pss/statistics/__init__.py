"""What a statistician asks: do tails follow the model, and how sure is a mean over images."""

from pss.statistics.curves import agreement, bootstrap, interval, paired_difference, summarize
from pss.statistics.tails import (
    AndersonDarling,
    MeanExcess,
    ThresholdStability,
    anderson_darling,
    calibration,
    hill,
    likelihood_ratio,
    mean_excess,
    qq,
    threshold_stability,
)

__all__ = [
    "AndersonDarling",
    "MeanExcess",
    "ThresholdStability",
    "agreement",
    "anderson_darling",
    "bootstrap",
    "calibration",
    "hill",
    "interval",
    "likelihood_ratio",
    "mean_excess",
    "paired_difference",
    "qq",
    "summarize",
    "threshold_stability",
]
