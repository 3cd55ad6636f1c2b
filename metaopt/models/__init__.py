"""Meta-models: how a network's parameters are split into weights and hyperparameters."""

from metaopt.models.anil import ANIL, sinusoid_net
from metaopt.models.meta_sgd import MetaSGD

__all__ = ["ANIL", "MetaSGD", "sinusoid_net"]
