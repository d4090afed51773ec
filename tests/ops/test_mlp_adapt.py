"""mlp_adapt: the battery over all its options, and its meta-gradient against a hand-written loop."""

import ctypes
import itertools
import re
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
import torch.nn.functional as F

from mtml_fast.ops import OPERATORS, backend, mlp_adapt, mlp_adapt_mean
from mtml_fast.ops._route import TorchDispatchMode
from mtml_fast.ops.mlp_adapt import _arguments, eager
from mtml_fast.testing import BadInput, Case, op_battery


def offsets_of(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


def make(widths, tasks, shots, query, rates="scalar", per_task_start=(), classes=None, labels=True, **options):
    """shots, query: rows of every task, or a list with the rows of each. classes: how many outputs each task has."""

    def arguments(dtype, generator):
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
        bias, norm, loss = options.get("bias", True), options.get("norm", False), options.get("loss", "cross_entropy")
        shapes = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            hidden = i < len(widths) - 2
            shapes += [(outputs, inputs), *[(outputs,)] * (bias + 2 * (norm and hidden))]
        params = [
            draw(*((tasks,) if i in per_task_start else ()), *shape) / max(shape[-1], 1) ** 0.5
            for i, shape in enumerate(shapes)
        ]
        steps = options.get("steps", 1)
        rate = lambda *shape: 0.1 + 0.3 * draw(*shape).abs()  # noqa: E731
        lr = {
            "number": lambda: 0.3,
            "scalar": lambda: rate(),
            "step": lambda: rate(steps),
            "layer": lambda: rate(1, len(widths) - 1),
            "table": lambda: rate(steps, len(params)),
            "more": lambda: rate(steps + 2, len(params)),
            "parameter": lambda: [rate(*shape) for shape in shapes],
            "both": lambda: [rate(steps, *shape) for shape in shapes],
        }[rates]()
        call = dict(params=params, lr=lr, **options)
        outputs = widths[-1]
        limit = torch.tensor(classes if classes else [outputs] * tasks, dtype=torch.int64)
        if classes:
            call["class_mask"] = torch.arange(outputs) < limit[:, None]
        for name, rows in (("support", shots), ("query", query)):
            ragged = isinstance(rows, list)
            counts = torch.tensor(rows if ragged else [rows] * tasks, dtype=torch.int64)
            lead = (int(counts.sum()),) if ragged else (tasks, rows)
            call[f"{name}_x"] = draw(*lead, widths[0])
            if ragged:
                call[f"{name}_offsets"] = offsets_of(rows)
            if loss == "cross_entropy":
                y = torch.randint(0, 1000, lead, generator=generator)
                own = limit.repeat_interleave(counts).view(lead) if ragged else limit[:, None].expand(lead)
                y = y % own
            else:
                y = torch.rand((*lead, outputs), generator=generator).to(dtype)
            if name == "support" or labels:
                call[f"{name}_y"] = y
        return call

    return arguments


def axes(ragged=False, starts=False, masks=False):
    support, query = ("support_offsets", "query_offsets") if ragged else ("T", "T")
    names = dict(support_x=support, support_y=support, query_x=query, query_y=query)
    return {**names, **({"class_mask": "T"} if masks else {}), **({"params": "T"} if starts else {})}


NORM = dict(norm=True, norm_eps=1e-3)
ALL = dict(momentum=0.5, weight_decay=0.1, clip=0.8, every_step=True, return_parameters=True)
STARTS = tuple(range(12))
CASES = [
    Case("plain", make((7, 9, 4), 3, 5, 6), axes()),
    Case("head", make((6, 3), 4, 5, 2, steps=3), axes()),
    Case("tiny", make((2, 2, 2), 2, 2, 2, activation="tanh", steps=2, return_parameters=True), axes(), tiny=True),
    Case("tiny-head", make((2, 2), 2, 3, 2, "table", steps=2, bias=False), axes(), tiny=True),
    Case("tiny-norm", make((2, 3, 1), 2, 3, 4, loss="mse", activation="silu", steps=1, **NORM), axes(), tiny=True),
    Case(
        "tiny-all",
        make((2, 2, 2), 2, 3, 2, "both", loss="bce", activation="gelu", steps=2, **ALL),
        axes(),
        tiny=True,
    ),
    Case(
        "tiny-ragged",
        make((2, 2, 3), 2, [2, 3], [1, 2], activation="elu", classes=[3, 2], clip=0.2),
        axes(True, masks=True),
        tiny=True,
    ),
    Case("tiny-start", make((2, 2), 2, 2, 1, per_task_start=STARTS, steps=1), axes(starts=True), tiny=True),
    Case("deep", make((5, 8, 7, 6, 6, 3), 2, 6, 4, steps=4, rates="layer"), axes()),
    Case("norm", make((6, 8, 7, 5), 3, 6, 9, steps=2, **NORM), axes()),
    Case("norm-ragged", make((6, 8, 5), 3, [3, 7, 2], [4, 2, 5], steps=2, **NORM), axes(True)),
    Case("per-step", make((4, 6, 2), 3, 5, 5, "step", steps=3, loss="mse", activation="softplus"), axes()),
    Case("more-rates", make((4, 6, 2), 3, 5, 5, "more", steps=2), axes()),
    Case("meta-sgd", make((4, 6, 2), 3, 5, 5, "parameter", steps=3, loss="bce", activation="sigmoid"), axes()),
    Case(
        "everything",
        make((4, 6, 5, 3), 3, [3, 1, 6], [2, 5, 1], "table", classes=[2, 3, 1], steps=3, **ALL),
        axes(True, masks=True),
    ),
    Case("mixed-start", make((4, 6, 3), 3, 4, 4, per_task_start=(1, 2), steps=2)),
    Case("anil", make((4, 6, 3), 3, 4, 4, steps=2, adapted=[False, False, True, True]), axes()),
    Case("boil", make((4, 6, 3), 3, 4, 4, steps=2, adapted=[True, True, False, False]), axes()),
    Case("first-order", make((4, 6, 3), 3, 4, 4, steps=3, first_order=True, momentum=0.3), axes()),
    Case("multi-step", make((4, 6, 3), 3, 4, 4, steps=3, every_step=True), axes()),
    Case(
        "mse-ways",
        make((4, 6, 3), 2, 4, 4, steps=2, loss="mse", classes=[1, 3], activation="leaky_relu"),
        axes(masks=True),
    ),
    Case("linear", make((4, 6, 3), 2, 4, 4, "number", steps=2, activation="identity"), axes()),
    Case("unlabelled", make((4, 6, 3), 3, 4, 4, steps=2, labels=False)),
    Case("no-step", make((4, 6, 3), 3, 4, 4, steps=0, return_parameters=True), axes()),
    Case("no-task-all", make((4, 6, 3), 0, 4, 4, steps=2, return_parameters=True, clip=0.5)),
    Case("nothing-adapted", make((4, 6, 3), 2, 4, 4, steps=2, adapted=[False] * 4, clip=0.5, momentum=0.5)),
    Case("no-task", make((4, 6, 3), 0, 4, 4, steps=2)),
    Case("one", make((1, 1, 1), 1, 1, 1, loss="mse", steps=2), axes()),
    Case("odd", make((17, 33, 7), 5, 3, 19, activation="gelu_tanh", steps=2), axes()),
]


def change(**values):
    return lambda arguments: {**arguments, **values}


BAD = [
    BadInput("params-type", change(params=torch.ones(2)), TypeError, "params must be a list of tensors, got Tensor"),
    BadInput(
        "params-count",
        lambda a: {**a, "params": a["params"][:3]},
        ValueError,
        "params must hold weight, bias for every layer (the last without norm), got 3 tensors",
    ),
    BadInput(
        "params-chain",
        lambda a: {**a, "params": [a["params"][0], *a["params"][1:2], torch.ones(4, 8), a["params"][3]]},
        ValueError,
        "params[2] must have shape [4, 9] per task, got [4, 8]",
    ),
    BadInput(
        "params-rank",
        lambda a: {**a, "params": [a["params"][0][0], *a["params"][1:]]},
        ValueError,
        "params[0] must be [O, I] or [T, O, I], got shape [7]",
    ),
    BadInput(
        "params-tasks",
        lambda a: {**a, "params": [a["params"][0].expand(2, 9, 7), *a["params"][1:]]},
        ValueError,
        "params[0] must have a task axis of T=3, got shape [2, 9, 7]",
    ),
    BadInput(
        "params-dtype",
        lambda a: {**a, "params": [p.double() for p in a["params"]]},
        TypeError,
        "support_x must have the dtype of params[0] (torch.float64), got torch.float32",
    ),
    BadInput(
        "support-rank", change(support_x=torch.ones(3, 7)), ValueError, "support_x must be [T, N, D], got shape [3, 7]"
    ),
    BadInput(
        "support-empty",
        change(support_x=torch.ones(3, 0, 7), support_y=torch.ones(3, 0).long()),
        ValueError,
        "support_x must hold at least one row in every task, got shape [3, 0, 7]",
    ),
    BadInput("support-width", change(support_x=torch.ones(3, 5, 8)), ValueError, "support_x must have D=7 features"),
    BadInput(
        "support-dtype", change(support_x=torch.ones(3, 5, 7).long()), TypeError, "support_x must be float32 or float64"
    ),
    BadInput(
        "query-tasks",
        change(query_x=torch.ones(2, 6, 7)),
        ValueError,
        "query_x must hold the 3 tasks of support_x, got 2",
    ),
    BadInput(
        "label-high",
        change(support_y=torch.full((3, 5), 4)),
        ValueError,
        "support_y must be in 0..3, got 4",
        reads=True,
    ),
    BadInput(
        "label-low", change(query_y=torch.full((3, 6), -1)), ValueError, "query_y must be in 0..3, got -1", reads=True
    ),
    BadInput("label-dtype", change(support_y=torch.ones(3, 5)), TypeError, "support_y must be int64 class labels"),
    BadInput("label-shape", change(support_y=torch.ones(3, 4).long()), ValueError, "support_y must be [T=3, N=5], got"),
    BadInput(
        "label-absent",
        change(class_mask=torch.tensor([[True, True, True, False]] * 3), support_y=torch.full((3, 5), 3)),
        ValueError,
        "support_y must be a class of its task in class_mask, got 3 in task 0",
        reads=True,
    ),
    BadInput(
        "target-shape",
        change(loss="mse", support_y=torch.ones(3, 5, 3)),
        ValueError,
        "support_y must be [T=3, N=5, C=4]",
    ),
    BadInput(
        "target-grad",
        change(loss="mse", support_y=torch.ones(3, 5, 4, requires_grad=True)),
        ValueError,
        "support_y must not require a gradient",
    ),
    BadInput(
        "label-device",
        change(support_y=torch.ones(3, 5, dtype=torch.int64, device="meta")),
        ValueError,
        "support_y must be on the device of its rows (cpu), got meta",
    ),
    BadInput(
        "params-device",
        lambda a: {**a, "params": [a["params"][0].to("meta"), *a["params"][1:]]},
        ValueError,
        "must be on the device of params[0] (meta), got cpu",
    ),
    BadInput("mask", change(class_mask=torch.ones(3, 4)), TypeError, "class_mask must be bool, got torch.float32"),
    BadInput("mask-shape", change(class_mask=torch.ones(3, 5).bool()), ValueError, "class_mask must be [T=3, C=4]"),
    BadInput("lr-nan", change(lr=float("nan")), ValueError, "lr must be finite, got nan"),
    BadInput("lr-type", change(lr="0.1"), TypeError, "lr must be a number, got '0.1'"),
    BadInput("lr-shape", change(lr=torch.ones(2, 3), steps=2), ValueError, "lr must have shape [], [K=2]"),
    BadInput("lr-few", change(lr=torch.ones(2), steps=3), ValueError, "lr must have shape [], [K=3]"),
    BadInput("lr-list", change(lr=[torch.ones(3)] * 4), ValueError, "lr[0] must have shape [], [9, 7]"),
    BadInput("steps", change(steps=-1), ValueError, "steps must be finite, at least 0, got -1"),
    BadInput("steps-type", change(steps=1.5), TypeError, "steps must be an integer, got 1.5"),
    BadInput("loss", change(loss="nll"), ValueError, "loss must be one of 'cross_entropy', 'mse', 'bce', got 'nll'"),
    BadInput("activation", change(activation="mish"), ValueError, "activation must be one of 'relu'"),
    BadInput("momentum", change(momentum=1.5), ValueError, "momentum must be finite"),
    BadInput("clip", change(clip=-1.0), ValueError, "clip must be finite, above 0, got -1.0"),
    BadInput("norm-eps", change(norm_eps=0.0), ValueError, "norm_eps must be finite, above 0, got 0.0"),
    BadInput(
        "adapted", change(adapted=[True]), ValueError, "adapted must hold one bool for each of the 4 params, got 1"
    ),
]


def per_task(results, arguments):
    """Outputs, losses and parameters of each task; the step axis, where there is one, goes along."""
    outputs, losses, *parameters = results
    step_axis = int(arguments.get("every_step", False))
    if "query_offsets" in arguments:
        outputs = outputs.split(arguments["query_offsets"].diff().tolist(), step_axis)
    else:
        outputs = outputs.unbind(step_axis)
    losses = losses.unbind(step_axis)
    return [[o, loss, *(p[t] for p in parameters)] for t, (o, loss) in enumerate(zip(outputs, losses, strict=True))]


@pytest.mark.parametrize(
    "check", op_battery(mlp_adapt, OPERATORS["mlp_adapt"], CASES, per_task=per_task, bad_inputs=BAD), ids=str
)
def test_battery(check):
    check()


def hand_written(params, sx, sy, qx, qy, lr, steps, first_order):
    """The meta-loss of a two-layer tanh network, one task after the other, with nothing of the library."""
    total = 0.0
    for t in range(sx.shape[0]):
        fast = list(params)
        net = lambda x, w: (x @ w[0].T + w[1]).tanh() @ w[2].T + w[3]  # noqa: E731
        for _ in range(steps):
            grads = torch.autograd.grad(F.cross_entropy(net(sx[t], fast), sy[t]), fast, create_graph=not first_order)
            fast = [w - lr * g for w, g in zip(fast, grads, strict=True)]
        total = total + F.cross_entropy(net(qx[t], fast), qy[t])
    return total / sx.shape[0]


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_equals_a_hand_written_loop(first_order, steps):
    torch.manual_seed(0)
    call = make((6, 8, 3), 4, 5, 7)(torch.float64, torch.Generator().manual_seed(1))
    rows = [call[name] for name in ("support_x", "support_y", "query_x", "query_y")]
    params = [p.requires_grad_() for p in call["params"]]
    expected = torch.autograd.grad(hand_written(params, *rows, 0.3, steps, first_order), params)
    result = mlp_adapt(params, *rows, lr=0.3, steps=steps, activation="tanh", first_order=first_order)
    for a, b in zip(torch.autograd.grad(result.losses.mean(), params), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_second_order_is_not_first_order():
    call = make((6, 8, 3), 4, 5, 7, steps=2)(torch.float64, torch.Generator().manual_seed(1))
    params = [p.requires_grad_() for p in call["params"]]
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(mlp_adapt(**call, first_order=f).losses.mean(), params)])
        for f in (False, True)
    ]
    assert (grads[0] - grads[1]).norm() > 1e-3 * grads[0].norm()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, of its decompositions
