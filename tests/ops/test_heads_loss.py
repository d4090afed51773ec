"""heads_loss: the battery, and both operators of heads against a loop of nn.Linear and of torch's losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtml_fast.ops import OPERATORS, backend, heads, heads_loss
from mtml_fast.testing import BadInput, Case, op_battery
from tests.ops.test_heads import BAD, RAGGED, WIDTHS, axes, change, make, offsets_of

MIXED = ["cross_entropy", "huber", "mse", "bce"]


def with_options(arguments, *names, **options):
    """The arguments of a case, with tensors drawn for the options that are named."""

    def drawn(dtype, generator):
        call = {**arguments(dtype, generator), **options}
        rows, outputs = call["x"].shape[0], call["weight"].shape[0]
        widths = call["out_offsets"].diff()
        total = int((call["offsets"].diff() * widths).sum())
        # the first counts: where nothing does there is nothing to differentiate
        coin = lambda n: (torch.rand(n, generator=generator) < 0.7) | (torch.arange(n) == 0)  # noqa: E731
        if "class_weights" in names:
            call["class_weights"] = torch.rand(outputs, generator=generator).to(dtype)
        if "mask" in names:
            call["mask"] = coin(rows)
        if "output_mask" in names:
            call["mask"] = coin(total)
        if "ignored" in names:
            call["y"] = torch.where(coin(rows), call["y"], call.get("ignore_index", -100))
        if "pair" in names:
            labels = torch.rand(rows, generator=generator) * widths.repeat_interleave(call["offsets"].diff())
            call["y"] = (labels.long(), torch.rand(total, generator=generator).to(dtype))
        return call

    return drawn


def option_cases():
    ragged = lambda loss, **more: make(RAGGED, WIDTHS, 5, hidden=9, loss=loss, **more)  # noqa: E731
    odd = lambda loss: make([17, 63, 7], [3, 65, 1], 31, loss=loss)  # noqa: E731
    tiny = lambda loss: make([2, 3], [2, 3], 2, hidden=2, activation="tanh", loss=loss)  # noqa: E731
    rows = axes(True, "cross_entropy")
    classes = {**rows, "class_weights": "out_offsets"}
    smooth = dict(label_smoothing=0.2, ignore_index=-7)
    everything = ("class_weights", "mask", "ignored")
    return [
        Case("weighted", with_options(ragged("cross_entropy"), "class_weights"), classes),
        Case("smooth", with_options(odd("cross_entropy"), label_smoothing=0.1), rows),
        Case("ignored", with_options(odd("cross_entropy"), "ignored"), rows),
        Case("masked", with_options(odd("cross_entropy"), "mask"), {**rows, "mask": "offsets"}),
        Case(
            "everything",
            with_options(odd("cross_entropy"), *everything, **smooth),
            {**classes, "mask": "offsets"},
        ),
        Case("tiny-everything", with_options(tiny("cross_entropy"), *everything, **smooth), tiny=True),
        Case("huber", with_options(ragged("huber"), delta=0.3)),
        Case("tiny-huber", with_options(tiny("huber"), "mask", delta=0.7), tiny=True),
        Case("missing-outputs", with_options(ragged("mse"), "output_mask")),
        Case("missing-bce", with_options(odd("bce"), "output_mask")),
        Case("mixed", with_options(ragged("mse"), "pair", "mask", "class_weights", loss=MIXED, **smooth)),
        Case("tiny-mixed", with_options(tiny("mse"), "pair", loss=["cross_entropy", "huber"]), tiny=True),
    ]


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
    *option_cases(),
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
        reads=True,
    ),
    BadInput("y-low", change(y=torch.full((11,), -1)), ValueError, "y must be in 0..1 in row 0, got -1", reads=True),
    BadInput("y-dtype", change(y=torch.zeros(11)), TypeError, "y must be int64 class labels, got torch.float32"),
    BadInput("y-rows", change(y=torch.zeros(3, dtype=torch.int64)), ValueError, "y must be [R=11], got shape [3]"),
    BadInput(
        "y-size",
        change(y=torch.zeros(5), loss="mse"),
        ValueError,
        "y must be [26], packed as the outputs of heads",
        reads=True,
    ),
    BadInput("y-pair", change(loss=MIXED), ValueError, "y must be the pair (classes, targets) where"),
    BadInput(
        "losses", change(loss=["mse"]), ValueError, "loss must be one name, or one for each of the 4 tasks, got 1"
    ),
    BadInput("mask-dtype", change(mask=torch.ones(11)), TypeError, "mask must be bool, got torch.float32"),
    BadInput(
        "mask-rows", change(mask=torch.ones(26, dtype=torch.bool)), ValueError, "mask must be [R=11], got shape [26]"
    ),
    BadInput("smoothing", change(label_smoothing=1.5), ValueError, "label_smoothing must be at most 1, got 1.5"),
    BadInput("weights", change(class_weights=torch.ones(3)), ValueError, "class_weights must be [sum of C_t=14], got"),
    BadInput("delta", change(delta=0), ValueError, "delta must be finite, above 0, got 0"),
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


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce", "huber"])
@pytest.mark.parametrize("by", ["auto", "operator", "reference"])
def test_options_as_torch_has_them(loss, by):
    """Each task alone through torch.nn.functional, on the rows and outputs that count; the last task has none."""
    generator = torch.Generator().manual_seed(0)
    rows, widths, features = [9, 1, 20, 4], [3, 1, 40, 2], 6
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weights = draw(sum(rows), features), draw(sum(widths)).abs()
    weight = draw(sum(widths), features).requires_grad_()
    call = dict(offsets=offsets_of(rows), weight=weight, out_offsets=offsets_of(widths), loss=loss)
    outputs = [a @ w.T for a, w in zip(x.split(rows), weight.split(widths), strict=True)]
    if loss == "cross_entropy":
        y = torch.cat([torch.randint(0, c, (n,), generator=generator) for n, c in zip(rows, widths, strict=True)])
        y[[2, 15]] = 1_000_000
        y[-4:] = 1_000_000
        options = dict(ignore_index=1_000_000, label_smoothing=0.3)
        call |= dict(options, class_weights=weights)
        expected = [
            F.cross_entropy(z, t, weight=w, **options)
            for z, t, w in zip(outputs, y.split(rows), weights.split(widths), strict=True)
        ]
    else:
        function = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits, "huber": F.huber_loss}[loss]
        targets = [
            torch.rand(n, c, generator=generator, dtype=torch.float64) for n, c in zip(rows, widths, strict=True)
        ]
        present = [torch.rand(t.shape, generator=generator) < 0.6 for t in targets]
        present[1][:], present[3][:] = True, False
        expected = [function(z[p], t[p]) for z, t, p in zip(outputs, targets, present, strict=True)]
        y, call["mask"] = (torch.cat([t.flatten() for t in tensors]) for tensors in (targets, present))
        # what does not count is not read
        y = torch.where(call["mask"], y, torch.nan)
    with backend(by):
        losses = heads_loss(x, y, **call)
    assert losses[3] == 0
    torch.testing.assert_close(losses[:3], torch.stack(expected[:3]), rtol=1e-12, atol=1e-12)
    cotangents = draw(3)
    expected = torch.autograd.grad(expected[:3], weight, list(cotangents))[0]
    mine = torch.autograd.grad(losses[:3], weight, cotangents, retain_graph=True)[0]
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    # a second time through the same graph
    again = torch.autograd.grad(losses[:3], weight, cotangents)[0]
    torch.testing.assert_close(again, mine, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_second_order(case, seed):
    """Gradients of gradients by the way of autograd, against the reference."""
    names = ("x", "weight", "bias", "hidden_weight", "hidden_bias")

    def outer(name):
        call = case.make(torch.float64, torch.Generator().manual_seed(seed))
        leaves = [call[n].requires_grad_() for n in names if call.get(n) is not None]
        draws = torch.Generator().manual_seed(1)
        with backend(name):
            losses = heads_loss(**call)
            v = torch.randn(losses.shape, generator=draws, dtype=torch.float64).requires_grad_()
            first = torch.autograd.grad(losses, leaves, v, create_graph=True)
            along = [torch.randn(g.shape, generator=draws, dtype=torch.float64) for g in first]
            total = sum((g * a).sum() for g, a in zip(first, along, strict=True))
            return torch.autograd.grad(total, [*leaves, v], allow_unused=True, materialize_grads=True)

    for a, b in zip(outer("auto"), outer("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_class_has_no_slope(dtype, seed):
    """Its probability is 1: whatever the weights and the smoothing, loss and gradients are exactly zero."""
    make_call = with_options(make([30, 9], [1, 1], 5, loss="cross_entropy"), "class_weights", label_smoothing=0.2)
    call = make_call(dtype, torch.Generator().manual_seed(seed))
    leaves = [call[n].requires_grad_() for n in ("x", "weight", "bias")]
    losses = heads_loss(**call)
    assert (losses == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(losses, leaves, torch.randn(2, dtype=dtype)))


@pytest.mark.parametrize("case", ["classes", "equal", "ragged"])
def test_unsorted_rows(case, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 3, (20,), generator=generator)
    rows, order = torch.bincount(index, minlength=3).tolist(), index.argsort(stable=True)
    loss = "cross_entropy" if case == "classes" else "mse"
    call = make(rows, [3, 3, 3] if case == "equal" else [2, 3, 1], 5, hidden=4, loss=loss)(torch.float64, generator)
    back = lambda t: torch.empty_like(t).index_copy(0, order, t)  # noqa: E731
    mask = torch.rand(20, generator=generator) < 0.8
    y = back(call["y"]) if case == "classes" else call["y"]
    if case == "equal":
        y = back(y.view(20, 3)).flatten()
    unsorted = {**call, "x": back(call["x"]), "y": y, "offsets": None, "mask": back(mask), "task_index": index}
    torch.testing.assert_close(heads_loss(**unsorted), heads_loss(**call, mask=mask), rtol=0, atol=0)
