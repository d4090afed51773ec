"""heads_loss in Triton: logits, losses and, backward, all gradients of a tile of rows in one launch.

Forward reads the rows once, in one launch, and a second one makes means. The operator returns losses alone, and their
cotangents come later, so the backward pass computes the logits again: reading x once more costs less than gradients of
x made beforehand, which would be written, read and written again. What a task's rows count comes first, then one launch
reads each tile of x, writes that of dx and adds to the sums of dW and db, whose parts a last one adds. A hidden layer
adds the launches of its own: here x is what comes out of it.

Outputs are taken 16 at a time. A wider head reads its rows, which are in the second cache by then, for each of them; of
cross-entropy the sum of exponentials is carried along and the logits are computed twice backward.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_fast.ops._losses.triton import (
    COLUMNS,
    bits_of,
    carried,
    count_of_tile,
    counting_outputs,
    kind_of,
    kinds_of,
    label_counts,
    lowest,
    number,
    output_loss,
    row_part,
    row_targets,
    smooth_targets,
)
from mtml_fast.ops._ragged.triton import Sums, dot, options, product
from mtml_fast.ops._task_heads.triton import Heads
from mtml_fast.ops._tiles.triton import ROWS, find_outputs, find_part, find_tile, place_of_sums


def heads_loss(*arguments) -> Tensor:
    """Each task's mean loss [T]."""
    call = _Call(arguments)
    rows = call.head.rows
    losses = call.head.x.new_empty(rows.tasks)
    # two arrays: Triton compiles anew for one that begins elsewhere than at a multiple of 16 bytes
    sums = [losses.new_empty(rows.slots, dtype=torch.float64) for _ in range(2)]
    if rows.slots:
        _losses[(rows.slots,)](*call.inputs, rows.tasks, *sums, **call.flags, **call.options)
    if rows.tasks:
        _means[(rows.tasks,)](*sums, rows.offsets, losses, SLOTS=256, enable_fp_fusion=True)
    return losses


def heads_loss_backward(grad_outputs: list[Tensor], *arguments) -> list[Tensor]:
    """The gradients of the sum of d_t L_t that are needed."""
    *arguments, needs = arguments
    call = _Call(arguments)
    head, rows = call.head, call.head.rows
    need = head.named(needs)
    of_rows = need["x"] or need["hidden_weight"] or need["hidden_bias"]
    of_head = need["weight"], need["bias"]
    d_rows = torch.empty_like(head.h) if of_rows else head.h
    sums = Sums(rows, head.outputs, head.h, of_head)
    if rows.slots:
        counts = head.h.new_empty(rows.slots, dtype=torch.float64)
        _counts[(rows.slots,)](*call.inputs, rows.tasks, counts, **call.flags, num_warps=4, enable_fp_fusion=True)
        slopes = head.h.new_empty(rows.slots, ROWS.value, COLUMNS.value)
        _backward[(rows.tasks * rows.parts,)](
            *call.inputs, rows.parts, grad_outputs[0].contiguous(), counts, slopes, d_rows, *sums.partial,
            sums.total, **call.flags, OF_ROWS=of_rows, OF_WEIGHT=of_head[0], OF_BIAS=of_head[1],
            **call.options_backward,
        )  # fmt: skip
    found = head.before(d_rows, need) if of_rows else {}
    found["weight"], found["bias"] = sums.added()
    return head.results(found, need)


class _Call:
    """The arguments as the kernels take them."""

    def __init__(self, arguments: Sequence):
        x, labels, targets, *of_head, class_weights, mask, activation = arguments[:12]
        losses, smoothing, ignore_index, delta = arguments[12:]
        of_rows = mask is not None and mask.numel() == x.shape[0]
        packed = targets is not None or (mask is not None and not of_rows)
        self.head = head = Heads(x, *of_head, activation, packed=packed)
        rows, features = head.rows, head.h.shape[1]
        # where there is none, something that is not read
        there = lambda t, other: other if t is None else t.contiguous()  # noqa: E731
        self.inputs = (
            head.h, there(labels, rows.offsets), there(targets, head.h), rows.offsets, head.weight,
            there(head.bias, head.h), *head.outputs.table, there(class_weights, head.h),
            rows.offsets if mask is None else mask.contiguous().view(torch.uint8),
            *kinds_of(losses, rows.offsets), features, bits_of(smoothing), ignore_index, bits_of(delta),
        )  # fmt: skip
        self.flags = dict(
            BIAS=head.bias is not None,
            CLASS_WEIGHTS=class_weights is not None,
            MASK=0 if mask is None else 1 if of_rows else 2,
            SMOOTH=smoothing > 0,
        )
        self.options = options(features, x.dtype)
        # as many columns of x at a time as registers allow
        double = x.dtype == torch.float64
        few = double or self.options["PRECISION"] == "bfloat16"
        self.options_backward = dict(WIDTH=16 if few else 32, **options(features, x.dtype, large=double))