def test_third_order_is_there_by_the_reference():
    """The operator refuses; torch.func goes through the reference and gives it."""
    call = make((2, 2), 2, 3, 2, bias=False)(torch.float64, torch.Generator().manual_seed(1))
    weight = call.pop("params")[0]
    loss = lambda w: mlp_adapt(params=[w], **call).losses.sum()  # noqa: E731
    assert torch.func.hessian(loss)(weight).shape == (2, 2, 2, 2)
    with backend("operator"), pytest.raises(RuntimeError, match="third order"):
        torch.autograd.functional.hessian(loss, weight)


def test_meta_tensors_have_shapes():
    call = make((6, 8, 3), 4, 5, 7, return_parameters=True)(torch.float32, torch.Generator())
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    result = mlp_adapt(**{**meta, "params": [p.to("meta") for p in call["params"]]})
    assert result.outputs.shape == (4, 7, 3)
    assert result.losses.shape == (4,)
    assert [p.shape for p in result.parameters] == [(4, 8, 6), (4, 8), (4, 3, 8), (4, 3)]


def test_memory_without_a_gradient_does_not_grow_with_the_steps():
    """Only the weights of the step at hand are kept."""
    kept = []
    for steps in (1, 20):
        call = make((30, 30, 3), 4, 5, 5, steps=steps)(torch.float32, torch.Generator().manual_seed(0))
        alive = _live_bytes(lambda call=call: mlp_adapt(**call))
        kept.append(alive)
    assert kept[1] < 1.5 * kept[0]


