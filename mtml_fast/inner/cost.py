"""Operations and bytes of a forward pass, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtml_fast.ops._route import TorchDispatchMode


def forward_cost(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Floating-point operations of the products and convolutions, and bytes of all results."""
    with FlopCounterMode(display=False) as operations, _Bytes() as results:
        call()
    return operations.get_total_flops(), results.total


class _Bytes(TorchDispatchMode):
    """Adds up the size of whatever is computed."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (list, tuple)) else [results]:
            if isinstance(result, Tensor):
                self.total += result.numel() * result.element_size()
        return results
