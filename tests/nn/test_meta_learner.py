"""MetaLearner against a plain loop over its task modules, in every form of a call."""

import copy
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mtml_fast.nn.meta_learner import MetaLearner, TaskModule
from mtml_fast.nn.task_stack import TaskStack

SIZES = (3, 1, 5)


def ragged(*row, sizes=SIZES):
    return [torch.randn(n, *row, dtype=torch.float64) for n in sizes]


def conv_module(t):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(18, 2 + t % 2),
    )  # fmt: skip


def assert_like_a_loop(learner, modules, trunk, inputs, tasks):
    """Outputs, and the gradients of a random function of them, equal those of a loop over ordinary modules."""
    outputs = learner(inputs, tasks)
    x = list(inputs)
    if trunk is not None:
        x = trunk(torch.cat(x)).split([len(value) for value in x])
    expected = [modules[t](value) for t, value in zip(tasks, x, strict=True)]
    for z, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(z, reference, rtol=0, atol=1e-12)
    weights = [torch.randn_like(z) for z in expected]
    loss, reference_loss = (
        sum((w * z.sin()).sum() for w, z in zip(weights, results, strict=True)) for results in (outputs, expected)
    )
    # second order as well: the gradient of the squared norm of the gradient
    own = [p for p in learner.parameters() if p.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(loss, own, create_graph=True, **options)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), own, **options)
    plain = [p for module in modules for p in module.parameters()]
    plain += [] if trunk is None else list(trunk.parameters())
    grads_of_loop = torch.autograd.grad(reference_loss, plain, create_graph=True, **options)
    second_of_loop = torch.autograd.grad(sum(g.square().sum() for g in grads_of_loop), plain, **options)
    for measured, reference in ((grads, grads_of_loop), (second, second_of_loop)):
        # a bias before batch norm has the derivative zero: what is left of large terms, to their precision
        scale = max(1.0, *(b.detach().abs().max().item() for b in reference))
        for a, b in zip(by_module(learner, own, measured), reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * scale)


def by_module(learner, parameters, values):
    """The learner's gradients in the order of its task modules' parameters, then the trunk's."""
    holder = copy.deepcopy(learner)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            for own, value in zip(parameters, values, strict=True):
                if own is parameter:
                    dict(holder.named_parameters())[name].copy_(value)
    ordered = [p for module in holder.task_modules for p in module.parameters()]
    return ordered + ([] if holder.trunk is None else list(holder.trunk.parameters()))


@pytest.mark.parametrize("widths", [2, [1, 4, 2, 3]])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("with_trunk", [False, True])
@pytest.mark.parametrize("tasks", [[0, 1, 2], [3, 0, 3]])
def test_default_modules_equal_a_loop(widths, hidden, with_trunk, tasks):
    trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()) if with_trunk else None
    learner = MetaLearner(4, 8 if with_trunk else 6, widths, hidden=hidden, trunk=trunk).double()
    modules, plain_trunk = list(learner.task_modules), copy.deepcopy(learner.trunk)
    assert_like_a_loop(learner, modules, plain_trunk, ragged(6), tasks)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 2, 3)])
@pytest.mark.parametrize("tasks", [[0, 1, 2], [4, 1, 0], [2, 2, 2]])
def test_own_conv_modules_with_batch_norm_equal_a_loop(sizes, tasks):
    learner = MetaLearner(5, task_module=conv_module).double()
    assert len(learner.heads.groups) == 2
    modules = list(learner.task_modules)
    assert_like_a_loop(learner, modules, None, ragged(1, 5, 5, sizes=sizes), tasks)
    # the batch statistics moved as in the loop, also for a task that came three times
    for module, reference in zip(learner.task_modules, modules, strict=True):
        for value, expected in zip(module.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    learner.eval()
    x = ragged(1, 5, 5, sizes=sizes)
    for z, t, value in zip(learner(x, tasks), tasks, x, strict=True):
        torch.testing.assert_close(z, modules[t].eval()(value), rtol=0, atol=1e-12)


def test_own_modules_over_a_trunk_equal_a_loop():
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh())
    learner = MetaLearner(3, trunk=trunk, task_module=lambda: TaskModule(6, 2, 5)).double()
    modules, plain_trunk = list(learner.task_modules), copy.deepcopy(trunk)
    assert_like_a_loop(learner, modules, plain_trunk, ragged(2, 2), [2, 0, 1])