def _live_bytes(call):
    """The most bytes of float tensors alive at the end of any operation."""
    live, most = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(t, torch.Tensor):
                    storage = t.untyped_storage()
                    live[id(storage)] = weakref.ref(t), storage.nbytes()
            now = sum(size for ref, size in live.values() if ref() is not None)
            most = max(most, now)
            return result

    with torch.no_grad(), Watch():
        call()
    return most


needs_native = pytest.mark.skipif(OPERATORS["mlp_adapt"].served_by("cpu") != "native", reason="needs native kernels")


def leaves_of(call):
    """Everything with a derivative, as leaves that ask for it, and the call with them."""
    call = dict(call)
    call["params"] = [p.detach().requires_grad_() for p in call["params"]]
    call["support_x"], call["query_x"] = (call[name].detach().requires_grad_() for name in ("support_x", "query_x"))
    leaves = [*call["params"], call["support_x"], call["query_x"]]
    if isinstance(call["lr"], torch.Tensor):
        call["lr"] = call["lr"].detach().requires_grad_()
        leaves.append(call["lr"])
    elif isinstance(call["lr"], list):
        call["lr"] = [rate.detach().requires_grad_() for rate in call["lr"]]
        leaves += call["lr"]
    return call, leaves


ROUTES = {
    "plain": make((4, 6, 3), 3, 4, 5, steps=2),
    "norm": make((4, 6, 5, 3), 3, 4, 5, steps=2, norm=True, activation="tanh"),
    "table": make((4, 6, 3), 3, 4, 5, "table", steps=3, momentum=0.4, weight_decay=0.1),
    "more": make((4, 6, 3), 3, 4, 5, "more", steps=2),
    "meta-sgd": make((4, 6, 3), 3, 4, 5, "both", steps=2, loss="mse", activation="silu", clip=0.5),
    "ragged": make((4, 6, 3), 3, [2, 5, 1], [3, 1, 4], "step", steps=2, classes=[2, 3, 3]),
    "every-step": make((4, 6, 3), 3, 4, 5, "layer", steps=2, every_step=True),
    "starts": make((4, 6, 3), 3, 4, 5, per_task_start=STARTS, steps=2),
    "frozen": make((4, 6, 3), 3, 4, 5, "table", steps=2, adapted=[False, True, True, False]),
    "no-step": make((4, 6, 3), 3, 4, 5, "table", steps=0),
    "first-order": make((4, 6, 3), 3, 4, 5, "table", steps=2, first_order=True),
}


