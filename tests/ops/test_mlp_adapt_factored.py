"""mlp_adapt layer by layer in factored form: what wide networks take on a GPU, here on the CPU."""

import dataclasses
import itertools
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import mtml_fast as mf
from mtml_fast.ops import mlp_adapt
from mtml_fast.ops._route import TorchDispatchMode
from mtml_fast.ops.mlp_adapt import _arguments, eager, factored
from mtml_fast.testing import random_mlp

native = pytest.mark.skipif(not eager.NATIVE, reason="the native kernels are not built")


@pytest.fixture
def served(monkeypatch):
    """Calls that fit go this way; counts them."""
    counts = Counter()

    def is_factored(arguments, by_kernels):
        fits = factored.fits(arguments) and os.environ.get("MTML_FAST_FORM", "factored") == "factored"
        counts[fits] += 1
        return fits

    monkeypatch.setattr(eager, "_is_factored", is_factored)
    monkeypatch.setattr(eager, "_has_gradients_at_once", lambda tensors: False)
    return counts


@native
def test_random_configurations(served, monkeypatch, seed):
    """As those of the kernels in a form that is forced; torch's products do not promise a task alone the same bits."""
    options, draw = random_mlp._options, random_mlp.draw

    def plain(r, steps):
        return {k: v for k, v in options(r, steps).items() if k not in ("momentum", "weight_decay", "clip")}

    monkeypatch.setattr(random_mlp, "_options", plain)
    monkeypatch.setattr(random_mlp, "draw", lambda number: dataclasses.replace(draw(number), form="factored"))
    for name in ("_check_threads", "_check_poison", "_check_alone"):
        monkeypatch.setattr(random_mlp, name, lambda *_: None)
    found = random_mlp.Found()
    for configuration in range(256 * seed, 256 * seed + 100):
        random_mlp.check(configuration, found)
    assert served[True] > 40
    assert found.count == 100


def network(*widths, tasks=2, shots=3, lr=0.1, **options):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    params = []
    for inputs, outputs in itertools.pairwise(widths):
        params += [draw(outputs, inputs) / inputs**0.5, draw(outputs)]
    rows = lambda: torch.randint(widths[-1], (tasks, shots), generator=generator)  # noqa: E731
    return dict(
        params=[p.requires_grad_() for p in params],
        support_x=draw(tasks, shots, widths[0]),
        support_y=rows(),
        query_x=draw(tasks, shots, widths[0]),
        query_y=rows(),
        lr=lr,
        **options,
    )


def arguments_of(*widths, **options):
    return _arguments(**network(*widths, **options))[0]


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        (dict(), True),
        (dict(steps=3, first_order=True, every_step=True, return_parameters=True, activation="gelu"), True),
        (dict(lr=[torch.tensor(0.1)] * 6), True),
        (dict(lr=[torch.full((2, 5, 4), 0.1), *[torch.tensor(0.1)] * 5]), False),
        (dict(momentum=0.5), False),
        (dict(weight_decay=0.5), False),
        (dict(clip=0.5), False),
    ],
)
def test_which_calls_have_this_form(options, fits):
    assert factored.fits(arguments_of(4, 5, 6, 3, **{"steps": 2, **options})) == fits


def test_a_head_has_a_form_of_its_own():
    assert not factored.fits(arguments_of(4, 3))


def test_it_pays_for_wide_networks():
    assert not factored.pays(arguments_of(784, 256, 128, 64, 64, 5, shots=5))
    assert not factored.pays(arguments_of(4000, 1000, 5, shots=5))
    assert factored.pays(arguments_of(784, 1024, 1024, 10, shots=5))
    assert factored.pays(arguments_of(4000, 1000, 5, shots=5, return_parameters=True))
    of_features = network(4000, 1000, 5, shots=5)
    of_features["query_x"].requires_grad_()
    assert factored.pays(_arguments(**of_features)[0])
    # as many as the kernels take, and one more
    header = Path(__file__).parents[2] / "csrc/cuda/mlp_adapt.h"
    layers = int(re.search(r"kMlpLayers = (\d+);", header.read_text()).group(1))
    assert not factored.pays(arguments_of(4, *[5] * layers))
    assert factored.pays(arguments_of(4, *[5] * (layers + 1)))


