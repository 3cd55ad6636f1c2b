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
        if len(self.labels) and not (0 <= int(self.labels.min()) and int(self.labels.max()) < len(self.names)):
            raise ValueError(
                f"labels lie in {int(self.labels.min())} … {int(self.labels.max())}, but there are {len(self.names)} "
                "class names"
            )

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
        return LabelledImages(torch.stack(images), torch.tensor(labels), tuple(str(name) for name in found))

    def classes(self, chosen: Sequence[int] | Sequence[str]) -> Self:
        """Only these classes, by number or by name, renumbered in this order."""
        if unknown := [name for name in chosen if isinstance(name, str) and name not in self.names]:
            raise ValueError(f"no class is called {', '.join(map(repr, unknown))}; there are {', '.join(self.names)}")
        indices = [self.names.index(c) if isinstance(c, str) else int(c) for c in chosen]
        if not indices or len(set(indices)) < len(indices) or not all(0 <= i < len(self.names) for i in indices):
            raise ValueError(
                f"classes must be distinct numbers in 0 … {len(self.names) - 1}, or names, and at least one; got "
                f"{list(chosen)}"
            )
        renumbered = torch.full((len(self.names),), -1, device=self.labels.device)
        renumbered[indices] = torch.arange(len(indices), device=self.labels.device)
        kept = self.rows((renumbered[self.labels] >= 0).nonzero().squeeze(1))
        return replace(kept, labels=renumbered[kept.labels], names=tuple(self.names[i] for i in indices))

    def rows(self, index: Tensor) -> Self:
        """Only these images, in this order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def counts(self) -> Tensor:
        """Images per class, int64 ``[classes]``."""
        return torch.bincount(self.labels, minlength=len(self.names))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = _size(self.images[0]) if len(self) else "?"
        return f"{type(self).__name__}({len(self)} images of {size}, {len(self.names)} classes)"


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
        parts.append(data.classes(sorted(order[:count])))
        order = order[count:]
    return tuple(parts)


def as_uint8(image: Any, number: int = 0) -> Tensor:
    """A PIL image, array or tensor as uint8 ``[C, H, W]``; ``number`` is for the error message."""
    if isinstance(image, Image.Image):
        image = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise TypeError(
                f"image {number}: an array must be uint8 [H, W] or [H, W, C], got {image.dtype} {list(image.shape)}"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(2, 0).contiguous()
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
