"""The truth of gradient_combine in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def gradient_combine(
    gradients: list[Tensor],  # each [T, ...]
    weights: Tensor,  # [T]
) -> list[Tensor]:
    """The weighted sum over tasks of each leaf, [...]."""
    return [(weights @ leaf.unsqueeze(-1).flatten(1)).reshape(leaf.shape[1:]) for leaf in gradients]
