import hashlib
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mtml_fast.data import Sinusoid


def kolmogorov_smirnov(values, low, high):
    """Distance between the values and the uniform distribution on [low, high], in units of 1 / sqrt(n)."""
    unit = np.sort((np.asarray(values, np.float64).ravel() - low) / (high - low))
    grid = np.arange(unit.size + 1) / unit.size
    return max(np.abs(unit - grid[1:]).max(), np.abs(unit - grid[:-1]).max()) * math.sqrt(unit.size)


def test_rows_follow_the_equation():
    tasks = Sinusoid(shots=6, query_shots=9, seed=3, dtype=torch.float64)
    batch = tasks.sample(40, step=5)
    amplitude, phase = tasks.parameters(40, step=5)
    assert batch.support.x.shape == batch.support.y.shape == (40, 6, 1)
    assert batch.query.x.shape == batch.query.y.shape == (40, 9, 1)
    for rows in (batch.support, batch.query):
        expected = amplitude[:, None, None] * torch.sin(rows.x - phase[:, None, None])
        torch.testing.assert_close(rows.y, expected, rtol=0, atol=1e-14)
        assert rows.x.is_contiguous()
        assert rows.y.is_contiguous()


def test_distributions_are_the_papers():
    tasks = Sinusoid()
    batch = tasks.sample(20_000)
    amplitude, phase = tasks.parameters(20_000)
    # exceeded once in a thousand by chance; the numbers are fixed, so this never flakes
    assert kolmogorov_smirnov(amplitude, 0.1, 5.0) < 1.95
    assert kolmogorov_smirnov(phase, 0.0, math.pi) < 1.95
    assert kolmogorov_smirnov(batch.support.x, -5.0, 5.0) < 1.95
    assert kolmogorov_smirnov(batch.query.x, -5.0, 5.0) < 1.95
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 4 / math.sqrt(20_000)
    assert batch.support.x.dtype == batch.support.y.dtype == torch.float32


def test_ranges_are_options():
    tasks = Sinusoid(amplitude=(5, 10), phase=(1, 1), x=(0, 2))
    amplitude, phase = tasks.parameters(5000)
    assert kolmogorov_smirnov(amplitude, 5, 10) < 1.95
    assert phase.eq(1).all()
    assert kolmogorov_smirnov(tasks.sample(5000).query.x, 0, 2) < 1.95
    assert tasks.fingerprint != Sinusoid().fingerprint


def test_slices_equal_the_whole():
    tasks = Sinusoid(seed=1)
    whole = tasks.sample(32, step=4)
    for first in (0, 7, 31):
        part = tasks.sample(1, step=4, first_task=first)
        assert torch.equal(part.support.x[0], whole.support.x[first])
        assert torch.equal(part.query.y[0], whole.query.y[first])
        assert torch.equal(tasks.parameters(1, 4, first_task=first)[0][0], tasks.parameters(32, 4)[0][first])


def test_seed_and_step_change_the_tasks():
    base = Sinusoid(seed=0).sample(8, step=0).support.x
    assert not torch.isin(Sinusoid(seed=1).sample(8, step=0).support.x, base).any()
    assert not torch.isin(Sinusoid(seed=0).sample(8, step=1).support.x, base).any()
    assert torch.equal(Sinusoid(seed=0).sample(8, step=0).support.x, base)


def test_other_processes_draw_the_same_bits():
    code = (
        "import hashlib; from mtml_fast.data import Sinusoid; b = Sinusoid(seed=9).sample(25, 3); "
        "print(hashlib.sha256(b.support.y.numpy().tobytes() + b.query.x.numpy().tobytes()).hexdigest())"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    batch = Sinusoid(seed=9).sample(25, 3)
    here = hashlib.sha256(batch.support.y.numpy().tobytes() + batch.query.x.numpy().tobytes()).hexdigest()
    assert seen == {here + "\n"}


def test_global_generators_are_untouched():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Sinusoid().sample(10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_sampling_is_fast():
    tasks = Sinusoid()
    seconds = []
    for step in range(200):
        start = time.perf_counter()
        tasks.sample(25, step)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[100] < 1e-3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sinusoid(shots=0), ValueError, "shots must be at least 1, got 0"),
        (lambda: Sinusoid(query_shots=2.0), TypeError, r"query_shots must be an int, got 2\.0"),
        (lambda: Sinusoid(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: Sinusoid(shots=torch.tensor(2.0)), TypeError, r"shots must be an int, got tensor\(2\.\)"),
        (lambda: Sinusoid(seed=True), TypeError, "seed must be an int, got True"),
        (lambda: Sinusoid(amplitude=(2, 1)), ValueError, r"amplitude must be a finite range .* got \(2, 1\)"),
        (lambda: Sinusoid(phase=(0, math.nan)), ValueError, "phase must be a finite range"),
        (lambda: Sinusoid(x=3), TypeError, r"x must be a range \(low, high\), got 3"),
        (lambda: Sinusoid(dtype=torch.int64), TypeError, "dtype must be a floating point torch.dtype, got torch.int64"),
        (lambda: Sinusoid().sample(0), ValueError, "num_tasks must be at least 1, got 0"),
        (lambda: Sinusoid().sample(2.5), TypeError, r"num_tasks must be an int, got 2\.5"),
        (lambda: Sinusoid().sample(2, step=-1), ValueError, "step must be at least 0, got -1"),
        (lambda: Sinusoid().sample(2, step=2**63), ValueError, r"step must be below 2\^63, got 9223372036854775808"),
        (lambda: Sinusoid().sample(2, first_task=-1), ValueError, "first_task must be at least 0, got -1"),
    ],
)
def test_bad_input_is_one_clear_line(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_fingerprint_and_repr_show_the_settings():
    assert Sinusoid(shots=5, seed=2).fingerprint == Sinusoid(shots=5, seed=2).fingerprint
    different = [
        Sinusoid(),
        Sinusoid(shots=5),
        Sinusoid(query_shots=5),
        Sinusoid(seed=5),
        Sinusoid(dtype=torch.float64),
    ]
    assert len({tasks.fingerprint for tasks in different}) == len(different)
    assert repr(Sinusoid(seed=4)).startswith("Sinusoid(shots=10, query_shots=10, amplitude=(0.1, 5.0)")
    assert repr(Sinusoid(seed=4)).endswith("seed=4)")
