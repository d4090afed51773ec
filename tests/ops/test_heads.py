"""heads: the battery."""

import pytest
import torch

from mtml_fast.ops import OPERATORS, heads
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
    Case("tiny-hidden-bias", make([2, 1], [1, 2], 2, hidden=2, bias=False, activation="tanh"), tiny=True),
    Case("tiny-equal", make([2, 1], 2, 3, bias=False), tiny=True),
    Case("hidden", make(RAGGED, WIDTHS, 5, hidden=9, activation="gelu"), axes(True)),
    Case("empty-task", make([3, 0, 2], [2, 3, 4], 4)),
    Case("no-task", make([], 2, 4)),
    Case("one-row", make([1], [1], 1), axes(True)),
    Case("odd", make([17, 63, 7], [3, 65, 1], 31, hidden=33), axes(True)),
]


def change(**values):
    return lambda arguments: {**arguments, **values}


BAD = [
    BadInput("x-type", change(x=[1]), TypeError, "x must be a torch.Tensor, got list"),
    BadInput("x-rank", change(x=torch.ones(11, 2, 3)), ValueError, "x must be [R, D], got shape [11, 2, 3]"),
    BadInput(
        "x-dtype", change(x=torch.ones(11, 6).half()), TypeError, "x must be float32 or float64, got torch.float16"
    ),
    BadInput(
        "weight-device",
        change(weight=torch.ones(14, 6, device="meta")),
        ValueError,
        "weight must be on the device of x (cpu)",
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


def outputs_per_task(results, arguments):
    rows = arguments["offsets"].diff()
    widths = arguments.get("out_offsets")
    tasks = rows.numel()
    widths = (
        widths.diff() if widths is not None else torch.full((tasks,), arguments["weight"].shape[0] // max(tasks, 1))
    )
    return [[part] for part in results[0].split((rows * widths).tolist())]


@pytest.mark.parametrize(
    "check", op_battery(heads, OPERATORS["heads"], CASES, per_task=outputs_per_task, bad_inputs=BAD), ids=str
)
def test_battery(check):
    check()
