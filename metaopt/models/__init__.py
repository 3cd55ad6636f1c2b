"""Meta-models: how a network's parameters are split into weights and hyperparameters."""

from metaopt.models.anil import ANIL, sinusoid_net

__all__ = ["ANIL", "sinusoid_net"]
