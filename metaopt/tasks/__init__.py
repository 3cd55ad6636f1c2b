"""Task distributions."""

from metaopt.tasks import label_noise, sinusoid
from metaopt.tasks.episodes import Episode, Episodes, ImageBatch
from metaopt.tasks.images import LabelledImages, split_classes
from metaopt.tasks.sinusoid import Sinusoid

__all__ = ["Episode", "Episodes", "ImageBatch", "LabelledImages", "Sinusoid", "label_noise", "sinusoid", "split_classes"]
