"""heads and heads_loss: the battery, and both against a loop of nn.Linear."""

import pytest
import torch
from torch import nn

from mtml_fast.ops import OPERATORS, heads, heads_loss
from mtml_fast.testing import BadInput, Case, op_battery


def offsets_of(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]) if counts else torch.tensor([0])


def make(rows, outputs, features, hidden=None, bias=True, loss=None, **options):
    """rows: of each task; outputs: of each task, or one number for all."""

    def arguments(dtype, generator):
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
        tasks, total = len(rows), sum(rows)
        widths = outputs if isinstance(outputs, list) else [outputs] * tasks
        call = dict(x=draw(total, features), offsets=offsets_of(rows), weight=draw(sum(widths), hidden or features))
        if bias:
            call["bias"] = draw(sum(widths))
        if isinstance(outputs, list):
            call["out_offsets"] = offsets_of(outputs)
        if hidden:
            call |= dict(hidden_weight=draw(tasks, hidden, features), hidden_bias=draw(tasks, hidden))
        if loss == "cross_entropy":
            labels = [torch.randint(0, c, (n,), generator=generator) for n, c in zip(rows, widths, strict=True)]
            call["y"] = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)
        elif loss is not None:
            call["y"] = torch.rand(sum(n * c for n, c in zip(rows, widths, strict=True)), generator=generator).to(dtype)
        return {**call, **options, **(dict(loss=loss) if loss else {})}

    return arguments


def axes(ragged, loss=None):
    weight = "out_offsets" if ragged else None
    names = dict(x="offsets", hidden_weight="T", hidden_bias="T")
    if weight:
        names |= dict(weight=weight, bias=weight)
    if loss == "cross_entropy":
        names["y"] = "offsets"
    return names


RAGGED, WIDTHS = [3, 1, 5, 2], [2, 7, 1, 4]
CASES = [
    Case("ragged", make(RAGGED, WIDTHS, 6), axes(True)),
    Case("tiny", make([2, 3], [2, 1], 2, hidden=2, activation="tanh"), axes(True), tiny=True),
    Case("tiny-equal", make([2, 1], 2, 3, bias=False), tiny=True),
    Case("hidden", make(RAGGED, WIDTHS, 5, hidden=9, activation="gelu"), axes(True)),
    Case("empty-task", make([3, 0, 2], [2, 3, 4], 4)),
    Case("no-task", make([], 2, 4)),
    Case("one-row", make([1], [1], 1), axes(True)),
    Case("odd", make([17, 63, 7], [3, 65, 1], 31, hidden=33), axes(True)),
]
LOSS_CASES = [
    Case(f"{loss}-{name}", make(rows, widths, features, loss=loss, **options), axes(name != "equal", loss))
    for loss in ("cross_entropy", "mse", "bce")
    for name, rows, widths, features, options in (
        ("ragged", RAGGED, WIDTHS, 6, {}),
        ("hidden", RAGGED, WIDTHS, 5, dict(hidden=9)),
        ("odd", [17, 63, 7], [3, 65, 1], 31, {}),
    )
    if loss == "cross_entropy"
] + [
    Case(
        "tiny",
        make([2, 3], [2, 3], 2, hidden=2, activation="tanh", loss="cross_entropy"),
        axes(True, "cross_entropy"),
        tiny=True,
    ),
    Case("tiny-mse", make([2, 1], 2, 3, loss="mse"), tiny=True),
    Case("tiny-bce", make([2, 1], [1, 2], 2, bias=False, loss="bce"), tiny=True),
    Case("mse", make(RAGGED, WIDTHS, 6, loss="mse", hidden=4)),
    Case("bce", make(RAGGED, WIDTHS, 6, loss="bce")),
    Case("empty-task", make([3, 0, 2], [2, 3, 4], 4, loss="cross_entropy")),
    Case("no-task", make([], 2, 4, loss="mse")),
]


def change(**values):
    return lambda arguments: {**arguments, **values}


