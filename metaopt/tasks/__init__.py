"""Task distributions, readers of data sets, and label noise."""

from metaopt.tasks import fonts, label_noise, sinusoid
from metaopt.tasks.datasets import cifar10, cifar100, fashion_mnist, folder, mnist
from metaopt.tasks.episodes import Episode, Episodes, ImageBatch
from metaopt.tasks.fonts import split_families
from metaopt.tasks.glyphs import Glyphs, glyphs
from metaopt.tasks.images import LabelledImages, split_classes
from metaopt.tasks.sinusoid import Sinusoid
from metaopt.tasks.tiny_imagenet import tiny_imagenet

__all__ = [
    "Episode",
    "Episodes",
    "Glyphs",
    "ImageBatch",
    "LabelledImages",
    "Sinusoid",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "folder",
    "fonts",
    "glyphs",
    "label_noise",
    "mnist",
    "sinusoid",
    "split_classes",
    "split_families",
    "tiny_imagenet",
]
