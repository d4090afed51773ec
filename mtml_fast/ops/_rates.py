"""Inner learning rates in one form: a table over steps and parameters, or one tensor a parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_fast.ops import _check


def rate_list(
    lr, steps: int, shapes: Sequence[torch.Size], layer_of: Sequence[int], like: Tensor, *, read: bool = True
) -> list[Tensor]:
    """The rates of K steps: one table `[1 or K, 1 or P]`, or P tensors `[1 or K, *shape]` (more rows are allowed).

    Args:
        lr: a number; a tensor `[]`, `[K]`, `[1 or K, L]` or `[1 or K, P]`; or P tensors, each `[]`, its parameter's
            shape, or `[1 or K, *shape]`.
        shapes: of the P parameters.
        layer_of: for each parameter the layer 0..L-1 that it belongs to.
        read: whether to look for values that are not finite.
    """
    if isinstance(lr, (list, tuple)):
        if len(lr) != len(shapes):
            raise ValueError(f"lr must hold one tensor for each of the {len(shapes)} params, got {len(lr)}")
        rates = []
        for i, (rate, own) in enumerate(zip(lr, shapes, strict=True)):
            rate = _check.rate(f"lr[{i}]", rate, like=like, read=read)
            rate = rate.expand(1, *own) if rate.dim() == 0 or rate.shape == own else rate
            if rate.shape[1:] != own or not (rate.shape[0] == 1 or rate.shape[0] >= steps):
                allowed = f"[], {list(own)} or {['1 or K', *own]}".replace("'1 or K'", f"1 or K={steps}")
                raise ValueError(f"lr[{i}] must have shape {allowed}, got {list(rate.shape)}")
            rates.append(rate)
        return rates
    rate = _check.rate("lr", lr, like=like, read=read)
    given, layers = list(rate.shape), layer_of[-1] + 1
    rate = rate.reshape(-1, 1) if rate.dim() < 2 else rate
    columns = (1, layers, len(shapes))
    if rate.dim() > 2 or rate.shape[1] not in columns or not (rate.shape[0] == 1 or rate.shape[0] >= steps):
        allowed = f"[], [K={steps}] or [1 or K={steps}, {layers} layers or {len(shapes)} params]"
        raise ValueError(f"lr must have shape {allowed}, got {given}")
    if rate.shape[1] == layers and layers not in (1, len(shapes)):
        # by views: indices would have to be copied to the device, which a graph cannot capture
        rate = torch.stack([rate[:, layer] for layer in layer_of], 1)
    return [rate]
