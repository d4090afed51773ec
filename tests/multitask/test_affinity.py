"""Affinity: every matrix against plain loops over copies of the model, groupings against all partitions, and a case
whose groups are known."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtml_fast import MetaLearner, TaskRows
from mtml_fast.multitask import Affinity, affinity


def learner_and_rows(own, tasks=4, dtype=torch.float64):
    """A trunk with dropout and batch statistics, heads, and ragged rows."""
    trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 6))
    options = {"task_module": lambda: nn.Linear(6, 3)} if own else {"in_features": 6, "out_features": 3, "hidden": 4}
    learner = MetaLearner(tasks, trunk=trunk, **options).to(dtype)
    trunk[1].running_mean.uniform_(-1, 1)
    counts = [7, 3, 7, 5][:tasks]
    inputs = [torch.randn(n, 5, dtype=dtype) for n in counts]
    return learner, inputs


def loop(model, shared, loss_of, tasks, lr):
    """(losses [T], lookahead, linear, cosine [T, T]) by one copy a step."""
    parameters = list(shared.parameters())
    losses = [loss_of(model, t) for t in range(tasks)]
    grads = [torch.autograd.grad(loss, parameters) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])
    losses = torch.stack(losses).detach()
    after = torch.zeros(tasks, tasks, dtype=torch.float64)
    for i in range(tasks):
        # the model's own parameters are moved and put back
        with torch.no_grad():
            for p, g in zip(parameters, grads[i], strict=True):
                p -= lr * g
            after[i] = torch.stack([loss_of(model, j) for j in range(tasks)])
            for p, g in zip(parameters, grads[i], strict=True):
                p += lr * g
    gram = flat @ flat.T
    # a head whose units are all dead sends no gradient to the trunk
    norms = flat.norm(dim=1).clamp(min=1e-300)
    return 1 - after / losses, lr * gram / losses, gram / norms / norms[:, None]


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", None, "own"])
@pytest.mark.parametrize("own", [False, True])
def test_a_learner_against_the_loop(own, loss):
    learner, inputs = learner_and_rows(own)
    if loss in (None, "cross_entropy"):
        targets = [torch.randint(3, (len(x),)) for x in inputs]
    else:
        targets = [torch.randn(len(x), 3, dtype=torch.float64) for x in inputs]
    function = {"mse": F.mse_loss, "own": nn.SmoothL1Loss(beta=0.5)}.get(loss, F.cross_entropy)
    tasks = [2, 0, 3, 1]
    learner.eval()
    expected = loop(learner, learner.trunk, lambda m, i: function(m([inputs[i]], [tasks[i]])[0], targets[i]), 4, lr=0.3)
    learner.train()
    learner.trunk[1].eval()
    state, mode = copy.deepcopy(learner.state_dict()), [m.training for m in learner.modules()]
    given = function if loss == "own" else loss
    for kind, matrix in zip(("lookahead", "linear", "cosine"), expected, strict=True):
        for chunk in (1, 3):
            found = affinity(learner, (inputs, targets), kind=kind, loss=given, lr=0.3, tasks=tasks, chunk=chunk)
            torch.testing.assert_close(found.matrix, matrix, rtol=1e-7, atol=1e-9)
            assert found.tasks == tasks
    # the learner is as it was
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert [m.training for m in learner.modules()] == mode
    assert all(p.grad is None for p in learner.parameters())


def test_a_module_against_the_loop():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(5, 9, 4).double(), torch.randn(5, 9, 1).double()
    expected = loop(model, model, lambda m, t: F.mse_loss(m(x[t]), y[t]), 5, lr=0.1)
    for kind, matrix in zip(("lookahead", "linear", "cosine"), expected, strict=True):
        torch.testing.assert_close(affinity(model, TaskRows(x, y), kind=kind, lr=0.1).matrix, matrix)


def test_to_first_order_lookahead_is_linear():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    rows = TaskRows(torch.randn(3, 9, 4).double(), torch.randn(3, 9, 1).double())
    far, near = (
        (
            affinity(model, rows, kind="lookahead", lr=lr).matrix - affinity(model, rows, kind="linear", lr=lr).matrix
        ).norm()
        / lr
        for lr in (1e-3, 1e-5)
    )
    assert near < far / 50


def test_measure_takes_rows_evenly():
    """The steps follow all rows; the losses are those of three of each task."""
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(3, 9, 4).double(), torch.randn(3, 9, 1).double()
    found = affinity(model, TaskRows(x, y), kind="lookahead", lr=0.1, measure=3).matrix
    few = [0, 4, 8]
    for i in range(3):
        stepped = copy.deepcopy(model)
        F.mse_loss(stepped(x[i]), y[i]).backward()
        with torch.no_grad():
            for p in stepped.parameters():
                p -= 0.1 * p.grad
        for j in range(3):
            before, after = (F.mse_loss(m(x[j, few]), y[j, few]) for m in (model, stepped))
            torch.testing.assert_close(found[i, j], (1 - after / before).detach())
    whole = affinity(model, TaskRows(x, y), kind="lookahead", lr=0.1).matrix
    torch.testing.assert_close(affinity(model, TaskRows(x, y), kind="lookahead", lr=0.1, measure=99).matrix, whole)


class Reads(nn.Module):
    """A forward that depends on a value, which vmap cannot take."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x) if self.linear.weight.sum().item() < 1e9 else x


