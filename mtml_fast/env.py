"""What runs here, and who serves each operator: `python -m mtml_fast.env` prints it, for reports and for doubts."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

import torch

from mtml_fast import __version__
from mtml_fast.ops import OPERATORS
from mtml_fast.ops._check import cuda_device
from mtml_fast.ops._define import Operator
from mtml_fast.ops._library import build_info, cuda_build_info, cuda_status, native_status
from mtml_fast.ops._triton import has_file, missing

# all the variables there are: (name, what it does)
VARIABLES = (
    ("MTML_FAST_BUILD", "auto, 1 or 0: native code when installing if it can be built, or else stop, or none"),
    ("MTML_FAST_ISA", "baseline, avx2, avx512 or neon: force the instruction set of the native code"),
    ("MTML_FAST_CACHE", "folder of decoded data sets (else in XDG_CACHE_HOME)"),
    ("MTML_FAST_DATA", "folder with the real data sets that some tests use"),
    ("MTML_FAST_DEBUG", "1: the command line shows the traceback of an error"),
    (
        "MTML_FAST_FORM",
        "dense, factored, gram or gram_cross: insist on a form of mlp_adapt's weights where it is possible, for tests",
    ),
    ("MTML_FAST_TEST_DEVICE", "device of the operators' battery, such as cuda; else the CPU"),
    ("MTML_FAST_TEST_SEED", "seed of a test, to repeat a failure"),
)


@dataclass(frozen=True)
class Service:
    """Who serves an operator on a device, and why."""

    operator: str
    device: str
    served_by: str  # "native", "triton" or "reference"
    why: str


def services() -> list[Service]:
    """For each operator and device who serves it.

    Example:
        >>> {s.operator for s in services()} >= {"mlp_adapt", "heads", "heads_loss", "sgd_step"}
        True
    """
    found = []
    for device in ("cpu", "cuda"):
        for name, operator in sorted(OPERATORS.items()):
            by = operator.served_by(device)
            found.append(Service(name, device, by, _why(operator, by, device)))
    return found


def main() -> None:
    """Print the report."""
    info = build_info()
    print(f"mtml_fast   {__version__}")
    print(f"native      {native_status()}")
    if info is not None:
        print(f"            instruction sets built: {', '.join(info['isas_built'])}; in use: {info['isa']}")
    print(f"            {cuda_status()}")
    print(f"torch       {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"CUDA        {cuda_device() or 'no device'}")
    print(f"Triton      {'installed' if importlib.util.find_spec('triton') else 'not installed'}")
    print(f"Python      {sys.version.split()[0]} on {platform.system()} {platform.machine()}")
    print()
    rows = [("operator", "device", "served by", "why")]
    rows += [(s.operator, s.device, s.served_by, s.why) for s in services()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    print()
    for name, does in VARIABLES:
        value = os.environ.get(name)
        print(f"{name:20}  {'unset' if value is None else repr(value):12}  {does}")


def _why(operator: Operator, by: str, device: str) -> str:
    name = operator.name
    # the CUDA library has kernels for it, but none that this device runs
    instead = f" in the place of the CUDA library: {operator.refused}" if device == "cuda" and operator.refused else ""
    if by == "native":
        return "own kernels, forward and backward"
    if by == "triton":
        return f"own kernels, forward and backward, compiled at the first call{instead}"
    if instead:
        return f"PyTorch operations{instead}"
    if device == "cuda" and has_file(name):
        return f"its Triton kernels cannot run: {missing()}"
    if device == "cpu" and build_info() is None:
        return "the native library is not there"
    if device == "cuda" and cuda_build_info() is None:
        return cuda_status()
    return "no kernel for it yet: PyTorch operations, right and slower"


if __name__ == "__main__":
    main()
