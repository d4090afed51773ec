"""The core's matrix products: tests/native/gemm_check.cpp, compiled for each instruction set and run."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETS = {"baseline": [], "avx2": ["-DCHECK_AVX2"], "avx512": ["-DCHECK_AVX512"]}
LACKS_THE_SET = 77
COMPILER = shlex.split(os.environ.get("CXX") or "c++")


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", SETS)
def test_against_plain_loops(isa, tmp_path):
    if isa != "baseline" and platform.machine() != "x86_64":
        pytest.skip(f"{isa} is for x86-64")
    flags = shlex.split("-O1 -std=c++17 -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi")
    program = tmp_path / "gemm_check"
    source = ROOT / "tests/native/gemm_check.cpp"
    command = [*COMPILER, *flags, "-Werror", f"-I{ROOT / 'csrc'}", *SETS[isa], str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], capture_output=True, text=True)
    if run.returncode == LACKS_THE_SET:
        pytest.skip(f"this processor lacks {isa}")
    assert run.returncode == 0, run.stdout + run.stderr
