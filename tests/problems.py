"""Small things that several test files need."""

import torch

from metaopt import tree


def noise_like(x):
    """A tree of random numbers like another one; what is not a floating-point tensor stays."""
    return tree.map(lambda leaf: torch.randn_like(leaf) if tree.is_float(leaf) else leaf, x)
