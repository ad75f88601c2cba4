"""Networks: the built-in one, published ones and your own; what they predict; what is usual for them."""

from pss.engine.process import keep_freed_memory
from pss.models.loading import imagenet, load, names
from pss.models.networks import Network, Preprocessing, logits_of
from pss.models.predictions import accuracy, evaluate, misclassified, predict
from pss.models.resnet import EPOCHS, WIDTH, digits, resnet18, train
from pss.models.usual import PhotographCrops, cache_of, is_own, preprocessing_of, profiles_of, reference, reference_set
from pss.models.weights import load_weights, read_record, save_weights
from pss.storage.fingerprints import fingerprint
