"""Images with class labels in one tensor, and their split into classes for meta-training and -test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

Data = TypeVar("Data", bound="LabelledImages")


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """N images and their classes.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``, numbers into ``names``.
        names: one name per class.

    >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    >>> data = LabelledImages(images, torch.tensor([0, 1, 2, 2]), ("ant", "bee", "cat"))
    >>> data.classes([2, 0])
    LabelledImages(3 images of 1×8×8, 2 classes)
    >>> data.classes([2, 0]).labels.tolist()
    [1, 0, 0]
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuses images or labels of another type or shape, and labels without a name."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise TypeError(
                f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}; see "
                "LabelledImages.of"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise TypeError(
                f"labels must be int64 [{len(self.images)}], one per image, got {self.labels.dtype} "
                f"{list(self.labels.shape)}; see LabelledImages.of"
            )
        if not len(self.labels):
            return
        lowest = int(self.labels.min())
        highest = int(self.labels.max())
        if lowest < 0 or highest >= len(self.names):
            raise ValueError(f"labels lie in {lowest} … {highest}, but there are {len(self.names)} class names")

    @classmethod
    def of(cls, dataset: Any, names: Sequence[str] | None = None) -> LabelledImages:
        """All of a map-style dataset, i.e. one with ``len`` and items ``(image, label)``.

        An image is a PIL image, a uint8 array ``[H, W]`` or ``[H, W, C]``, or a tensor ``[C, H,
        W]``, uint8 or floats in [0, 1].

        Args:
            dataset: the dataset.
            names: class names; default the dataset's ``classes``, else the numbers.

        Raises:
            ValueError: if it is empty, or if images differ in size (resize them in the dataset's
                transform).
        """
        if not len(dataset):
            raise ValueError(f"{type(dataset).__name__} is empty")
        images = []
        labels = []
        for i in tqdm(range(len(dataset)), desc=type(dataset).__name__, leave=False, delay=1):
            image, label = dataset[i]
            images.append(as_uint8(image, i))
            if images[i].shape != images[0].shape:
                raise ValueError(
                    f"image {i} is {_size(images[i])}, image 0 is {_size(images[0])}: bring them to one size and "
                    "mode in the dataset's transform"
                )
            labels.append(int(label))

        found = names or getattr(dataset, "classes", None) or range(max(labels) + 1)
        texts = tuple(str(name) for name in found)
        return LabelledImages(torch.stack(images), torch.tensor(labels), texts)

    def classes(self, chosen: Sequence[int] | Sequence[str]) -> Self:
        """Only these classes, by number or by name, renumbered in this order."""
        unknown = [name for name in chosen if isinstance(name, str) and name not in self.names]
        if unknown:
            raise ValueError(f"no class is called {', '.join(map(repr, unknown))}; there are {', '.join(self.names)}")

        count = len(self.names)
        indices = [self.names.index(c) if isinstance(c, str) else int(c) for c in chosen]
        distinct = len(set(indices)) == len(indices)
        inside = all(0 <= i < count for i in indices)
        if not indices or not distinct or not inside:
            raise ValueError(
                f"classes must be distinct numbers in 0 … {count - 1}, or names, and at least one; got {list(chosen)}"
            )

        device = self.labels.device
        renumbered = torch.full((count,), -1, device=device)
        renumbered[indices] = torch.arange(len(indices), device=device)

        wanted = renumbered[self.labels] >= 0
        kept = self.rows(wanted.nonzero().squeeze(1))
        names = tuple(self.names[i] for i in indices)
        return replace(kept, labels=renumbered[kept.labels], names=names)

    def rows(self, index: Tensor) -> Self:
        """Only these images, in this order."""
        images = self.images[index]
        labels = self.labels[index]
        return replace(self, images=images, labels=labels)

    def to(self, device: torch.device | str) -> Self:
        """The same images and labels on another device."""
        images = self.images.to(device)
        labels = self.labels.to(device)
        return replace(self, images=images, labels=labels)

    def counts(self) -> Tensor:
        """Images per class, int64 ``[classes]``."""
        return torch.bincount(self.labels, minlength=len(self.names))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        name = type(self).__name__
        size = _size(self.images[0]) if len(self) else "?"
        return f"{name}({len(self)} images of {size}, {len(self.names)} classes)"


def split_classes(data: Data, counts: Sequence[int], seed: int) -> tuple[Data, ...]:
    """Disjoint random sets of ``counts[0]``, ``counts[1]``, … classes, e.g. for meta-training, -validation and -test.

    >>> data = LabelledImages(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10), tuple("abcdefghij"))
    >>> [len(part.names) for part in split_classes(data, (5, 2, 3), seed=0)]
    [5, 2, 3]
    """
    if any(count < 1 for count in counts) or sum(counts) > len(data.names):
        raise ValueError(f"cannot split {len(data.names)} classes into parts of {tuple(counts)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.names), generator=generator).tolist()
    parts = []
    for count in counts:
        chosen = sorted(order[:count])
        parts.append(data.classes(chosen))
        order = order[count:]
    return tuple(parts)


def as_uint8(image: Any, number: int = 0) -> Tensor:
    """A PIL image, array or tensor as uint8 ``[C, H, W]``; ``number`` is for the error message."""
    if isinstance(image, Image.Image):
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        image = np.array(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise TypeError(
                f"image {number}: an array must be uint8 [H, W] or [H, W, C], got {image.dtype} {list(image.shape)}"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        if pixels.ndim == 2:
            return pixels.unsqueeze(0)
        return pixels.movedim(2, 0).contiguous()
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise TypeError(
            f"image {number}: expected a PIL image, an array or a tensor [C, H, W], got "
            f"{getattr(image, 'shape', type(image).__name__)}"
        )
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        raise TypeError(
            f"image {number}: a tensor must be uint8 or floats in [0, 1], got {image.dtype}; leave out the dataset's "
            "normalisation"
        )
    return (image * 255).round().to(torch.uint8)


def _size(image: Tensor) -> str:
    return "×".join(str(n) for n in image.shape)
