"""Other libraries' optimisers as inner optimisers."""

from metaopt.interop.higher import FromHigher, from_higher
from metaopt.interop.torch_optim import Started, from_torch, load, to_torch

__all__ = ["FromHigher", "Started", "from_higher", "from_torch", "load", "to_torch"]
