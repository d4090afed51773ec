"""The operator library `mtml_fast` of the dispatcher: declared here, its native kernels loaded here, once."""

from __future__ import annotations

import ctypes
import json
import warnings
from pathlib import Path

import torch

from mtml_fast import __version__

__all__ = ["LIB", "build_info", "native_status"]

LIB = torch.library.Library("mtml_fast", "DEF")

_PATH = Path(__file__).parents[1] / "_C_cpu.so"


def build_info() -> dict | None:
    """What the loaded native library was built from, or `None` without one.

    Example:
        >>> info = build_info()
        >>> info is None or sorted(info) == ["compiler", "isa", "isas_built", "version"]
        True
    """
    if _REASON is not None:
        return None
    function = ctypes.CDLL(str(_PATH)).mtml_fast_build_info
    function.restype = ctypes.c_char_p
    return json.loads(function())


def native_status() -> str:
    """One line: which native library serves the CPU, or why none does."""
    info = build_info()
    if info is None:
        return f"no native library: {_REASON}"
    return f"native library {info['version']} by {info['compiler']}, running on {info['isa']}"


def _load() -> str | None:
    """The reason why there is no native library, or `None` after loading it."""
    if not _PATH.is_file():
        return f"{_PATH.name} is missing"
    # looked up in the file and not by a call: a library that is loaded has registered its kernels already
    if f'"version": "{__version__}"'.encode() not in _PATH.read_bytes():
        return f"{_PATH.name} was built for another version than {__version__}"
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        return f"{_PATH.name} does not load with torch {torch.__version__} ({str(error).splitlines()[0]})"
    return None


_REASON = _load()
if _REASON is not None:
    warnings.warn(
        f"mtml_fast runs on its PyTorch reference, many times slower than native: {_REASON}; "
        "run `pip install --no-build-isolation -e .` in its source folder",
        RuntimeWarning,
        stacklevel=2,
    )
