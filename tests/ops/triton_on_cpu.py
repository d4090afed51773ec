"""Puts the Triton kernels in the place of the native ones on the CPU: a plugin of pytest, for TRITON_INTERPRET=1.

    TRITON_INTERPRET=1 python -m pytest -p tests.ops.triton_on_cpu tests/ops/test_gradient_gram.py -k battery

The interpreter runs a program after the other, in NumPy, on the memory of the CPU.
"""

import os
import warnings
from collections import Counter

from mtml_fast.ops import OPERATORS, _triton
from mtml_fast.ops._library import LIB

_calls = Counter()


def _mend_bfloat16() -> None:
    """As a GPU has it: the interpreter cuts numbers off, and its products take the 16 bits for integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        # to the nearest, and in the middle to the even one
        return TensorHandle((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16), dtype.scalar)

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.cast_impl = rounded
    InterpreterBuilder.create_fp_trunc = rounded
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, wide(a), wide(b), *rest)


def pytest_configure(config):
    assert os.environ.get("TRITON_INTERPRET") == "1", "the CPU cannot run what Triton compiles: set TRITON_INTERPRET=1"
    _mend_bfloat16()
    with warnings.catch_warnings():
        # that a kernel is replaced is what is wanted
        warnings.simplefilter("ignore", UserWarning)
        for name in filter(_triton.has_file, OPERATORS):
            for target in _triton.targets(name):
                LIB.impl(target, _counted(name, target), "CPU", allow_override=True)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("Triton kernels called: " + ", ".join(f"{k} {n}" for k, n in sorted(_calls.items())))


def _counted(name: str, target: str):
    kernel = _triton.implementation(name, target)

    def call(*args):
        _calls[target] += 1
        return kernel(*args)

    return call
