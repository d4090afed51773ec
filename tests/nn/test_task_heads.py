"""TaskHeads against a plain loop over nn.Linear heads."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtml_fast.nn.task_heads import TaskHeads
from mtml_fast.tasks import TaskRows

COUNTS = (3, 1, 5, 2)
OFFSETS = torch.tensor([0, 3, 4, 9, 11])
RAGGED_WIDTHS = [2, 3, 1, 4]


def packed_rows(widths, loss="cross_entropy"):
    x = torch.randn(11, 6, dtype=torch.float64)
    if loss == "cross_entropy":
        y = torch.cat([torch.randint(width, (n,)) for n, width in zip(COUNTS, widths, strict=True)])
    else:
        y = torch.rand(sum(n * width for n, width in zip(COUNTS, widths, strict=True)), dtype=torch.float64)
    return x, y


def rows_of(x, y=None):
    return TaskRows(x, y, offsets=OFFSETS)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
@pytest.mark.parametrize("widths", [[3, 3, 3, 3], RAGGED_WIDTHS])
@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_losses_and_gradients_equal_a_loop(loss, widths, hidden, bias):
    head = TaskHeads(6, widths, hidden, activation="tanh", bias=bias).double()
    modules = [head.head(t) for t in range(4)]
    x, y = packed_rows(widths, loss)

    outputs = head.outputs(rows_of(x))
    expected = [module(part) for module, part in zip(modules, x.split(COUNTS), strict=True)]
    for z, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(z, reference, rtol=0, atol=1e-12)

    function = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}[loss]
    sizes = COUNTS if loss == "cross_entropy" else [n * w for n, w in zip(COUNTS, widths, strict=True)]
    losses = [
        function(z, part if loss == "cross_entropy" else part.view_as(z))
        for z, part in zip(expected, y.split(list(sizes)), strict=True)
    ]
    measured = head.task_losses(rows_of(x), loss, y=y)
    torch.testing.assert_close(measured, torch.stack(losses), rtol=0, atol=1e-12)

    weights = torch.randn(4, dtype=torch.float64)
    (measured * weights).sum().backward()
    (torch.stack(losses) * weights).sum().backward()
    reference = {
        name: [dict(m.named_parameters())[name].grad for m in modules] for name, _ in modules[0].named_parameters()
    }
    last = "" if hidden is None else "2."
    torch.testing.assert_close(head.weight.grad, torch.cat(reference[last + "weight"]), rtol=0, atol=1e-12)
    if bias:
        torch.testing.assert_close(head.bias.grad, torch.cat(reference[last + "bias"]), rtol=0, atol=1e-12)
    if hidden:
        torch.testing.assert_close(head.hidden_weight.grad, torch.stack(reference["0.weight"]), rtol=0, atol=1e-12)


def test_shapes_of_rectangular_packed_and_mixed_rows():
    equal, mixed = TaskHeads(6, [3] * 4), TaskHeads(6, RAGGED_WIDTHS)
    x = torch.randn(11, 6)
    assert equal(rows_of(x)).shape == (11, 3)
    assert equal(TaskRows(torch.randn(4, 5, 6))).shape == (4, 5, 3)
    assert mixed(rows_of(x)).shape == (3 * 2 + 1 * 3 + 5 * 1 + 2 * 4,)
    assert [list(z.shape) for z in mixed.outputs(TaskRows(torch.randn(4, 5, 6)))] == [[5, 2], [5, 3], [5, 1], [5, 4]]


def test_tasks_choose_their_heads():
    head = TaskHeads(6, RAGGED_WIDTHS, hidden=5).double()
    x = torch.randn(11, 6, dtype=torch.float64)
    tasks = [3, 0, 3, 1]
    for z, part, t in zip(head.outputs(rows_of(x), tasks), x.split(COUNTS), tasks, strict=True):
        torch.testing.assert_close(z, head.head(t)(part), rtol=0, atol=1e-12)


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("widths", [RAGGED_WIDTHS, [3] * 4])
def test_rows_in_any_order(widths, hidden):
    """Task 2 has none: its loss is zero."""
    head = TaskHeads(6, widths, hidden).double()
    task_index = torch.tensor([3, 0, 0, 1, 3, 1, 0])
    x = torch.randn(7, 6, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 2, 2, 0, 1])
    each = [head.head(t)(row) for t, row in zip(task_index.tolist(), x, strict=True)]
    outputs = head(x, task_index=task_index)
    if len(set(widths)) == 1:
        torch.testing.assert_close(outputs, torch.stack(each))
    else:
        torch.testing.assert_close(outputs, torch.cat([each[i] for i in (1, 2, 6, 3, 5, 0, 4)]))
    losses = head.task_losses(x, y=y, task_index=task_index)
    for t in range(4):
        own = [F.cross_entropy(z, label) for z, label, task in zip(each, y, task_index, strict=True) if task == t]
        torch.testing.assert_close(losses[t], torch.stack(own).mean() if own else torch.zeros_like(losses[t]))
    torch.testing.assert_close(head.loss(x, y=y, task_index=task_index), losses.sum())


MANY = """
import torch
from mtml_fast.nn import TaskHeads
from mtml_fast.tasks import TaskRows

