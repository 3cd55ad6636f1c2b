"""Where the image experiments get their images, and how classes are split into meta-training, -validation and -test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

from metaopt.experiments.experiment import SettingError
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

SOURCES = ("glyphs", "mnist", "fashion-mnist", "cifar10", "cifar100", "tinyimagenet", "folder")
"""Names of the data sets; ``"folder"`` is any folder with a sub-folder of images for each class."""


@dataclass(frozen=True)
class Source:
    """A data set by name.

    Attributes:
        name: one of :data:`SOURCES`.
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

SHARES = (0.5, 0.2, 0.3)
"""Shares of the images of a class, where there are too few classes to split by classes."""


def read(source: Source, per_class: int) -> LabelledImages:
    """All images of a source; ``per_class`` of each glyph.

    Raises:
        SettingError: if there is no such source, the fonts have too few glyphs, or a download fails.
        FileNotFoundError: if its files are missing.
    """
    readers: dict[str, Callable[[], LabelledImages]] = {
        "glyphs": lambda: _glyphs(source.size or 28, per_class),
        "cifar10": lambda: cifar10(source.root, download=source.download),
        "cifar100": lambda: cifar100(source.root, download=source.download),
        "tinyimagenet": lambda: tiny_imagenet(source.root, download=source.download),
        "fashion-mnist": lambda: fashion_mnist(source.root, download=source.download),
        "mnist": lambda: mnist(source.root, download=source.download),
        "folder": lambda: folder(source.root, source.size or 32),
    }
    if source.name not in readers:
        raise SettingError(f"no data is called {source.name!r}; there are {', '.join(SOURCES)}", "--data")
    return _resized(fetched(readers[source.name], download=source.download), source.size)


def fetched(reader: Callable[[], LabelledImages], *, download: bool) -> LabelledImages:
    """What the reader reads.

    Raises:
        SettingError: if its files were to be downloaded, and that failed.
    """
    try:
        return reader()
    except RuntimeError as error:
        if not download:
            raise
        raise SettingError(str(error), "--download") from error


def _glyphs(size: int, per_class: int) -> LabelledImages:
    try:
        return glyphs(size, per_class=per_class)
    except ValueError as error:
        raise SettingError(
            f"the fonts of this machine do not give {per_class} glyphs of a class at {size}×{size} pixels ({error})",
            "--shots",
            "--size",
        ) from error


def load(source: Source, *, ways: int, shots: int) -> Splits:
    """Split by classes (always the same way) where there are three times as many as ``ways``, otherwise by images.

    Raises:
        SettingError: if there are fewer classes than ``ways``, or if a class of a part has fewer than
            ``2 * shots`` images.
        FileNotFoundError: if a file is missing.
    """
    data = read(source, 2 * shots)
    count = len(data.names)
    if count < ways:
        raise SettingError(f"tasks of {ways} classes were asked for, but {source.name} has {count}", "--ways")
    train, validation = CLASSES.get(source.name, (count // 2, count // 5))[:2]
    counts = (train, validation, CLASSES[source.name][2] if source.name in CLASSES else count - train - validation)
    by_class = min(counts) >= ways
    parts = split_classes(data, counts, seed=0) if by_class else split_images(data, SHARES, seed=0)
    fewest = min(int(part.counts().min()) for part in parts)
    if fewest < 2 * shots:
        raise SettingError(_too_few(int(data.counts().min()), fewest, shots, by_class=by_class), "--shots")
    return Splits(*parts, flip=source.name != "glyphs", by_class=by_class)


def _too_few(whole: int, fewest: int, shots: int, *, by_class: bool) -> str:
    """What to say of classes with too few images."""
    needed = f"{shots} shots need {2 * shots} images of a class, {shots} to train on and {shots} to test on"
    if by_class:
        found = f"a class has {fewest}"
    else:
        shares = " : ".join(f"{100 * share:.0f}" for share in SHARES)
        found = (
            f"the smallest class has {whole}, of which {fewest} are left after the split {shares} into "
            "meta-training, -validation and -test (there are too few classes to split by classes: that takes about "
            "five times --ways)"
        )
    return f"{needed}, but {found}; {f'at most --shots {fewest // 2} is possible' if fewest > 1 else 'add images'}"


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
