"""Losses of a tile of rows of one task, with their slopes: the formulas are those of docs/maths/heads_loss.md.

An output's loss is on its own, but for cross-entropy: there a row's largest output and the sum of exponentials below it
are carried from one tile of outputs to the next. Which loss is whose is known to the host, and goes to the device as
arguments.
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_fast.ops._tiles.triton import ROWS

# outputs of a tile
COLUMNS: tl.constexpr = tl.constexpr(16)
# numbers of two bits in a word, and words of a launch
IN_A_WORD: tl.constexpr = tl.constexpr(30)
WORDS: tl.constexpr = tl.constexpr(16)


def kinds_of(losses: Sequence[int], offsets: Tensor) -> tuple[Tensor, int]:
    """The loss of each task, in memory of the device, or that of all."""
    if len(losses) == 1:
        return offsets, losses[0]
    kinds = torch.empty(len(losses), dtype=torch.int64, device=offsets.device)
    in_a_launch = IN_A_WORD.value * WORDS.value
    for first in range(0, len(losses), in_a_launch):
        some = losses[first : first + in_a_launch]
        words = [some[i : i + IN_A_WORD.value] for i in range(0, in_a_launch, IN_A_WORD.value)]
        # as arguments, which a graph captures; odd and large, so that one kernel does for all: see ops/_leaves
        words = tuple((1 << 62) + sum(kind << 2 * i + 1 for i, kind in enumerate(word)) + 1 for word in words)
        _unpack[(1,)](words, kinds, first, len(losses), enable_fp_fusion=True)
    return kinds, -1


def bits_of(number: float) -> int:
    """A float64 as an argument: Triton makes float32 of numbers."""
    return struct.unpack("q", struct.pack("d", number))[0]


@triton.jit
def kind_of(kinds, kind, task):
    of_task = tl.zeros((), tl.int64) + kind
    if kind < 0:
        of_task = tl.load(kinds + task)
    return of_task


@triton.jit
def counting_rows(mask, rows, end, MASK: tl.constexpr):
    """Which rows [ROWS] there are that the mask lets count."""
    there = rows < end
    if MASK == 1:
        there = there & (tl.load(mask + rows, mask=there, other=0) != 0)
    return there


@triton.jit
def counting_outputs(mask, start, wide, begin, rows, columns, end, MASK: tl.constexpr):
    """Which outputs [ROWS, COLUMNS]."""
    there = counting_rows(mask, rows, end, MASK)[:, None] & (columns < wide)[None, :]
    if MASK == 2:
        there = there & (tl.load(mask + start + (rows - begin)[:, None] * wide + columns, mask=there, other=0) != 0)
    return there


@triton.jit
def label_counts(labels, mask, ignore_index, rows, end, MASK: tl.constexpr):
    """Which rows [ROWS] count for cross-entropy."""
    there = counting_rows(mask, rows, end, MASK)
    return there & (tl.load(labels + rows, mask=there, other=0) != ignore_index)


@triton.jit
def row_targets(
    labels, class_weights, mask, ignore_index, first, wide, rows, end, CLASS_WEIGHTS: tl.constexpr, MASK: tl.constexpr
):
    """Of rows [ROWS]: the label, and its weight, zero where the row does not count. NaN for a label out of place."""
    there = counting_rows(mask, rows, end, MASK)
    label = tl.load(labels + rows, mask=there, other=0)
    there = there & (label != ignore_index)
    inside = (label >= 0) & (label < wide)
    element: tl.constexpr = class_weights.dtype.element_ty
    weight = tl.full((ROWS,), 1.0, element)
    if CLASS_WEIGHTS:
        weight = tl.load(class_weights + first + label, mask=there & inside, other=0.0)
    weight = tl.where(inside, weight, float("nan"))
    return label, tl.where(there, weight, 0.0).to(element)


@triton.jit
def count_of_tile(
    labels,
    class_weights,
    mask,
    ignore_index,
    kind,
    first,
    wide,
    start,
    begin,
    rows,
    end,
    CLASS_WEIGHTS: tl.constexpr,
    MASK: tl.constexpr,
):
    count = tl.zeros((), tl.float64)
    if kind == 0:
        _, weights = row_targets(
            labels, class_weights, mask, ignore_index, first, wide, rows, end, CLASS_WEIGHTS, MASK
        )  # fmt: skip
        count += tl.sum(weights.to(tl.float64))
    else:
        for column in range(0, wide, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            there = counting_outputs(mask, start, wide, begin, rows, columns, end, MASK)
            count += tl.sum(tl.sum(there.to(tl.float64), axis=1))
    return count


@triton.jit
def row_part(weight, smoothing, SMOOTH: tl.constexpr):
    """(1 - u) w_y"""
    if SMOOTH:
        weight = weight * (1.0 - number(smoothing)).to(weight.dtype)
    return weight


@triton.jit
def smooth_targets(class_weights, smoothing, first, columns, wide, CLASS_WEIGHTS: tl.constexpr):
    """u w_c / C [COLUMNS] of label smoothing u."""
    element: tl.constexpr = class_weights.dtype.element_ty
    smooth = tl.where(columns < wide, number(smoothing) / wide.to(tl.float64), 0.0)
    if CLASS_WEIGHTS:
        smooth *= tl.load(class_weights + first + columns, mask=columns < wide, other=0.0).to(tl.float64)
    return smooth.to(element)


@triton.jit
def number(bits):
    return (tl.zeros((), tl.int64) + bits).to(tl.float64, bitcast=True)


@triton.jit
def lowest(x):
    """The least finite number, for each row of a tile."""
    element: tl.constexpr = x.dtype.element_ty
    least: tl.constexpr = -1.7976931348623157e308 if element == tl.float64 else -3.4028234663852886e38
    return tl.full((ROWS,), least, element)


@triton.jit
def carried(z, there, top, total):
    """The largest output so far and the sum of exponentials below it, with some outputs more."""
    # a NaN does not become the largest, but does go into the sum
    highest = tl.maximum(top, tl.max(tl.where(there & (z == z), z, top[:, None]), axis=1))
    some = tl.exp(tl.where(there, z - highest[:, None], float("-inf")))
    return highest, total * tl.exp(top - highest) + tl.sum(some, axis=1)


@triton.jit
def output_loss(z, y, kind, delta):
    """The loss of each output and its derivative."""
    difference = z - y
    if kind == 1:
        value, slope = difference * difference, 2.0 * difference
    elif kind == 2:
        e = tl.exp(-tl.abs(z))
        slope = tl.where(z < 0, e, 1.0) / (1.0 + e) - y
        # in torch's order, which decides what infinities give
        value = (1.0 - y) * z - (tl.minimum(z, 0.0) - log1p_of_unit(e))
    else:
        size = tl.abs(difference)
        square = 0.5 * difference * difference
        value = tl.where(size < delta, square, delta * (size - 0.5 * delta))
        slope = tl.where(difference > delta, delta, tl.where(difference < -delta, -delta, difference))
    return value, slope


@triton.jit
def log1p_of_unit(x):
    """log(1 + x) for 0 <= x <= 1, small ones too: twice the artanh of x / (2 + x), which is a third at most."""
    s = x / (2.0 + x)
    square, total = s * s, s * 0.0 + 1.0 / 35
    for i in tl.static_range(17):
        total = total * square + 1.0 / (33 - 2 * i)
    return 2.0 * s * total


# One program: numbers of two bits, from words to memory.
@triton.jit(do_not_specialize=["first", "count"])
def _unpack(words, to, first, count):
    lanes = tl.arange(0, 32)
    for i in tl.static_range(WORDS):
        at = first + i * IN_A_WORD + lanes
        tl.store(to + at, (words[i] >> (2 * lanes + 1).to(tl.int64)) & 3, mask=(lanes < IN_A_WORD) & (at < count))
