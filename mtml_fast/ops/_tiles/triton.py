"""Rows and outputs of tasks in tiles: how many there are is a matter of sizes, which is whose is found on the device.

Offsets stay there. Rows are cut into tiles: that of task t and tile i has the slot `offsets[t] // ROWS + t + i`, of
which there are R // ROWS + T for any offsets, and a search finds a slot's task. Sums over rows are taken by parts of a
task, a matter of its own rows alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows of a tile
ROWS: tl.constexpr = tl.constexpr(64)
# the parts of a task's rows whose sums are kept are no more than this
PARTS: tl.constexpr = tl.constexpr(16)


class Rows(NamedTuple):
    """Rows packed by task."""

    offsets: Tensor  # [T + 1]
    tasks: int  # T
    count: int  # R

    @property
    def slots(self) -> int:
        """Of tiles, some of them without rows."""
        return self.count // ROWS.value + self.tasks if self.count else 0

    @property
    def parts(self) -> int:
        """The most that a task can have."""
        return min(PARTS.value, triton.cdiv(self.count, ROWS.value))


class Outputs(NamedTuple):
    """The outputs of all tasks: those of a task are rows of the packed weights, and [R_t, C_t] of packed outputs."""

    # equally many for all tasks; -1: task t has the rows offsets[t]:offsets[t + 1], its outputs begin at starts[t]
    width: int
    offsets: Tensor
    starts: Tensor
    total: int  # sum of C_t
    mean: int  # of a task, at least 1: how many programs share the outputs

    @property
    def table(self) -> tuple[Tensor, Tensor, int]:
        """What the kernels take."""
        return self.offsets, self.starts, self.width

    @property
    def tile(self) -> int:
        """Outputs of a tile: of ragged widths few, as most heads are narrow and the tile must not depend on others."""
        return 16 if self.width <= 16 else 32


def outputs_of(rows: Rows, weight: Tensor, out_offsets: Tensor | None, packed: bool = True) -> Outputs:
    """The outputs of the last layer; `packed`: whether somebody reads or writes them packed."""
    if out_offsets is None:
        return equal_outputs(rows, weight.shape[0] // max(rows.tasks, 1))
    out_offsets = out_offsets.contiguous()
    starts = torch.empty_like(rows.offsets) if packed else rows.offsets
    if packed:
        _starts[(1,)](rows.offsets, out_offsets, starts, rows.tasks, TASKS=256, enable_fp_fusion=True)
    total = weight.shape[0]
    return Outputs(-1, out_offsets, starts, total, max(1, triton.cdiv(total, max(rows.tasks, 1))))


def equal_outputs(rows: Rows, width: int) -> Outputs:
    """Equally many of all tasks."""
    return Outputs(width, rows.offsets, rows.offsets, rows.tasks * width, max(1, width))


@triton.jit
def find_tile(offsets, tasks, slot):
    """Of a slot: its task, where the task's rows begin, the tile's first row, and where the task's rows end."""
    low = tl.zeros((), tl.int64)
    high = low + tasks
    while high - low > 1:
        middle = (low + high) // 2
        behind = tl.load(offsets + middle) // ROWS + middle <= slot
        low = tl.where(behind, middle, low)
        high = tl.where(behind, high, middle)
    begin = tl.load(offsets + low)
    return low, begin, begin + (slot - begin // ROWS - low) * ROWS, tl.load(offsets + low + 1)


@triton.jit
def find_part(offsets, task, part):
    """Of a part of a task: where the task's rows begin, and its rows first:end."""
    begin, last = tl.load(offsets + task), tl.load(offsets + task + 1)
    size = rows_of_part(last - begin)
    first = begin + part * size
    return begin, first, tl.minimum(first + size, last)


@triton.jit
def rows_of_part(rows):
    """How many a part has of a task's rows: whole tiles."""
    return (rows + ROWS * PARTS - 1) // (ROWS * PARTS) * ROWS


@triton.jit
def place_of_sums(total, task, begin, part, row, first, wide):
    """Where the sums of a part are that begins with a row: their first row; of a negative total, by tiles."""
    place = part * total + first
    if total < 0:
        place = (begin // ROWS + task + (row - begin) // ROWS) * wide
    return place


@triton.jit
def find_outputs(out_offsets, starts, width, task, begin):
    """Of a task whose rows begin there: its first row of the weights, its outputs, where they begin packed."""
    wide = tl.zeros((), tl.int64) + width
    first, start = task * wide, begin * wide
    if width < 0:
        first = tl.load(out_offsets + task)
        wide = tl.load(out_offsets + task + 1) - first
        start = tl.load(starts + task)
    return first, wide, start


# One program: where the packed outputs of each task begin.
@triton.jit(do_not_specialize=["tasks"])
def _starts(offsets, out_offsets, starts, tasks, TASKS: tl.constexpr):
    start = tl.zeros((), tl.int64)
    tl.store(starts, start)
    for task in range(0, tasks, TASKS):
        lanes = task + tl.arange(0, TASKS)
        there = lanes < tasks
        rows = tl.load(offsets + lanes + 1, mask=there, other=0) - tl.load(offsets + lanes, mask=there, other=0)
        first = tl.load(out_offsets + lanes, mask=there, other=0)
        sizes = rows * (tl.load(out_offsets + lanes + 1, mask=there, other=0) - first)
        tl.store(starts + lanes + 1, start + tl.cumsum(sizes, axis=0), mask=there)
        start += tl.sum(sizes)
