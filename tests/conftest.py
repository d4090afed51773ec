"""Every test starts from a fresh seed, which a failure shows; MTML_FAST_TEST_SEED repeats one.

`--repeat 200` runs every test so often, each time with another seed.
"""

import os

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed(monkeypatch) -> int:
    """Of torch's own generator, and by the variable of the batteries."""
    value = os.environ.get("MTML_FAST_TEST_SEED", str(int.from_bytes(os.urandom(3), "big")))
    print(f"repeat with MTML_FAST_TEST_SEED={value}")
    monkeypatch.setenv("MTML_FAST_TEST_SEED", value)
    torch.manual_seed(int(value))
    return int(value)


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


def pytest_addoption(parser):
    parser.addoption("--repeat", type=int, default=1, metavar="N", help="run every test N times, with N seeds")


def pytest_generate_tests(metafunc):
    times = metafunc.config.getoption("--repeat")
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times))
