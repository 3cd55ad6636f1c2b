"""The library ``higher``, imported without the warnings that compiling it gives."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of `is 1`
    from higher import optim
    from higher.patch import _MonkeyPatchBase as Patched

__all__ = ["Patched", "optim"]
