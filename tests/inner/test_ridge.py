"""ridge_head: against lstsq with rows for the penalty, and scikit-learn; its derivatives; what is refused."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mtml_fast as mf
from mtml_fast.inner import ridge


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 2**32
    torch.manual_seed(value)
    print(f"seed {value}")


def ragged(counts, features=5, outputs=3, dtype=torch.float64):
    """Packed rows far from the origin, so that a penalised bias would show."""
    rows = sum(counts)
    x = torch.randn(rows, features, dtype=torch.float64) + 3
    y = torch.randn(rows, outputs, dtype=torch.float64) - 7
    return mf.TaskRows(x.to(dtype), y.to(dtype), torch.tensor([0, *counts]).cumsum(0))


def by_lstsq(x, y, penalty):
    """Weight and bias of one task, with the penalty as rows of a least-squares problem."""
    rows, features = x.shape
    root = penalty**0.5
    free = torch.ones(rows, 1, dtype=x.dtype)
    design = torch.cat(
        [
            torch.cat([x, free], 1),
            torch.cat([root * torch.eye(features, dtype=x.dtype), free.new_zeros(features, 1)], 1),
        ]
    )
    target = torch.cat([y, torch.zeros(features, y.shape[1], dtype=y.dtype)])
    # by singular values: other drivers take full rank for granted
    solution = torch.linalg.lstsq(design.double(), target.double(), driver="gelsd").solution
    return solution[:-1].T, solution[-1]


# one row, fewer rows than features, as many, more, and padded ones
COUNTS = [1, 2, 3, 5, 6, 9, 11, 33, 100]


@pytest.mark.parametrize("penalty", [1e-6, 0.3, 50.0])
@pytest.mark.parametrize("features", [1, 5, 40])
def test_heads_equal_lstsq_and_scikit_learn(features, penalty):
    sklearn = pytest.importorskip("sklearn.linear_model")
    rows = ragged(COUNTS, features)
    weight, bias = mf.ridge_head(rows, penalty)
    assert weight.shape == (len(COUNTS), 3, features)
    assert bias.shape == (len(COUNTS), 3)
    for t in range(rows.num_tasks):
        x, y = rows.task(t)
        for own, expected in zip((weight[t], bias[t]), by_lstsq(x, y, penalty), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-8)
        theirs = sklearn.Ridge(alpha=penalty, solver="svd").fit(x.numpy(), y.numpy())
        torch.testing.assert_close(weight[t], torch.tensor(theirs.coef_), rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(bias[t], torch.tensor(theirs.intercept_), rtol=1e-8, atol=1e-8)


def test_a_task_does_not_depend_on_the_others():
    rows = ragged(COUNTS)
    penalty = torch.rand(len(COUNTS), dtype=torch.float64) + 0.1
    together = mf.ridge_head(rows, penalty)
    for t in range(rows.num_tasks):
        x, y = rows.task(t)
        alone = mf.ridge_head(mf.TaskRows(x[None], y[None]), penalty[t])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[t], rtol=1e-11, atol=1e-12)
    shuffled = torch.randperm(len(COUNTS))
    for a, b in zip(mf.ridge_head(rows.select(shuffled), penalty[shuffled]), together, strict=True):
        torch.testing.assert_close(a, b[shuffled], rtol=1e-11, atol=1e-12)


def test_targets_that_are_not_finite_stay_with_their_task():
    rows = ragged([9, 9, 3])
    rows.y[1] = torch.inf
    weight, bias = mf.ridge_head(rows)
    assert weight.isfinite().flatten(1).all(1).tolist() == [False, True, True]
    assert bias.isfinite().all(1).tolist() == [False, True, True]


def test_groups_of_bounded_memory_give_the_same(monkeypatch):
    rows = ragged([4] * 7 + [9] * 5)
    expected = mf.ridge_head(rows)
    monkeypatch.setattr(ridge, "_GROUP", 150)
    for a, b in zip(mf.ridge_head(rows), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_tasks_that_run_together_have_alike_numbers_of_rows():
    counts = torch.randint(1, 5000, (3000,))
    groups, places = ridge._groups(counts, width=4)
    assert torch.cat(groups).sort().values.tolist() == list(range(3000))
    starts = counts.cumsum(0) - counts
    for tasks, place in zip(groups, places, strict=True):
        own = counts[tasks]
        assert place.shape == (len(tasks), int(own.max()))
        assert bool((own.max() <= 1.25 * own).all())
        assert torch.equal(place[:, 0], starts[tasks])
        assert torch.equal(place[:, -1], starts[tasks] + own - 1)
        assert len(tasks) == 1 or own.max() * (4 * len(tasks)) <= ridge._GROUP
    # four to each power of two, where memory does not divide them
    assert len(ridge._groups(torch.arange(1, 256), width=1)[0]) <= 4 * 8


def test_one_row_gives_its_target_and_no_weight():
    rows = ragged([1, 1])
    weight, bias = mf.ridge_head(rows, 1e-9)
    assert not weight.any()
    torch.testing.assert_close(bias, rows.y, rtol=0, atol=0)


@pytest.mark.parametrize("count", [4, 30])
def test_constant_columns_and_copies(count):
    """A constant feature carries no weight, the bias has it all; equal features share theirs."""
    x = torch.randn(1, count, 6, dtype=torch.float64)
    x[..., 2], x[..., 4] = 11.3, x[..., 1]
    y = x[..., 1] * 4 + 5
    weight, bias = mf.ridge_head(mf.TaskRows(x, y), 1e-8)
    assert weight[0, 0, 2].abs() < 1e-9
    torch.testing.assert_close(weight[0, 0, 1], weight[0, 0, 4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((x @ weight.mT + bias[:, None])[..., 0], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [3, 80])
def test_float32_is_solved_in_float64(features):
    """Correlated features far from the origin: float32 alone would lose the solution."""
    rows = ragged([20, 60], features)
    x = rows.x.float() * 0.01 + 30
    given = mf.TaskRows(x, rows.y.float(), rows.offsets)
    exact = mf.TaskRows(x.double(), rows.y.float().double(), rows.offsets)
    for own, expected in zip(mf.ridge_head(given, 1e-3), mf.ridge_head(exact, 1e-3), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, expected.float(), rtol=1e-6, atol=1e-6)


def test_classes_are_regressed_on_as_ones():
    rows = ragged([6, 20], features=8, outputs=1)
    y = torch.randint(0, 4, (26,))
    y[0] = 3
    weight, bias = mf.ridge_head(mf.TaskRows(rows.x, y, rows.offsets), 0.5)
    one_hot = torch.nn.functional.one_hot(y).double()
    for own, expected in zip(
        (weight, bias), mf.ridge_head(mf.TaskRows(rows.x, one_hot, rows.offsets), 0.5), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=0, atol=0)
    # the scores of a row sum to one, as the targets do
    torch.testing.assert_close(weight.sum(1), torch.zeros(2, 8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(bias.sum(1), torch.ones(2, dtype=torch.float64))
    assert mf.ridge_head(mf.TaskRows(rows.x, y, rows.offsets), classes=7)[1].shape == (2, 7)


def test_separate_classes_are_told_apart():
    """The head against the truth, on rows that it has not seen."""
    centres = 4 * torch.randn(5, 3, 16)
    y = torch.arange(3).repeat(5, 10)
    x = centres.gather(1, y[..., None].expand(-1, -1, 16)) + torch.randn(5, 30, 16)
    weight, bias = mf.ridge_head(mf.TaskRows(x[:, :15], y[:, :15]))
    scores = x[:, 15:] @ weight.mT + bias[:, None]
    assert (scores.argmax(2) == y[:, 15:]).double().mean() > 0.95


def test_absent_outputs_get_zeros():
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    y = torch.stack([torch.arange(9) % 2, torch.arange(9) % 3])
    weight, bias = mf.ridge_head(mf.TaskRows(x, y, class_mask=mask))
    assert not weight[0, 2].any()
    assert bias[0, 2] == 0
    assert weight[1, 2].any()
    floats = torch.randn(2, 9, 3, dtype=torch.float64)
    weight, bias = mf.ridge_head(mf.TaskRows(x, floats.masked_fill(~mask[:, None], torch.nan), class_mask=mask))
    expected, _ = mf.ridge_head(mf.TaskRows(x, floats))
    torch.testing.assert_close(weight, expected * mask[..., None], rtol=1e-12, atol=1e-13)
    assert bias[0, 2] == 0


@pytest.mark.parametrize(
    ("counts", "features"), [([2, 3], 4), ([9], 11), ([9], 2), ([1, 3, 5], 3)], ids=["wide", "padded", "tall", "mixed"]
)
def test_derivatives(counts, features):
    """Of first and second order, in both forms of the system and in padded rows."""
    rows = ragged(counts, features, outputs=2)
    penalty = (torch.rand(len(counts), dtype=torch.float64) + 0.5).requires_grad_()
    inputs = (rows.x.requires_grad_(), rows.y.requires_grad_(), penalty)

    def heads(x, y, penalty):
        return mf.ridge_head(mf.TaskRows(x, y, rows.offsets), penalty)

    assert gradcheck(heads, inputs)
    # along random directions: all of them take ten seconds
    assert gradgradcheck(heads, inputs, fast_mode=True)


def test_transforms_agree_with_autograd():
    x, y = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def loss(x, penalty):
        weight, bias = mf.ridge_head(mf.TaskRows(x, y), penalty)
        return weight.square().sum() + bias.sum()

    penalty = torch.tensor(0.7, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(loss, (x, penalty))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, penalty), expected)
    many = torch.func.vmap(loss, (None, 0))(x, torch.stack([penalty, 2 * penalty]))
    torch.testing.assert_close(many, torch.stack([loss(x, penalty), loss(x, 2 * penalty)]))


def test_no_tasks():
    weight, bias = mf.ridge_head(mf.TaskRows(torch.zeros(0, 3, 4), torch.zeros(0, 3, 2)))
    assert weight.shape == (0, 2, 4)
    assert bias.shape == (0, 2)


X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 3, 2)
CLASSES = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mf.ridge_head(X), "rows must be TaskRows, got Tensor"),
        (lambda: mf.ridge_head(mf.TaskRows(X)), "rows.y must hold the targets, got None"),
        (lambda: mf.ridge_head(mf.TaskRows(X.half(), Y)), "rows.x must be float32 or float64, got torch.float16"),
        (lambda: mf.ridge_head(mf.TaskRows(X[..., None], Y)), "rows.x must be [T, N, D], got shape [2, 3, 4, 1]"),
        (
            lambda: mf.ridge_head(mf.TaskRows(X, Y[..., None])),
            "rows.y must be [T, N] or [T, N, O], got shape [2, 3, 2, 1]",
        ),
        (lambda: mf.ridge_head(mf.TaskRows(X, Y.long())), "rows.y must be [T, N], got shape [2, 3, 2]"),
        (lambda: mf.ridge_head(mf.TaskRows(X, Y), 0), "penalty must be finite, above 0, got 0"),
        (lambda: mf.ridge_head(mf.TaskRows(X, Y), float("inf")), "penalty must be finite, above 0, got inf"),
        (lambda: mf.ridge_head(mf.TaskRows(X, Y), "1"), "penalty must be a number, got '1'"),
        (
            lambda: mf.ridge_head(mf.TaskRows(X, Y), torch.tensor([1.0, -2.0])),
            "penalty must be finite, above 0, got -2",
        ),
        (
            lambda: mf.ridge_head(mf.TaskRows(X, Y), torch.ones(3)),
            "penalty must be a number, [] or [T=2], got shape [3]",
        ),
        (
            lambda: mf.ridge_head(mf.TaskRows(torch.ones(1, 3, 4).cumsum(1) * 1e8, Y[:1]), 1e-9),
            "penalty must not vanish beside the squares of the rows in float64, got 1e-09",
        ),
        (
            lambda: mf.ridge_head(mf.TaskRows(torch.full_like(X, torch.nan), Y)),
            "rows.x must be finite, got NaN or infinity",
        ),
        (lambda: mf.ridge_head(mf.TaskRows(X, CLASSES + 5), classes=3), "rows.y must be in 0..2, got 5"),
        (lambda: mf.ridge_head(mf.TaskRows(X, CLASSES - 1)), "rows.y must be in 0..0, got -1"),
        (lambda: mf.ridge_head(mf.TaskRows(X, CLASSES), classes=0), "classes must be finite, at least 1, got 0"),
        (lambda: mf.ridge_head(mf.TaskRows(X, Y), classes=2), "classes must be None for floating targets, got 2"),
        (
            lambda: mf.ridge_head(mf.TaskRows(X, CLASSES, class_mask=torch.ones(2, 3, dtype=torch.bool)), classes=2),
            "classes must be those of rows.class_mask [2, 3], got 2",
        ),
        (
            lambda: mf.ridge_head(mf.TaskRows(X, Y, class_mask=torch.ones(2, 3, dtype=torch.bool))),
            "rows.class_mask must be [T, O=2], got shape [2, 3]",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
