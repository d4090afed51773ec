"""Every test starts from a seed of its own, the same in every run, so that a change is judged by itself alone.

`--repeat 200` searches: it runs every test so often, each time with a fresh seed, which a failure shows;
MTML_FAST_TEST_SEED repeats one.
"""

import hashlib
import os

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed(monkeypatch, request) -> int:
    """Of torch's own generator, and by the variable of the batteries."""
    searching = request.config.getoption("--repeat") > 1
    drawn = os.urandom(3) if searching else hashlib.sha256(request.node.nodeid.encode()).digest()[:3]
    value = os.environ.get("MTML_FAST_TEST_SEED", str(int.from_bytes(drawn, "big")))
    print(f"repeat with MTML_FAST_TEST_SEED={value}")
    monkeypatch.setenv("MTML_FAST_TEST_SEED", value)
    torch.manual_seed(int(value))
    return int(value)


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


def pytest_addoption(parser):
    parser.addoption("--repeat", type=int, default=1, metavar="N", help="run every test N times, with N fresh seeds")


def pytest_generate_tests(metafunc):
    times = metafunc.config.getoption("--repeat")
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times))
