"""The loops around an estimator: online, offline, over tasks."""

from metaopt.inner.tasks import Ragged, Stacked, looped, replicated, vmapped
from metaopt.meta.bounds import bounded
from metaopt.meta.calibration import calibrated
from metaopt.meta.checkpoint import Checkpoint
from metaopt.meta.evaluate import evaluate
from metaopt.meta.history import History, progress
from metaopt.meta.hyper_steps import HyperSteps
from metaopt.meta.initialisation import FOMAML, Fixed, Initialisation, Reptile
from metaopt.meta.online import online
from metaopt.meta.outer_optimizer import OuterOptimizer, SizeWarning
from metaopt.meta.report import Guard, Report, Reports
from metaopt.meta.sign_step import SignStep
from metaopt.meta.task_chunks import InTaskChunks, TaskChunks, in_task_chunks
from metaopt.meta.training import MetaReport, MetaTask, MetaTraining
from metaopt.meta.tune import tune

__all__ = [
    "FOMAML",
    "Checkpoint",
    "Fixed",
    "Guard",
    "History",
    "HyperSteps",
    "InTaskChunks",
    "Initialisation",
    "MetaReport",
    "MetaTask",
    "MetaTraining",
    "OuterOptimizer",
    "Ragged",
    "Report",
    "Reports",
    "Reptile",
    "SignStep",
    "SizeWarning",
    "Stacked",
    "TaskChunks",
    "bounded",
    "calibrated",
    "evaluate",
    "in_task_chunks",
    "looped",
    "online",
    "progress",
    "replicated",
    "tune",
    "vmapped",
]
