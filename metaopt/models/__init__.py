"""Meta-models: how a network's parameters are split into weights and hyperparameters."""

from metaopt.models.anil import ANIL, sinusoid_net
from metaopt.models.base import MetaModel
from metaopt.models.conv_net import batch_norm, conv_net, group_norm, no_norm
from metaopt.models.data_weights import DataWeights, RawWeights, SigmoidWeights, SoftmaxWeights
from metaopt.models.feature_transform import FeatureTransform
from metaopt.models.insertion import insert
from metaopt.models.maml import MAML
from metaopt.models.meta_sgd import MetaSGD
from metaopt.models.meta_weight_net import (
    MetaWeightNet,
    SaturatedWarning,
    SigmoidAbove,
    SigmoidClamped,
    batch_mean,
    batch_normalised,
)
from metaopt.models.rotation import Rotation, rotate
from metaopt.models.rtn import RTN
from metaopt.models.warpgrad import Warp, WarpGrad

__all__ = [
    "ANIL",
    "MAML",
    "RTN",
    "DataWeights",
    "FeatureTransform",
    "MetaModel",
    "MetaSGD",
    "MetaWeightNet",
    "RawWeights",
    "Rotation",
    "SaturatedWarning",
    "SigmoidAbove",
    "SigmoidClamped",
    "SigmoidWeights",
    "SoftmaxWeights",
    "Warp",
    "WarpGrad",
    "batch_mean",
    "batch_norm",
    "batch_normalised",
    "conv_net",
    "group_norm",
    "insert",
    "no_norm",
    "rotate",
    "sinusoid_net",
]
