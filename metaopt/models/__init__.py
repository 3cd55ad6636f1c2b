"""Meta-models: how a network's parameters are split into weights and hyperparameters."""

from metaopt.models.anil import ANIL, sinusoid_net
from metaopt.models.base import MetaModel
from metaopt.models.conv_net import batch_norm, conv_net, group_norm, no_norm
from metaopt.models.meta_sgd import MetaSGD
from metaopt.models.meta_weight_net import MetaWeightNet, SigmoidAbove, SigmoidClamped, batch_mean, batch_normalised
from metaopt.models.warpgrad import Warp, WarpGrad

__all__ = [
    "ANIL",
    "MetaModel",
    "MetaSGD",
    "MetaWeightNet",
    "SigmoidAbove",
    "SigmoidClamped",
    "Warp",
    "WarpGrad",
    "batch_mean",
    "batch_norm",
    "batch_normalised",
    "conv_net",
    "group_norm",
    "no_norm",
    "sinusoid_net",
]
