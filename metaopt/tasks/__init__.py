"""Task distributions."""

from metaopt.tasks import sinusoid
from metaopt.tasks.sinusoid import Sinusoid

__all__ = ["Sinusoid", "sinusoid"]
