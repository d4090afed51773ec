"""MetaLearnerTrainer.meta_train: its gradient against a plain loop in float64, the split of the rows, learning."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mtml_fast.nn.meta_learner import MetaLearner
from mtml_fast.trainers._inner import split_rows
from mtml_fast.trainers.meta_learner import MetaLearnerTrainer


def conv_module():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(18, 2),
    )  # fmt: skip


def dense_norm(layer):
    return lambda: nn.Sequential(nn.Linear(5, 8), layer(), nn.Tanh(), nn.Linear(8, 2))


def conv_norm(layer):
    return lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.Tanh(), layer(), nn.Flatten(), nn.Linear(12, 2)
    )


# second derivatives of some of these are wrong where torch.func differentiates them under vmap
NORMS = {
    "batch norm": dense_norm(lambda: nn.BatchNorm1d(8)),
    "layer norm": dense_norm(lambda: nn.LayerNorm(8)),
    "layer norm, plain": dense_norm(lambda: nn.LayerNorm(8, elementwise_affine=False)),
    "group norm": dense_norm(lambda: nn.GroupNorm(2, 8)),
    "rms norm": dense_norm(lambda: nn.RMSNorm(8)),
    "batch norm, conv": conv_norm(lambda: nn.BatchNorm1d(4)),
    "group norm, conv": conv_norm(lambda: nn.GroupNorm(2, 4)),
    "instance norm": conv_norm(lambda: nn.InstanceNorm1d(4, affine=True)),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    "kind", ["default", "ragged widths", "trunk", "trunk, all", "conv", "conv trunk, all", "norm trunk, all", *NORMS]
)
def test_meta_gradient_equals_a_hand_loop(kind, first_order):
    def body(d):
        return nn.Sequential(nn.Linear(d, 6), nn.Tanh())

    conv = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()
    )
    learner, row, layers = {
        "default": (MetaLearner(4, 5, 2, hidden=6), (5,), "head"),
        "ragged widths": (MetaLearner(4, 5, [1, 3, 2, 4], hidden=6), (5,), "head"),
        "trunk": (MetaLearner(4, 6, [2, 2, 3, 2], hidden=None, trunk=body(5)), (5,), "head"),
        "trunk, all": (MetaLearner(4, 6, [2, 2, 3, 2], hidden=3, trunk=body(5)), (5,), "all"),
        "norm trunk, all": (MetaLearner(4, 8, 2, hidden=3, trunk=NORMS["layer norm"]()[:3]), (5,), "all"),
        **{name: (MetaLearner(4, task_module=make), (5,), "head") for name, make in NORMS.items()},
        "conv": (MetaLearner(4, task_module=conv_module), (1, 5, 5), "head"),
        "conv trunk, all": (MetaLearner(4, 2, 2, hidden=None, trunk=conv), (1, 5, 5), "all"),
    }[kind]
    learner = learner.double()
    tasks, steps, lr = [2, 0, 3], 3, 0.3
    inputs = [torch.randn(n, *row, dtype=torch.float64) for n in (6, 7, 6)]
    widths = getattr(learner.heads, "out_features", [2] * 4)
    targets = [torch.randint(widths[t], (len(x),)) for t, x in zip(tasks, inputs, strict=True)]

    # the steps below must see the values before the trainer's
    modules, trunk = list(learner.task_modules), copy.deepcopy(learner.trunk)
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    trainer = MetaLearnerTrainer(learner, 4, optimizer="sgd", lr=1.0)
    torch.manual_seed(7)
    total = trainer.meta_train(inputs, tasks, targets, steps=steps, lr=lr, first_order=first_order, layers=layers)

    torch.manual_seed(7)
    entries = learner.entries(inputs, tasks)
    (support, support_y), (query, query_y) = split_rows(entries, targets, 0.5)
    if layers == "head" and trunk is not None:
        support, query = ([*trunk(torch.cat(each.x)).split(each.counts)] for each in (support, query))
    else:
        support, query = support.x, query.x
    losses = []
    for i, t in enumerate(tasks):
        module = nn.Sequential(trunk, modules[t]) if layers == "all" else modules[t]
        start = dict(module.named_parameters())
        fast = start
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(module, fast, support[i]), support_y[i])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order, retain_graph=True)
            fast = {name: p - lr * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(module, fast, query[i]), query_y[i]))
    plain = [p for m in modules for p in m.parameters()] + ([] if trunk is None else list(trunk.parameters()))
    expected = torch.autograd.grad(sum(losses), plain, allow_unused=True, materialize_grads=True)

    assert total == pytest.approx(sum(losses).item(), abs=1e-12)
    # one SGD step of rate one: what was minus what is
    gradient = copy.deepcopy(learner)
    with torch.no_grad():
        for name, p in gradient.named_parameters():
            p.copy_(before[name] - p)
    measured = [p for m in gradient.task_modules for p in m.parameters()]
    measured += [] if trunk is None else list(gradient.trunk.parameters())
    for a, b in zip(measured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert sum(e.abs().sum() for e in expected) > 0.1


def test_split_uses_every_row_once_and_takes_its_target_along():
    learner = MetaLearner(3, 2, 1)
    x = [torch.randn(n, 2) for n in (2, 9, 5)]
    entries = learner.entries(x, [2, 0, 1])
    (support, support_y), (query, query_y) = split_rows(entries, [value.sum(1) for value in x], 0.3)
    assert support.counts == [1, 3, 2]
    assert support.tasks == query.tasks == [2, 0, 1]
    for i, value in enumerate(x):
        both = torch.cat([support.x[i], query.x[i]])
        assert torch.equal(both.sort(0).values, value.sort(0).values)
        assert torch.equal(torch.cat([support_y[i], query_y[i]]), both.sum(1))
    assert not torch.equal(torch.cat([support.x[1], query.x[1]]), x[1])


def test_meta_train_learns_to_adapt():
    """Rows of a task agree on a random sign that support reveals: no fixed module fits, an adapted one does."""
    learner = MetaLearner(4, 2, 1, hidden=16)
    trainer = MetaLearnerTrainer(learner, 4, lr=1e-2)
    for _ in range(150):
        x = torch.randn(4, 20, 2)
        # at a rate of 0.2 the inner loop runs away at times
        trainer.meta_train(x, range(4), x[..., :1] * torch.randn(4, 1, 1).sign(), steps=5, lr=0.1)
    # a fixed module's loss is at least the sum of the tasks' mean squares, 4; adapted from random values, 0.7 to 1.6
    assert np.mean(trainer.history["meta_train"][-50:]) < 0.5
