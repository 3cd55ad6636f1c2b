"""What the readers share: parts of a data set, checks of its files, one image from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from PIL import Image, ImageOps

Part: TypeAlias = Literal["train", "test", "all"]
"""Which of the published parts; "all" where classes, not images, are split."""
T = TypeVar("T")


def parts(part: Part, train: T, test: T) -> list[T]:
    """What stands for the parts that are asked for."""
    chosen = {"train": [train], "test": [test], "all": [train, test]}
    if part not in chosen:
        raise ValueError(f"part must be 'train', 'test' or 'all', got {part!r}")
    return chosen[part]


def check_file(path: Path, remedy: str, md5: str | None = None) -> None:
    """Raise an error that names the file and the remedy where it is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {remedy}")
    if md5 is None:
        return
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is damaged: its MD5 is {found}, not {md5}; delete it and {remedy}")


def fetch(download: Callable[[], Any], place: Path, source: str) -> None:
    """Download, or say what can be done instead."""
    try:
        download()
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"download to {place} failed ({error}); get the files elsewhere and put them there: {source}"
        ) from error


def open_image(path: str | Path, size: int) -> Image.Image:
    """An image file in RGB, scaled and cropped at the centre to ``size`` × ``size``."""
    try:
        with Image.open(path) as image:
            return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no image ({error}); fetch it again or take it out") from error
