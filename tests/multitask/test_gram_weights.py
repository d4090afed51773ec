"""Surgery on Gram matrices: against TorchJD, the papers' loops on whole gradients, and their optimality conditions."""

import json
from pathlib import Path

import numpy as np
import pytest

from mtml_fast.multitask import _quadratic, gram_weights

TORCHJD = json.loads((Path(__file__).parent / "torchjd_results.json").read_text())
KINDS = ["random", "opposed", "similar", "dependent", "equal", "with a zero", "large", "one task"]


def gradients(rng, kind):
    """[T, P], of very different lengths."""
    tasks = {"large": 40, "one task": 1}.get(kind, int(rng.integers(2, 9)))
    g = rng.standard_normal((tasks, tasks + 30))
    if kind in ("opposed", "large"):
        g -= 0.95 * g.mean(0)
    if kind == "similar":
        g += 3 * rng.standard_normal(g.shape[1])
    if kind == "dependent":
        g[-1] = -0.5 * g[0]
    g *= np.exp(rng.standard_normal((tasks, 1)))
    if kind == "equal":
        g[:] = g[0]
    if kind == "with a zero":
        g[-1] = 0
    return g


def along(weights, g):
    return np.asarray(weights) @ np.asarray(g)


@pytest.mark.parametrize("case", TORCHJD["matrices"], ids=lambda case: f"T{len(case['gradients'])}")
def test_torchjd(case):
    """The same direction as TorchJD's."""
    g = np.array(case["gradients"])
    gram, orders, expected = g @ g.T, np.array(case["orders"]), case["weights"]
    first, targets = gram_weights.gradvac(gram, np.zeros_like(gram), orders)
    mine = {
        "imtl_g": gram_weights.imtl_g(gram),
        "upgrad": gram_weights.upgrad(gram),
        "pcgrad": gram_weights.pcgrad(gram, orders),
        "gradvac": first,
        "gradvac again": gram_weights.gradvac(gram, targets, orders)[0],
        **{f"aligned_mtl {scale}": gram_weights.aligned_mtl(gram, scale) for scale in ("min", "median", "rmse")},
    }
    for name, weights in mine.items():
        theirs = along(expected[name], g)
        np.testing.assert_allclose(along(weights, g), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name)
    # TorchJD stops early with these two (Frank-Wolfe, an interior point): ours reach a value that is no worse, and is
    # the same to 1e-5
    scale = np.trace(gram)
    ours, theirs = (w @ gram @ w / scale for w in (gram_weights.mgda(gram), np.array(expected["mgda"])))
    assert ours <= theirs + 1e-12
    assert ours == pytest.approx(theirs, abs=1e-5)
    for c in (0.2, 0.5, 0.9):
        ours, theirs = gram_weights.cagrad(gram, c), np.array(expected[f"cagrad {c}"])
        np.testing.assert_allclose(along(ours, g), along(theirs, g), rtol=0, atol=2e-3 * np.sqrt(scale))
        ours, theirs = ((g @ along(w, g)).min() / scale for w in (ours, theirs))
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pcgrad_is_the_loop_over_gradients(kind, rng):
    g = gradients(rng, kind)
    tasks = len(g)
    orders = np.stack([rng.permutation(tasks) for _ in range(tasks)])
    total = np.zeros(g.shape[1])
    for i in range(tasks):
        own = g[i].copy()
        for j in orders[i]:
            if j != i and own @ g[j] < 0:
                own -= own @ g[j] / (g[j] @ g[j]) * g[j]
        total += own
    np.testing.assert_allclose(along(gram_weights.pcgrad(g @ g.T, orders), g), total, atol=1e-9 * np.abs(g).max())


# not of dependent gradients: turned against each other they vanish, and what is left of rounding has no direction
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dependent"])
def test_gradvac_is_the_loop_over_gradients(kind, rng):
    g = gradients(rng, kind)
    tasks = len(g)
    targets = expected_targets = rng.uniform(-0.5, 0.9, (tasks, tasks))
    expected_targets = expected_targets.copy()
    for _ in range(3):
        orders = np.stack([rng.permutation(tasks) for _ in range(tasks)])
        total = np.zeros(g.shape[1])
        for i in range(tasks):
            own = g[i].copy()
            for j in orders[i]:
                if j == i:
                    continue
                target, norms = expected_targets[i, j], np.linalg.norm(own) * np.linalg.norm(g[j])
                cosine = own @ g[j] / norms if norms else 0.0
                if cosine < target and norms:
                    turn = target * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - target**2)
                    own += np.linalg.norm(own) * turn / (np.linalg.norm(g[j]) * np.sqrt(1 - target**2)) * g[j]
                expected_targets[i, j] = 0.7 * target + 0.3 * cosine
            total += own
        weights, targets = gram_weights.gradvac(g @ g.T, targets, orders, beta=0.3)
        np.testing.assert_allclose(along(weights, g), total, atol=1e-6 * np.abs(total).max())
        np.testing.assert_allclose(targets, expected_targets, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_is_the_shortest_mixture(kind, rng):
    g = gradients(rng, kind)
    gram = g @ g.T
    w = gram_weights.mgda(gram)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)
    # no task gains less than the mixture's square, and those that take part gain just that
    gain = gram @ w
    assert gain.min() >= w @ gain - 1e-9 * np.trace(gram)
    np.testing.assert_allclose(gain[w > 1e-6], w @ gain, atol=1e-9 * np.trace(gram))


