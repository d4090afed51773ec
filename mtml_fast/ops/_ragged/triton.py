"""Linear layers of tasks over their packed rows: y = x W^T + b, dx = d W, dW = d^T x, each task with its own W.

A program has a tile of rows, or a part of a task's rows whose sums it takes (ops/_tiles). Parts are added in their
order: the bits are a matter of a task's own rows. Sums of float32 numbers are float32, added in float64 where parts
meet.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_fast.ops._tiles.triton import (
    ROWS,
    Outputs,
    Rows,
    find_outputs,
    find_part,
    find_tile,
    place_of_sums,
    rows_of_part,
)

# columns of a tile of dx and dW, elements of a program that adds parts
COLUMNS, ELEMENTS = 32, 1024
# CUDA takes no more programs along the second and the third axis of a grid
MOST_PROGRAMS = 65535


def forward(rows: Rows, outputs: Outputs, pairs: Sequence[tuple], bias: Tensor | None, y: Tensor) -> Tensor:
    """y, packed, = b + the sum of x W^T over no more than two pairs (x [R, I], W [sum of C_t, I])."""
    if not pairs and bias is None:
        return y.zero_()
    # no terms where there are no pairs
    features = pairs[0][0].shape[1] if pairs else 0
    (x, weight), (x2, weight2) = (pairs[0], pairs[-1]) if pairs else ((y, y), (y, y))
    several = triton.cdiv(outputs.mean, outputs.tile)
    if y.numel():
        _forward[rows.slots, several](
            x, weight, x2, weight2, y if bias is None else bias, rows.offsets, *outputs.table, y, rows.tasks, features,
            PAIRS=max(len(pairs), 1), BIAS=bias is not None, COLUMNS=outputs.tile,
            **options(features, y.dtype, large=outputs.tile > 16),
        )  # fmt: skip
    return y


def backward(rows: Rows, outputs: Outputs, pairs: Sequence[tuple], x: Tensor) -> Tensor:
    """dx [R, I], like x, = the sum of d W over no more than two pairs (d, packed, and W [sum of C_t, I])."""
    if not pairs:
        return torch.zeros_like(x)
    (d, weight), (d2, weight2) = pairs[0], pairs[-1]
    dx, features = torch.empty_like(x), x.shape[1]
    if dx.numel():
        _backward[rows.slots, triton.cdiv(features, COLUMNS)](
            d, weight, d2, weight2, rows.offsets, *outputs.table, dx, rows.tasks, features,
            PAIRS=len(pairs), COLUMNS=COLUMNS, **options(features, x.dtype),
        )  # fmt: skip
    return dx


def gradients(rows: Rows, outputs: Outputs, pairs: Sequence[tuple], needs: tuple[bool, bool]) -> tuple:
    """dW [sum of C_t, I] = the sum of d^T x over one or two pairs (d, packed, x [R, I]); 1^T d of the first pair."""
    (d, x), (d2, x2) = pairs[0], pairs[-1]
    sums, features = Sums(rows, outputs, x, needs), x.shape[1]
    if any(needs) and rows.count and outputs.total:
        # without dW a tile reads all that db needs
        blocks = max(1, triton.cdiv(features, COLUMNS)) if needs[0] else 1
        _gradients[rows.tasks * rows.parts, blocks, triton.cdiv(outputs.mean, outputs.tile)](
            d, x, d2, x2, rows.offsets, *outputs.table, *sums.partial, sums.total, rows.parts, features,
            PAIRS=len(pairs), WEIGHT=needs[0], BIAS=needs[1], OUTPUTS=outputs.tile, COLUMNS=COLUMNS,
            **options(features, x.dtype, large=outputs.tile > 16),
        )  # fmt: skip
    return sums.added()


class Sums:
    """The gradients of weights [sum of C_t, I] and biases [sum of C_t]: first sums of parts, then these added."""

    def __init__(self, rows: Rows, outputs: Outputs, like: Tensor, needs: tuple[bool, bool]):
        self.rows, self.outputs, self.features, self.needs = rows, outputs, like.shape[1], needs
        sizes = (outputs.total, self.features), (outputs.total,)
        # by parts, or of equal widths by tiles where these are fewer, as in a batch of many tasks with few rows each
        by_tiles = outputs.width >= 0 and rows.slots < rows.parts * rows.tasks
        self.total = -1 if by_tiles else outputs.total
        length = rows.slots * outputs.width if by_tiles else rows.parts * outputs.total
        # of what is not needed, something that is not written
        self.partial = [like.new_empty(length, *size[1:]) if n else like for size, n in zip(sizes, needs, strict=True)]
        self.to = [like.new_empty(size) if n else like for size, n in zip(sizes, needs, strict=True)]

    def added(self) -> list[Tensor | None]:
        if any(self.needs) and self.outputs.total:
            # of a large head more than one turn each
            blocks = min(MOST_PROGRAMS, triton.cdiv(self.outputs.mean * max(self.features, 1), ELEMENTS))
            _add_parts[self.rows.tasks, blocks](
                *self.partial, *self.to, self.rows.offsets, *self.outputs.table, self.total, self.features,
                WEIGHT=self.needs[0], BIAS=self.needs[1], COLUMNS=ELEMENTS, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        return [to if needed else None for to, needed in zip(self.to, self.needs, strict=True)]


def options(features: int, dtype: torch.dtype, large: bool = False) -> dict:
    """Whether rows begin where a load may take several numbers at once; more threads for more registers."""
    aligned = features % 16 == 0
    warps = 8 if large or not aligned else 4
    # left to itself the assembler spills rather than take more than 128 registers for 8 warps
    registers = dict(num_warps=warps, num_stages=3, maxnreg=255, enable_fp_fusion=True)
    return dict(DEPTH=16, ALIGNED=aligned, PRECISION=precision(dtype), **registers)


def precision(dtype: torch.dtype) -> str:
    """How factors are rounded before a product: as torch's own switch for its products of float32 numbers says."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    try:
        return "bfloat16" if torch.get_float32_matmul_precision() == "medium" else "tf32"
    except RuntimeError:
        # torch's newer switch has been used, which knows no medium
        return "tf32"


