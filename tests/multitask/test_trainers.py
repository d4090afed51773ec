"""balance= and select_tasks in the trainers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mtml_fast as mf
from mtml_fast.multitask import BALANCES, DWA, FAMO, Affinity, PCGrad, Uncertainty, task_gradients
from mtml_fast.multitask.balance import Surgery

STATELESS = [name for name, kind in BALANCES.items() if not kind.keeps_tasks]


def toy(tasks=4, rows=24):
    x = torch.randn(tasks, rows, 3)
    return x, torch.tanh(x @ torch.randn(tasks, 3, 1))


def new_learner(trunk=True, tasks=4):
    trunk = nn.Sequential(nn.Linear(3, 16), nn.Tanh()) if trunk else None
    return mf.MetaLearner(tasks, 16 if trunk else 3, 1, trunk=trunk)


@pytest.mark.parametrize("name", [*BALANCES])
def test_meta_learner_trainer(name):
    """Every phase with every balance; the losses fall."""
    x, y = toy()
    learner = new_learner()
    trainer = mf.MetaLearnerTrainer(learner, 4, lr=1e-2, balance=name)
    first = trainer.train(x, range(4), y)
    assert trainer.pretrain(x, range(4), y, epochs=80) < first / 2
    for layers in ("head", "all"):
        assert math.isfinite(trainer.meta_train(x, range(4), y, epochs=2, layers=layers))
    # some of the tasks
    assert math.isfinite(trainer.train(x[:2], [3, 1], y[:2]))
    if issubclass(BALANCES[name], Surgery):
        with pytest.raises(ValueError, match="balance must be a weighting for a learner without a trunk, got"):
            mf.MetaLearnerTrainer(new_learner(trunk=False), 4, balance=name)
    else:
        trainer = mf.MetaLearnerTrainer(new_learner(trunk=False), 4, lr=1e-2, balance=name)
        assert trainer.train(x, range(4), y, epochs=80) < trainer.history["train"][0]


def test_equal_is_the_plain_sum():
    x, y = toy()
    results = []
    for balance in (None, "equal"):
        torch.manual_seed(4)
        learner = new_learner()
        trainer = mf.MetaLearnerTrainer(learner, 4, balance=balance)
        trainer.train(x, range(4), y, epochs=5)
        results.append([p.clone() for p in learner.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Wrapped(nn.Module):
    """A trunk that is not known to treat each row alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("name", ["pcgrad", "gradnorm", "upgrad"])
