"""Files to go on from after a kill: whole or absent, of a known version, read without executing anything."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import files, replay
from metaopt.estimators.base import Estimator
from metaopt.meta._packed import differences, pack, unpack
from metaopt.tree import Tree

VERSION = 2
"""Of the files' format; a file of another version is refused."""

TORCH = str(torch.__version__)
"""Another version of torch need not give the same numbers to the bit."""


def seed() -> int:
    """The seed that torch's global generator was given."""
    return torch.initial_seed()


def write(path: Path, kind: str, content: Any, settings: Any = None, shared: Sequence[Tensor] = ()) -> None:
    """Write a checkpoint; a kill at any moment leaves the old file or the new one, never a part.

    Args:
        path: the file; its folder is made.
        kind: the loop it belongs to.
        content: what to go on from.
        settings: what must be the same when it is read (:func:`metaopt.meta._packed.described`).
        shared: see :func:`metaopt.meta._packed.pack`.

    Raises:
        TypeError: if a part of ``content`` cannot be stored; it is named.
    """
    plain = {
        "format": "metaopt",
        "version": VERSION,
        "kind": kind,
        "settings": settings,
        "content": pack(content, "the run", shared),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda file: torch.save(plain, file))


def read(path: Path, kind: str, settings: Any = None) -> Stored:
    """The content of a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, of another kind or version, or of other settings.
    """
    try:
        found = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:  # torch's advice is to load whatever it holds, which may run code
        raise ValueError(
            f"{path} is damaged or not a checkpoint: it holds other things than tensors and numbers; "
            "remove it to start again"
        ) from None
    except (EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); remove it to start again") from error
    if not isinstance(found, dict) or found.get("format") != "metaopt":
        raise ValueError(f"{path} is not a checkpoint of metaopt; remove it to start again, or give another path")
    if found["version"] != VERSION:
        raise ValueError(f"{path} is a checkpoint of format {found['version']}, this version reads {VERSION}")
    if found["kind"] != kind:
        raise ValueError(f"{path} is a checkpoint of {found['kind']}, not of {kind}; give another path")
    different = [] if settings is None else differences(found["settings"], settings)
    if different:
        raise ValueError(
            f"{path} holds a run with other settings: {'; '.join(different)}. Give another path, or remove it"
        )
    return Stored(path, found["content"])


class Stored(NamedTuple):
    """The content of a checkpoint, still packed.

    Attributes:
        path: the file.
        packed: as :func:`metaopt.meta._packed.pack` made it.
    """

    path: Path
    packed: Any

    def peek(self, key: str) -> Any:
        """One entry of a dict, without the shared tensors."""
        return next(unpack(item) for name, item in self.packed["items"] if name == key)

    def open(self, shared: Sequence[Tensor] = ()) -> Any:
        """The content; ``shared`` as it was written with."""
        try:
            return unpack(self.packed, shared)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{self.path} cannot be read by this version ({error}); remove it to start again"
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """The state of meta-training between two inner runs.

    :meth:`metaopt.meta.MetaTraining.runs` goes on from it.

    Attributes:
        run: the last finished run.
        phi: initial weights after it.
        outer: :meth:`metaopt.meta.OuterOptimizer.state_dict` after it.
        estimator: as calibrated.
        notes: whatever the caller wants to keep beside (curves, settings): numbers, strings, tensors,
            and lists, dicts and NamedTuples of them.
        rng: torch's random state after it.
    """

    run: int
    phi: Tree
    outer: dict[str, Any]
    estimator: Estimator
    notes: Any = None
    rng: replay.Rng | None = None

    def save(self, path: Path) -> None:
        """Write it to ``path``, as a whole or not at all; see :func:`write`."""
        write(path, "meta-training", vars(self))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read one.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is not a checkpoint of meta-training.
        """
        return cls(**read(path, "meta-training").open())