def test_a_module_that_vmap_cannot_take_runs_step_by_step():
    model, rows = Reads(), TaskRows(torch.randn(3, 9, 3), torch.randn(3, 9, 1))
    with pytest.warns(UserWarning, match="torch.func.vmap cannot run"):
        found = affinity(model, rows, kind="lookahead")
    torch.testing.assert_close(found.matrix, affinity(model.linear, rows, kind="lookahead").matrix)


def test_a_task_without_a_gradient_has_no_affinity():
    model = nn.Linear(3, 1, bias=False)
    x = torch.randn(3, 5, 3)
    x[1] = 0
    y = torch.randn(3, 5, 1)
    y[2] = model(x[2]).detach()
    for kind in ("lookahead", "linear", "cosine"):
        matrix = affinity(model, TaskRows(x, y), kind=kind).matrix
        assert matrix.isfinite().all()
        assert not matrix[1].any()
        if kind != "cosine":
            assert not matrix[:, 2].any()


def partitions(items, count):
    """All partitions into `count` parts."""
    if not items:
        if count == 0:
            yield []
        return
    first, *rest = items
    for part in partitions(rest, count - 1) if count else ():
        yield [[first], *part]
    for part in partitions(rest, count):
        for i in range(len(part)):
            yield [*part[:i], [first, *part[i]], *part[i + 1 :]]


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_groups_are_the_best_partition(size):
    found = Affinity(torch.randn(size, size).double(), "cosine", list("abcdefg"[:size]))
    for count in range(1, size + 1):
        groups = found.groups(count)
        assert sorted(itertools.chain(*groups)) == list(found.tasks)
        assert len(groups) == count
        best = max(found.score(p) for p in partitions(list(found.tasks), count))
        assert found.score(groups) == pytest.approx(best)


def test_groups_of_many_tasks():
    """Four blocks among 24 tasks, in a random order and with noise; and near the best where both can be had."""
    order = torch.randperm(24)
    block = torch.arange(24) % 4
    z = (block[:, None] == block).double() + 0.3 * torch.randn(24, 24)
    groups = Affinity(z[order][:, order], "lookahead", order.tolist()).groups(4)
    assert sorted(sorted(t % 4 for t in group) for group in groups) == [[b] * 6 for b in range(4)]
    many = Affinity(torch.randn(11, 11).double(), "lookahead", list(range(11)))
    groups = many.groups(3)
    assert len(groups) == 3
    assert sorted(itertools.chain(*groups)) == list(range(11))
    # no single move is better
    for a, b in itertools.permutations(range(3), 2):
        for t in groups[a] if len(groups[a]) > 1 else ():
            moved = [[s for s in g if s != t] + ([t] if i == b else []) for i, g in enumerate(groups)]
            assert many.score(moved) <= many.score(groups) + 1e-9


