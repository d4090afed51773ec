"""mlp_adapt: the battery over all its options, and its meta-gradient against a hand-written loop."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F

from mtml_fast.ops import OPERATORS, backend, mlp_adapt
from mtml_fast.ops._route import TorchDispatchMode
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
    BadInput("label-high", change(support_y=torch.full((3, 5), 4)), ValueError, "support_y must be in 0..3, got 4"),
    BadInput("label-low", change(query_y=torch.full((3, 6), -1)), ValueError, "query_y must be in 0..3, got -1"),
    BadInput("label-dtype", change(support_y=torch.ones(3, 5)), TypeError, "support_y must be int64 class labels"),
    BadInput("label-shape", change(support_y=torch.ones(3, 4).long()), ValueError, "support_y must be [T=3, N=5], got"),
    BadInput(
        "label-absent",
        change(class_mask=torch.tensor([[True, True, True, False]] * 3), support_y=torch.full((3, 5), 3)),
        ValueError,
        "support_y must be a class of its task in class_mask, got 3 in task 0",
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
