"""Other libraries' optimisers as inner optimisers."""

from metaopt.interop.torch_optim import Started, from_torch

__all__ = ["Started", "from_torch"]
