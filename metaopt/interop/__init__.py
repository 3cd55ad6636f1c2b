"""Models and optimisers of other libraries."""

from metaopt.interop.higher import FromHigher, from_higher
from metaopt.interop.higher_model import HigherModel
from metaopt.interop.torch_optim import Started, from_torch, load, to_torch

__all__ = ["FromHigher", "HigherModel", "Started", "from_higher", "from_torch", "load", "to_torch"]