def drawn(name, dtype=torch.float64):
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "big") % 1000)
    return {**ROUTES, **THREADED}[name](dtype, generator)


def assert_close(a, b):
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("name", ROUTES)
def test_store(name):
    """Kept or recomputed, the gradients are those of the reference, for any cotangents."""
    call, leaves = leaves_of(drawn(name))
    grads = {}
    for store, server in (("all", "reference"), ("all", "auto"), ("recompute", "auto"), ("all", "operator")):
        with backend(server):
            result = mlp_adapt(**call, store=store, return_parameters=True)
        results = [result.outputs, result.losses, *result.parameters]
        generator = torch.Generator().manual_seed(5)
        draws = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in results]
        cotangents = [torch.where(r.isfinite(), d, 0.0) for r, d in zip(results, draws, strict=True)]
        grads[store, server] = torch.autograd.grad(
            results, leaves, cotangents, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        again = torch.autograd.grad(results, leaves, cotangents, allow_unused=True, materialize_grads=True)
        assert_close(again, grads[store, server])
    expected = grads.pop(("all", "reference"))
    for mine in grads.values():
        assert_close(mine, expected)


def truth_of_the_mean(call, leaves, weights):
    """The gradient of weights[0] outputs + weights[1] losses + weights[2] mean loss, by the reference."""
    with backend("reference"):
        result = mlp_adapt(**call)
    last = result.losses[-1] if result.losses.dim() > 1 else result.losses
    finite = torch.where(result.outputs.isfinite(), result.outputs, 0.0)
    total = weights[0] * finite.sin().sum() + weights[1] * result.losses.cos().sum() + weights[2] * last.mean()
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("weights", [(0, 0, 1), (0, 0, 0.37), (1, 0, 0), (0, 1, 0), (0.5, 2, 3), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ROUTES)
def test_mean_loss_in_any_use(name, weights):
    """Its own gradient, computed in advance, and every mixture with the outputs and the losses, more than once."""
    call, leaves = leaves_of(drawn(name))
    expected = truth_of_the_mean(call, leaves, weights)
    for server in ("auto", "operator"):
        with backend(server):
            result = mlp_adapt_mean(**call)
        finite = torch.where(result.outputs.isfinite(), result.outputs, 0.0)
        terms = [finite.sin().sum(), result.losses.cos().sum(), result.mean_loss]
        total = sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)
        for _ in range(3):
            mine = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            assert_close(mine, expected)
            # what was handed out may be written to
            for g in mine:
                g.add_(1.0)


@pytest.mark.parametrize("weights", [(0, 0, 1), (0.5, 2, 3)], ids=str)
def test_mean_loss_where_no_kernel_computes_its_gradient_at_once(weights, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(eager, "_has_gradients_at_once", lambda _: False)
    call, leaves = leaves_of(drawn("table"))
    result = mlp_adapt_mean(**call)
    terms = [result.outputs.sin().sum(), result.losses.cos().sum(), result.mean_loss]
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)
    mine = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    assert_close(mine, truth_of_the_mean(call, leaves, weights))


def test_mean_loss_accumulates():
    """backward twice adds the same gradient twice, also where .grad has taken what was computed in advance."""
    call, leaves = leaves_of(drawn("table"))
    expected = truth_of_the_mean(call, leaves, (0, 0, 1))
    mean = mlp_adapt_mean(**call).mean_loss
    for times in (1, 2, 3):
        mean.backward(retain_graph=True)
        assert_close([leaf.grad for leaf in leaves], [times * g for g in expected])
    mlp_adapt_mean(**call).mean_loss.backward()
    assert_close([leaf.grad for leaf in leaves], [4 * g for g in expected])


def test_mean_loss_without_a_gradient():
    call, leaves = leaves_of(drawn("plain"))
    with_graph = mlp_adapt_mean(**call)
    with torch.no_grad():
        without = mlp_adapt_mean(**call)
    assert not without.mean_loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(without, with_graph, strict=True))
    some = mlp_adapt_mean(**{**call, "params": [p.detach() for p in call["params"]]})
    grads = torch.autograd.grad(some.mean_loss, leaves[-3:-1])
    assert_close(grads, truth_of_the_mean(call, leaves[-3:-1], (0, 0, 1)))
    with pytest.raises(ValueError, match="query_y must be given"):
        mlp_adapt_mean(**{**call, "query_y": None})


