"""What a statistician asks: do tails follow the model, which units are significant, how sure is a mean over images."""

from pss.statistics.curves import agreement, bootstrap, interval, paired_difference, share_interval, summarize, wilson
from pss.statistics.tails import (
    anderson_darling,
    calibration,
    hill,
    likelihood_ratio,
    mean_excess,
    qq,
    threshold_stability,
)
from pss.statistics.tops import fdr_significant, stage_shares