def opposed_groups(seed):
    """Six regressions on the same inputs: tasks 0, 2, 4 follow one function, 1, 3, 5 its negative."""
    torch.manual_seed(seed)
    direction = torch.randn(8, 1)
    x = torch.randn(24, 8).expand(6, 24, 8)
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None, None]
    return x, sign * torch.tanh(x @ direction) + 0.05 * torch.randn(6, 24, 1), sign * torch.tanh(x @ direction)


@pytest.mark.parametrize("kind", ["lookahead", "linear", "cosine"])
@pytest.mark.parametrize("seed", range(3))
def test_opposed_tasks_are_told_apart_and_train_better_apart(kind, seed):
    x, y, truth = opposed_groups(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    found = affinity(model, TaskRows(x, y), kind=kind)
    groups = found.groups(2)
    assert groups == [[0, 2, 4], [1, 3, 5]]

    def trained(tasks):
        """The error against the truth, of one model for these tasks."""
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.mse_loss(own(x[tasks]), y[tasks]).backward()
            optimizer.step()
        return F.mse_loss(own(x[tasks]), truth[tasks]).item()

    together = trained(list(range(6)))
    apart = sum(trained(group) for group in groups) / 2
    assert apart < together / 10


def test_picture_and_table(tmp_path):
    model, rows = nn.Linear(3, 1), TaskRows(torch.randn(4, 9, 3), torch.randn(4, 9, 1))
    found = affinity(model, rows, tasks=["north", "south", "east", "west"])
    assert len(str(found).splitlines()) == 5
    assert str(found).splitlines()[0].split() == ["linear", "north", "south", "east", "west"]
    for name, groups in (("plain", None), ("grouped", found.groups(2))):
        found.save_picture(tmp_path / f"{name}.png", groups)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    many = Affinity(torch.randn(30, 30).double(), "cosine", list(range(30)))
    many.save_picture(tmp_path / "many.png", many.groups(5))
    assert (tmp_path / "many.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model=3), TypeError, "model must be an nn.Module, got int"),
        (dict(model=nn.Tanh()), ValueError, "model must share parameters that require a gradient, got none"),
        (dict(model=MetaLearner(3, 3, 1)), ValueError, "model must have a trunk"),
        (dict(kind="tag"), ValueError, "kind must be one of 'linear', 'lookahead', 'cosine', got 'tag'"),
        (dict(measure=3), ValueError, "measure must be None where kind is 'linear', got 3"),
        (dict(lr=0), ValueError, "lr must be finite, above 0, got 0"),
        (dict(chunk=0), ValueError, "chunk must be finite, at least 1, got 0"),
        (dict(measure=0), ValueError, "measure must be finite, at least 1, got 0"),
        (dict(loss="l2"), ValueError, "loss must be one of 'cross_entropy'"),
        (dict(loss=3), TypeError, "loss must be a name or callable, got int"),
        (dict(tasks=[1]), ValueError, "tasks must be 3, one for each task of rows, got 1"),
        (dict(rows=3), TypeError, "rows must be TaskRows or (inputs, targets), got int"),
        (dict(rows=TaskRows(torch.ones(3, 4, 3))), ValueError, "rows must have labels y, got None"),
        (dict(rows=([torch.ones(4, 3)], [])), ValueError, "rows must be as many inputs as targets, got 1 and 0"),
        (
            dict(rows=TaskRows(torch.ones(3, 4, 3), torch.full((3, 4, 1), torch.nan))),
            FloatingPointError,
            "the loss of task 0 is nan",
        ),
    ],
)
def test_bad_input(change, error, message):
    rows = TaskRows(torch.randn(3, 4, 3), torch.randn(3, 4, 1))
    with pytest.raises(error) as caught:
        affinity(**{"model": nn.Linear(3, 1), "rows": rows, **change})
    assert message in str(caught.value)


def test_bad_number_of_groups():
    found = Affinity(torch.eye(3).double(), "cosine", [0, 1, 2])
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count must be finite, at least 1 and below 4, got {count}"):
            found.groups(count)