class NoGradient(torch.autograd.Function):
    """Passes nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("kind", ["mean", "all", "recompute"])
def test_nothing_comes_back(kind):
    call, leaves = leaves_of(drawn("plain"))
    loss = mlp_adapt_mean(**call).mean_loss if kind == "mean" else mlp_adapt(**call, store=kind).losses
    grads = torch.autograd.grad(NoGradient.apply(loss).sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all((g == 0).all() for g in grads)


def in_use():
    """Bytes that the process has allocated and not freed, as the C library counts them."""

    class Counts(ctypes.Structure):
        names = (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    function = ctypes.CDLL(None).mallinfo2
    function.restype = Counts
    counts = function()
    return counts.uordblks + counts.hblkhd


@needs_native
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's count of memory in use")
@pytest.mark.parametrize("kind", ["mean", "all", "forward", "error"])
def test_calls_leave_no_memory_behind(kind):
    call, _ = leaves_of(drawn("plain"))
    arguments, _ = _arguments(**call)
    bad = (*arguments[:3], arguments[3] + 9, *arguments[4:])

    def calls(count):
        for _ in range(count):
            if kind == "mean":
                mlp_adapt_mean(**call).mean_loss.backward()
            elif kind == "all":
                mlp_adapt(**call).losses.sum().backward()
            elif kind == "forward":
                mlp_adapt(**call)
            else:
                assert eager.adapt_mean_or_none(bad) is None

    calls(200)
    before = in_use()
    calls(1000)
    assert in_use() - before < 1000 * 20


@needs_native
def test_too_large_a_state_is_one_line():
    call = {**drawn("plain"), "steps": 2**31 - 1}
    call["params"] = [p.requires_grad_() for p in call["params"]]
    with pytest.raises(MemoryError, match=r"^mtml_fast: there is no memory for a tensor of shape \[\d+\]$"):
        mlp_adapt(**call)
    for server in (mlp_adapt, mlp_adapt_mean):
        with pytest.raises(ValueError, match="steps must be at least 0 and below 2147483648, got 4611686018427387904"):
            server(**{**call, "steps": 2**62})


@needs_native
def test_settings_that_do_not_fit_the_tensors_are_refused():
    """The operators without autograd read neither tensors nor numbers that they were not given."""
    call, _ = leaves_of(drawn("plain"))
    arguments, _ = _arguments(**call)
    tensors = eager._tensors(arguments)
    needs = eager._needs(arguments, tensors)
    settings = eager._settings(arguments, needs)
    gradients = torch.ops.mtml_fast._mlp_adapt_gradients
    assert len(gradients(tensors, settings)) == 3 + sum(needs)

    for wrong in (tensors[:-1], [*tensors, tensors[0]], []):
        with pytest.raises(ValueError, match="tensors must be as many as settings say"):
            gradients(wrong, settings)
    for wrong in (settings.float(), settings[None], settings.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="settings must be float64 numbers in a row"):
            gradients(tensors, wrong)
    for count in range(settings.numel()):
        with pytest.raises(ValueError, match="settings must hold"):
            gradients(tensors, settings[:count])
    with pytest.raises(ValueError, match="settings must hold a number for each setting, got 1 more"):
        gradients(tensors, torch.cat([settings, settings[:1]]))
    # the counts of params, needs and adapted
    for place in (0, 5, 6 + len(needs)):
        for value in (-1.0, 1e9, 2.0**62, 2.0**63, torch.nan):
            wrong = settings.clone()
            wrong[place] = value
            with pytest.raises(ValueError, match=r"settings|tensors must be"):
                gradients(tensors, wrong)


@pytest.mark.parametrize("before", ["torch.set_default_device('meta')", "torch.inference_mode().__enter__()"])
def test_defaults_at_import_do_not_matter(before):
    lines = f"""
        import torch
        {before}
        import mtml_fast as mf
        torch.set_default_device("cpu")
        with torch.inference_mode(False):
            maml, batch = mf.MAML(mf.nn.mlp(1, (4,), 1)), mf.data.Sinusoid().sample(2)
            maml(batch).task_losses.sum().backward()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], check=True)