def memory(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

torch.set_num_threads(1)
tasks, rows, features = 10_000, 1_000_000, 64
widths = torch.randint(1, 6, (tasks,))
head = TaskHeads(features, widths.tolist())
optimizer = torch.optim.SGD(head.parameters(), 0.1)
few = TaskRows(torch.randn(tasks, 1, features), torch.zeros(tasks, 1, dtype=torch.int64))
head.loss(few).backward()  # what a first call loads
before = memory("VmRSS")
cuts = (torch.randperm(rows - 1)[: tasks - 1] + 1).sort().values
offsets = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), rows)])
y = torch.randint(0, 1 << 30, (rows,)) % widths.repeat_interleave(offsets.diff())
data = TaskRows(torch.randn(rows, features), y, offsets)
size = data.x.nbytes + data.y.nbytes
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = head.loss(data)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(memory("VmHWM") - before, size, *losses)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures by /proc/self/status")
def test_ten_thousand_heads_and_a_million_rows():
    """The data and a step on them within twice the memory of the data, and no operator called once a task."""
    run = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    memory, data, *losses = map(float, run.stdout.split())
    assert losses == sorted(losses, reverse=True)
    assert memory <= 2 * data, f"{memory / data:.2f} times the data"


class _Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("hidden", [None, 5])
def test_a_step_calls_as_many_operators_for_any_number_of_tasks(hidden):
    counts = []
    for tasks in (3, 300):
        head = TaskHeads(4, [2, 3, 1] * (tasks // 3), hidden)
        offsets = torch.arange(tasks + 1) * 2
        rows = TaskRows(torch.randn(2 * tasks, 4), torch.zeros(2 * tasks, dtype=torch.int64), offsets)
        with _Calls() as calls:
            head.loss(rows).backward()
        counts.append(calls.count)
    assert counts[0] == counts[1]


def test_loss_is_the_sum_of_the_task_losses():
    head = TaskHeads(6, RAGGED_WIDTHS)
    x, y = packed_rows(RAGGED_WIDTHS)
    rows = rows_of(x.float(), y)
    torch.testing.assert_close(head.loss(rows), head.task_losses(rows).sum())


def test_options_of_the_losses_reach_the_operator():
    head = TaskHeads(4, [2, 3])
    rows = TaskRows(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), offsets=torch.tensor([0, 2, 5]))
    mask = torch.tensor([True, False, True, True, False])
    (first, second), (a, b) = head.outputs(rows), rows.y.split([2, 3])
    smooth = dict(label_smoothing=0.1)
    expected = F.cross_entropy(first[:1], a[:1], **smooth) + F.cross_entropy(second[:2], b[:2], **smooth)
    torch.testing.assert_close(head.loss(rows, mask=mask, **smooth), expected)
    targets = torch.randn(2 * 2 + 3 * 3)
    losses = head.task_losses(rows, ["cross_entropy", "huber"], y=(rows.y, targets))
    torch.testing.assert_close(losses[0], F.cross_entropy(first, a))
    torch.testing.assert_close(losses[1], F.huber_loss(second.flatten(), targets[4:]))


def test_values_are_drawn_as_nn_linear_draws_them():
    torch.manual_seed(0)
    head = TaskHeads(25, [2000, 2000], hidden=64)
    for parameter, inputs in ((head.hidden_weight, 25), (head.hidden_bias, 25), (head.weight, 64), (head.bias, 64)):
        bound = 1 / math.sqrt(inputs)
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.95 * bound
        # a uniform variable's spread; 4 standard errors of it at the smallest parameter, 128 values
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.16)


