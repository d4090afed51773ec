"""Gradient surgery as arithmetic on the Gram matrix: M [T, T] of the task gradients in, weights [T] out.

The gradient that a step follows is `sum_t w_t g_t`. All of it is float64 and NumPy: at T tasks these are a few
operations on T numbers each, where the cost of a call is all that counts. Chance comes in as an argument.

Each keeps the scale of its paper: where no two gradients conflict, pcgrad, gradvac and the plain sum have weights of
one, upgrad and cagrad (at c = 0) of 1 / T; mgda and imtl_g sum to one.
"""

from __future__ import annotations

import numpy as np

from mtml_fast.multitask._quadratic import above, on_simplex, ridged

__all__ = ["aligned_mtl", "cagrad", "gradvac", "imtl_g", "mgda", "nash_mtl", "pcgrad", "upgrad"]


def pcgrad(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Yu et al. 2020: each gradient loses its part along every other that it points against, one after the other.

    `orders [T, T]`: row i is the order, a permutation of all tasks, in which task i meets them.
    """
    size = len(gram)
    rows, norms = np.arange(size), np.maximum(np.diag(gram), np.finfo(float).tiny)
    # row i: the coefficients of task i's projected gradient, and its inner products with all gradients
    coefficients, products = np.eye(size), gram.copy()
    for met in orders.T:
        along = np.where(met == rows, 0, np.minimum(products[rows, met], 0) / norms[met])
        coefficients[rows, met] -= along
        products -= along[:, None] * gram[met]
    return coefficients.sum(0)


def gradvac(
    gram: np.ndarray, targets: np.ndarray, orders: np.ndarray, beta: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Wang et al. 2021: as pcgrad, but each pair of gradients is turned towards its usual cosine instead of to zero.

    `targets [T, T]`: the moving averages of the cosines, `beta`: how fast they move; the second result: the new ones.
    """
    size = len(gram)
    rows, norms = np.arange(size), np.sqrt(np.diag(gram).clip(0))
    coefficients, products, targets = np.eye(size), gram.copy(), targets.copy()
    for met in orders.T:
        own = np.sqrt((products * coefficients).sum(1).clip(0))
        product, norm = products[rows, met], norms[met]
        cosine = product / (own * norm + 1e-8 * (own * norm == 0))
        cosine = cosine.clip(-1, 1)
        target = targets[rows, met]
        sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt((1 - target**2).clip(0))
        below = (cosine < target) & (met != rows) & (norm > 0) & (target_sine > 0)
        scale = np.where(below, norm * target_sine, 1)
        added = np.where(below, own * (target * sine - cosine * target_sine) / scale, 0)
        coefficients[rows, met] += added
        products += added[:, None] * gram[met]
        targets[rows, met] = np.where(met == rows, target, (1 - beta) * target + beta * cosine)
    return coefficients.sum(0), targets


def mgda(gram: np.ndarray) -> np.ndarray:
    """Desideri 2012, Sener and Koltun 2018: the shortest vector among the mixtures of the gradients."""
    return on_simplex(ridged(gram), np.zeros(len(gram)))


def cagrad(gram: np.ndarray, c: float = 0.5) -> np.ndarray:
    """Liu et al. 2021: the direction within c |g_0| of the mean gradient g_0 that serves the worst task best.

    With g_w the mixture that minimises <g_w, g_0> + c |g_0| |g_w|, it is g_0 + c |g_0| / |g_w| g_w.
    """
    size = len(gram)
    mean = np.full(size, 1 / size)
    scaled = ridged(gram)
    linear = scaled @ mean
    reach = c * np.sqrt(mean @ linear)
    if reach <= 1e-6:
        return mean
    # |g_w| = min over r of (|g_w|^2 / r + r) / 2: for each r a quadratic program, and r is right where it is |g_w|,
    # below which the mixture is longer than r and above which it is shorter
    w, low, high = mean, 0.0, np.sqrt(np.diag(scaled).max())
    r = high / 2
    for _ in range(100):
        w = on_simplex(scaled, linear * (r / reach), w)
        length = np.sqrt(w @ scaled @ w)
        if abs(length - r) <= 1e-12 * high:
            break
        low, high = (r, high) if length > r else (low, r)
        r = _fixed_length(scaled, linear / reach, w > 0)
        if not low < r < high:
            r = (low + high) / 2
    norm = np.sqrt(w @ scaled @ w)
    # At a point where no direction serves all tasks the mixture's length is what rounding and the ridge leave of zero,
    # and so is the worst task's gain.
    stationary = norm <= 1e-4 and w @ linear + reach * norm <= 1e-5 * reach
    return np.zeros(size) if stationary else mean + reach / norm * w


def imtl_g(gram: np.ndarray) -> np.ndarray:
    """Liu et al. 2021 (Towards impartial multi-task learning): as long a part along each gradient; weights sum to one.

    They may be negative. Zeros where no such direction exists.
    """
    solved = np.linalg.pinv(gram, hermitian=True) @ np.sqrt(np.diag(gram).clip(0))
    total = solved.sum()
    return solved / total if abs(total) > 1e-12 * np.abs(solved).sum() else np.zeros(len(gram))


def nash_mtl(gram: np.ndarray, max_norm: float | None = 1.0) -> np.ndarray:
    """Navon et al. 2022: the Nash bargain, the positive w with M w = 1 / w; each task gains the same, |d|^2 = T.

    w minimises w^T M w / 2 - sum log w, which is convex: Newton's method, to the last digits. `max_norm`: the largest
    norm of the direction d, which is longer otherwise whatever the gradients are.
    """
    size = len(gram)
    if not np.trace(gram) > 0:
        return np.zeros(size)
    # in units of each gradient's length, which the bargain does not depend on; one without length is no party to it
    lengths = np.sqrt(np.diag(gram).clip(0))
    parties = np.count_nonzero(lengths)
    lengths[lengths == 0] = 1
    scaled = gram / np.outer(lengths, lengths)
    np.fill_diagonal(scaled, 1)
    scaled = ridged(scaled)
    w, before = np.full(size, size**-0.5), np.inf

    def value(w: np.ndarray) -> float:
        return w @ scaled @ w / 2 - np.log(w).sum()

    for _ in range(200):
        slope = w * (scaled @ w) - 1
        # in units of w, where the barrier's curvature is one
        step = -np.linalg.solve(scaled * np.outer(w, w) + np.eye(size), slope)
        decrease = -step @ slope
        # in the end rounding alone is left
        if decrease < 1e-24 or (decrease < 1e-3 and decrease >= before):
            break
        before, length = decrease, min(1.0, 0.99 / max(-step.min(), 1e-300))
        while decrease > 1e-3 and value(w * (1 + length * step)) > value(w) - 0.1 * length * decrease:
            length /= 2
        w = w * (1 + length * step)
    w = w * min(1.0, max_norm / np.sqrt(parties)) if max_norm is not None else w
    return w / lengths


def aligned_mtl(gram: np.ndarray, scale: str = "min") -> np.ndarray:
    """Senushkin et al. 2023: the mean of the gradients after all singular values of [g_1 .. g_T] are made equal.

    `scale`: to the smallest of them ("min"), to the median, or to the root of their mean square ("rmse").
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max(initial=0) * len(gram) * np.finfo(float).eps
    if not kept.any():
        return np.full(len(gram), 1 / len(gram))
    values, vectors = values[kept], vectors[:, kept]
    # the lower one of two in the middle
    common = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[scale]
    return vectors @ (np.sqrt(common / values) * vectors.mean(0))


def upgrad(gram: np.ndarray) -> np.ndarray:
    """Quinton and Rey 2024: each gradient is projected onto the cone of what conflicts with none; their mean."""
    size = len(gram)
    return above(ridged(gram), np.eye(size) / size).sum(0)


def _fixed_length(quadratic: np.ndarray, linear: np.ndarray, free: np.ndarray) -> float:
    """The r for which the w that minimises w^T A w / 2 + r b^T w over sum w = 1, zero where not free, has |g_w| = r."""
    size = int(free.sum())
    system = np.ones((size + 1, size + 1))
    system[size, size] = 0
    system[:size, :size] = quadratic[np.ix_(free, free)]
    right = np.zeros((size + 1, 2))
    right[size, 0], right[:size, 1] = 1, -linear[free]
    # w is u + r v
    u, v = np.linalg.solve(system, right)[:size].T
    among = system[:size, :size]
    a, b, c = v @ among @ v - 1, u @ among @ v, u @ among @ u
    root = np.sqrt(max(b * b - a * c, 0))
    # of a < 0 < c the positive root
    return (-b - root) / a if a < 0 else np.nan
