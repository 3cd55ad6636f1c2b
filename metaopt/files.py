"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; see :func:`write`."""
    write(path, lambda file: file.write(text.encode()))


def write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file; a kill or a full disk at any moment leaves the old one or the new one.

    Args:
        path: the file.
        fill: writes the content.

    Raises:
        OSError: if it cannot be written; it names the path.
    """
    try:
        descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:  # Ctrl-C too
            os.unlink(unfinished)
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