@pytest.mark.parametrize("hidden", [None, 4])
def test_heads_go_out_and_in_again(hidden):
    source, target = TaskHeads(6, RAGGED_WIDTHS, hidden), TaskHeads(6, RAGGED_WIDTHS, hidden)
    copies = [source.head(t) for t in range(4)]
    target.load_heads(copies)
    for name, value in source.named_parameters():
        assert torch.equal(value, dict(target.named_parameters())[name])
    # copies: changing one leaves the heads alone
    with torch.no_grad():
        next(copies[0].parameters()).zero_()
    assert source.weight.abs().min() > 0
    state = torch.get_rng_state()
    source.head(0)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_widths_come_with_the_first_rows():
    head = TaskHeads(None, [None, 3, None], hidden=4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    assert head.is_lazy
    outputs = head.outputs(TaskRows(torch.randn(3, 5, 6)))
    assert [list(z.shape) for z in outputs] == [[5, 1], [5, 3], [5, 1]]
    before = head.weight.detach().clone()
    sum(z.sum() for z in outputs).backward()
    optimizer.step()
    assert not torch.equal(before, head.weight)


def test_lazy_heads_take_a_state_dict_and_a_dtype():
    source = TaskHeads(6, RAGGED_WIDTHS, hidden=4).double()
    lazy = TaskHeads(None, [None] * 4, hidden=4).double()
    lazy.load_state_dict(source.state_dict())
    rows = TaskRows(torch.randn(4, 5, 6, dtype=torch.float64))
    assert torch.equal(lazy(rows), source(rows))
    assert lazy.out_features == RAGGED_WIDTHS
    copied = copy.deepcopy(TaskHeads(None, [None] * 4, hidden=4))
    assert copied.is_lazy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskHeads(0, [1]), "in_features must be finite, at least 1, got 0"),
        (lambda: TaskHeads(3, []), "out_features must be a list of one width a task, got []"),
        (lambda: TaskHeads(3, 2), "out_features must be a list of one width a task, got 2"),
        (lambda: TaskHeads(3, [2, 1.5]), "out_features[1] must be an integer, got 1.5"),
        (lambda: TaskHeads(3, [2], activation="relish"), "activation must be one of 'relu', "),
        (lambda: TaskHeads(3, [2])(TaskRows(torch.zeros(2, 1, 3))), "rows must hold 1 tasks, got 2"),
        (lambda: TaskHeads(3, [2])(TaskRows(torch.zeros(1, 1, 4))), "rows.x must have 3 features, got shape [1, 1, 4]"),
        (lambda: TaskHeads(3, [2])(TaskRows(torch.zeros(1, 3))), "rows.x must be [T, N, D], got shape [1, 3]"),
        (lambda: TaskHeads(3, [2]).loss(TaskRows(torch.zeros(1, 1, 3))), "rows.y must hold the targets, got None"),
        (
            lambda: TaskHeads(3, [2])(torch.zeros(2, 3)),
            "rows must be TaskRows, or a tensor with task_index, got Tensor",
        ),
        (
            lambda: TaskHeads(3, [2]).loss(torch.zeros(2, 3), task_index=torch.zeros(2).long()),
            "y must hold the targets, got None",
        ),
        (
            lambda: TaskHeads(3, [2])(torch.zeros(2, 4), task_index=torch.zeros(2).long()),
            "rows must be [R, D=3], got shape [2, 4]",
        ),
        (
            lambda: TaskHeads(3, [2])(torch.zeros(2, 3), [0], task_index=torch.zeros(2).long()),
            "tasks must be None where task_index is given, got [0]",
        ),
        (
            lambda: TaskHeads(3, [2])(torch.zeros(2, 3), task_index=torch.ones(2).long()),
            "task_index must be in 0..0, got 1",
        ),
        (lambda: TaskHeads(3, [2]).head(1), "t must be a task in 0..0, got 1"),
        (lambda: TaskHeads(None, [2]).head(0), "the heads have no widths yet: give in_features and out_features"),
        (lambda: TaskHeads(None, [2]).state_dict(), "the heads have no widths yet: give in_features and out_features"),
        (lambda: TaskHeads(3, [2]).load_heads([]), "modules must be 1 heads, one a task, got 0"),
        (
            lambda: TaskHeads(3, [2]).load_heads([nn.Linear(3, 4)]),
            "modules[0] must have the widths [3, 2] with bias, got Linear(in_features=3, out_features=4, bias=True)",
        ),
        (
            lambda: TaskHeads(3, [2]).load_heads([nn.ReLU()]),
            "modules[0] must be Linear, got ReLU()",
        ),
        (
            lambda: TaskHeads(3, [2], 4, "leaky_relu").load_heads(
                [nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.3), nn.Linear(4, 2))]
            ),
            "modules[0] must be Linear, leaky_relu, Linear, got Sequential( (0): Linear(in_features=3",
        ),
        (
            lambda: TaskHeads(3, [2, 3]).load_state_dict(TaskHeads(3, [3, 2]).state_dict()),
            "state_dict must hold heads of widths [3, 2, 3], the first that of the rows, got [3, 3, 2]",
        ),
        (
            lambda: TaskHeads(3, [None]).load_state_dict(TaskHeads(4, [2]).state_dict()),
            "state_dict must hold heads of widths [3, None], the first that of the rows, got [4, 2]",
        ),
        (
            lambda: TaskHeads(3, [None], hidden=4).load_state_dict(TaskHeads(3, [2]).state_dict()),
            "state_dict must hold 1 heads with hidden=4, got ['weight', 'bias', 'out_offsets']",
        ),
        (lambda: TaskHeads(3, [2]).materialize(3), "materialize must be called once; the heads have in_features=3"),
    ],
)
def test_errors_name_the_argument_and_the_value(make, message):
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
