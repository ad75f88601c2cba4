"""Networks: the built-in one, published ones and your own; what they predict."""

from pss.engine.process import keep_freed_memory
from pss.models.builtin import (
    EPOCHS,
    WIDTH,
    accuracy,
    digits,
    evaluate,
    load_weights,
    misclassified,
    predict,
    read_record,
    resnet18,
    save_weights,
    train,
)
from pss.models.logits import logits_of
from pss.models.zoo import Network, PhotographCrops, Preprocessing, load, names, reference, reference_set
from pss.storage.fingerprints import fingerprint

__all__ = [
    "EPOCHS",
    "WIDTH",
    "Network",
    "PhotographCrops",
    "Preprocessing",
    "accuracy",
    "digits",
    "evaluate",
    "fingerprint",
    "keep_freed_memory",
    "load",
    "load_weights",
    "logits_of",
    "misclassified",
    "names",
    "predict",
    "read_record",
    "reference",
    "reference_set",
    "resnet18",
    "save_weights",
    "train",
]
