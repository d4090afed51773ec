import random

import pytest
import torch

from mtml_fast.data import folds
from mtml_fast.tasks import TaskRows


def ragged(counts, classes, seed):
    torch.manual_seed(seed)
    rows = sum(counts)
    y = torch.randint(0, classes, (rows,))
    return TaskRows(torch.arange(rows)[:, None].float(), y, torch.tensor([0, *counts]).cumsum(0))


def test_each_row_is_a_query_row_once_and_all_parts_are_alike():
    seed = random.randrange(2**31)
    print("seed", seed)
    rows = ragged([31, 5, 12], 3, seed)
    batches = folds(rows, 5, seed)
    for t in range(3):
        x, y = rows.task(t)
        queries = [batch.query.task(t) for batch in batches]
        assert torch.cat([q for q, _ in queries]).flatten().sort().values.tolist() == x.flatten().tolist()
        sizes = [len(q) for q, _ in queries]
        assert max(sizes) - min(sizes) <= 1
        for label in range(3):
            held = [int((labels == label).sum()) for _, labels in queries]
            assert sum(held) == int((y == label).sum())
            assert max(held) - min(held) <= 1
        for batch in batches:
            both = torch.cat([batch.support.task(t)[0], batch.query.task(t)[0]])
            assert both.flatten().sort().values.tolist() == x.flatten().tolist()
            # targets stay with their inputs, and the rows in their order
            for part in (batch.support, batch.query):
                places = part.task(t)[0].flatten().long()
                assert torch.equal(part.task(t)[1], rows.y[places])
                assert places.tolist() == sorted(places.tolist())


def test_the_seed_decides_and_a_task_is_split_alike_in_any_company():
    rows = ragged([20, 15], 2, 0)
    first, again, other = folds(rows, 3, 1), folds(rows, 3, 1), folds(rows, 3, 2)
    assert all(torch.equal(a.query.x, b.query.x) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.query.x, b.query.x) for a, b in zip(first, other, strict=True))
    alone = folds(rows.select([0]), 3, 1)
    assert all(torch.equal(a.query.task(0)[0], b.query.x) for a, b in zip(first, alone, strict=True))


def test_rectangular_rows_floating_targets_and_masks():
    x = torch.randn(3, 6, 2)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    rows = TaskRows(x, x.sum(-1, keepdim=True), class_mask=mask)
    for batch in folds(rows, 3):
        assert batch.query.counts.tolist() == [2, 2, 2]
        assert torch.equal(batch.query.y, batch.query.x.sum(-1, keepdim=True))
        assert torch.equal(batch.support.class_mask, mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": 1}, ValueError, "count must be .*2.*got 1"),
        ({"count": 6}, ValueError, "count must be at most the rows of every task, 5 in the smallest, got 6"),
        ({"count": 2.5}, TypeError, "count must be .*got 2.5"),
        ({"seed": -1}, ValueError, "seed must be .*got -1"),
        ({"rows": TaskRows(torch.zeros(2, 3, 1))}, ValueError, "rows.y must hold the targets, got None"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        folds(**({"rows": ragged([9, 5], 2, 0), "count": 3} | change))