@triton.jit
def logits(
    x,
    weight,
    bias,
    rows,
    end,
    first,
    columns,
    wide,
    features,
    BIAS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [ROWS, COLUMNS]"""
    there = (columns < wide)[None, :]
    z = tl.zeros((ROWS, COLUMNS), x.dtype.element_ty)
    at = weight + (first + columns)[None, :] * features
    z = product(x + rows[:, None] * features, (rows < end)[:, None], at, there, features, z, DEPTH, PRECISION)
    if BIAS:
        z += tl.load(bias + first + columns[None, :], mask=there, other=0.0)
    return z


# One program: what a tile of rows counts.
@triton.jit(do_not_specialize=["width", "kind", "features", "smoothing", "ignore_index", "delta", "tasks"])
def _counts(
    x,
    labels,
    targets,
    offsets,
    weight,
    bias,
    out_offsets,
    starts,
    width,
    class_weights,
    mask,
    kinds,
    kind,
    features,
    smoothing,
    ignore_index,
    delta,
    tasks,
    counts,
    BIAS: tl.constexpr,
    CLASS_WEIGHTS: tl.constexpr,
    MASK: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    task, begin, row, end = find_tile(offsets, tasks, tl.program_id(0))
    if row >= end:
        return
    first, wide, start = find_outputs(out_offsets, starts, width, task, begin)
    rows = row + tl.arange(0, ROWS)
    count = count_of_tile(
        labels, class_weights, mask, ignore_index, kind_of(kinds, kind, task), first, wide, start, begin, rows, end,
        CLASS_WEIGHTS, MASK,
    )  # fmt: skip
    tl.store(counts + tl.program_id(0), count)


# One program: the sum of the losses of a tile of rows, and what it counts.
@triton.jit(do_not_specialize=["width", "kind", "features", "smoothing", "ignore_index", "delta", "tasks"])
def _losses(
    x,
    labels,
    targets,
    offsets,
    weight,
    bias,
    out_offsets,
    starts,
    width,
    class_weights,
    mask,
    kinds,
    kind,
    features,
    smoothing,
    ignore_index,
    delta,
    tasks,
    sums,
    counts,
    BIAS: tl.constexpr,
    CLASS_WEIGHTS: tl.constexpr,
    MASK: tl.constexpr,
    SMOOTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if ALIGNED:
        features = features // 16 * 16
    element: tl.constexpr = x.dtype.element_ty
    task, begin, row, end = find_tile(offsets, tasks, tl.program_id(0))
    if row >= end:
        return
    first, wide, start = find_outputs(out_offsets, starts, width, task, begin)
    kind = kind_of(kinds, kind, task)
    rows = row + tl.arange(0, ROWS)
    sum_of_losses = tl.zeros((), tl.float64)
    top, total = lowest(x), tl.zeros((ROWS,), element)
    at_label, below, smooth_sum = tl.zeros((ROWS,), element), tl.zeros((ROWS,), element), tl.zeros((), element)
    label, weights = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), element)
    if kind == 0:
        label, weights = row_targets(
            labels, class_weights, mask, ignore_index, first, wide, rows, end, CLASS_WEIGHTS, MASK
        )  # fmt: skip
    for column in range(0, wide, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        z = logits(x, weight, bias, rows, end, first, columns, wide, features, BIAS, DEPTH, PRECISION)
        if kind == 0:
            exist = (columns < wide)[None, :]
            before = top
            top, total = carried(z, exist, top, total)
            at_label += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), axis=1)
            if SMOOTH:
                smooth = smooth_targets(class_weights, smoothing, first, columns, wide, CLASS_WEIGHTS)
                # the sums so far are below another top now; of the first outputs there are none
                below += smooth_sum * tl.where(smooth_sum == 0.0, 0.0, before - top)
                below += tl.sum(tl.where(exist, smooth[None, :] * (z - top[:, None]), 0.0), axis=1)
                smooth_sum += tl.sum(smooth)
        else:
            there = counting_outputs(mask, start, wide, begin, rows, columns, end, MASK)
            at = targets + start + (rows - begin)[:, None] * wide + columns[None, :]
            y = tl.load(at, mask=there, other=0.0)
            value, _ = output_loss(z, y, kind, number(delta).to(element))
            sum_of_losses += tl.sum(tl.sum(tl.where(there, value, 0.0).to(tl.float64), axis=1))
    if kind == 0:
        part = row_part(weights, smoothing, SMOOTH)
        value = part * (tl.log(total) + (top - at_label))
        if SMOOTH:
            value += smooth_sum * tl.log(total) - below
        counts_row = (rows < end) & (label_counts(labels, mask, ignore_index, rows, end, MASK))
        sum_of_losses += tl.sum(tl.where(counts_row, value, 0.0).to(tl.float64))
    tl.store(sums + tl.program_id(0), sum_of_losses)
    count = count_of_tile(
        labels, class_weights, mask, ignore_index, kind, first, wide, start, begin, rows, end, CLASS_WEIGHTS, MASK
    )  # fmt: skip
    tl.store(counts + tl.program_id(0), count)


@triton.jit
def sum_of_tiles(values, offsets, task, SLOTS: tl.constexpr):
    """The sum over the tiles of a task."""
    begin = tl.load(offsets + task)
    tiles = (tl.load(offsets + task + 1) - begin + ROWS - 1) // ROWS
    first = begin // ROWS + task
    total = tl.zeros((SLOTS,), tl.float64)
    for tile in range(0, tiles, SLOTS):
        lanes = tile + tl.arange(0, SLOTS)
        total += tl.load(values + first + lanes, mask=lanes < tiles, other=0.0)
    return tl.sum(total)


# One program: the mean loss of a task.
@triton.jit
def _means(sums, counts, offsets, losses, SLOTS: tl.constexpr):
    task = tl.program_id(0).to(tl.int64)
    total, count = sum_of_tiles(sums, offsets, task, SLOTS), sum_of_tiles(counts, offsets, task, SLOTS)
    tl.store(losses + task, tl.where(count == 0.0, 0.0, total / tl.where(count == 0.0, 1.0, count)))


# One program: the gradients of a part of a task's rows, tile by tile.
@triton.jit(
    do_not_specialize=["width", "kind", "features", "smoothing", "ignore_index", "delta", "parts", "total_outputs"]
)
def _backward(
    x,
    labels,
    targets,
    offsets,
    weight,
    bias,
    out_offsets,
    starts,
    width,
    class_weights,
    mask,
    kinds,
    kind,
    features,
    smoothing,
    ignore_index,
    delta,
    parts,
    d_losses,
    counts,
    slopes,  # [tiles, ROWS, COLUMNS], of a part the first
    dx,
    weights,  # [parts or tiles, outputs, I]
    biases,  # [parts or tiles, outputs]
    total_outputs,
    BIAS: tl.constexpr,
    CLASS_WEIGHTS: tl.constexpr,
    MASK: tl.constexpr,
    SMOOTH: tl.constexpr,
    OF_ROWS: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    OF_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if ALIGNED:
        features = features // 16 * 16
    element: tl.constexpr = x.dtype.element_ty
    task, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0).to(tl.int64) % parts
    begin, part_begin, end = find_part(offsets, task, part)
    if part_begin >= end:
        return
    first, wide, start = find_outputs(out_offsets, starts, width, task, begin)
    kind = kind_of(kinds, kind, task)
    count = sum_of_tiles(counts, offsets, task, 128)
    scale = tl.load(d_losses + task).to(tl.float64) / tl.where(count == 0.0, 1.0, count)
    scale = tl.where(count == 0.0, 0.0, scale).to(element)
    to = place_of_sums(total_outputs, task, begin, part, part_begin, first, wide)
    slopes += (begin // ROWS + task + (part_begin - begin) // ROWS) * (ROWS * COLUMNS)
    for row in range(part_begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        some = tl.arange(0, COLUMNS)
        z = logits(x, weight, bias, rows, end, first, some, wide, features, BIAS, DEPTH, PRECISION)
        top, total = lowest(x), tl.zeros((ROWS,), element)
        label, part_of_label = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), element)
        smooth_sum = tl.zeros((), element)
        if kind == 0:
            label, row_weights = row_targets(
                labels, class_weights, mask, ignore_index, first, wide, rows, end, CLASS_WEIGHTS, MASK
            )  # fmt: skip
            part_of_label = row_part(row_weights, smoothing, SMOOTH)
            top, total = carried(z, (some < wide)[None, :], top, total)
            if SMOOTH:
                smooth_sum += tl.sum(smooth_targets(class_weights, smoothing, first, some, wide, CLASS_WEIGHTS))
            for column in range(COLUMNS, wide, COLUMNS):
                more = column + tl.arange(0, COLUMNS)
                z_of_more = logits(x, weight, bias, rows, end, first, more, wide, features, BIAS, DEPTH, PRECISION)
                top, total = carried(z_of_more, (more < wide)[None, :], top, total)
                if SMOOTH:
                    smooth_sum += tl.sum(smooth_targets(class_weights, smoothing, first, more, wide, CLASS_WEIGHTS))
        for column in range(0, wide, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            if column > 0:
                z = logits(x, weight, bias, rows, end, first, columns, wide, features, BIAS, DEPTH, PRECISION)
            if kind == 0:
                exist = (columns < wide)[None, :]
                counted = label_counts(labels, mask, ignore_index, rows, end, MASK)[:, None] & exist
                # t in one number, rounded as its sum is: the slope of a single class is zero
                target = tl.where(columns[None, :] == label[:, None], part_of_label[:, None], 0.0)
                if SMOOTH:
                    target += smooth_targets(class_weights, smoothing, first, columns, wide, CLASS_WEIGHTS)[None, :]
                share = (part_of_label + smooth_sum) / total
                p = tl.exp(tl.where(exist, z - top[:, None], float("-inf")))
                dz = tl.where(counted, p * share[:, None] - target, 0.0)
            else:
                there = counting_outputs(mask, start, wide, begin, rows, columns, end, MASK)
                at = targets + start + (rows - begin)[:, None] * wide + columns[None, :]
                y = tl.load(at, mask=there, other=0.0)
                _, slope = output_loss(z, y, kind, number(delta).to(element))
                dz = tl.where(there, slope, 0.0)
            # by way of memory: each product asks for the slopes in other registers
            of_tile = slopes + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            tl.store(of_tile, dz * scale)
            tl.debug_barrier()
            # sums go on from earlier tiles, the first begin
            zero = tl.zeros((), tl.int64)
            wide_before = tl.where(zero + row > part_begin, wide, 0)
            features_before = tl.where(zero + column > 0, features, 0)
            if OF_BIAS:
                to_bias = biases + to + columns
                d_bias = tl.load(to_bias, mask=columns < wide_before, other=0.0) + tl.sum(tl.load(of_tile), axis=0)
                tl.store(to_bias, d_bias, mask=columns < wide)
            of_x, of_weight = rows[:, None] * features, columns[:, None] * features
            if OF_ROWS:
                add_rows(
                    slopes, weight + first * features + of_weight, dx + of_x, (rows < end)[:, None],
                    (columns < wide)[:, None], features, features_before, WIDTH, PRECISION,
                )  # fmt: skip
            if OF_WEIGHT:
                add_weight(
                    slopes, x + of_x, weights + to * features + of_weight, (rows < end)[:, None],
                    (columns < wide)[:, None], (columns < wide_before)[:, None], features, WIDTH, PRECISION,
                )  # fmt: skip
            # another thread may go on from what this one has written
            tl.debug_barrier()


@triton.jit
def add_rows(
    slopes,
    weight,
    dx,
    rows_there,
    outputs_there,
    features,
    features_before,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx [ROWS, I], the first columns of which go on, + dz W."""
    dz = tl.load(slopes + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    for column in range(0, features, WIDTH):
        lanes = (column + tl.arange(0, WIDTH))[None, :]
        w = tl.load(weight + lanes, mask=outputs_there & (lanes < features), other=0.0)
        d = tl.load(dx + lanes, mask=rows_there & (lanes < features_before), other=0.0)
        d += dot(dz, w, None, PRECISION)
        tl.store(dx + lanes, d, mask=rows_there & (lanes < features))


@triton.jit
def add_weight(
    slopes, x, weight, rows_there, outputs_there, outputs_before, features, WIDTH: tl.constexpr, PRECISION: tl.constexpr
):
    """dW [COLUMNS, I], the first rows of which go on, + dz^T x."""
    dz = tl.load(slopes + tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None])
    for column in range(0, features, WIDTH):
        lanes = (column + tl.arange(0, WIDTH))[None, :]
        x_there = tl.load(x + lanes, mask=rows_there & (lanes < features), other=0.0)
        d = tl.load(weight + lanes, mask=outputs_before & (lanes < features), other=0.0)
        d += dot(dz, x_there, None, PRECISION)
        tl.store(weight + lanes, d, mask=outputs_there & (lanes < features))