def test_trunks_whose_rows_stay_apart_train_the_same(name):
    """By copies of the trunk, one backward pass, and by a batched pass: ragged rows, an absent task."""
    counts, tasks = (9, 5, 9), [3, 0, 2]
    x, y = ([v[i, :n] for i, n in enumerate(counts)] for v in toy())
    results = []
    for wrap in (lambda trunk: trunk, Wrapped):
        torch.manual_seed(4)
        trunk = wrap(nn.Sequential(nn.Linear(3, 16), nn.Tanh()).double())
        learner = mf.MetaLearner(4, 16, 1, trunk=trunk).double()
        trainer = mf.MetaLearnerTrainer(learner, 4, balance=name)
        trainer.train([v.double() for v in x], tasks, [v.double() for v in y], epochs=5)
        results.append([p.clone() for p in learner.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_optimizer_learns_the_parameters_of_the_balance():
    x, y = toy()
    trainer = mf.MetaLearnerTrainer(new_learner(), 4, lr=0.01, balance="uncertainty")
    trainer.train(x, range(4), y, epochs=10)
    assert trainer.balance.log_variances.abs().min() > 0.01
    trainer.initialize(seed=1)
    assert not trainer.balance.log_variances.any()
    # one that the optimizer holds already
    learner, balance = new_learner(), Uncertainty(4)
    optimizer = torch.optim.SGD([*learner.parameters(), *balance.parameters()], lr=0.1)
    mf.MetaLearnerTrainer(learner, 4, optimizer=optimizer, balance=balance).train(x, range(4), y)
    assert len(optimizer.param_groups) == 1
    assert balance.log_variances.any()


def test_initialize_forgets():
    x, y = toy()
    trainer = mf.MetaLearnerTrainer(new_learner(), 4, balance=FAMO(4))
    trainer.train(x, range(4), y, epochs=5)
    assert trainer.balance.logits.any()
    trainer.initialize()
    assert not trainer.balance.logits.any()
    assert trainer.balance.before.isnan().all()


def test_select_tasks():
    """Tasks 0, 2 and 1, 3 with opposed targets; groups have the ids that the caller gave."""
    x = torch.randn(20, 3).expand(4, 20, 3)
    y = torch.tanh(x.sum(2, keepdim=True)) * torch.tensor([1.0, -1, 1, -1])[:, None, None]
    learner = new_learner(tasks=6)
    # heads that read the trunk in one way: what differs is what the tasks want from it
    learner.heads.load_heads([learner.task_modules[0]] * 6)
    trainer = mf.MetaLearnerTrainer(learner, 6)
    for kind in ("lookahead", "linear", "cosine"):
        assert trainer.select_tasks(x, [5, 0, 2, 3], y, groups=2, kind=kind) == [[5, 2], [0, 3]]
        assert isinstance(trainer.affinity, Affinity)
    ragged = [x[0], x[1, :7], x[2, :9], x[3, :8]], [5, 0, 2, 3], [y[0], y[1, :7], y[2, :9], y[3, :8]]
    assert len(trainer.select_tasks(*ragged, groups=4)) == 4
    with pytest.raises(ValueError, match="tasks must hold each task once, got 0 twice"):
        trainer.select_tasks(x[:2], [0, 0], y[:2], groups=1)
    with pytest.raises(ValueError, match="inputs must have an axis for the rows of each task"):
        trainer.select_tasks(x[:2, 0], [0, 1], y[:2, 0], groups=1)
    trainer.initialize()
    assert trainer.affinity is None


@pytest.mark.parametrize("store", ["gradient", "all"])
def test_task_gradients_through_the_inner_loop(store):
    """Of every task's query loss in the start, second order: one backward pass a task gives the same."""
    maml = mf.MAML(mf.nn.mlp(1, (8,), 1), lr=0.1, steps=2, store=store)
    losses = maml(mf.data.Sinusoid(seed=0).sample(5, step=0)).task_losses
    parameters = list(maml.parameters())
    gradients = task_gradients(losses, parameters, chunk=2)
    for t in range(5):
        expected = torch.autograd.grad(losses[t], parameters, retain_graph=True)
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g[t], e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STATELESS)
def test_trainer(name):
    maml = mf.MAML(mf.nn.mlp(1, (16,), 1), lr=0.01)
    validation = mf.data.Sinusoid(shots=5, seed=1)
    trainer = mf.Trainer(maml, mf.data.Sinusoid(shots=5, seed=0), meta_batch=4, progress=False, balance=name)
    before = trainer.evaluate(validation, num_tasks=50).mean
    trainer.fit(100)
    assert trainer.evaluate(validation, num_tasks=50).mean < before


def test_trainer_takes_what_keeps_no_tasks():
    maml, tasks = mf.MAML(mf.nn.mlp(1, (4,), 1)), mf.data.Sinusoid()
    for balance in (DWA(32), "uncertainty"):
        with pytest.raises(ValueError, match="balance must not remember tasks, as every meta-batch holds others, got"):
            mf.Trainer(maml, tasks, balance=balance)


def test_a_run_resumes_with_its_balance(tmp_path):
    """To the same bits, chance included; with another balance it is another run."""

    def trainer(folder, balance):
        torch.manual_seed(0)
        maml = mf.MAML(mf.nn.mlp(1, (8,), 1), lr=0.01)
        options = {"meta_batch": 4, "progress": False, "checkpoint": folder}
        return mf.Trainer(maml, mf.data.Sinusoid(shots=5, seed=0), balance=balance, **options)

    whole = trainer(tmp_path / "whole", PCGrad()).fit(12)
    trainer(tmp_path / "parts", PCGrad()).fit(5)
    parts = trainer(tmp_path / "parts", "pcgrad").fit(12)
    for a, b in zip(whole.algorithm.parameters(), parts.algorithm.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"balance was PCGrad\(\), is MGDA\(\)"):
        trainer(tmp_path / "parts", "mgda")
    with pytest.raises(ValueError, match=r"balance was PCGrad\(\), is absent"):
        trainer(tmp_path / "parts", None)


def test_a_loss_that_is_not_finite_stops_the_step():
    x, y = toy()
    learner = new_learner()
    trainer = mf.MetaLearnerTrainer(learner, 4, balance="pcgrad", loss=lambda z, t: F.mse_loss(z, t) * math.inf)
    before = [p.clone() for p in learner.parameters()]
    with pytest.raises(FloatingPointError):
        trainer.train(x, range(4), y)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
