"""The operator library `mtml_fast` of the dispatcher: declared here, its native kernels loaded here, once.

There are two native libraries: one for the CPU, and one for CUDA, which is built and loaded where torch has CUDA.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from pathlib import Path

import torch

from mtml_fast import __version__

__all__ = ["LIB", "build_info", "cuda_build_info", "cuda_status", "native_status", "warn_without_cuda"]

LIB = torch.library.Library("mtml_fast", "DEF")

_PATH = Path(__file__).parents[1] / "_C_cpu.so"
_CUDA_PATH = _PATH.with_name("_C_cuda.so")


def build_info() -> dict | None:
    """What the loaded native library was built from, or `None` without one.

    Example:
        >>> info = build_info()
        >>> info is None or sorted(info) == ["compiler", "isa", "isas_built", "version"]
        True
    """
    return None if _REASON is not None else _info(_PATH, "mtml_fast_build_info")


def cuda_build_info() -> dict | None:
    """The same of the library for CUDA.

    Example:
        >>> info = cuda_build_info()
        >>> info is None or sorted(info) == ["architectures", "cuda", "version"]
        True
    """
    return None if _CUDA_REASON is not None else _info(_CUDA_PATH, "mtml_fast_cuda_build_info")


def native_status() -> str:
    """One line: which native library serves the CPU, or why none does."""
    info = build_info()
    if info is None:
        return f"no native library: {_REASON}"
    return f"native library {info['version']} by {info['compiler']}, running on {info['isa']}"


def cuda_status() -> str:
    """One line: which native library serves CUDA, or why none does."""
    info = cuda_build_info()
    if info is None:
        return f"no CUDA library: {_CUDA_REASON}"
    return f"CUDA library {info['version']} by nvcc {info['cuda']}, for {info['architectures']}"


def warn_without_cuda() -> None:
    """Say why no native library serves CUDA, if none does: once, and not before somebody has called for it."""
    global _cuda_is_said
    if _CUDA_REASON is not None and not _cuda_is_said:
        _cuda_is_said = True
        warnings.warn(f"mtml_fast runs on CUDA by its PyTorch reference: {_CUDA_REASON}", RuntimeWarning, stacklevel=4)


def _info(path: Path, name: str) -> dict:
    function = getattr(ctypes.CDLL(str(path)), name)
    function.restype = ctypes.c_char_p
    return json.loads(function())


def _load(path: Path) -> str | None:
    """The reason why there is no native library, or `None` after loading it."""
    if not path.is_file():
        return f"{path.name} is missing"
    # looked up in the file and not by a call: a library that is loaded has registered its kernels already
    if f'"version": "{__version__}"'.encode() not in path.read_bytes():
        return f"{path.name} was built for another version than {__version__}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__} ({str(error).splitlines()[0]})"
    return None


_REASON = _load(_PATH)
if _REASON is not None:
    warnings.warn(
        f"mtml_fast runs on its PyTorch reference, many times slower than native: {_REASON}; "
        "run `pip install --no-build-isolation -e .` in its source folder",
        RuntimeWarning,
        stacklevel=2,
    )
_CUDA_REASON = _load(_CUDA_PATH) if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
_cuda_is_said = False