@triton.jit
def dot(left, right, sums, PRECISION: tl.constexpr):
    """left right, added to sums if there are any, the factors rounded as asked."""
    if PRECISION == "bfloat16":
        sums = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), sums, out_dtype=left.dtype)
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=left.dtype)
    return sums


@triton.jit
def product(x, x_there, w, w_there, terms, sums, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """sums [M, N] + x w^T, for pointers to the first of so many terms of rows x [M, 1] and w [1, N]."""
    lanes = tl.arange(0, DEPTH)
    for term in range(0, terms, DEPTH):
        there = term + lanes < terms
        left = tl.load(x + (term + lanes)[None, :], mask=x_there & there[None, :], other=0.0)
        right = tl.load(w + (term + lanes)[:, None], mask=w_there & there[:, None], other=0.0)
        sums = dot(left, right, sums, PRECISION)
    return sums


# One program: a tile of rows of y, by tiles of outputs.
@triton.jit(do_not_specialize=["width", "tasks", "features"])
def _forward(
    x,
    weight,
    x2,
    weight2,
    bias,
    offsets,
    out_offsets,
    starts,
    width,
    y,
    tasks,
    features,
    PAIRS: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if ALIGNED:
        features = features // 16 * 16
    task, begin, row, end = find_tile(offsets, tasks, tl.program_id(0))
    if row >= end:
        return
    first, wide, start = find_outputs(out_offsets, starts, width, task, begin)
    rows = (row + tl.arange(0, ROWS))[:, None]
    for column in range(tl.program_id(1) * COLUMNS, wide, tl.num_programs(1) * COLUMNS):
        columns = (column + tl.arange(0, COLUMNS))[None, :]
        at = (first + columns) * features
        there = columns < wide
        sums = tl.zeros((ROWS, COLUMNS), y.dtype.element_ty)
        sums = product(x + rows * features, rows < end, weight + at, there, features, sums, DEPTH, PRECISION)
        if PAIRS == 2:
            sums = product(x2 + rows * features, rows < end, weight2 + at, there, features, sums, DEPTH, PRECISION)
        if BIAS:
            sums += tl.load(bias + first + columns, mask=there, other=0.0)
        tl.store(y + start + (rows - begin) * wide + columns, sums, mask=(rows < end) & there)


# One program: a tile of rows and columns of dx.
@triton.jit(do_not_specialize=["width", "tasks", "features"])
def _backward(
    d,
    weight,
    d2,
    weight2,
    offsets,
    out_offsets,
    starts,
    width,
    dx,
    tasks,
    features,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if ALIGNED:
        features = features // 16 * 16
    task, begin, row, end = find_tile(offsets, tasks, tl.program_id(0))
    if row >= end:
        return
    first, wide, start = find_outputs(out_offsets, starts, width, task, begin)
    rows = (row + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = columns < features
    sums = tl.zeros((ROWS, COLUMNS), dx.dtype.element_ty)
    for i in tl.static_range(PAIRS):
        outputs = (d if i == 0 else d2) + start + (rows - begin) * wide
        rows_of_weight = (weight if i == 0 else weight2) + first * features + columns
        for output in range(0, wide, DEPTH):
            lanes = output + tl.arange(0, DEPTH)
            across, down = lanes[None, :], lanes[:, None]
            left = tl.load(outputs + across, mask=(rows < end) & (across < wide), other=0.0)
            right = tl.load(rows_of_weight + down * features, mask=(down < wide) & there, other=0.0)
            sums = dot(left, right, sums, PRECISION)
    tl.store(dx + rows * features + columns, sums, mask=(rows < end) & there)


# One program: the sums over a part of a task's rows, for a tile of columns, by tiles of outputs.
@triton.jit(do_not_specialize=["width", "total", "parts", "features"])
def _gradients(
    d,
    x,
    d2,
    x2,
    offsets,
    out_offsets,
    starts,
    width,
    weights,  # [parts or tiles, outputs, I]
    biases,  # [parts or tiles, outputs]
    total,
    parts,
    features,
    PAIRS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if ALIGNED:
        features = features // 16 * 16
    task, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0).to(tl.int64) % parts
    begin, row, end = find_part(offsets, task, part)
    if row >= end:
        return
    first, wide, start = find_outputs(out_offsets, starts, width, task, begin)
    to = place_of_sums(total, task, begin, part, row, first, wide)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = columns < features
    for output in range(tl.program_id(2) * OUTPUTS, wide, tl.num_programs(2) * OUTPUTS):
        outputs = (output + tl.arange(0, OUTPUTS))[:, None]
        sums = tl.zeros((OUTPUTS, COLUMNS), weights.dtype.element_ty)
        columns_of_d = tl.zeros((OUTPUTS,), weights.dtype.element_ty)
        for i in tl.static_range(PAIRS):
            of_outputs = (d if i == 0 else d2) + start + outputs
            for term in range(row, end, DEPTH):
                across, down = (term + tl.arange(0, DEPTH))[None, :], (term + tl.arange(0, DEPTH))[:, None]
                mask = (across < end) & (outputs < wide)
                left = tl.load(of_outputs + (across - begin) * wide, mask=mask, other=0.0)
                if WEIGHT:
                    right = tl.load(
                        (x if i == 0 else x2) + down * features + columns, mask=(down < end) & there, other=0.0
                    )
                    sums = dot(left, right, sums, PRECISION)
                if BIAS and i == 0:
                    columns_of_d += tl.sum(left, axis=1)
        if WEIGHT:
            tl.store(weights + (to + outputs) * features + columns, sums, mask=(outputs < wide) & there)
        if BIAS:
            # by one program of those that share the rows
            lanes = output + tl.arange(0, OUTPUTS)
            tl.store(biases + to + lanes, columns_of_d, mask=lanes < tl.where(tl.program_id(1) == 0, wide, 0))


# One program: some elements of a task's gradients, the sums of its parts added.
@triton.jit(do_not_specialize=["width", "total", "features"])
def _add_parts(
    weights,  # [parts or tiles, outputs, I]
    biases,  # [parts or tiles, outputs]
    weight,
    bias,
    offsets,
    out_offsets,
    starts,
    width,
    total,
    features,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    task = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + task)
    rows = tl.load(offsets + task + 1) - begin
    size = tl.maximum(rows_of_part(rows), 1)
    parts = (rows + size - 1) // size
    first, wide, _ = find_outputs(out_offsets, starts, width, task, begin)
    at = place_of_sums(total, task, begin, 0, begin, first, wide)
    # from one part to the next
    step = place_of_sums(total, task, begin, 1, begin + size, first, wide) - at
    if WEIGHT:
        add_parts(
            weights + at * features, weight + first * features, wide * features, step * features, parts, COLUMNS
        )  # fmt: skip
    if BIAS:
        add_parts(biases + at, bias + first, wide, step, parts, COLUMNS)


@triton.jit
def add_parts(partial, to, count, step, parts, COLUMNS: tl.constexpr):
    for column in range(tl.program_id(1) * COLUMNS, count, tl.num_programs(1) * COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        sums = tl.zeros((COLUMNS,), tl.float64)
        at = partial + columns
        for _ in range(0, parts):
            sums += tl.load(at, mask=columns < count, other=0.0).to(tl.float64)
            at += step
        tl.store(to + columns, sums, mask=columns < count)
