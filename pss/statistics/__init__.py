"""What a statistician asks: do tails follow the model, and how sure is a mean over images."""

from pss.statistics.curves import agreement, bootstrap, interval, paired_difference, summarize
from pss.statistics.tails import (
    anderson_darling,
    calibration,
    hill,
    likelihood_ratio,
    mean_excess,
    qq,
    threshold_stability,
)
