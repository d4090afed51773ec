"""gradient_combine in Triton: each launch reads up to sixteen leaves once.

Sums are float64, also those of float32 gradients, and rounded once. The floor is the memory's speed: there is one
multiplication for each number that is read or written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_fast.ops._leaves.triton import ELEMENTS, add_up, columns_of_sums, find_piece, launches

# columns of a tile, and tasks that are read at a time
COLUMNS: tl.constexpr = tl.constexpr(256)
TASKS: tl.constexpr = tl.constexpr(8)

_OPTIONS = dict(num_warps=4, enable_fp_fusion=True)


def gradient_combine(gradients: list[Tensor], weights: Tensor) -> list[Tensor]:
    """d = sum_t w_t g_t, a tensor [...] a leaf."""
    leaves, weights = [leaf.contiguous() for leaf in gradients], weights.contiguous()
    tasks, element = weights.shape[0], ELEMENTS[weights.dtype]
    if tasks == 0:
        return [leaf.new_zeros(leaf.shape[1:]) for leaf in leaves]
    results = [leaf.new_empty(leaf.shape[1:]) for leaf in leaves]
    for pieces, tables, bits in launches(leaves, results, COLUMNS.value):
        _combine[(pieces,)](*tables, bits, weights, tasks, ELEMENT=element, **_OPTIONS)
    return results


def gradient_combine_backward(
    grad_outputs: list[Tensor], gradients: list[Tensor], weights: Tensor, needs: list[bool]
) -> list[Tensor]:
    """dg_t = w_t q and dw_t = <q, g_t>, those of them that are needed, q being the cotangents."""
    cotangents, weights = [q.contiguous() for q in grad_outputs], weights.contiguous()
    tasks, element = weights.shape[0], ELEMENTS[weights.dtype]
    *leaves_need, weights_need = needs
    wanted = [q for q, needed in zip(cotangents, leaves_need, strict=True) if needed]
    results = [q.new_empty(tasks, *q.shape) for q in wanted]
    for pieces, tables, bits in launches(results, wanted, COLUMNS.value):
        _spread[(pieces,)](*tables, bits, weights, tasks, ELEMENT=element, **_OPTIONS)
    if weights_need:
        results.append(_products([leaf.contiguous() for leaf in gradients], cotangents, weights))
    return results


def _products(leaves: list[Tensor], cotangents: list[Tensor], weights: Tensor) -> Tensor:
    """<q, g_t> [T], summed in float64."""
    result = torch.empty_like(weights)
    tasks = result.numel()
    if tasks == 0:
        return result
    parts = list(launches(leaves, cotangents, columns_of_sums(leaves)))
    partial = result.new_empty(sum(launch.pieces for launch in parts), tasks, dtype=torch.float64)
    first = 0
    for pieces, tables, bits in parts:
        grid = (pieces, triton.cdiv(tasks, TASKS.value))
        _dots[grid](*tables, bits, partial, first, tasks, ELEMENT=ELEMENTS[result.dtype], **_OPTIONS)
        first += pieces
    add_up(partial, result)
    return result


# One program: one piece of d = sum_t w_t g_t, a tile.
@triton.jit(do_not_specialize=["bits", "tasks"])
def _combine(begins, ends, results, bits, weights, tasks, ELEMENT: tl.constexpr):
    row, result, start, end, size = find_piece(begins, ends, results, bits, tl.program_id(0), ELEMENT)
    columns = start + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, tasks, TASKS):
        # a few rows are on their way at once
        for i in tl.static_range(TASKS):
            t = first + i
            # behind the last row there are no columns
            x = tl.load(row + t * size + columns, mask=columns < tl.where(t < tasks, end, 0), other=0.0)
            total += tl.load(weights + tl.minimum(t, tasks - 1)).to(tl.float64) * x.to(tl.float64)
    tl.store(result + columns, total, mask=columns < end)


# One program: one piece of dg_t = w_t q, a tile, for all t.
@triton.jit(do_not_specialize=["bits", "tasks"])
def _spread(begins, ends, cotangents, bits, weights, tasks, ELEMENT: tl.constexpr):
    row, cotangent, start, end, size = find_piece(begins, ends, cotangents, bits, tl.program_id(0), ELEMENT)
    columns = start + tl.arange(0, COLUMNS)
    q = tl.load(cotangent + columns, mask=columns < end, other=0.0)
    to = row + columns
    for t in range(0, tasks):
        tl.store(to, tl.load(weights + t) * q, mask=columns < end)
        to += size


# One program: <q, g_t> over one piece for a few tasks; partial[first + piece] gets them.
@triton.jit(do_not_specialize=["bits", "first", "tasks"])
def _dots(begins, ends, cotangents, bits, partial, first, tasks, ELEMENT: tl.constexpr):
    row, cotangent, start, end, size = find_piece(begins, ends, cotangents, bits, tl.program_id(0), ELEMENT)
    tasks = tasks.to(tl.int64)
    rows = tl.program_id(1) * TASKS + tl.arange(0, TASKS)
    above = row + rows[:, None] * size
    lanes = tl.arange(0, COLUMNS)
    sums = tl.zeros((TASKS, COLUMNS), tl.float64)
    for column in range(start, end, COLUMNS):
        there = lanes < (end - column).to(tl.int32)
        q = tl.load(cotangent + column + lanes, mask=there, other=0.0)
        mask = (rows < tasks)[:, None] & there[None, :]
        x = tl.load(above + column + lanes[None, :], mask=mask, other=0.0)
        sums += x.to(tl.float64) * q.to(tl.float64)[None, :]
    to = partial + (first + tl.program_id(0)).to(tl.int64) * tasks + rows
    tl.store(to, tl.sum(sums, axis=1), mask=rows < tasks)
