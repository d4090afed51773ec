"""The truth of heads in plain PyTorch: pad rows and outputs to rectangles, multiply, keep what exists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "identity": lambda x: x,
}


def heads(
    x: Tensor,  # [R, D]
    offsets: Tensor,  # [T + 1]
    weight: Tensor,  # [sum of C_t, D or H]
    bias: Tensor | None,  # [sum of C_t]
    out_offsets: Tensor | None,  # [T + 1]
    hidden_weight: Tensor | None,  # [T, H, D]
    hidden_bias: Tensor | None,  # [T, H]
    activation: str,
) -> Tensor:
    """Task after task its outputs [R_t, C_t], flattened."""
    outputs, row_mask, class_mask = padded_heads(
        x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation
    )
    return outputs.flatten()[kept(row_mask[:, :, None] & class_mask[:, None, :])]


def padded_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation):
    """The outputs [T, N, C], and which rows [T, N] and which outputs [T, C] exist."""
    if out_offsets is None:
        tasks = offsets.numel() - 1
        out_offsets = torch.arange(tasks + 1, device=x.device) * (weight.shape[0] // max(tasks, 1))
    rows, row_mask = pad(x, offsets)  # [T, N, D]
    if hidden_weight is not None:
        rows = rows @ hidden_weight.mT
        if hidden_bias is not None:
            rows = rows + hidden_bias[:, None]
        rows = ACTIVATIONS[activation](rows)  # [T, N, H]
    weights, class_mask = pad(weight, out_offsets)  # [T, C, D or H]
    outputs = rows @ weights.mT  # [T, N, C]
    if bias is not None:
        outputs = outputs + pad(bias, out_offsets)[0][:, None]
    return outputs, row_mask, class_mask


def pad(packed: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows [R, ...] as a rectangle [T, N, ...] with zeros, and a mask [T, N] of the rows that exist."""
    counts = offsets.diff()
    longest = int(counts.max()) if counts.numel() else 0
    place = torch.arange(longest, device=packed.device)
    mask = place < counts[:, None]
    rows = torch.where(mask, offsets[:-1, None] + place, 0)
    # where, not a product: a NaN in the row that stands in for a missing one must not get through
    exists = mask.reshape(*mask.shape, *[1] * (packed.dim() - 1))
    return torch.where(exists, packed[rows], packed.new_zeros(())), mask


def kept(mask: Tensor) -> Tensor:
    """Flat indices of what exists."""
    return mask.flatten().nonzero().squeeze(1)