def test_the_forms_of_a_call_agree():
    learner = MetaLearner(4, 6, [1, 2, 3, 2], hidden=5)
    modules = list(learner.task_modules)
    x = torch.randn(4, 3, 6)
    expected = [module(value) for module, value in zip(modules, x, strict=True)]

    def check(outputs, reference):
        assert len(outputs) == len(reference)
        for z, e in zip(outputs, reference, strict=True):
            torch.testing.assert_close(z, e)

    ids = [0, 1, 2, 3]
    for inputs in (x, list(x), tuple(x), x.numpy(), list(x.double().numpy())):
        for tasks in (ids, tuple(ids), range(4), torch.arange(4), np.arange(4), [torch.tensor(t) for t in ids], None):
            check(learner(inputs, tasks), expected)
    # a list of ids is read literally: inputs[i] is one row
    check(learner(x[:, 0], ids), [e[0] for e in expected])
    check(learner(list(x[:, 0]), [0, 1, 2, 3]), [e[0] for e in expected])
    # a tensor of ids is one a row: grouped, ascending, rows in their order
    rows, ids_of_rows = torch.randn(7, 6), torch.tensor([2, 0, 2, 3, 0, 2, 3])
    grouped = [modules[t](rows[ids_of_rows == t]) for t in (0, 2, 3)]
    check(learner(rows, ids_of_rows), grouped)
    check(learner(rows.numpy(), ids_of_rows.numpy()), grouped)
    # no ids: every task sees all rows
    check(learner(rows), [module(rows) for module in modules])


def test_shared_rows_go_through_the_trunk_once():
    calls = []
    trunk = nn.Linear(6, 8)
    trunk.register_forward_hook(lambda *_: calls.append(1))
    learner = MetaLearner(4, 8, 2, trunk=trunk)
    assert [list(z.shape) for z in learner(torch.randn(5, 6))] == [[5, 2]] * 4
    assert len(calls) == 1


def test_an_optimizer_made_before_the_first_call_trains_the_learner():
    learner = MetaLearner(3)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    x = torch.randn(3, 5, 4)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        losses.append(sum(z.square().mean() for z in learner(x, range(3))))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 10
    assert len(learner.state_dict()) == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: MetaLearner(3, 6, [1, 2, 3], trunk=nn.Linear(6, 6)),
        lambda: MetaLearner(3, task_module=lambda: TaskModule(6)),
        lambda: MetaLearner(3, task_module=lambda t: nn.Sequential(nn.Linear(6, t + 1), nn.BatchNorm1d(t + 1))),
    ],
)
def test_state_dict_makes_the_round_trip(make):
    source, target = make(), make()
    x = torch.randn(3, 5, 6)
    source(x)
    target.load_state_dict(source.state_dict())
    source.eval(), target.eval()
    for a, b in zip(source(x), target(x), strict=True):
        assert torch.equal(a, b)


