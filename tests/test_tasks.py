"""TaskRows and TaskBatch."""

import pytest
import torch
from torch import ones, tensor

from mtml_fast import TaskBatch, TaskRows


def ragged():
    x = torch.arange(12.0).view(6, 2)
    return TaskRows(x, torch.arange(6), torch.tensor([0, 1, 4, 6]))


def test_rectangular():
    rows = TaskRows(torch.randn(3, 4, 2), torch.randn(3, 4))
    assert (rows.num_tasks, rows.is_ragged, rows.counts.tolist()) == (3, False, [4, 4, 4])
    assert torch.equal(rows.task(-1)[0], rows.x[2])
    assert torch.equal(rows.select([2, 0]).x, rows.x[[2, 0]])


def test_ragged():
    rows = ragged()
    assert (rows.num_tasks, rows.is_ragged, rows.counts.tolist()) == (3, True, [1, 3, 2])
    for t in range(3):
        assert rows.task(t)[1].tolist() == [[0], [1, 2, 3], [4, 5]][t]
    assert rows.task(-1)[1].tolist() == [4, 5]
    chosen = rows.select(torch.tensor([2, 0, 2]))
    assert chosen.y.tolist() == [4, 5, 0, 4, 5]
    assert chosen.offsets.tolist() == [0, 2, 3, 5]
    assert rows.select([]).num_tasks == 0


def test_masks_go_along():
    mask = torch.tensor([[True, False], [True, True]])
    rows = TaskRows(torch.ones(2, 1, 1), torch.zeros(2, 1).long(), class_mask=mask)
    assert rows.select([1]).class_mask.tolist() == [[True, True]]
    assert rows.without_labels().class_mask is mask


def test_to_moves_everything_and_keeps_labels():
    rows = ragged().to(torch.float64)
    assert (rows.x.dtype, rows.y.dtype, rows.offsets.dtype) == (torch.float64, torch.int64, torch.int64)
    targets = TaskRows(torch.ones(1, 1, 1), torch.ones(1, 1)).to(torch.float64)
    assert targets.y.dtype == torch.float64
    assert ragged().to("meta").y.device.type == "meta"


def test_batch():
    batch = TaskBatch(ragged(), ragged())
    assert batch.num_tasks == 3
    assert batch.select([1]).query.y.tolist() == [1, 2, 3]
    assert batch.to(torch.float64).support.x.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=ones(3)), ValueError, "x must be [T, N, ...], got shape [3]"),
        (dict(x=ones(3, 0, 2)), ValueError, "x must hold at least one row in every task, got shape [3, 0, 2]"),
        (dict(x=ones(3, 2), y=3), TypeError, "y must be a torch.Tensor, got int"),
        (
            dict(x=ones(3, 2), y=ones(3, 1)),
            ValueError,
            "y must have the rows of x [3, 2], got shape [3, 1]",
        ),
        (dict(x=ones(3, 2), y=ones(3, 2, device="meta")), ValueError, "y must be on the device of x (cpu)"),
        (dict(x=ones(3), offsets=[0, 3]), TypeError, "offsets must be a torch.Tensor, got list"),
        (
            dict(x=ones(3), offsets=tensor([0, 3]).int()),
            TypeError,
            "offsets must be int64, got torch.int32",
        ),
        (
            dict(x=ones(3), offsets=tensor([[0, 3]])),
            ValueError,
            "offsets must be [T + 1], got shape [1, 2]",
        ),
        (
            dict(x=ones(3), offsets=tensor([0, 2])),
            ValueError,
            "offsets must run from 0 to the number of rows 3",
        ),
        (dict(x=ones(3), offsets=tensor([1, 3])), ValueError, "got 1 to 3"),
        (
            dict(x=ones(3), offsets=tensor([0, 2, 1, 3])),
            ValueError,
            "offsets must increase (no task may be empty)",
        ),
        (dict(x=ones(3), offsets=tensor([0, 2, 2, 3])), ValueError, "got 2 then 2 at task 1"),
        (
            dict(x=ones(3, 2), class_mask=ones(3, 2)),
            TypeError,
            "class_mask must be bool, got torch.float32",
        ),
        (dict(x=ones(3, 2), class_mask=ones(2, 2).bool()), ValueError, "class_mask must be [T=3, C], got"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        TaskRows(**arguments)
    assert message in str(caught.value)


def test_bad_batch():
    with pytest.raises(TypeError, match="query must be TaskRows, got Tensor"):
        TaskBatch(ragged(), torch.ones(3, 1))
    with pytest.raises(ValueError, match="query must hold the 3 tasks of support, got 2"):
        TaskBatch(ragged(), ragged().select([0, 1]))
    with pytest.raises(IndexError, match=r"t must be a task in 0..2, got 3"):
        ragged().task(3)
