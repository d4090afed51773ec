"""mtml_fast: multi-task meta-learning on PyTorch, all tasks and all inner steps in one call."""

__version__ = "0.1.0"

from mtml_fast import data as data
from mtml_fast import multitask as multitask
from mtml_fast import nn as nn
from mtml_fast import ops as ops
from mtml_fast.algorithms import FOMAML as FOMAML
from mtml_fast.algorithms import MAML as MAML
from mtml_fast.inner import Adapted as Adapted
from mtml_fast.inner import InnerLoop as InnerLoop
from mtml_fast.inner import adapt as adapt
from mtml_fast.inner import explain as explain
from mtml_fast.inner import ridge_head as ridge_head
from mtml_fast.nn import MetaLearner as MetaLearner
from mtml_fast.nn import TaskModule as TaskModule
from mtml_fast.ops import backend as backend
from mtml_fast.tasks import TaskBatch as TaskBatch
from mtml_fast.tasks import TaskRows as TaskRows
from mtml_fast.trainers import History as History
from mtml_fast.trainers import MetaLearnerTrainer as MetaLearnerTrainer
from mtml_fast.trainers import MultiTaskMetaLearningModel as MultiTaskMetaLearningModel
from mtml_fast.trainers import Trainer as Trainer

# without the modules: `import *` must not put mtml_fast.nn in the place of torch.nn
__all__ = [
    "FOMAML",
    "MAML",
    "Adapted",
    "History",
    "InnerLoop",
    "MetaLearner",
    "MetaLearnerTrainer",
    "MultiTaskMetaLearningModel",
    "TaskBatch",
    "TaskModule",
    "TaskRows",
    "Trainer",
    "adapt",
    "backend",
    "explain",
    "ridge_head",
]
