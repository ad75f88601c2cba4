"""Images: the built-in sets, photographs, picture files and folders of your own."""

from pss.data.builtin import DIGITS, SETS, SIZE, SPLITS, digits, load, mnist
from pss.data.folders import folder, open_set, preprocess, torchvision_set
from pss.data.image_set import MEAN, STD, ImageSet
from pss.data.pictures import MAX_PIXELS, Photograph, photographs, read_image
from pss.storage.places import cache_folder
