"""Meta-training that survives a kill: what is needed to go on after a finished inner run."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaopt.estimators.base import Estimator
from metaopt.tree import Tree


@dataclass(frozen=True)
class Checkpoint:
    """The state of meta-training between two inner runs; :meth:`metaopt.meta.MetaTraining.runs` goes on from it.

    Attributes:
        run: the last finished run.
        phi: initial weights after it.
        outer: :meth:`metaopt.meta.Outer.state_dict` after it.
        estimator: as calibrated.
        notes: whatever the caller wants to keep beside (curves, settings); plain Python or tensors.
    """

    run: int
    phi: Tree
    outer: dict[str, Any]
    estimator: Estimator
    notes: Any = None

    def save(self, path: Path) -> None:
        """Write it; a kill at any moment leaves the old file or the new one, never a part."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        torch.save(self, unfinished)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read one. Unpickles: only open files of your own.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is no checkpoint.
        """
        try:
            found = torch.load(path, weights_only=False)
        except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ModuleNotFoundError) as error:
            raise ValueError(
                f"{path} is no readable checkpoint of meta-training ({error}); remove it to start anew"
            ) from error
        if not isinstance(found, cls):
            raise ValueError(
                f"{path} holds a {type(found).__name__}, not a checkpoint of meta-training; remove it to start anew"
            )
        return found