VIEWS = {
    *("t", "transpose", "unsqueeze", "view", "_unsafe_view", "expand", "select", "slice", "detach", "alias", "squeeze"),
    *("reshape", "permute", "empty", "new_empty", "empty_like", "new_zeros", "lift_fresh"),
}


class Launches(TorchDispatchMode):
    """Counts operations that would be launches on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(n for name, n in self.count.items() if name not in VIEWS)


def launches(tasks, steps, layers):
    widths = [8, *[6] * (layers - 1), 3]
    arguments = arguments_of(*widths, tasks=tasks, steps=steps)
    with Launches() as mode:
        _, losses, _ = factored.adapt(*arguments)
        forward = mode.total
        torch.autograd.grad(losses.sum(), arguments[0])
    # nothing is read on the host: a graph can capture it
    assert not mode.count.keys() & {"_local_scalar_dense", "nonzero", "is_nonzero"}
    return forward, mode.total


def test_launches_are_a_matter_of_steps_and_layers():
    """Of tasks there may be any number; a step of a layer takes at most 14 forward, 27 in reverse."""
    assert launches(2, 3, 3) == launches(50, 3, 3)
    # of three layers and steps, the last of which is behind the fifth step: what it adds is the most
    forward, both = (a - b for a, b in zip(launches(4, 5, 3), launches(4, 4, 3), strict=True))
    assert forward <= 3 * 14
    assert both - forward <= 3 * 27


def test_layers_that_stay_are_passed_once():
    """A frozen body is no part of the steps; its gradient is."""

    def products(steps):
        arguments = arguments_of(8, 7, 6, 3, steps=steps, adapted=[False] * 4 + [True] * 2)
        with Launches() as mode:
            _, losses, _ = factored.adapt(*arguments)
        gradients = torch.autograd.grad(losses.sum(), arguments[0])
        assert all(g.any() for g in gradients)
        return mode.count["mm"] + mode.count["bmm"]

    # of support and query rows: two layers, and the head's products with W_0 and X, once for any number of steps
    assert products(2) == products(5) == 8


@native
def test_no_weight_of_a_task_is_built(served):
    """Memory: factors of rows, where dense weights of 64 tasks would be 64 x 5 matrices."""
    call = network(64, 512, 512, 5, tasks=64, shots=2, steps=5)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    arguments, _ = _arguments(**call)
    with Largest():
        _, losses, _ = factored.adapt(*arguments)
        torch.autograd.grad(losses.sum(), call["params"])
    assert largest < 4 * 64 * 512 * 512 / 16


@native
def test_bad_rows_are_one_line(served):
    torch.manual_seed(0)
    maml = mf.MAML(mf.nn.mlp(8, (16, 12), 4), lr=0.1, steps=2)
    rows = mf.TaskRows(torch.randn(3, 5, 8), torch.randint(0, 4, (3, 5)))
    maml(mf.TaskBatch(rows, rows)).loss.backward()
    for bad, message in (
        (
            mf.TaskRows(rows.x[..., :7], rows.y),
            r"^query_x must have D=8 features, .* got shape ",
        ),
        (mf.TaskRows(rows.x, rows.y + 1), r"^query_y must "),
        (mf.TaskRows(rows.x.double(), rows.y), r"^query_x must have the dtype of "),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            maml(mf.TaskBatch(rows, bad))
    assert served[True] > 0


@native
def test_what_explain_says(served):
    torch.manual_seed(0)
    rows = mf.TaskRows(torch.randn(3, 5, 8), torch.randint(0, 4, (3, 5)))
    batch = mf.TaskBatch(rows, rows)
    model = mf.nn.mlp(8, (16, 12), 4)
    said = mf.explain(model, batch, steps=2)
    assert said.forms == ("8-16 gram", "16-12 factored", "12-4 factored")
    # more steps keep more factors: 1 + 2 + 3 + 4 sets of them in the place of 1 + 2
    assert 2 * said.bytes < mf.explain(model, batch, steps=4).bytes < 4 * said.bytes


@native
@pytest.mark.parametrize(
    ("inner", "forms"),
    [
        (dict(layers="head"), ("8-16 dense", "16-12 dense", "12-4 gram")),
        (dict(layers=["2"]), ("8-16 dense", "16-12 gram", "12-4 dense")),
        (dict(steps=0), ("8-16 dense", "16-12 dense", "12-4 dense")),
    ],
)
def test_what_explain_says_of_layers_that_stay(served, inner, forms):
    rows = mf.TaskRows(torch.randn(3, 5, 8), torch.randint(0, 4, (3, 5)))
    assert mf.explain(mf.nn.mlp(8, (16, 12), 4), mf.TaskBatch(rows, rows), **inner).forms == forms


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(every_step=True),
        dict(adapted=[False, False, True, True, True, True]),
        dict(adapted=[False, False, False, False, True, True]),
    ],
)
def test_bytes_that_autograd_keeps(options):
    """What `plan` counts, against what is really kept."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    arguments = arguments_of(16, 96, 80, 5, tasks=8, shots=4, steps=5, **options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = factored.adapt(*arguments)
    inputs = {t.untyped_storage().data_ptr() for t in (*arguments[0], *arguments[2:6])}
    found = sum(size for place, (size, _) in kept.items() if place not in inputs)
    assert results[1].requires_grad
    assert 0.5 * found < factored.plan(arguments)["bytes"] < 1.5 * found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_task(bad):
    call = network(4, 5, 6, 3, tasks=3, steps=2, return_parameters=True)
    clean = factored.adapt(*_arguments(**call)[0])
    call["support_x"][1, 0, 0] = bad
    spoilt = factored.adapt(*_arguments(**call)[0])
    for before, after in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
        assert after[1].isnan().any()


