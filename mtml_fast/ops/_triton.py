"""Triton kernels as the implementations of operators on CUDA devices.

A file `ops/<op>/triton.py` has the functions `<op>`, `<op>_backward` and, where it is an operator, perhaps
`<op>_double_backward`, with the arguments of the operators of these names. They are registered where torch has CUDA and
Triton is installed; file and Triton are imported at the first call on a device. Elsewhere the reference serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mtml_fast.ops._route import has_kernel


def register(name: str, library: torch.library.Library, *, override: bool = False) -> bool:
    """Give operator `name` its Triton kernels, if it has any and they can run; whether it did.

    override: in the place of others; else not where others are there.
    """
    if not has_file(name) or missing() is not None:
        return False
    if not override and has_kernel(f"mtml_fast::{name}", "cuda"):
        return False
    for target in targets(name):
        if override:
            replace(library, target, implementation(name, target))
        else:
            library.impl(target, implementation(name, target), "CUDA")
    return True


def replace(library: torch.library.Library, name: str, kernel: Callable) -> None:
    """Register a kernel for CUDA devices in the place of another."""
    with warnings.catch_warnings():
        # that a kernel is replaced is what is wanted
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, kernel, "CUDA", allow_override=True)


def has_file(name: str) -> bool:
    """Whether there are Triton kernels for operator `name`."""
    return (Path(__file__).parent / name / "triton.py").is_file()


def targets(name: str) -> list[str]:
    """The operators that the file of operator `name` has kernels for."""
    # read and not imported: Triton is slow to load
    text = (Path(__file__).parent / name / "triton.py").read_text()
    return [target for target in (name, f"{name}_backward", f"{name}_double_backward") if f"\ndef {target}(" in text]


def missing() -> str | None:
    """What Triton kernels lack to serve CUDA devices here, or `None`."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def warn_of_missing(name: str) -> None:
    """Say that the reference serves operator `name` on CUDA devices, where it is for want of Triton."""
    if has_file(name) and torch.version.cuda is not None:
        warnings.warn(
            f"mtml_fast: {name} runs on its PyTorch reference on CUDA devices, slower than its kernels: {missing()}",
            RuntimeWarning,
            stacklevel=4,
        )


def implementation(name: str, target: str) -> Callable:
    """The function `target` of ops/<name>/triton.py, on the device and the stream of its tensors."""

    def kernel(*args):
        module = importlib.import_module(f"mtml_fast.ops.{name}.triton")
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device_of(first):
            return getattr(module, target)(*args)

    return kernel
