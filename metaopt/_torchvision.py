"""Torchvision's data sets, also where torchvision was built for another torch.

The wheel for CUDA beside torch's CPU wheel cannot load its compiled part, and then ``import
torchvision`` fails with "operator torchvision::nms does not exist", although the data sets need no
compiled part. Two operator schemas without an implementation are enough for the import.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

from torch.library import Library


def datasets() -> ModuleType:
    """``torchvision.datasets``.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision").datasets
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ModuleNotFoundError(
            "this data set is read by torchvision: pip install 'metaopt[vision]'", name="torchvision"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    _declared()
    return importlib.import_module("torchvision").datasets


@cache
def _declared() -> Library:
    """The schemas; they last as long as the library object."""
    library = Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
