"""The truth of gradient_gram in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# numbers of each task that are float64 at a time: 40 tasks take 5 MB
_BLOCK = 1 << 14


def gradient_gram(gradients: list[Tensor]) -> Tensor:
    """[T, T] in float64, of leaves each [T, ...]."""
    tasks = gradients[0].shape[0]
    gram = torch.zeros(tasks, tasks, dtype=torch.float64, device=gradients[0].device)
    for leaf in gradients:
        for block in leaf.unsqueeze(-1).flatten(1).split(_BLOCK, dim=1):
            block = block.double()
            gram = gram + block @ block.mT
    return gram
