"""What all data sets share: steps drawn ahead and memory used again never show in what `sample` returns."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mtml_fast.data import Sinusoid, TensorClasses
from mtml_fast.data._episodes import _REUSED, _TASKS_AHEAD
from mtml_fast.data._random import Draws


def classes(**options):
    """Pictures large enough for memory that is used again, each filled with its own row number."""
    x = torch.arange(60.0)[:, None].expand(60, 2000)
    return TensorClasses(x, torch.arange(60) % 6, ways=5, shots=2, query_shots=2, **options)


def tensors(batch):
    return [part.clone() for rows in (batch.support, batch.query) for part in (rows.x, rows.y)]


def assert_equal(batch, expected):
    for a, b in zip(tensors(batch), expected, strict=True):
        assert torch.equal(a, b)


KINDS = {"sinusoid": Sinusoid, "classes": classes}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_steps_in_turn_equal_steps_alone(make):
    tasks = make(seed=4)
    last = 2 * _TASKS_AHEAD // 20 + 3
    for step in [*range(last), 5, 6, 5, 5, 2**40, 2**40 + 1, 2**40 + 2, 2**63 - 2, 2**63 - 1]:
        assert_equal(tasks.sample(20, step), tensors(make(seed=4).sample(20, step)))
    # another range of tasks in between, and another seed
    for step in range(4):
        assert_equal(tasks.sample(3, step, first_task=7), tensors(make(seed=4).sample(3, step, first_task=7)))
    tasks.seed = 5
    for step in range(4, 8):
        assert_equal(tasks.sample(3, step, first_task=7), tensors(make(seed=5).sample(3, step, first_task=7)))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_batch_is_the_callers_own(make, dtype):
    tasks = make(dtype=dtype)
    expected = [tensors(make(dtype=dtype).sample(8, step)) for step in range(6)]
    held = [tasks.sample(8, step) for step in range(6)]
    # one picture alone keeps its memory
    views = [batch.query.x[3, 1] for batch in held]
    for batch, before in zip(held, expected, strict=True):
        assert_equal(batch, before)
    del held, batch
    for step in range(6):
        changed = tasks.sample(8, step)
        assert_equal(changed, expected[step])
        for rows in (changed.support, changed.query):
            rows.x.fill_(7)
            rows.y.fill_(7)
        assert_equal(tasks.sample(8, step), expected[step])
    for view, before in zip(views, expected, strict=True):
        assert torch.equal(view, before[2][3, 1])


def test_memory_is_used_again_once_it_is_free():
    tasks = classes()
    first = tasks.sample(8, 0).support.x
    assert first.nbytes in _REUSED
    place = first.data_ptr()
    assert place % 64 == 0
    array = first.numpy()
    del first
    # NumPy holds it still
    assert tasks.sample(8, 1).support.x.data_ptr() != place
    del array
    place = tasks.sample(8, 2).support.x.data_ptr()
    assert tasks.sample(8, 3).support.x.data_ptr() == place


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_threads_and_copies_draw_the_same(make):
    tasks = make()
    expected = [tensors(make().sample(10, step)) for step in range(300)]

    def check(offset):
        for step in range(300):
            step = (step + offset) % 300
            assert_equal(tasks.sample(10, step), expected[step])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, (0, 0, 100, 200)))
    for other in (copy.deepcopy(tasks), pickle.loads(pickle.dumps(tasks))):
        assert_equal(other.sample(10, 3), expected[3])
        assert_equal(tasks.sample(10, 4), expected[4])


def test_draws_of_many_steps_are_those_of_each():
    calls = (
        lambda draws: draws.uniform(3),
        lambda draws: draws.distinct(50, 4, 2),
        lambda draws: draws.shuffled(np.full(draws.num_tasks, 5)).reshape(-1, 5),
        lambda draws: draws.permuted(9),
    )
    many, each = Draws(3, 9, 4, 20, steps=5), [Draws(3, step, 4, 20) for step in range(9, 14)]
    for call in calls:
        assert np.array_equal(call(many), np.concatenate([call(draws) for draws in each]))
