"""Task distributions."""

from metaopt.tasks import label_noise, sinusoid
from metaopt.tasks.sinusoid import Sinusoid

__all__ = ["Sinusoid", "label_noise", "sinusoid"]