@native
@pytest.mark.parametrize("steps", [0, 2])
def test_gradients_that_are_zero_are_there(served, steps):
    """Of rates that no step takes, of support rows in first order."""
    call = network(4, 5, 3, steps=steps, first_order=True)
    call["lr"] = torch.tensor(0.1, requires_grad=True)
    call["support_x"].requires_grad_()
    losses = mlp_adapt(**call).losses
    of_rates, of_rows = torch.autograd.grad(losses.sum(), [call["lr"], call["support_x"]])
    assert (of_rates != 0) == (steps > 0)
    assert not of_rows.any()
    outputs = mlp_adapt(**call).outputs
    assert not torch.autograd.grad(outputs.sum(), [call["support_x"]])[0].any()
    assert served[True] == 2


@native
@pytest.mark.parametrize("reader", ["outputs", "losses", "parameters"])
def test_each_result_has_each_derivative(served, reader):
    """Of query rows the adapted parameters know nothing, of nothing the losses without labels: zero, as of kernels."""
    call = network(4, 5, 3, steps=2, return_parameters=True)
    if reader == "losses":
        call["query_y"] = None
    call["query_x"].requires_grad_()
    result = mlp_adapt(**call)
    read = result.parameters[0] if reader == "parameters" else getattr(result, reader)
    gradients = torch.autograd.grad(read.sum(), [call["query_x"], *call["params"]])
    assert any(g.any() for g in gradients) == (reader != "losses")
    assert gradients[0].any() == (reader == "outputs")
    assert served[True] == 1


@native
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, requires_grad=True)])
@pytest.mark.parametrize("every_step", [False, True])
def test_results_may_be_written_into(served, lr, every_step):
    call = network(4, 5, 3, lr=lr, loss="bce", every_step=every_step)
    for rows in ("support_y", "query_y"):
        call[rows] = torch.nn.functional.one_hot(call[rows], 3).float()
    (expected,) = torch.autograd.grad(mlp_adapt(**call).losses.sum(), call["params"][:1])
    result = mlp_adapt(**call)
    result.outputs.zero_()
    result.losses.add_(1)
    assert torch.equal(torch.autograd.grad(result.losses.sum(), call["params"][:1])[0], expected)
    assert served[True] == 2


