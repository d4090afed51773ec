"""Whether the CUDA library has kernels for a device: asked once for each device, without a wait.

A library holds machine code for some architectures, which later ones of the same major version run too, and maybe PTX,
which the driver compiles for all later ones. On any other device CUDA would refuse every launch.
"""

from __future__ import annotations

import functools
import re
import warnings

import torch

from mtml_fast.ops._library import cuda_build_info

__all__ = ["covers", "refusal", "warn_of_refusal"]

_said: set[str] = set()


def refusal(device: torch.device) -> str | None:
    """Why the CUDA library cannot serve a device; `None` where it can, or where there is no library or no device."""
    info = cuda_build_info()
    if info is None or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _refusal(index, info["architectures"])


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a library for these architectures, as in TORCH_CUDA_ARCH_LIST, runs on a device of this capability.

    Example:
        >>> [covers("8.0 9.0+PTX", c) for c in ((7, 5), (8, 6), (9, 0), (12, 0))]
        [False, True, True, True]
        >>> [covers("9.0a", c) for c in ((9, 0), (10, 0))]
        [True, False]
    """
    for major, minor, special, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", architectures):
        built = int(major), int(minor)
        # features of one architecture (a), or of its family (f), are on no other, not even by PTX
        if special == "a":
            found = capability == built
        else:
            found = capability[0] == built[0] and capability[1] >= built[1]
            found |= bool(ptx) and not special and capability >= built
        if found:
            return True
    return False


def warn_of_refusal(why: str) -> None:
    """Say once that others serve a device."""
    if why not in _said:
        _said.add(why)
        warnings.warn(
            f"mtml_fast: {why}: Triton, or the PyTorch reference, serves CUDA devices instead "
            "(python -m mtml_fast.env shows who); built again with TORCH_CUDA_ARCH_LIST it serves them all",
            RuntimeWarning,
            stacklevel=5,
        )


@functools.cache
def _refusal(index: int, architectures: str) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if covers(architectures, capability):
        return None
    return f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, the library is for {architectures}"
