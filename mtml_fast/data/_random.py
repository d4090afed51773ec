"""Counter-based random numbers: a pure function of (seed, step, task, draw), for all tasks of a step at once.

A tree of SplitMix64 generators (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): the
seed's generator gives one key a step, the step's one key a task, the task's one value a draw. Nothing is carried from
call to call, so a step can be drawn alone, in slices, or on many machines, and no global generator is touched.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["VERSION", "Draws", "places"]

# part of every fingerprint: a change of the numbers below must not pass for the same episodes
VERSION = 1

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Draws:
    """The random numbers of tasks `first_task .. first_task + num_tasks - 1` of a step, taken call after call.

    Every method returns arrays `[T, ...]`; row t depends on (seed, step, first_task + t) and the calls made before.
    With `steps > 1` the rows of the steps `step .. step + steps - 1` follow each other, `T = steps * num_tasks`: a call
    costs little more than for one step.

    Example:
        >>> whole, part = Draws(0, 7, 0, 5), Draws(0, 7, 3, 2)
        >>> bool((whole.uniform(4)[3:] == part.uniform(4)).all())
        True
    """

    def __init__(self, seed: int, step: int, first_task: int, num_tasks: int, steps: int = 1):
        self.num_tasks = steps * num_tasks
        self._range = first_task, first_task + num_tasks
        self._step_keys = _stream(np.uint64(_mix_int(seed + _GOLDEN)), step, steps)  # [steps]
        self._task_keys = _stream(self._step_keys[:, None], first_task, num_tasks).reshape(-1)  # [T]
        self._used = 0

    def bits(self, *shape: int) -> np.ndarray:
        """64 random bits each, uint64 `[T, *shape]`."""
        count = math.prod(shape)
        values = _stream(self._task_keys[:, None], self._used, count)  # [T, count]
        self._used += count
        return values.reshape(self.num_tasks, *shape)

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform in [0, 1), float64 `[T, *shape]`, with 53 random bits."""
        return _unit(self.bits(*shape))

    def integers(self, bound, *shape: int) -> np.ndarray:
        """Uniform in 0 .. bound - 1, int64 `[T, *shape]`; `bound` is an int or an array that broadcasts to it."""
        return _below(self.bits(*shape), bound)

    def distinct(self, bound, count: int, *shape: int) -> np.ndarray:
        """`count` different integers of 0 .. bound - 1 in random order, int64 `[T, *shape, count]`.

        `bound` is an int or an array `[T, *shape]` with entries >= count. The work grows with `count`, not `bound`
        (Floyd's algorithm: Bentley and Floyd, "A sample of brilliance", 1987).
        """
        last = np.asarray(bound, np.int64)[..., None] - count + np.arange(count)  # [..., count]
        picks = self.integers(last + 1, *shape, count)
        # the picks of all tasks side by side, [count, T, *shape], which NumPy compares many at a time
        columns = np.ascontiguousarray(np.moveaxis(picks, -1, 0))
        last = np.moveaxis(np.broadcast_to(last, picks.shape), -1, 0)
        for i in range(1, count):
            np.copyto(columns[i], last[i], where=(columns[:i] == columns[i]).any(0))
        picks = np.moveaxis(columns, 0, -1)
        # floyd's set is uniform, its order is not
        return np.take_along_axis(picks, self.bits(*shape, count).argsort(-1), -1)

    def shuffled(self, counts: np.ndarray) -> np.ndarray:
        """For each task the integers 0 .. counts[t] - 1 in random order, packed one task after the other, int64."""
        tasks = np.repeat(np.arange(self.num_tasks), counts)
        place = places(counts)
        # a generator of its own for each task, so that its next draw does not depend on the counts
        keys = self.bits(1)[tasks, 0]
        bits = _mix(keys + (place + 1).astype(np.uint64) * np.uint64(_GOLDEN))
        return place[np.lexsort((bits, tasks))]

    def permuted(self, bound: int) -> np.ndarray:
        """The tasks' entries of a random permutation of 0 .. bound - 1 that the whole step shares, int64 `[T]`.

        Tasks 0 .. bound - 1 of a step get different entries, the next `bound` tasks those of a new permutation.
        """
        first, stop = self._range
        rounds = range(first // bound, (stop - 1) // bound + 1)
        start = first - rounds[0] * bound
        steps = []
        for key in self._step_keys.tolist():
            entries = [self._permutation(key, bound, r, min(bound, stop - r * bound)) for r in rounds]
            steps.append(np.concatenate(entries)[start : start + stop - first])
        return np.concatenate(steps)

    def _permutation(self, step_key: int, bound: int, round_: int, count: int) -> np.ndarray:
        # the first occurrences in a sequence of independent draws are a permutation, and a longer sequence only adds
        # to it: the work grows with count, not bound. The complement keeps the key apart from those of the tasks
        key = np.uint64(_mix_int((step_key ^ _WORD) + (round_ + 1) * _GOLDEN))
        length = 2 * count
        while True:
            values = _below(_stream(key, 0, length), bound)
            first = np.sort(np.unique(values, return_index=True)[1])
            if len(first) >= count:
                return values[first[:count]]
            length *= 2


def places(counts: np.ndarray) -> np.ndarray:
    """For each task the integers 0 .. counts[t] - 1, packed one task after the other."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def _stream(key, start: int, count: int) -> np.ndarray:
    """Values start .. start + count - 1 of the SplitMix64 generators with the states `key`."""
    counters = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(key + counters)


def _mix(z: np.ndarray) -> np.ndarray:
    z ^= z >> np.uint64(30)
    z *= np.uint64(_FIRST)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_SECOND)
    z ^= z >> np.uint64(31)
    return z


def _mix_int(z: int) -> int:
    """`_mix` of one word; NumPy would warn where a scalar overflows."""
    z &= _WORD
    z = (z ^ (z >> 30)) * _FIRST & _WORD
    z = (z ^ (z >> 27)) * _SECOND & _WORD
    return z ^ (z >> 31)


def _unit(bits: np.ndarray) -> np.ndarray:
    return (bits >> np.uint64(11)) * 2.0**-53


def _below(bits: np.ndarray, bound) -> np.ndarray:
    # rounding never reaches the bound, and the bias is below bound / 2^53
    return (_unit(bits) * bound).astype(np.int64)
