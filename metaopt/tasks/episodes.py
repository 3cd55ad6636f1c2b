r"""Class episodes: each task is a many-shot classification problem over a few classes drawn from labelled images.

What is random is recorded: the tasks depend on ``seed`` alone, and the minibatch, crops and flips
of step t on ``(seed, t)`` alone, so that a sweep that recomputes a step sees the same data.
Defaults are the setting of the HyperDistill paper (section 5): 10-way, 250 training and 250 test
examples per class, minibatches of 100, crop and flip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metaopt.tasks.images import LabelledImages


class Corruption(Protocol):
    """Label noise, as in :mod:`metaopt.tasks.label_noise`."""

    def __call__(self, labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
        """The labels with noise; an equal seed gives equal noise."""
        ...


class ImageBatch(NamedTuple):
    """Images ``x: [tasks, n, C, H, W]`` in [-1, 1] and classes ``y: [tasks, n]`` of stacked tasks."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Episodes:
    """The task distribution.

    Args:
        data: where classes and images are drawn from.
        ways: classes of a task, drawn without replacement.
        shots: training examples per class.
        test_shots: test examples per class; none is also a training example.
        batch_size: examples per task in a minibatch.
        crop: training images are padded with this many black pixels and cropped back at random; 0
            for none.
        flip: training images are mirrored with probability ½; switch it off where a mirror image is
            another class.
        corruption: of training labels, e.g. :func:`metaopt.tasks.label_noise.uniform`; test labels
            stay clean.
        rate: probability of corruption.
        device: where everything lies.
        dtype: of the images.

    >>> data = LabelledImages(torch.zeros(60, 1, 8, 8, dtype=torch.uint8), torch.arange(60) % 6, tuple("abcdef"))
    >>> episode = Episodes(data, ways=3, shots=4, test_shots=2, batch_size=5).sample(tasks=2, seed=0)
    >>> episode.train.x.shape, episode.test.y.shape, episode.batches(1).x.shape
    (torch.Size([2, 12, 1, 8, 8]), torch.Size([2, 6]), torch.Size([2, 5, 1, 8, 8]))

    Raises:
        ValueError: if ``data`` has too few classes, or a class too few images.
    """

    data: LabelledImages
    ways: int = 10
    shots: int = 250
    test_shots: int = 250
    batch_size: int = 100
    crop: int = 4
    flip: bool = True
    corruption: Corruption | None = None
    rate: float = 0.4
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse sizes that make no task, or that the data cannot serve."""
        if min(self.ways, self.shots, self.test_shots, self.batch_size) < 1 or self.crop < 0:
            raise ValueError(
                f"ways, shots, test_shots and batch_size must be positive and crop not negative, got "
                f"{self.ways}, {self.shots}, {self.test_shots}, {self.batch_size} and {self.crop}"
            )
        if len(self.data.names) < self.ways:
            raise ValueError(f"{self.ways}-way episodes need as many classes, the data has {len(self.data.names)}")
        smallest = self.ways * min(self.shots, self.test_shots)
        if self.batch_size > smallest:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {smallest} examples that a task has; lower it or "
                "raise shots and test_shots"
            )
        self._check_counts()

    def _check_counts(self) -> None:
        """Refuse data where a class has too few images."""
        names = self.data.names
        counts = self.data.counts().tolist()
        needed = self.shots + self.test_shots
        poor = [f"{name!r} has {n}" for name, n in zip(names, counts, strict=True) if n < needed]
        if poor:
            shown = ", ".join(poor[:3])
            more = ", …" if len(poor) > 3 else ""
            raise ValueError(
                f"{self.shots} + {self.test_shots} examples per class are needed, but class {shown}{more} "
                f"({len(poor)} of {len(names)} classes); lower shots or test_shots, or leave them out with "
                "data.classes(…)"
            )

    def sample(self, tasks: int, seed: int) -> Episode:
        """``tasks`` stacked tasks; the same seed gives the same tasks, and the global random state is not used."""
        if tasks < 1:
            raise ValueError(f"at least one task is needed, got {tasks}")
        drawn = [self._draw(seed, task) for task in range(tasks)]
        rows = torch.stack([index for index, _ in drawn]).to(self.device)
        classes = torch.stack([chosen for _, chosen in drawn])
        train = rows[..., : self.shots].flatten(1)
        test = rows[..., self.shots :].flatten(1)

        numbers = torch.arange(self.ways)
        clean = numbers.repeat_interleave(self.shots).expand(tasks, -1)
        of_test = numbers.repeat_interleave(self.test_shots).expand(tasks, -1)
        noisy = clean
        if self.corruption is not None:
            noisy = torch.stack([self._corrupt(y, seed, task) for task, y in enumerate(clean)])

        return Episode(
            setting=self,
            seed=seed,
            classes=classes,
            train_rows=train,
            test_rows=test,
            train_labels=noisy.to(self.device),
            clean_labels=clean.to(self.device),
            test_labels=of_test.to(self.device),
        )

    def as_floats(self, images: Tensor) -> Tensor:
        """Bytes as numbers in [-1, 1]."""
        numbers = images.to(self.dtype)
        return numbers.div_(127.5).sub_(1.0)

    @cached_property
    def images(self) -> Tensor:
        """All images on the device."""
        return self.data.images.to(self.device)

    @cached_property
    def _members(self) -> list[Tensor]:
        """The rows of each class, in the order of the data."""
        labels = self.data.labels.cpu()
        by_class = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=len(self.data.names))
        return list(torch.split(by_class, counts.tolist()))

    def _draw(self, seed: int, task: int) -> tuple[Tensor, Tensor]:
        """Rows ``[ways, shots + test_shots]`` and classes ``[ways]`` of one task."""
        generator = _generator(seed, task, stream=0)
        order = torch.randperm(len(self.data.names), generator=generator)
        chosen = order[: self.ways]
        needed = self.shots + self.test_shots

        drawn = []
        for number in chosen.tolist():
            members = self._members[number]
            order = torch.randperm(len(members), generator=generator)
            drawn.append(members[order[:needed]])
        return torch.stack(drawn), chosen

    def _corrupt(self, labels: Tensor, seed: int, task: int) -> Tensor:
        assert self.corruption is not None
        generator = _generator(seed, task, stream=1)
        return self.corruption(labels, self.ways, self.rate, generator.initial_seed())


@dataclass(frozen=True, eq=False)
class Episode:
    """Stacked tasks. ``batches`` and ``outer_batches`` are the callables that inner runs take.

    Attributes:
        setting: where it was drawn from.
        seed: that of :meth:`Episodes.sample`.
        classes: ``[tasks, ways]``, the classes of each task as numbers into ``setting.data.names``.
        train_rows: ``[tasks, ways · shots]``, rows of ``setting.images``; ``test_rows`` alike.
        train_labels: ``[tasks, ways · shots]``, noisy where the setting says so.
        clean_labels: the same without noise.
        test_labels: ``[tasks, ways · test_shots]``.
    """

    setting: Episodes
    seed: int
    classes: Tensor
    train_rows: Tensor
    test_rows: Tensor
    train_labels: Tensor
    clean_labels: Tensor
    test_labels: Tensor

    @property
    def tasks(self) -> int:
        """How many tasks are stacked."""
        return len(self.train_rows)

    @property
    def train(self) -> ImageBatch:
        """All training examples, not augmented."""
        return self._batch(self.train_rows, self.train_labels)

    @property
    def test(self) -> ImageBatch:
        """All test examples, with clean labels."""
        return self._batch(self.test_rows, self.test_labels)

    def batches(self, t: int) -> ImageBatch:
        """The augmented training minibatch of step ``t``, drawn without replacement."""
        generator = _generator(self.seed, t, stream=2)
        setting = self.setting
        index = self._minibatch(self.train_rows.shape[1], generator)
        rows = self.train_rows.gather(1, index)
        labels = self.train_labels.gather(1, index)

        images = setting.images[rows]
        moved = _augmented(images.flatten(0, 1), setting.crop, setting.flip, generator)
        x = setting.as_floats(moved.view_as(images))
        return ImageBatch(x, labels)

    def outer_batches(self, t: int) -> ImageBatch:
        """The test minibatch of step ``t``, drawn without replacement, not augmented."""
        generator = _generator(self.seed, t, stream=3)
        index = self._minibatch(self.test_rows.shape[1], generator)
        rows = self.test_rows.gather(1, index)
        labels = self.test_labels.gather(1, index)
        return self._batch(rows, labels)

    def _minibatch(self, size: int, generator: torch.Generator) -> Tensor:
        keys = torch.rand(self.tasks, size, generator=generator)
        order = keys.argsort(1)
        chosen = order[:, : self.setting.batch_size]
        return chosen.to(self.train_rows.device)

    def _batch(self, rows: Tensor, labels: Tensor) -> ImageBatch:
        images = self.setting.images[rows]
        x = self.setting.as_floats(images)
        return ImageBatch(x, labels)


def _augmented(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Images ``[n, C, H, W]``, each at its own offset in a black margin of ``crop`` pixels, and mirrored or not."""
    n, channels, height, width = images.shape
    shift = torch.randint(2 * crop + 1, (2, n, 1), generator=generator)
    coins = torch.rand(n, 1, generator=generator)
    mirrored = (coins < 0.5) & flip

    columns = torch.arange(width).expand(n, -1)
    columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shift[1]
    rows = torch.arange(height) + shift[0]

    padded_width = width + 2 * crop
    pixels = rows.unsqueeze(2) * padded_width + columns.unsqueeze(1)
    pixels = pixels.view(n, 1, -1).to(images.device)

    padded = torch.nn.functional.pad(images, (crop, crop, crop, crop))
    taken = padded.flatten(2).gather(2, pixels.expand(-1, channels, -1))
    return taken.view(images.shape)


def _generator(seed: int, number: int, *, stream: int) -> torch.Generator:
    """A separate generator for each ``(seed, number, stream)``.

    On the CPU, so that every device sees the same numbers.
    """
    sequence = np.random.SeedSequence([seed % 2**64, number % 2**64, stream])
    words = sequence.generate_state(2, np.uint32)
    high = int(words[0])
    low = int(words[1])
    return torch.Generator().manual_seed(high << 32 | low)
