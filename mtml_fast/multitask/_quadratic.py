"""Two small quadratic programs, solved exactly by active sets in float64: on the simplex, and above lower bounds."""

from __future__ import annotations

import numpy as np

__all__ = ["above", "on_simplex", "ridged"]

# of the mean of the diagonal: gradients that depend on each other make M singular, and their weights ambiguous
_RIDGE = 1e-11
# what counts as negative, of the largest value
_TOLERANCE = 1e-10


def ridged(gram: np.ndarray) -> np.ndarray:
    """M scaled to a mean diagonal of one, and made positive definite: of many weights the shortest are taken."""
    size = len(gram)
    scale = np.trace(gram) / size
    return (gram / scale if scale > 0 else np.zeros_like(gram)) + _RIDGE * np.eye(size)


def on_simplex(quadratic: np.ndarray, linear: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The w that minimises w^T A w / 2 + b^T w over w >= 0, sum w = 1, for A positive definite.

    The primal active set method: solve on the weights that are free, stop at the first that would turn negative, and
    free the one with the most negative multiplier; finite, as the value falls with every full step.
    """
    size = len(linear)
    w = np.full(size, 1 / size) if start is None else start
    free = w > 0
    system, right = np.zeros((size + 1, size + 1)), np.zeros(size + 1)
    system[:size, :size] = quadratic
    system[:size, size] = system[size, :size] = 1
    right[:size], right[size] = -linear, 1
    freed = -1
    # far more than it ever takes: only rounding could go round in circles
    for _ in range(20 * size + 100):
        index = np.append(np.flatnonzero(free), size)
        target = np.zeros(size)
        target[index[:-1]] = np.linalg.solve(system[np.ix_(index, index)], right[index])[:-1]
        falling = free & (target <= 0)
        if falling.any():
            steps = np.full(size, np.inf)
            steps[falling] = w[falling] / (w[falling] - target[falling])
            step = steps.min()
            if step == 0 and freed >= 0 and steps[freed] == 0:
                # freed by rounding alone
                return w
            w = np.maximum(w + step * (target - w), 0)
            w[steps <= step] = 0
            free &= w > 0
            continue
        w = target
        slope = quadratic @ w + linear
        multipliers = np.where(free, np.inf, slope - slope[free].mean())
        freed = int(multipliers.argmin())
        if free.all() or multipliers[freed] >= -_TOLERANCE * (np.abs(slope).max() + np.abs(linear).max()):
            break
        free[freed] = True
    return w / w.sum()


def above(quadratic: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Each row v minimises v^T A v over v >= its row of `lower` [B, T], for A positive definite.

    Block principal pivoting (Judice and Pires 1994; Kim and Park 2011) on all rows at once: every variable on the wrong
    side changes sides together, and one at a time where that stops to help.
    """
    count, size = lower.shape
    pull = lower @ quadratic  # the slope at the bound
    free = np.zeros((count, size), bool)
    excess, slope = np.zeros((count, size)), pull.copy()
    best, patience = np.full(count, size + 1), np.full(count, 3)
    eye, limits = np.eye(size, dtype=bool), _TOLERANCE * (1e-30 + np.abs(pull).max(1, keepdims=True))
    for _ in range(20 * size + 100):
        wrong = np.where(free, excess < 0, slope < -limits)
        number = wrong.sum(1)
        todo = np.flatnonzero(number)
        if not len(todo):
            break
        better = number[todo] < best[todo]
        patience[todo] = np.where(better, 3, patience[todo] - 1)
        best[todo] = np.minimum(best[todo], number[todo])
        for b in todo[patience[todo] < 0]:
            # Murty's rule, which ends for certain
            wrong[b, : wrong[b].nonzero()[0][-1]] = False
        free[todo] ^= wrong[todo]
        f = free[todo]
        systems = np.where(f[:, :, None] & f[:, None, :], quadratic, 0) + (eye & ~f[:, :, None])
        excess[todo] = np.linalg.solve(systems, np.where(f, -pull[todo], 0)[..., None])[..., 0]
        slope[todo] = np.where(f, 0, excess[todo] @ quadratic + pull[todo])
    return lower + np.maximum(excess, 0)