@pytest.mark.parametrize("c", [0.0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_cagrad_has_no_duality_gap(kind, c, rng):
    """d is within c |g_0| of g_0, and serves the worst task as well as the dual problem allows any direction to."""
    g = gradients(rng, kind)
    gram, mean = g @ g.T, g.mean(0)
    weights = gram_weights.cagrad(gram, c)
    d, reach = along(weights, g), c * np.linalg.norm(mean)
    if c == 0:
        np.testing.assert_allclose(d, mean)
        return
    if not weights.any():
        assert np.linalg.norm(along(gram_weights.mgda(gram), g)) <= 1e-4 * np.sqrt(np.trace(gram))
        return
    assert np.linalg.norm(d - mean) == pytest.approx(reach, rel=1e-7)
    w = (weights - 1 / len(g)) / (weights - 1 / len(g)).sum()
    assert w.min() >= -1e-9
    dual = along(w, g) @ mean + reach * np.linalg.norm(along(w, g))
    assert (g @ d).min() == pytest.approx(dual, abs=1e-8 * np.trace(gram))


@pytest.mark.parametrize("kind", ["random", "opposed", "similar", "large", "one task"])
def test_imtl_g_is_as_long_along_each_gradient(kind, rng):
    g = gradients(rng, kind)
    w = gram_weights.imtl_g(g @ g.T)
    parts = g @ along(w, g) / np.linalg.norm(g, axis=1)
    assert w.sum() == pytest.approx(1)
    np.testing.assert_allclose(parts, parts.mean(), rtol=1e-7)


@pytest.mark.parametrize("kind", ["random", "opposed", "similar", "with a zero", "large", "one task"])
def test_nash_mtl_is_the_bargain(kind, rng):
    g = gradients(rng, kind) * 10.0 ** rng.integers(-4, 4)
    gram = g @ g.T
    w = gram_weights.nash_mtl(gram, max_norm=None)
    assert (w > 0).all()
    parties = np.diag(gram) > 0
    np.testing.assert_allclose((gram @ w)[parties], 1 / w[parties], rtol=1e-6)
    assert np.linalg.norm(along(gram_weights.nash_mtl(gram), g)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_aligned_mtl_makes_all_singular_values_equal(kind, rng):
    g = gradients(rng, kind)
    gram = g @ g.T
    values = np.linalg.svd(g, compute_uv=False)
    values = values[values > 1e-7 * values[0]]
    for scale, common in (("min", values[-1]), ("rmse", np.sqrt((values**2).mean()))):
        # of orthogonal gradients of one length the mean; the transformation has that length in the span of g
        left, _, right = np.linalg.svd(g, full_matrices=False)
        aligned = common * left[:, : len(values)] @ right[: len(values)]
        np.testing.assert_allclose(along(gram_weights.aligned_mtl(gram, scale), g), aligned.mean(0), atol=1e-6 * common)


@pytest.mark.parametrize("kind", KINDS)
def test_upgrad_conflicts_with_no_task(kind, rng):
    g = gradients(rng, kind)
    gram = g @ g.T
    d = along(gram_weights.upgrad(gram), g)
    lengths = np.linalg.norm(g, axis=1)
    assert ((g @ d) >= -1e-7 * lengths * lengths.max()).all()
    if (gram >= 0).all():
        np.testing.assert_allclose(d, g.mean(0), atol=1e-7 * lengths.max())


@pytest.mark.parametrize("kind", KINDS)
def test_above_meets_the_conditions_of_its_program(kind, rng):
    """Each row of UPGrad's program: above its bound, and without a slope but where it is at the bound."""
    g = gradients(rng, kind)
    system = _quadratic.ridged(g @ g.T)
    lower = rng.standard_normal((5, len(g)))
    v = _quadratic.above(system, lower)
    slope, scale = v @ system, np.abs(lower @ system).max() + 1e-30
    assert (v >= lower).all()
    assert slope.min() >= -1e-7 * scale
    assert np.abs(slope * (v - lower)).max() <= 1e-6 * scale * max(1, np.abs(v).max())


def test_on_simplex_meets_the_conditions_of_its_program(rng):
    for _ in range(200):
        size = int(rng.integers(1, 30))
        root = rng.standard_normal((size, rng.integers(1, 2 * size + 1)))
        system, linear = _quadratic.ridged(root @ root.T), rng.standard_normal(size) * rng.choice([0, 1, 100])
        w = _quadratic.on_simplex(system, linear)
        slope = system @ w + linear
        # the matrix has a mean diagonal of one
        scale = 1 + np.abs(slope).max() + np.abs(linear).max()
        assert (w >= 0).all()
        assert w.sum() == pytest.approx(1)
        assert slope.min() >= w @ slope - 1e-8 * scale


@pytest.mark.parametrize("name", ["mgda", "cagrad", "imtl_g", "nash_mtl", "aligned_mtl", "upgrad"])
def test_no_gradient_at_all(name):
    for size in (1, 3):
        weights = getattr(gram_weights, name)(np.zeros((size, size)))
        assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", ["mgda", "cagrad", "nash_mtl", "upgrad"])
def test_opposed_gradients_leave_nothing_to_follow(name, rng):
    """At a point where one task's gain is the other's loss, there is no direction."""
    first = rng.standard_normal(20)
    g = np.stack([first, -first, 2 * first])
    d = along(getattr(gram_weights, name)(g @ g.T), g)
    # along all that is there, which is one line
    assert np.abs(d).max() < 1e-4 or name == "cagrad"
    if name == "cagrad":
        assert (g @ d).min() <= 1e-9
