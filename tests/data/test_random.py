"""Draws: exact values, uniformity, and independence over seed, step, task and draw."""

import itertools

import numpy as np
import pytest

from mtml_fast.data._random import Draws


def splitmix64(state, index):
    """Value number `index` (from 0) of Vigna's splitmix64.c, in Python integers."""
    word = (1 << 64) - 1
    z = (state + (index + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def chi_square(counts):
    """Pearson's statistic against equal counts, in standard deviations from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_is_a_tree_of_splitmix64():
    assert splitmix64(1234567, 0) == 6457827717110365317  # the published test vector
    seed, step, task = 11, 2**40, 3
    key = splitmix64(splitmix64(splitmix64(seed, 0), step), task)
    assert Draws(seed, step, task, 1).bits(5).tolist() == [[splitmix64(key, i) for i in range(5)]]


def test_slices_equal_the_whole():
    whole = Draws(3, 9, 0, 64)
    parts = [Draws(3, 9, first, count) for first, count in ((0, 1), (1, 30), (31, 33))]
    calls = (
        lambda draws: draws.uniform(3),
        lambda draws: draws.integers(17, 2, 2),
        lambda draws: draws.distinct(50, 4),
        lambda draws: draws.distinct(6, 6, 3),
        lambda draws: draws.permuted(40),
    )
    for call in calls:
        assert np.array_equal(call(whole), np.concatenate([call(part) for part in parts]))


def test_every_coordinate_changes_every_draw():
    values = np.concatenate([Draws(seed, step, 0, 100).bits(50) for seed in range(10) for step in range(10)])
    assert np.unique(values).size == values.size == 10 * 10 * 100 * 50


@pytest.mark.parametrize("axis", ["seed", "step", "task", "draw"])
def test_uniform_and_independent_along_each_axis(axis):
    n = 200_000
    if axis == "seed":
        u = np.array([Draws(seed, 5, 5, 1).uniform(1)[0, 0] for seed in range(n // 10)])
    elif axis == "step":
        u = np.array([Draws(5, step, 5, 1).uniform(1)[0, 0] for step in range(n // 10)])
    elif axis == "task":
        u = Draws(5, 5, 0, n).uniform(1)[:, 0]
    else:
        u = Draws(5, 5, 5, 1).uniform(n)[0]
    # kolmogorov-smirnov: exceeds 1.95 / sqrt(n) once in a thousand; the numbers are fixed, so this never flakes
    grid = np.arange(1, u.size + 1) / u.size
    assert np.abs(np.sort(u) - grid).max() < 1.95 / np.sqrt(u.size)
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4 / np.sqrt(u.size)
    cells = (u[:-1] * 16).astype(int) * 16 + (u[1:] * 16).astype(int)
    assert abs(chi_square(np.bincount(cells, minlength=256))) < 4


def test_every_bit_is_fair_and_flips_with_every_coordinate():
    base = Draws(2**20, 2**20, 2**20, 1).bits(4096)
    ones = np.unpackbits(base.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 4 * 0.5 / np.sqrt(4096 * 64)
    for bit, coordinate in itertools.product(range(0, 20, 3), range(3)):
        key = [2**20] * 3
        key[coordinate] ^= 1 << bit
        flips = np.unpackbits((base ^ Draws(*key, 1).bits(4096)).view(np.uint8)).mean()
        assert abs(flips - 0.5) < 4.5 * 0.5 / np.sqrt(4096 * 64)


def test_integers_are_uniform_below_the_bound():
    values = Draws(0, 0, 0, 1000).integers(7, 700)
    assert values.min() == 0
    assert values.max() == 6
    assert abs(chi_square(np.bincount(values.ravel()))) < 4
    bounds = np.array([[1, 2, 1_000_000_007]])
    values = Draws(0, 0, 0, 2000).integers(bounds, 3)
    assert (values < bounds).all()
    assert values.max(0)[2] > 990_000_000


@pytest.mark.parametrize(("bound", "count"), [(4, 2), (5, 3), (4, 4), (1, 1)])
def test_distinct_is_uniform_over_ordered_choices(bound, count):
    values = Draws(1, 2, 0, 4000).distinct(bound, count, 30).reshape(-1, count)
    choices = list(itertools.permutations(range(bound), count))
    codes = {choice: i for i, choice in enumerate(choices)}
    counts = np.bincount([codes[tuple(row)] for row in values.tolist()], minlength=len(choices))
    assert counts.sum() == 120_000
    if len(choices) > 1:
        assert abs(chi_square(counts)) < 4


def test_distinct_of_many_and_of_ragged_bounds():
    bounds = np.array([[20, 10**12, 21]] * 500)
    values = Draws(1, 1, 0, 500).distinct(bounds, 20, 3)
    assert (values < bounds[..., None]).all()
    assert (np.diff(np.sort(values, -1), axis=-1) > 0).all()
    assert (np.sort(values[:, 0], -1) == np.arange(20)).all()


@pytest.mark.parametrize("bound", [1, 5, 64])
def test_permuted_runs_through_all_before_it_repeats(bound):
    order = Draws(0, 3, 0, 3 * bound).permuted(bound).reshape(3, bound)
    assert (np.sort(order, -1) == np.arange(bound)).all()
    first = Draws(0, 3, 0, 1).permuted(bound)
    assert first == order[0, 0]


def test_permuted_is_uniform_over_permutations():
    codes = {p: i for i, p in enumerate(itertools.permutations(range(3)))}
    orders = [tuple(Draws(0, step, 0, 3).permuted(3).tolist()) for step in range(6000)]
    assert abs(chi_square(np.bincount([codes[order] for order in orders], minlength=6))) < 4
