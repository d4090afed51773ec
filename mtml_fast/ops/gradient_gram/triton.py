"""gradient_gram in Triton: each launch reads up to sixteen leaves once, and a last one adds the pieces' sums.

A float32 number is widened before it is multiplied, so that products are exact and sums are float64, as on the CPU.
The floor for few tasks is the memory's speed: T numbers a column are read for T^2 products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_fast.ops._leaves.triton import ELEMENTS, add_up, columns_of_sums, find_piece, launches

# columns of a piece of the backward pass
COLUMNS = 1024


def gradient_gram(gradients: list[Tensor]) -> Tensor:
    """[T, T] in float64, of leaves each [T, ...]."""
    leaves = [leaf.contiguous() for leaf in gradients]
    tasks, element = leaves[0].shape[0], ELEMENTS[leaves[0].dtype]
    gram = leaves[0].new_empty(tasks, tasks, dtype=torch.float64)
    if tasks == 0:
        return gram
    parts = list(launches(leaves, leaves, columns_of_sums(leaves)))
    partial = gram.new_empty(sum(launch.pieces for launch in parts), tasks, tasks)
    shape = _shape(tasks)
    blocks = triton.cdiv(tasks, shape["ROWS"])
    first = 0
    for pieces, tables, bits in parts:
        grid = (pieces, blocks, blocks)
        _gram[grid](*tables, bits, partial, first, tasks, ELEMENT=element, ALONE=blocks == 1, **shape)
        first += pieces
    add_up(partial, gram)
    return gram


def gradient_gram_backward(grad_outputs: list[Tensor], gradients: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """dg_i = sum_j S_ij g_j for the leaves that are needed, with S = Q + Q^T of the cotangent Q [T, T]."""
    pairs = grad_outputs[0] + grad_outputs[0].mT
    leaves = [leaf.contiguous() for leaf, needed in zip(gradients, needs, strict=True) if needed]
    results = [torch.empty_like(leaf) for leaf in leaves]
    tasks = pairs.shape[0]
    shape = _shape(tasks)
    for pieces, tables, bits in launches(leaves, results, COLUMNS):
        grid = (pieces, triton.cdiv(tasks, shape["ROWS"]))
        _gram_backward[grid](*tables, bits, pairs, tasks, ELEMENT=ELEMENTS[leaves[0].dtype], **shape)
    return results


def _shape(tasks: int) -> dict:
    """Tiles [ROWS, COLUMNS], as large as no Triton of 3.6 to 3.9 spills registers with, on sm_80 and sm_90."""
    tile = dict(ROWS=16, COLUMNS=64) if tasks <= 16 else dict(ROWS=32, COLUMNS=16)
    return dict(**tile, num_warps=4, num_stages=3, enable_fp_fusion=True)


# One program: the inner products of block i of rows with block j <= i over one piece; partial[first + piece] gets them
# and their mirror image.
@triton.jit(do_not_specialize=["bits", "first", "tasks"])
def _gram(
    begins,
    ends,
    others,
    bits,
    partial,  # [pieces, T, T]
    first,
    tasks,
    ELEMENT: tl.constexpr,
    ALONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, j = tl.program_id(1), tl.program_id(2)
    if j > i:
        return
    row, _, start, end, size = find_piece(begins, ends, others, bits, tl.program_id(0), ELEMENT)
    tasks = tasks.to(tl.int64)
    down, across = i * ROWS + tl.arange(0, ROWS), j * ROWS + tl.arange(0, ROWS)
    down_there, across_there = (down < tasks)[:, None], (across < tasks)[:, None]
    above, beside = row + down[:, None] * size, row + across[:, None] * size
    lanes = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((ROWS, ROWS), tl.float64)
    for column in range(start, end, COLUMNS):
        # of 32 bits, as there is one for each number of the tile
        there = lanes < (end - column).to(tl.int32)
        left = tl.load(above + column + lanes, mask=down_there & there, other=0.0).to(tl.float64)
        right = left if ALONE else tl.load(beside + column + lanes, mask=across_there & there, other=0.0).to(tl.float64)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee", out_dtype=tl.float64)
    to = partial + (first + tl.program_id(0)).to(tl.int64) * tasks * tasks
    down, across = down[:, None], across[None, :]
    lower = (down < tasks) & (across <= down)
    tl.store(to + down * tasks + across, sums, mask=lower)
    tl.store(to + across * tasks + down, sums, mask=lower & (across < down))


# One program: block program_id(1) of the results' rows over one piece.
@triton.jit(do_not_specialize=["bits", "tasks"])
def _gram_backward(
    begins,
    ends,
    results,
    bits,
    pairs,  # S [T, T]
    tasks,
    ELEMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, result, start, end, size = find_piece(begins, ends, results, bits, tl.program_id(0), ELEMENT)
    tasks = tasks.to(tl.int64)
    down = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    lanes = tl.arange(0, COLUMNS)[None, :]
    for column in range(start, end, COLUMNS):
        there = lanes < (end - column).to(tl.int32)
        sums = tl.zeros((ROWS, COLUMNS), tl.float64)
        for block in range(0, tasks, ROWS):
            across = block + tl.arange(0, ROWS)
            mask = (down < tasks) & (across < tasks)[None, :]
            weights = tl.load(pairs + down * tasks + across[None, :], mask=mask, other=0.0)
            mask = (across < tasks)[:, None] & there
            x = tl.load(row + across[:, None] * size + column + lanes, mask=mask, other=0.0)
            sums = tl.dot(weights, x.to(tl.float64), sums, input_precision="ieee", out_dtype=tl.float64)
        tl.store(result + down * size + column + lanes, sums, mask=(down < tasks) & there)