BAD = [
    BadInput("x-type", change(x=[1]), TypeError, "x must be a torch.Tensor, got list"),
    BadInput("x-rank", change(x=torch.ones(11, 2, 3)), ValueError, "x must be [R, D], got shape [11, 2, 3]"),
    BadInput(
        "x-dtype", change(x=torch.ones(11, 6).half()), TypeError, "x must be float32 or float64, got torch.float16"
    ),
    BadInput("offsets-dtype", change(offsets=torch.tensor([0.0, 11])), TypeError, "offsets must be int64"),
    BadInput("offsets-end", change(offsets=torch.tensor([0, 3, 4, 9, 10])), ValueError, "offsets must run from 0 to"),
    BadInput("offsets-order", change(offsets=torch.tensor([0, 5, 4, 9, 11])), ValueError, "got 5 then 4 at task 1"),
    BadInput("out-offsets", change(out_offsets=torch.tensor([0, 2, 14])), ValueError, "out_offsets must be [T + 1=5]"),
    BadInput("weight-width", change(weight=torch.ones(14, 5)), ValueError, "weight must be [sum of C_t, D=6], got"),
    BadInput("weight-equal", change(out_offsets=None), ValueError, "equally many rows for each of the 4 tasks"),
    BadInput("bias", change(bias=torch.ones(3)), ValueError, "bias must be [sum of C_t=14], got shape [3]"),
    BadInput("hidden", change(hidden_weight=torch.ones(3, 2, 6)), ValueError, "hidden_weight must be [T=4, H, D=6]"),
    BadInput("hidden-bias", change(hidden_bias=torch.ones(4, 2)), ValueError, "hidden_bias must be None without"),
    BadInput("activation", change(activation="swish"), ValueError, "activation must be one of 'relu'"),
]
LOSS_BAD = [
    BadInput(
        "loss", change(loss="hinge"), ValueError, "loss must be one of 'cross_entropy', 'mse', 'bce', got 'hinge'"
    ),
    BadInput(
        "y-high",
        change(y=torch.tensor([0, 1, 0, 6, 0, 0, 1, 0, 0, 3, 3])),
        ValueError,
        "y must be in 0..0 in row 6, got 1",
    ),
    BadInput("y-low", change(y=torch.full((11,), -1)), ValueError, "y must be in 0..13, got -1"),
    BadInput("y-dtype", change(y=torch.zeros(11)), TypeError, "y must be int64 class labels, got torch.float32"),
    BadInput("y-rows", change(y=torch.zeros(3, dtype=torch.int64)), ValueError, "y must be [R=11], got shape [3]"),
    BadInput(
        "y-size", change(y=torch.zeros(5), loss="mse"), ValueError, "y must be [26], packed as the outputs of heads"
    ),
    BadInput(
        "y-grad", change(y=torch.zeros(26, requires_grad=True), loss="mse"), ValueError, "y must not require a gradient"
    ),
]


def outputs_per_task(results, arguments):
    rows = arguments["offsets"].diff()
    widths = arguments.get("out_offsets")
    tasks = rows.numel()
    widths = (
        widths.diff() if widths is not None else torch.full((tasks,), arguments["weight"].shape[0] // max(tasks, 1))
    )
    return [[part] for part in results[0].split((rows * widths).tolist())]


def loss_per_task(results, arguments):
    return [[loss] for loss in results[0]]


@pytest.mark.parametrize(
    "check", op_battery(heads, OPERATORS["heads"], CASES, per_task=outputs_per_task, bad_inputs=BAD), ids=str
)
def test_heads(check):
    check()


@pytest.mark.parametrize(
    "check",
    op_battery(heads_loss, OPERATORS["heads_loss"], LOSS_CASES, per_task=loss_per_task, bad_inputs=BAD + LOSS_BAD),
    ids=str,
)
def test_heads_loss(check):
    check()


@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_equal_a_loop_of_modules(hidden, loss):
    torch.manual_seed(0)
    rows, widths, features = [4, 1, 6], [3, 1, 5], 7
    modules = [
        nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, c))
        if hidden
        else nn.Linear(features, c)
        for c in widths
    ]
    modules = [m.double() for m in modules]
    last = [m[-1] if hidden else m for m in modules]
    x = torch.randn(sum(rows), features, dtype=torch.float64)
    call = dict(
        offsets=offsets_of(rows),
        weight=torch.cat([m.weight for m in last]),
        bias=torch.cat([m.bias for m in last]),
        out_offsets=offsets_of(widths),
    )
    if hidden:
        call |= dict(
            hidden_weight=torch.stack([m[0].weight for m in modules]),
            hidden_bias=torch.stack([m[0].bias for m in modules]),
        )
    outputs = [m(part) for m, part in zip(modules, x.split(rows), strict=True)]
    torch.testing.assert_close(heads(x, **call), torch.cat([z.flatten() for z in outputs]), rtol=1e-12, atol=1e-12)
    if loss == "cross_entropy":
        targets = [torch.randint(0, c, (n,)) for n, c in zip(rows, widths, strict=True)]
        function = nn.functional.cross_entropy
    else:
        targets = [torch.rand(n, c, dtype=torch.float64) for n, c in zip(rows, widths, strict=True)]
        function = nn.functional.mse_loss if loss == "mse" else nn.functional.binary_cross_entropy_with_logits
    expected = torch.stack([function(z, y) for z, y in zip(outputs, targets, strict=True)])
    y = torch.cat([t.flatten() for t in targets])
    torch.testing.assert_close(heads_loss(x, y, **call, loss=loss), expected, rtol=1e-12, atol=1e-12)
