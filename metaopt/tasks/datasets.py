"""Readers of well-known data sets, and of a folder of images, through torchvision (``pip install 'metaopt[vision]'``).

Each looks below ``root`` where torchvision does, checks the files, and says which one is missing or
damaged and how to get it.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt import _torchvision
from metaopt.tasks._files import Part, check_file, fetch, open_image, parts
from metaopt.tasks.images import LabelledImages

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist (train-images-idx3-ubyte.gz and three more)"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist (data/fashion), or Debian's package dataset-fashion-mnist"


def cifar10(root: str | Path, part: Part = "train", *, download: bool = False) -> LabelledImages:
    """CIFAR-10: 10 classes, 50,000 training and 10,000 test images of 3×32×32; Krizhevsky 2009.

    Args:
        root: where ``cifar-10-batches-py/`` is.
        part: "train", "test" or "all".
        download: fetch it there if need be.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged (by its MD5).
    """
    reader = _torchvision.datasets().CIFAR10
    return _cifar(reader, Path(root), part, download)


def cifar100(root: str | Path, part: Part = "train", *, download: bool = False) -> LabelledImages:
    """CIFAR-100: 100 classes, 50,000 training and 10,000 test images of 3×32×32, in ``cifar-100-python/``.

    The arguments and errors are those of :func:`cifar10`.
    """
    reader = _torchvision.datasets().CIFAR100
    return _cifar(reader, Path(root), part, download)


def fashion_mnist(root: str | Path, part: Part = "train", *, download: bool = False) -> LabelledImages:
    """Fashion-MNIST: 10 classes, 60,000 training and 10,000 test images of 1×28×28.

    Xiao et al. 2017, `arXiv 1708.07747 <https://arxiv.org/abs/1708.07747>`__.

    Args:
        root: where ``FashionMNIST/raw/`` with the four unpacked idx files is.
        part: "train", "test" or "all".
        download: fetch it there if need be.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.
    """
    return _idx("FashionMNIST", _FASHION, Path(root), part, download)


def mnist(root: str | Path, part: Part = "train", *, download: bool = False) -> LabelledImages:
    """MNIST: 10 digits, 60,000 training and 10,000 test images of 1×28×28, in ``MNIST/raw/``.

    LeCun et al. 1998. The arguments and errors are those of :func:`fashion_mnist`.
    """
    return _idx("MNIST", _MNIST, Path(root), part, download)


def folder(path: str | Path, size: int = 64) -> LabelledImages:
    """A folder with one sub-folder of images per class, in colour, scaled and cropped to ``size`` × ``size``.

    Raises:
        FileNotFoundError: if there is no such folder, or a class without images.
        ValueError: if an image is damaged.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is not a folder; it should hold one sub-folder of images per class")
    loader = partial(open_image, size=size)
    dataset = _torchvision.datasets().ImageFolder(path, loader=loader)
    return LabelledImages.of(dataset)


def _cifar(reader: Any, root: Path, part: Part, download: bool) -> LabelledImages:
    place = root / reader.base_folder
    if download:
        fetch(partial(reader, root, download=True), place, reader.url)
    remedy = f"unpack {reader.url} in {root}, or pass download=True"
    meta = (reader.meta["filename"], reader.meta["md5"])
    for name, md5 in [*reader.train_list, *reader.test_list, meta]:
        check_file(place / name, remedy, md5)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"dtype\(\): align")  # NumPy 2.4.0 to 2.4.4, about the published pickles
        read = [reader(root, train=train) for train in parts(part, True, False)]
    pixels = np.concatenate([dataset.data for dataset in read])
    images = torch.from_numpy(pixels).movedim(3, 1).contiguous()
    labels = [label for dataset in read for label in dataset.targets]
    names = tuple(read[0].classes)
    return LabelledImages(images, torch.tensor(labels), names)


def _idx(name: str, source: str, root: Path, part: Part, download: bool) -> LabelledImages:
    """A data set of torchvision's that consists of four idx files."""
    module = _torchvision.datasets()
    reader = getattr(module, name)
    place = root / name / "raw"
    if download:
        fetch(partial(reader, root, download=True), place, source)

    images = []
    labels = []
    for piece in parts(part, "train", "t10k"):
        piece_images, piece_labels = _idx_part(module.mnist, place, piece, source)
        images.append(piece_images)
        labels.append(piece_labels)
    pixels = torch.cat(images).unsqueeze(1)
    return LabelledImages(pixels, torch.cat(labels), tuple(reader.classes))


def _idx_part(reader: Any, place: Path, name: str, source: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one part."""
    contents = []
    for file, read in (
        (f"{name}-images-idx3-ubyte", reader.read_image_file),
        (f"{name}-labels-idx1-ubyte", reader.read_label_file),
    ):
        path = place / file
        if (place / f"{file}.gz").exists():
            remedy = f"gunzip the {file}.gz that is there"
        else:
            remedy = f"unpack the files of {source} there"
        check_file(path, f"{remedy}, or pass download=True")
        try:
            contents.append(read(str(path)))
        except Exception as error:  # whatever a wrong header leads to
            raise ValueError(
                f"{path} is damaged, it is not an idx file of the expected kind; fetch it again"
            ) from error
    images, labels = contents
    if len(images) != len(labels):
        raise ValueError(
            f"{place}: {len(images)} {name} images but {len(labels)} labels, so one of the two files is damaged; "
            "fetch them again"
        )
    return images, labels
