"""Who else computes the same: each in its best idiom, and a reason in one line where somebody cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from mtml_fast.cli.timing import Provider

__all__ = ["HEADS_PEERS", "INNER_PEERS", "PEERS", "SURGERY_PEERS", "Build", "Settings", "Unavailable"]


@dataclass(frozen=True)
class Settings:
    threads: int = 1
    compile_limit: float = 180.0  # seconds
    jax: str | None = os.environ.get("MTML_FAST_JAX_PYTHON")  # a Python that has JAX
    device: str = "cpu"
    # who takes the time of a provider's calls: itself, by the processor's clock, or somebody by the device's
    timed: Callable[[Provider], Provider] = lambda provider: provider


class Unavailable(Exception):
    """Why a peer is left out; `recorded` where that is a result of its own."""

    def __init__(self, reason: str, recorded: bool = False):
        super().__init__(reason)
        self.recorded = recorded


Build = Callable[[Settings], Provider]

# below, since they use the names above
from benchmarks.peers import eager, heads, jax_jit, loops, surgery  # noqa: E402

INNER_PEERS = {
    "bmm": eager.bmm,
    "torch.func": eager.torch_func,
    "torch.func compiled": eager.compiled_torch_func,
    "jax": jax_jit.jax,
    "higher": loops.higher,
    "TorchOpt": loops.torchopt,
    "learn2learn": loops.learn2learn,
}
HEADS_PEERS = {
    "loop": heads.loop,
    "bmm": heads.bmm,
    "vmap": heads.vmap,
    "grouped_mm": heads.grouped_mm,
}
SURGERY_PEERS = {
    "loop": surgery.loop,
    "matmul": surgery.matmul,
    "TorchJD": surgery.torchjd,
}
# names alone: a loop of one suite is not that of another
PEERS = ("eager", *dict.fromkeys((*INNER_PEERS, *HEADS_PEERS, *SURGERY_PEERS)))
