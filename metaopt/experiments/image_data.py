"""Where the image experiments get their images, and how classes are split into meta-training, -validation and -test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

from metaopt.tasks import (
    LabelledImages,
    cifar10,
    cifar100,
    fashion_mnist,
    folder,
    glyphs,
    mnist,
    split_classes,
    tiny_imagenet,
)


@dataclass(frozen=True)
class Source:
    """A data set by name.

    Attributes:
        name: ``"glyphs"``, ``"cifar10"``, ``"cifar100"``, ``"tinyimagenet"``, ``"fashion-mnist"``,
            ``"mnist"`` or ``"folder"``.
        root: the folder that holds the files; glyphs are rendered and need none.
        size: height and width to work at; ``None``: the data's own.
        download: fetch the files where they are missing.
    """

    name: str
    root: Path = Path("data")
    size: int | None = None
    download: bool = False


class Splits(NamedTuple):
    """Meta-training, -validation and -test data, and which augmentation keeps a class what it is.

    Attributes:
        train: images of meta-training.
        validation: of meta-validation.
        test: of meta-test.
        flip: whether a mirror image is of the same class.
        by_class: whether the three share no class (else, with fewer than three times the ways, no
            image).
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    flip: bool
    by_class: bool


CLASSES = {"cifar100": (50, 20, 30), "tinyimagenet": (100, 40, 60)}
"""The paper's splits; any other data is split 50 : 20 : 30."""


def read(source: Source, per_class: int) -> LabelledImages:
    """All images of a source; ``per_class`` of each glyph.

    Raises:
        ValueError: if there is no such source.
        FileNotFoundError: if its files are missing.
    """
    readers: dict[str, Callable[[], LabelledImages]] = {
        "glyphs": lambda: glyphs(source.size or 28, per_class=per_class),
        "cifar10": lambda: cifar10(source.root, download=source.download),
        "cifar100": lambda: cifar100(source.root, download=source.download),
        "tinyimagenet": lambda: tiny_imagenet(source.root, download=source.download),
        "fashion-mnist": lambda: fashion_mnist(source.root, download=source.download),
        "mnist": lambda: mnist(source.root, download=source.download),
        "folder": lambda: folder(source.root, source.size or 32),
    }
    if source.name not in readers:
        raise ValueError(f"no data is called {source.name!r}; there are {', '.join(readers)}")
    return _resized(readers[source.name](), source.size)


def load(source: Source, *, ways: int, per_class: int) -> Splits:
    """Split by classes (always the same way) where there are three times as many as ``ways``, otherwise by images."""
    data = read(source, per_class)
    count = len(data.names)
    train, validation = CLASSES.get(source.name, (count // 2, count // 5))[:2]
    counts = (train, validation, CLASSES[source.name][2] if source.name in CLASSES else count - train - validation)
    flip = source.name != "glyphs"
    if min(counts) >= ways:
        return Splits(*split_classes(data, counts, seed=0), flip=flip, by_class=True)
    return Splits(*split_images(data, (0.5, 0.2, 0.3), seed=0), flip=flip, by_class=False)


def split_images(data: LabelledImages, shares: Sequence[float], seed: int) -> list[LabelledImages]:
    """Disjoint random parts with such a share of every class."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(data))
    for c in range(len(data.names)):
        members = order[data.labels[order] == c]
        rank[members] = (torch.arange(len(members)) + 0.5) / len(members)
    ends = torch.tensor(shares).cumsum(0)
    part = torch.bucketize(rank, ends)
    return [data.rows((part == i).nonzero().flatten()) for i in range(len(shares))]


def _resized(data: LabelledImages, size: int | None) -> LabelledImages:
    """At ``size`` × ``size``, averaged over the pixels that fall together."""
    if size is None or data.images.shape[-1] == size:
        return data
    images = [
        interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True).round().byte()
        for part in data.images.split(4096)
    ]
    return LabelledImages(torch.cat(images), data.labels, data.names)
