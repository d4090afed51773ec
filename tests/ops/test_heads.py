"""heads: the battery."""

import re

import pytest
import torch

from mtml_fast.ops import OPERATORS, backend, heads
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
    BadInput(
        "offsets-end",
        change(offsets=torch.tensor([0, 3, 4, 9, 10])),
        ValueError,
        "offsets must run from 0 to",
        reads=True,
    ),
    BadInput(
        "offsets-order",
        change(offsets=torch.tensor([0, 5, 4, 9, 11])),
        ValueError,
        "got 5 then 4 at task 1",
        reads=True,
    ),
    BadInput("out-offsets", change(out_offsets=torch.tensor([0, 2, 14])), ValueError, "out_offsets must be [T + 1=5]"),
    BadInput("weight-width", change(weight=torch.ones(14, 5)), ValueError, "weight must be [sum of C_t, D=6], got"),
    BadInput("weight-equal", change(out_offsets=None), ValueError, "equally many rows for each of the 4 tasks"),
    BadInput("bias", change(bias=torch.ones(3)), ValueError, "bias must be [sum of C_t=14], got shape [3]"),
    BadInput("hidden", change(hidden_weight=torch.ones(3, 2, 6)), ValueError, "hidden_weight must be [T=4, H, D=6]"),
    BadInput("hidden-bias", change(hidden_bias=torch.ones(4, 2)), ValueError, "hidden_bias must be None without"),
    BadInput("activation", change(activation="swish"), ValueError, "activation must be one of 'relu'"),
]


def outputs_per_task(results, arguments):
    rows, widths = arguments["offsets"].diff(), arguments.get("out_offsets")
    tasks = rows.numel()
    widths = rows.new_full((tasks,), arguments["weight"].shape[0] // max(tasks, 1)) if widths is None else widths.diff()
    return [[part] for part in results[0].split((rows * widths).tolist())]


@pytest.mark.parametrize(
    "check", op_battery(heads, OPERATORS["heads"], CASES, per_task=outputs_per_task, bad_inputs=BAD), ids=str
)
def test_battery(check):
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_double_backward(case, dtype, seed):
    """The reverse of the backward pass against the reference in float64, in the same bits on any number of threads."""
    operator = OPERATORS["heads"]
    draws = torch.Generator().manual_seed(seed)
    call = case.make(dtype, draws)
    values = [call.get(name, "relu" if kind == "str" else None) for kind, name in operator.arguments]
    inputs = [call[n] for n in operator.differentiable if call.get(n) is not None]
    outputs = operator.forward(*values)
    q = torch.randn(outputs.shape, generator=draws, dtype=torch.float64)
    first = [torch.randn(t.shape, generator=draws, dtype=torch.float64) for t in inputs]

    def run(kind, implementation):
        to = lambda t: t.to(kind) if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
        exact = [to(v) for v in values]
        needs = [True] * len(inputs)
        return implementation([to(g) for g in first], [to(q)], *exact, needs, [True, *needs])

    def by_reference(grad_results, grad_outputs, *rest):
        *arguments, _, _ = rest
        places = [i for i, (_, name) in enumerate(operator.arguments) if name in operator.differentiable]
        places = [i for i in places if arguments[i] is not None]
        leaves = [grad_outputs[0], *(arguments[i] for i in places)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        for i, leaf in zip(places, leaves[1:], strict=True):
            arguments[i] = leaf
        results = torch.autograd.grad(operator.reference(*arguments), leaves[1:], leaves[0], create_graph=True)
        return torch.autograd.grad(results, leaves, grad_results, allow_unused=True, materialize_grads=True)

    exact, eager, mine = (
        run(torch.float64, by_reference),
        run(dtype, by_reference),
        run(dtype, operator.double_backward),
    )
    for i, (a, b, c) in enumerate(zip(mine, eager, exact, strict=True)):
        # a few roundings more than eager's, whose own error may be small by chance
        slack = 32 * torch.finfo(dtype).eps * (c.abs().max() if c.numel() else 0)
        assert (a.double() - c).abs().le(2 * (b.double() - c).abs().amax() + slack).all() if c.numel() else True, i
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        again = run(dtype, operator.double_backward)
    finally:
        torch.set_num_threads(threads)
    if operator.served_by("cpu") == "native":
        assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


@pytest.mark.parametrize("rows", [[70_000], [3, 9_000, 0, 2]])
def test_a_task_of_many_rows(rows):
    """Its rows are divided among threads; the sums do not depend on how many there are."""
    call = make(rows, 3, 5, hidden=4)(torch.float64, torch.Generator().manual_seed(0))
    leaves = [call[n].requires_grad_() for n in ("x", "weight", "bias", "hidden_weight", "hidden_bias")]
    q = torch.randn(3 * sum(rows), dtype=torch.float64)
    with backend("reference"):
        exact = torch.autograd.grad(heads(**call), leaves, q)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with backend("operator"):
                found.append(torch.autograd.grad(heads(**call), leaves, q))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(found[0], exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if OPERATORS["heads"].served_by("cpu") == "native":
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("widths", [3, [2, 3, 1]], ids=["equal", "ragged"])
@pytest.mark.parametrize("hidden", [None, 4])
def test_unsorted_rows(widths, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 3, (20,), generator=generator)
    rows = torch.bincount(index, minlength=3).tolist()
    call = make(rows, [3] * 3 if widths == 3 else widths, 5, hidden=hidden)(torch.float64, generator)
    order = index.argsort(stable=True)
    x = torch.empty_like(call["x"]).index_copy(0, order, call["x"]).requires_grad_()
    found = heads(**{**call, "x": x, "offsets": None}, task_index=index)
    expected = heads(**call)
    if widths == 3:
        expected = torch.empty(20, 3, dtype=torch.float64).index_copy(0, order, expected.view(20, 3)).flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x: heads(**{**call, "x": x, "offsets": None}, task_index=index), x)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (dict(offsets=torch.tensor([0, 2])), ValueError, "offsets must be None"),
        (dict(task_index=torch.zeros(2)), TypeError, "task_index must be int64, got torch.float32"),
        (dict(task_index=torch.tensor([0, 1, 0])), ValueError, "task_index must be [R=2], got shape [3]"),
        (dict(task_index=torch.tensor([0, 3])), ValueError, "task_index must be in 0..2, got 3"),
        (dict(out_offsets=None), ValueError, "out_offsets must be given with task_index"),
    ],
)
def test_bad_task_index(changed, error, text):
    call = dict(x=torch.ones(2, 4), offsets=None, weight=torch.ones(3, 4), out_offsets=torch.arange(4))
    with pytest.raises(error, match=re.escape(text)):
        heads(**{**call, "task_index": torch.tensor([0, 2]), **changed})
