"""Small things that several test files need."""

import torch

from metaopt import tree


def noise_like(x):
    """A tree of random numbers like another one; what is not a floating-point tensor stays."""
    return tree.map(lambda leaf: torch.randn_like(leaf) if tree.is_float(leaf) else leaf, x)


def close(a, b, tolerance=1e-10):
    """Whether two trees have the same leaves, to a relative and absolute tolerance."""
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs)