def test_a_learner_without_widths_takes_a_state_dict():
    source, lazy = MetaLearner(3, 6, 2), MetaLearner(3)
    lazy.load_state_dict(source.state_dict())
    x = torch.randn(3, 5, 6)
    assert torch.equal(torch.stack(source(x)), torch.stack(lazy(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("task_module", "widths"),
    [
        (lambda: nn.Linear(6, 2), [2, 2, 2]),
        (lambda t: nn.Linear(6, t + 1), [1, 2, 3]),
        ([nn.Linear(6, 3), nn.Linear(6, 1), nn.Linear(6, 3)], [3, 1, 3]),
        (nn.Linear(6, 4), [4, 4, 4]),
    ],
)
def test_ways_to_give_task_modules(task_module, widths):
    learner = MetaLearner(3, task_module=task_module)
    assert [z.shape[1] for z in learner(torch.randn(3, 5, 6))] == widths
    weights = [module.weight for module in learner.task_modules]
    if isinstance(task_module, list):
        assert all(torch.equal(w, module.weight) for w, module in zip(weights, task_module, strict=True))
    else:
        assert not torch.equal(weights[0][0], weights[2][0])
    before = [w.clone() for w in weights]
    learner.reset_parameters()
    assert all(not torch.equal(m.weight, w) for m, w in zip(learner.task_modules, before, strict=True))


def test_modules_of_different_behaviour_do_not_run_as_one():
    class Scaled(nn.Module):
        def __init__(self, scale, function):
            super().__init__()
            self.layer, self.scale, self.function = nn.Linear(2, 2), scale, function

        def forward(self, x):
            return self.function(self.scale * self.layer(x))

    modules = [Scaled(1.0, torch.relu), Scaled(2.0, torch.relu), Scaled(1.0, torch.tanh), Scaled(1.0, torch.relu)]
    stack = TaskStack(modules)
    assert stack.members == [[0, 3], [1], [2]]
    x = torch.randn(4, 3, 2)
    for z, module, value in zip(stack(x), modules, x, strict=True):
        torch.testing.assert_close(z, module(value))
    assert TaskStack([Scaled(1.0, lambda x, k=k: x + k) for k in (1, 1, 2)]).members == [[0, 1], [2]]


def test_tied_parameters_stay_tied():
    def tied():
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        return nn.Sequential(first, second)

    modules = [tied() for _ in range(2)]
    stack = TaskStack(modules)
    assert len(list(stack.parameters())) == 3
    x = torch.randn(2, 4, 3)
    for z, module, value in zip(stack(x), modules, x, strict=True):
        torch.testing.assert_close(z, module(value))
    copied = stack.head(0)
    assert copied[0].weight is copied[1].weight


def test_every_task_draws_its_own_dropout():
    learner = MetaLearner(2, task_module=nn.Dropout(0.5))
    a, b = learner([torch.ones(1, 200)] * 2, [0, 1])
    assert not torch.equal(a, b)
    learner.eval()
    assert torch.equal(learner([torch.ones(1, 200)] * 2, [0, 1])[0], torch.ones(1, 200))


def test_a_module_that_vmap_refuses_runs_task_by_task():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(2), nn.Linear(2, 1)

        def forward(self, x):
            x = self.norm(x)
            return self.layer(x) if x.sum().item() > 1e9 else -self.layer(x)

    learner = MetaLearner(2, task_module=lambda: Reads()).double()
    modules = list(learner.task_modules)
    x = ragged(2, sizes=(3, 3))
    with pytest.warns(UserWarning, match="vmap cannot run Reads, one call a task instead: .*item"):
        outputs = learner(x, [1, 0])
    for z, t, value in zip(outputs, [1, 0], x, strict=True):
        torch.testing.assert_close(z, modules[t](value), rtol=0, atol=1e-12)
    # the attempt left no trace in the batch statistics
    for module, reference in zip(learner.task_modules, modules, strict=True):
        assert module.norm.num_batches_tracked == 1
        torch.testing.assert_close(module.norm.running_mean, reference.norm.running_mean)


@pytest.mark.filterwarnings("error")
def test_an_out_of_memory_error_is_not_taken_for_what_vmap_refuses():
    class Hungry(nn.Linear):
        """Its first call runs out of memory, a second one would not."""

        calls = 0

        def forward(self, x):
            Hungry.calls += 1
            if Hungry.calls == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    learner = MetaLearner(2, task_module=lambda: Hungry(3, 1))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        learner(torch.randn(2, 4, 3))
    assert Hungry.calls == 1


def test_a_failing_module_fails_in_its_own_words():
    learner = MetaLearner(2, task_module=lambda: nn.Linear(3, 1))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        learner(torch.randn(2, 4, 5))


@pytest.mark.parametrize("own", [False, True])
def test_500_heads_cost_far_less_than_500_modules(own):
    calls = []

    class Counted(nn.Sequential):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    def make():
        return Counted(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    learner = MetaLearner(500, task_module=make) if own else MetaLearner(500, 8, 2, hidden=16)
    modules = list(learner.task_modules)
    x = list(torch.randn(500, 4, 8))

    def seconds(call):
        """Of processors, of all threads: others on the machine do not count."""
        call()
        times = []
        for _ in range(5):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    batched = seconds(lambda: torch.cat(learner(x, range(500))).square().sum().backward())
    # six runs, one call of the group in each
    assert len(calls) == (6 if own else 0)
    loop = seconds(lambda: torch.cat([m(v) for m, v in zip(modules, x, strict=True)]).square().sum().backward())
    assert batched < loop / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MetaLearner(0), "num_tasks must be finite, at least 1, got 0"),
        (lambda: MetaLearner(2, 3, [1]), "out_features must be a list of 2 widths, got 1"),
        (lambda: MetaLearner(2, trunk=3), "trunk must be an nn.Module, got int"),
        (lambda: MetaLearner(2, 3, task_module=nn.Linear(1, 1)), "in_features must be None beside task_module, got 3"),
        (lambda: MetaLearner(2, task_module=[nn.Linear(1, 1)]), "task_module must be 2 modules, one a task, got 1"),
        (lambda: MetaLearner(2, task_module=3), "task_module must be a module, a list of modules or a function, got 3"),
        (lambda: MetaLearner(2, task_module=lambda: 3), "task_module must give an nn.Module for task 0, got int"),
        (
            lambda: MetaLearner(2, task_module=TaskModule),
            "task_module must be callable without arguments, got one that needs in_features",
        ),
        (lambda: MetaLearner(2)([torch.zeros(3, 4)], [0, 1]), "tasks must hold 1 ids, one an entry of inputs, got"),
        (lambda: MetaLearner(2)([torch.zeros(3, 4)], [2]), "tasks[0] must be in 0..1, got 2"),
        (lambda: MetaLearner(2)(torch.zeros(2, 4), torch.tensor([0, -1])), "tasks[1] must be in 0..1, got -1"),
        (lambda: MetaLearner(2)([torch.zeros(3, 4)], [0.5]), "tasks must be integers, got torch.float32"),
        (lambda: MetaLearner(2)([torch.zeros(3, 4)], "a"), "tasks must be a list of task ids, got 'a'"),
        (lambda: MetaLearner(2)([]), "inputs must be tensors [N, D], got an empty list"),
        (lambda: MetaLearner(2)(["a"], [0]), "inputs[0] must be a tensor or an array of numbers, got str"),
        (lambda: MetaLearner(2)([torch.zeros(0, 4)], [0]), "inputs[0] must have at least one row, got shape [0, 4]"),
        (
            lambda: MetaLearner(2)(torch.zeros(2, 0, 4)),
            "inputs must have at least one row an entry, got shape [2, 0, 4]",
        ),
        (
            lambda: MetaLearner(2)(torch.zeros(4)),
            "inputs must be [E, N, D], [R, D] or a list of tensors, got shape [4]",
        ),
        (
            lambda: MetaLearner(2)([torch.zeros(3, 4), torch.zeros(4)]),
            "inputs must have equally many axes, got [1, 2]",
        ),
        (
            lambda: MetaLearner(2)([torch.zeros(3, 4), torch.zeros(3, 5)]),
            "inputs must have rows of one shape, got (4,) and (5,)",
        ),
        (
            lambda: MetaLearner(2)([torch.zeros(3, 4, dtype=torch.int64)], [0]),
            "inputs must be floating point for these task modules, got torch.int64",
        ),
        (
            lambda: MetaLearner(2)(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])),
            "tasks must be a list of ids (one for each inputs[i]) for inputs [2, 3, 4, 4], got a tensor",
        ),
        (
            lambda: MetaLearner(2)(torch.zeros(2, 3, 4, 4)),
            "tasks must be a list of ids (one for each inputs[i]) for inputs [2, 3, 4, 4], got None",
        ),
        (
            lambda: MetaLearner(2, 4)(torch.zeros(2, 3, 4, dtype=torch.float64)),
            "inputs must have the dtype of the learner (torch.float32), got torch.float64",
        ),
        (
            lambda: MetaLearner(2, trunk=nn.Linear(4, 3))([torch.zeros(3, 4).half()], [0]),
            "inputs[0] must have the dtype of the learner (torch.float32), got torch.float16",
        ),
        (lambda: MetaLearner(2, 4)(torch.zeros(2, 3, 5)), "rows.x must have 4 features, got shape [2, 3, 5]"),
        (lambda: MetaLearner(2, 4, 1).task_modules[2], "t must be a task in 0..1, got 2"),
        (
            lambda: MetaLearner(2, task_module=nn.Linear(2, 1)).heads.load_heads([nn.Linear(2, 1), nn.Linear(3, 1)]),
            "modules[1] must have the parameters of task 1's module, got ['weight', 'bias']",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def sharing(widths, frozen=True):
    """Modules that hold one layer in common, the same tensors."""
    common = nn.Linear(3, 4).requires_grad_(not frozen)
    return common, [nn.Sequential(common, nn.Tanh(), nn.Linear(4, width)) for width in widths]


def test_frozen_parameters_in_common_are_kept_once():
    common, modules = sharing([2, 2, 1, 2])
    stack = TaskStack(modules)
    assert stack.members == [[0, 1, 3], [2]]
    assert {name: list(p.shape) for name, p in stack.groups[0].named_parameters()} == {
        "0.weight": [4, 3],
        "0.bias": [4],
        "2.weight": [3, 2, 4],
        "2.bias": [3, 2],
    }
    # of one module alone nothing is in common
    assert list(stack.groups[1][0].weight.shape) == [1, 4, 3]
    x = torch.randn(4, 5, 3)
    for tasks in (range(4), [3, 2], [1, 3, 1]):
        inputs = [x[t] for t in tasks]
        for z, t in zip(stack(inputs, tasks), tasks, strict=True):
            torch.testing.assert_close(z, modules[t](x[t]))
    assert torch.equal(stack.head(3)[0].weight, common.weight)
    assert stack.head(3)[0].weight is not stack.groups[0][0].weight
    assert len(stack.owners()) == 6
    # a gradient makes them each task's own, as does a copy
    assert list(TaskStack(sharing([2, 2], frozen=False)[1]).groups[0][0].weight.shape) == [2, 4, 3]
    copies = [copy.deepcopy(module) for module in modules[:2]]
    assert list(TaskStack(copies).groups[0][0].weight.shape) == [2, 4, 3]


def test_frozen_parameters_in_common_are_loaded_once():
    _, modules = sharing([2, 2])
    stack, (other, others) = TaskStack(modules), sharing([2, 2])
    stack.load_heads(others)
    assert torch.equal(stack.groups[0][0].weight, other.weight)
    stack.load_heads([stack.head(1), stack.head(0)])
    assert torch.equal(stack.groups[0][2].weight[0], others[1][2].weight)
    with pytest.raises(ValueError, match=r"^modules\[1\] must hold the values of 0.weight that the tasks have in"):
        stack.load_heads([others[0], modules[1]])


def test_frozen_tied_parameters_in_common():
    common = nn.Linear(3, 3).requires_grad_(False)
    modules = [nn.Sequential(common, nn.Linear(3, 3), common) for _ in range(2)]
    stack, x = TaskStack(modules), torch.randn(2, 4, 3)
    for z, module, value in zip(stack(x), modules, x, strict=True):
        torch.testing.assert_close(z, module(value))
    stack.load_heads(modules)
    assert stack.groups[0][0].weight is stack.groups[0][2].weight


def test_frozen_parameters_in_common_without_vmap():
    class Reads(nn.Module):
        def __init__(self, common):
            super().__init__()
            self.common, self.own = common, nn.Linear(4, 2)

        def forward(self, x):
            return self.own(self.common(x)) * (1 if x.sum().item() > 0 else 2)

    common = nn.Linear(3, 4).requires_grad_(False)
    modules, x = [Reads(common), Reads(common)], torch.randn(2, 5, 3)
    with pytest.warns(UserWarning, match="vmap cannot run Reads, one call a task instead"):
        outputs = TaskStack(modules)(x)
    for z, module, value in zip(outputs, modules, x, strict=True):
        torch.testing.assert_close(z, module(value))
