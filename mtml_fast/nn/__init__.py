"""Layers and models that know the task axis, and the ordinary ones that plans recognise."""

from mtml_fast.nn.meta_learner import MetaLearner as MetaLearner
from mtml_fast.nn.meta_learner import TaskModule as TaskModule
from mtml_fast.nn.mlp import mlp as mlp
from mtml_fast.nn.task_heads import TaskHeads as TaskHeads
from mtml_fast.nn.task_outputs import TaskOutputs as TaskOutputs
