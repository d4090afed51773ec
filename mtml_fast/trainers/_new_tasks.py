"""Where new tasks start: `MetaLearnerTrainer.adapt` before its first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mtml_fast.nn.meta_learner import Entries, MetaLearner
from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.trainers._inner import Objective


def learner_of_new_tasks(
    learner: MetaLearner,
    entries: Entries,
    targets: list[Tensor],
    loss: Callable,
    out_features: Sequence[int],
    own_trunks: bool,
) -> MetaLearner:
    """A learner of the new tasks whose modules are copies of the learned ones that fit them best.

    Its trunk is a frozen copy; with `own_trunks` each task module begins with a copy instead.
    """
    training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            features = learner.features(entries)
            modules = [
                _nearest(learner, x, target, loss, width)
                for x, target, width in zip(features.split(), targets, out_features, strict=True)
            ]
    finally:
        learner.train(training)
    trunk = copy.deepcopy(learner.trunk)
    if trunk is not None and own_trunks:
        return MetaLearner(len(modules), task_module=[nn.Sequential(copy.deepcopy(trunk), m) for m in modules])
    if trunk is not None:
        trunk.eval().requires_grad_(False)
    heads = learner.heads
    if not isinstance(heads, TaskHeads):
        return MetaLearner(len(modules), task_module=modules, trunk=trunk)
    new = MetaLearner(len(modules), heads.in_features, list(out_features), hidden=heads.hidden, trunk=trunk)
    new.heads.to(heads.weight).load_heads(modules)
    return new


def _nearest(learner: MetaLearner, x: Tensor, target: Tensor, loss: Callable, width: int) -> nn.Module:
    """A copy of the task module with that many outputs whose loss on the rows is the smallest; new if there is none."""
    heads, every = learner.heads, range(learner.num_tasks)
    if isinstance(heads, TaskHeads):
        fits = [t for t in every if heads.out_features[t] == width]
    else:
        outputs = heads([x] * len(every))
        fits = [t for t in every if outputs[t].shape[1:] == (width,)]
    if fits:
        entries = Entries(x, fits, [x.shape[0]] * len(fits), shared=True)
        losses = Objective(learner, loss)(entries, [target] * len(fits))
        return heads.head(fits[int(losses.argmin())])
    if isinstance(heads, TaskHeads):
        fresh = TaskHeads(heads.in_features, [width], heads.hidden, heads.activation, heads.bias is not None)
        return fresh.to(heads.weight).head(0)
    raise ValueError(f"out_features must be the outputs of some task module of the learner, got {width}")
