"""heads_loss: the battery, and both operators of heads against a loop of nn.Linear."""

import pytest
import torch
from torch import nn

from mtml_fast.ops import OPERATORS, heads, heads_loss
from mtml_fast.testing import BadInput, Case, op_battery
from tests.ops.test_heads import BAD, RAGGED, WIDTHS, axes, change, make, offsets_of

CASES = [
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
    Case("no-task-classes", make([], 2, 4, loss="cross_entropy")),
    Case("no-task", make([], 2, 4, loss="mse")),
]


LOSS_BAD = [
    BadInput(
        "loss", change(loss="hinge"), ValueError, "loss must be one of 'cross_entropy', 'mse', 'bce', 'huber', got"
    ),
    BadInput(
        "y-high",
        change(y=torch.tensor([0, 1, 0, 6, 0, 0, 1, 0, 0, 3, 3])),
        ValueError,
        "y must be in 0..0 in row 6, got 1",
    ),
    BadInput("y-low", change(y=torch.full((11,), -1)), ValueError, "y must be in 0..1 in row 0, got -1"),
    BadInput("y-dtype", change(y=torch.zeros(11)), TypeError, "y must be int64 class labels, got torch.float32"),
    BadInput("y-rows", change(y=torch.zeros(3, dtype=torch.int64)), ValueError, "y must be [R=11], got shape [3]"),
    BadInput(
        "y-size", change(y=torch.zeros(5), loss="mse"), ValueError, "y must be [26], packed as the outputs of heads"
    ),
    BadInput(
        "y-grad", change(y=torch.zeros(26, requires_grad=True), loss="mse"), ValueError, "y must not require a gradient"
    ),
]


def loss_per_task(results, arguments):
    return [[loss] for loss in results[0]]


@pytest.mark.parametrize(
    "check",
    op_battery(heads_loss, OPERATORS["heads_loss"], CASES, per_task=loss_per_task, bad_inputs=BAD + LOSS_BAD),
    ids=str,
)
def test_battery(check):
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
