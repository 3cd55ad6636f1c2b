"""The loops around an estimator: online, offline, over tasks."""

from metaopt.inner.tasks import Ragged, Stacked, looped, replicated, vmapped
from metaopt.meta.bounds import bounded
from metaopt.meta.checkpoint import Checkpoint
from metaopt.meta.initialisation import FOMAML, Fixed, Initialisation, Reptile
from metaopt.meta.online import HyperSteps, OnlineReport, online
from metaopt.meta.outer import Outer, SizeWarning
from metaopt.meta.sign_step import SignStep
from metaopt.meta.task_chunks import InTaskChunks, TaskChunks, in_task_chunks
from metaopt.meta.training import MetaReport, MetaTask, MetaTraining

__all__ = [
    "FOMAML",
    "Checkpoint",
    "Fixed",
    "HyperSteps",
    "InTaskChunks",
    "Initialisation",
    "MetaReport",
    "MetaTask",
    "MetaTraining",
    "OnlineReport",
    "Outer",
    "Ragged",
    "Reptile",
    "SignStep",
    "SizeWarning",
    "Stacked",
    "TaskChunks",
    "bounded",
    "in_task_chunks",
    "looped",
    "online",
    "replicated",
    "vmapped",
]