@needs_native
@pytest.mark.parametrize("kind", ["mean", "all", "recompute"])
def test_third_order_is_refused(kind):
    """In eager mode too, and only when it is asked for."""
    call, leaves = leaves_of(drawn("plain"))

    def loss():
        return mlp_adapt_mean(**call).mean_loss if kind == "mean" else mlp_adapt(**call, store=kind).losses.mean()

    grads = torch.autograd.grad(loss(), leaves, create_graph=True)
    assert_close([g.detach() for g in grads], truth_of_the_mean(call, leaves, (0, 0, 1)))
    with pytest.raises(RuntimeError, match=r"mlp_adapt: .*third order"):
        torch.autograd.grad(sum(g.sum() for g in grads), leaves)


def test_inputs_changed_in_between_are_an_error():
    """What backward needs was changed in place: autograd notices, as with any operation of its own."""
    call, leaves = leaves_of(drawn("plain"))
    result = mlp_adapt(**call)
    with torch.no_grad():
        leaves[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.losses.mean().backward()


@needs_native
def test_rates_of_more_tasks_than_are_in_memory_at_once():
    """Cotangents of 42 MB a task: the sums of every row of the rates go on from one chunk of tasks to the next."""
    generator, (tasks, rows, inputs, outputs, steps) = torch.Generator().manual_seed(0), (7, 2, 500, 100, 104)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, x, y = draw(outputs, inputs) / 30, draw(1, rows, inputs), draw(1, rows, outputs)
    rates = torch.full((steps, outputs, inputs), 0.01, dtype=torch.float64, requires_grad=True)

    def gradient(tasks):
        rows = [r.expand(tasks, -1, -1) for r in (x, y, x + 1, y)]
        losses = mlp_adapt([weight], *rows, lr=[rates], steps=steps, bias=False, loss="mse").losses
        return torch.autograd.grad(losses.sum(), rates)[0]

    torch.testing.assert_close(gradient(tasks), tasks * gradient(1), rtol=1e-9, atol=1e-12)


# as much work as is worth threads, which the small calls are not
THREADED = {
    "threads-norm": make((64, 96, 48, 5), 24, 5, 6, "layer", steps=3, norm=True),
    "threads-starts": make((64, 96, 5), 8, 9, 6, steps=3, per_task_start=(0, 1, 2, 3)),
    "threads-ragged": make((200, 64, 32, 5), 16, [1, 9, 4, 30] * 4, [7, 2, 3, 25] * 4, "layer", steps=2),
}


@needs_native
@pytest.mark.parametrize("name", [*ROUTES, *THREADED])
def test_same_bits_on_any_number_of_threads(name):
    call, leaves = leaves_of(drawn(name, torch.float32))
    runs, threads = [], torch.get_num_threads()
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            mean, kept = mlp_adapt_mean(**call), mlp_adapt(**call)
            grads = [torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
                     for loss in (mean.mean_loss, kept.losses.mean())]  # fmt: skip
            runs.append([*mean, *kept[:2], *grads[0], *grads[1]])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["plain", "norm", "meta-sgd"])
