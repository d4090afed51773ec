"""Providers of the same numbers: held against float64 first, then timed in turns, beside the processor's measured peak.

On one thread the clock is thread CPU time, which other programs disturb least; on more it is wall time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Provider", "allowed_error", "clock_for", "largest_error", "limit_to_isa", "measure", "peak", "quantile"]

TURNS = 10
# correct programs differ: a batch norm of five rows enlarges every rounding, and a kink of ReLU may fall on its other
# side; a derivative that is wrong (first order in the place of second) is off by about as much as it is large
ROUNDING = 1e-5
TIMES_EAGER = 30


@dataclass
class Provider:
    """Somebody who computes a workload's results."""

    call: Callable[[], Sequence[Tensor]]
    version: str = ""
    compile_s: float | None = None

    def results(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.call()]

    def turn(self, seconds: float, threads: int) -> list[float]:
        """Milliseconds of each of the calls that fill this time; one at least."""
        clock, times = clock_for(threads), []
        while sum(times) < 1e3 * seconds or not times:
            start = clock()
            self.call()
            times.append(1e3 * (clock() - start))
        return times

    def close(self) -> None:
        pass


def measure(providers: dict[str, Provider], seconds: float, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the providers taking turns until each has had `seconds` and five calls."""
    for provider in providers.values():
        provider.turn(0.0, threads)
    times: dict[str, list[float]] = {name: [] for name in providers}
    waiting = list(providers)
    while waiting:
        for name in waiting:
            times[name] += providers[name].turn(seconds / TURNS, threads)
        waiting = [name for name in waiting if sum(times[name]) < 1e3 * seconds or len(times[name]) < 5]
    return times


def largest_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference from the float64 results, each tensor on the scale of its largest value."""
    if [r.shape for r in results] != [e.shape for e in exact]:
        return float("inf")
    scales = [float(e.abs().max()) if e.numel() else 0.0 for e in exact]
    # some are nothing but rounding: a bias before a batch norm has no gradient
    least = max(1e-3 * max(scales), 1e-30)
    worst = 0.0
    for r, e, scale in zip(results, exact, scales, strict=True):
        error = (
            float((r.detach().to(e.device, torch.float64) - e).abs().max()) / max(scale, least) if e.numel() else 0.0
        )
        # max() would pass over a NaN
        worst = max(worst, error) if error == error else float("inf")
    return worst


def allowed_error(eager: float) -> float:
    """How far from float64 a provider may be where eager PyTorch is so far from it."""
    return max(ROUNDING, TIMES_EAGER * eager)


def quantile(times: list[float], q: float) -> float:
    return float(torch.tensor(times, dtype=torch.float64).quantile(q))


def clock_for(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


def peak(threads: int) -> float:
    """Operations a second of float32: the best of torch's and oneDNN's product of square matrices.

    torch's own product does not use 512-bit instructions on every processor that has them; oneDNN's does.
    """
    clock, best = clock_for(threads), 0.0
    for size in (256, 512, 768):
        a, b = torch.randn(size, size), torch.randn(size, size)
        products = [lambda a=a, b=b: torch.mm(a, b)]
        if torch.backends.mkldnn.is_available():
            c, d, zero = a.to_mkldnn(), b.to_mkldnn(), torch.zeros(size).to_mkldnn()
            products.append(lambda c=c, d=d, zero=zero: torch.nn.functional.linear(c, d, zero))
        for product in products:
            for _ in range(8):
                start = clock()
                product()
                best = max(best, 2 * size**3 / (clock() - start))
    return best


def limit_to_isa() -> None:
    """Hold torch, oneDNN, MKL and inductor to MTML_FAST_ISA=avx2 too; to be called before the first product.

    A comparison then shows what a machine without 512-bit instructions would.
    """
    if os.environ.get("MTML_FAST_ISA") == "avx2":
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
        os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")
        os.environ.setdefault("TORCHINDUCTOR_CPP_MARCH", "x86-64-v3")
