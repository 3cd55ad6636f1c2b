"""Meta-models: how a network's parameters are split into weights and hyperparameters."""

from metaopt.models.anil import ANIL, sinusoid_net
from metaopt.models.base import MetaModel
from metaopt.models.conv_net import batch_norm, conv_net, group_norm, no_norm
from metaopt.models.meta_sgd import MetaSGD
from metaopt.models.warpgrad import Warp, WarpGrad

__all__ = ["ANIL", "MetaModel", "MetaSGD", "Warp", "WarpGrad", "batch_norm", "conv_net", "group_norm", "no_norm", "sinusoid_net"]
