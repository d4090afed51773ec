"""Many leaves in one launch: a kernel gets the addresses of sixteen as arguments.

A table in device memory would have to be copied there at each call, which stops the stream and cannot be captured in a
graph. Leaves are cut into pieces, one a program, which do not cross their ends. A sum over columns is taken by piece,
and `add_up` adds the pieces in their order: as the pieces are a matter of the sizes alone, so are the bits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# leaves of a launch
LEAVES: tl.constexpr = tl.constexpr(16)

# pieces of large gradients, about: several for each processor of a large device
PIECES = 1024
# a piece's sums [T, T] are to be no more than a part of what it reads: so many columns for each task, and at least some
COLUMNS_PER_TASK, LEAST_COLUMNS = 64, 512

ELEMENTS = {torch.float32: tl.float32, torch.float64: tl.float64}


class Launch(NamedTuple):
    """How many pieces leaves of one launch make, and the arguments of the kernel that `find_piece` takes."""

    pieces: int
    # by address, of each leaf: its first row, this row's end, and another tensor that goes with the leaf
    tables: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    # a piece has 2^bits columns
    bits: int


def launches(leaves: Sequence[Tensor], others: Sequence[Tensor], columns: int) -> Iterator[Launch]:
    """The launches over contiguous leaves [T > 0, ...], in pieces of so many columns, a power of two.

    An address is an odd number here, one more than it is. Triton compiles a kernel anew for each pattern of arguments
    that are divisible by 16, and one kernel should do for all leaves.
    """
    pairs = [pair for pair in zip(leaves, others, strict=True) if pair[0].numel()]
    for first in range(0, len(pairs), LEAVES.value):
        group = pairs[first : first + LEAVES.value]
        sizes = [leaf.numel() // leaf.shape[0] for leaf, _ in group]
        begins = [leaf.data_ptr() + 1 for leaf, _ in group]
        ends = [begin + size * leaf.element_size() for begin, size, (leaf, _) in zip(begins, sizes, group, strict=True)]
        addresses = [other.data_ptr() + 1 for _, other in group]
        # leaves that are not there have no columns
        rest = [begins[0]] * (LEAVES.value - len(group))
        pieces = sum(-(-size // columns) for size in sizes)
        tables = tuple(tuple(table + rest) for table in (begins, ends, addresses))
        yield Launch(pieces, tables, columns.bit_length() - 1)


def columns_of_sums(leaves: Sequence[Tensor]) -> int:
    """The columns of a piece whose sums are kept: so many that there are neither too many pieces nor too few."""
    tasks = leaves[0].shape[0]
    columns = sum(leaf.numel() // tasks for leaf in leaves)
    return triton.next_power_of_2(max(LEAST_COLUMNS, COLUMNS_PER_TASK * tasks, triton.cdiv(columns, PIECES)))


@triton.jit
def find_piece(begins, ends, others, bits, piece, ELEMENT: tl.constexpr):
    """Of a launch's piece: pointers to its leaf's first row and to what goes with it, its columns, the leaf's size."""
    first = tl.zeros((), tl.int64)
    address, other, start, size = begins[0], others[0], first, first
    for i in tl.static_range(LEAVES):
        columns = (ends[i] - begins[i]) // (ELEMENT.primitive_bitwidth // 8)
        last = first + ((columns - 1) >> bits) + 1
        here = (piece >= first) & (piece < last)
        address = tl.where(here, begins[i], address)
        other = tl.where(here, others[i], other)
        start = tl.where(here, (piece - first) << bits, start)
        size = tl.where(here, columns, size)
        first = last
    end = tl.minimum(start + (tl.full((), 1, tl.int64) << bits), size)
    pointer: tl.constexpr = tl.pointer_type(ELEMENT)
    return (address - 1).to(pointer), (other - 1).to(pointer), start, end, size


def add_up(partial: Tensor, to: Tensor) -> None:
    """to = the sum of partial [pieces, ...] over pieces, in a fixed order."""
    n = to.numel()
    _add_up[(triton.cdiv(n, 4),)](partial, to, partial.shape[0], n, ROWS=256, COLUMNS=4, enable_fp_fusion=True)


@triton.jit(do_not_specialize=["pieces", "n"])
def _add_up(partial, to, pieces, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, pieces, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < pieces)[:, None] & (columns < n)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * n + columns[None, :], mask=mask, other=0.0)
    tl.store(to + columns, tl.sum(total, axis=0), mask=columns < n)