@native
def test_a_rate_that_is_expanded_itself(served):
    """One number in memory, and a derivative for each element."""
    rates = [torch.tensor(0.1).expand(5, 4).detach().requires_grad_(), *[torch.tensor(0.1)] * 3]
    call = network(4, 5, 3, lr=rates)
    (gradient,) = torch.autograd.grad(mlp_adapt(**call).losses.sum(), rates[:1])
    assert gradient.count_nonzero() > 1
    number = torch.tensor(0.1, requires_grad=True)
    call["lr"] = [number, *rates[1:]]
    (total,) = torch.autograd.grad(mlp_adapt(**call).losses.sum(), number)
    torch.testing.assert_close(gradient.sum(), total)
    assert served == {True: 1, False: 1}


@native
def test_what_runs_again_has_the_values_of_the_first_time(served):
    """With store="recompute" a parameter that has been changed is an error, and never another gradient."""
    call = network(4, 5, 3, store="recompute")
    losses = mlp_adapt(**call).losses
    with torch.no_grad():
        call["params"][0].mul_(2)
    with pytest.raises(RuntimeError, match=r"^mlp_adapt: an argument was modified by an inplace operation"):
        losses.sum().backward()
    with torch.inference_mode():
        assert mlp_adapt(**network(4, 5, 3, store="recompute")).losses.is_inference()
    assert served[True] == 2


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_no_tasks_and_no_rows(loss):
    call = network(4, 5, 3, tasks=0, shots=0, loss=loss)
    if loss == "mse":
        call |= dict(support_y=torch.zeros(0, 0, 3), query_y=torch.zeros(0, 0, 3))
    outputs, losses, _ = factored.adapt(*_arguments(**call)[0])
    assert (outputs.shape, losses.shape) == ((0, 0, 3), (0,))
    assert not any(g.any() for g in torch.autograd.grad(losses.sum(), call["params"]))


@pytest.mark.parametrize("label", [-100, -1, 3])
@pytest.mark.parametrize("rows", ["support_y", "query_y"])
def test_a_label_that_is_no_class_spoils_its_task(rows, label):
    """Nobody reads labels on a device."""
    arguments = list(arguments_of(4, 5, 6, 3, tasks=3))
    _, clean, _ = factored.adapt(*arguments)
    place = {"support_y": 3, "query_y": 5}[rows]
    arguments[place] = arguments[place].clone()
    arguments[place][1, 0] = label
    _, losses, _ = factored.adapt(*arguments)
    assert losses.isnan().tolist() == [False, True, False]
    assert torch.equal(losses[[0, 2]], clean[[0, 2]])
    assert all(g.isnan().any() for g in torch.autograd.grad(losses.sum(), arguments[0]))


@native
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("by", ["kernels", "factored", "reference"])
def test_missing_targets_may_be_nan(request, by, loss):
    """As in heads_loss: of outputs that a task has not nobody looks at the targets."""
    if by == "factored":
        request.getfixturevalue("served")
    call = network(4, 5, 3, steps=2, loss=loss, class_mask=torch.tensor([[True, False, True], [True, True, False]]))
    read = []
    for missing in (0.5, float("nan")):
        targets = torch.where(call["class_mask"][:, None], torch.linspace(0, 1, 18).view(2, 3, 3), missing)
        with mf.backend("reference" if by == "reference" else "auto"):
            result = mlp_adapt(**call | dict(support_y=targets, query_y=targets))
        read.append([result.losses, *torch.autograd.grad(result.losses.sum(), call["params"])])
    assert all(map(torch.equal, *read))


@pytest.mark.parametrize("store", ["all", "recompute"])
@native
def test_third_order(served, store):
    """Kernels refuse it; here autograd has it."""
    call = {k: v.double() if k.endswith("_x") else v for k, v in network(3, 4, 2, activation="tanh").items()}
    call["params"] = [p.detach().double().requires_grad_() for p in call["params"]]

    def curvature(name):
        with mf.backend(name):
            losses = mlp_adapt(**call, steps=2, store=store).losses
        gradients = torch.autograd.grad(losses.sum(), call["params"], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), call["params"])

    torch.testing.assert_close(curvature("auto"), curvature("reference"))
    assert served[True] == 1