def test_bad_values_stay_in_their_task(name, bad):
    call = drawn(name, torch.float32)
    clean = mlp_adapt(**call, return_parameters=True)
    call["support_x"] = call["support_x"].clone()
    call["support_x"][1, 0, 0] = bad
    dirty = mlp_adapt(**call, return_parameters=True)
    for a, b in zip([*clean[:2], *clean.parameters], [*dirty[:2], *dirty.parameters], strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not dirty.losses[1].isfinite()


@needs_native
def test_raw_operators_refuse_what_does_not_fit():
    """Whatever reaches the kernels is checked there too."""
    weight, x, y, rate = torch.ones(2, 3), torch.ones(4, 5, 3), torch.zeros(4, 5).long(), torch.ones(1, 1)
    good = dict(
        params=[weight], lr=[rate], support_x=x, support_y=y, query_x=x, query_y=y, support_offsets=None,
        query_offsets=None, class_mask=None, adapted=[True], steps=1, loss="cross_entropy", activation="relu",
        bias=False, norm=False, norm_eps=1e-5, momentum=0.0, weight_decay=0.0, clip=None, first_order=False,
        every_step=False, return_parameters=False,
    )  # fmt: skip
    torch.ops.mtml_fast.mlp_adapt(*good.values())
    packed, offsets = dict(query_x=x.flatten(0, 1), query_y=y.flatten()), torch.tensor([0, 5, 10, 15, 20])
    torch.ops.mtml_fast.mlp_adapt(*{**good, **packed, "query_offsets": offsets}.values())
    for change, message in (
        (dict(params=[]), "params must hold at least one layer, got none"),
        (dict(params=[weight, weight]), "adapted must hold one bool for each of the 2 params, got 1"),
        (dict(params=[weight.half()]), "params must be float32 or float64"),
        (dict(params=[weight[:, :2]]), "support_x must have D=2 features, as params[0] has, got shape [4, 5, 3]"),
        (dict(params=[weight.expand(3, 2, 3)]), "params[0] must have a task axis of T=4, got shape [3, 2, 3]"),
        (dict(lr=[torch.ones(2, 2)]), "lr must be [1 or K=1, 1 or 1], got shape [2, 2]"),
        (dict(lr=[torch.ones(2, 1)], steps=3), "lr must be [1 or K=3, 1 or 1], got shape [2, 1]"),
        (dict(lr=[torch.ones(1, 3, 2)]), "lr[0] must be [1 or K=1, *[2, 3]], got shape [1, 3, 2]"),
        (dict(lr=[]), "lr must hold one table or 1 tensors, got 0"),
        (dict(lr=[rate * torch.nan]), "lr must be finite, got nan"),
        (dict(support_x=x.double()), "support_x must have the dtype of params[0], float32"),
        (dict(query_x=x[:3]), "query_x must hold the 4 tasks of support_x, got 3"),
        (dict(query_x=x[:, :0], query_y=y[:, :0]), "query_x must hold at least one row in every task"),
        (dict(support_y=y[:, :4]), "support_y must be [T=4, N=5], got shape [4, 4]"),
        (dict(support_y=y + 2), "support_y must be in 0..1, got 2"),
        (dict(query_y=y - 1), "query_y must be in 0..1, got -1"),
        (dict(query_y=y.int()), "query_y must be int64 class labels"),
        (dict(loss="mse"), "support_y must be [T=4, N=5, C=2], got shape [4, 5]"),
        (
            dict(class_mask=torch.tensor([[False, True]] * 4)),
            "support_y must be a class of its task in class_mask, got",
        ),
        (dict(class_mask=torch.ones(4, 3).bool()), "class_mask must be [T=4, C=2], got shape [4, 3]"),
        ({**packed, "query_offsets": offsets - 1}, "query_offsets must run from 0 to the number of rows 20, got -1 to"),
        ({**packed, "query_offsets": offsets * 2}, "query_offsets must run from 0 to the number of rows 20, got 0 to"),
        (
            {**packed, "query_offsets": torch.tensor([0, 30, 10, 15, 20])},
            "query_offsets must increase (no task may be empty), got 30 then 10 at task 1",
        ),
        ({**packed, "query_offsets": offsets[1:]}, "query_x must hold the 4 tasks of support_x, got 3"),
        ({**packed, "query_offsets": offsets.int()}, "query_offsets must be int64"),
        (dict(steps=-1), "steps must be at least 0 and below 2147483648, got -1"),
        (dict(loss="hinge"), "loss must be one of 'cross_entropy', 'mse', 'bce', got 'hinge'"),
        (dict(momentum=1.0), "momentum must be in [0, 1), got 1"),
        (dict(clip=0.0), "clip must be above 0, got 0"),
        (dict(norm_eps=0.0), "norm_eps must be finite, above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.ops.mtml_fast.mlp_adapt(*{**good, **change}.values())
    cotangents = [torch.ones(1, 4, 5, 2), torch.ones(1, 4), torch.empty(0)]
    backward = torch.ops.mtml_fast.mlp_adapt_backward
    assert len(backward(cotangents, *good.values(), [True] * 4)) == 4
    with pytest.raises(ValueError, match=re.escape("grad_outputs[0] must be [1, 4, 5, 2]")):
        backward([torch.ones(1, 4, 5, 3), *cotangents[1:]], *good.values(), [True] * 4)
    with pytest.raises(ValueError, match=re.escape("needs must hold one bool per input tensor (4), got 3")):
        backward(cotangents, *good.values(), [True] * 3)


@pytest.mark.parametrize("function", [mlp_adapt, mlp_adapt_mean])
def test_a_compiler_goes_through(function):
    """In one graph, whatever eager mode asks before it calls a kernel."""
    torch.compiler.reset()
    torch.manual_seed(0)
    params = [torch.randn(*shape, requires_grad=True) for shape in ((4, 3), (4,), (2, 4), (2,))]
    x, y = torch.randn(3, 5, 3), torch.randint(0, 2, (3, 5))

    def meta_loss(x):
        return function(params, x, y, x, y, lr=0.1, steps=2).losses.sum()

    expected = meta_loss(x)
    loss = torch.compile(meta_loss, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(*(torch.autograd.grad(j, params) for j in (loss, expected)), strict=True):
        torch.testing.assert_close(mine, right)
