"""What the CUDA kernels take of a GPU, found without one: every .cu compiled for two architectures, and the compiler's
figures held against csrc/cuda/resources.txt. `make cuda-check UPDATE=1` writes that table anew.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TABLE = ROOT / "csrc/cuda/resources.txt"
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = shlex.split("-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Werror all-warnings -Xptxas -v")


class Resources(NamedTuple):
    """Of one kernel on one architecture."""

    registers: int  # of a thread
    shared: int  # bytes of a block, without what a launch asks for
    stack: int  # bytes of a thread
    spills: int  # bytes that did not fit into registers


def nvcc_release() -> str | None:
    """Such as "13.0.88", or `None` where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    says = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV([\d.]+)", says)[1]


def measure(folder: Path) -> dict[tuple[str, str], Resources]:
    """(kernel, architecture) -> its figures; objects go into the folder. Raises where a file does not compile."""

    def compile_for(job: tuple[Path, str]) -> dict[tuple[str, str], Resources]:
        source, name = job
        code = f"-gencode=arch=compute_{name[3:]},code={name}"
        target = folder / f"{source.stem}_{name}.o"
        command = ["nvcc", *FLAGS, code, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{built.stdout}{built.stderr}")
        return _parse(built.stdout + built.stderr)

    jobs = [(source, name) for source in SOURCES for name in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {key: row for found in pool.map(compile_for, jobs) for key, row in found.items()}


def _parse(log: str) -> dict[tuple[str, str], Resources]:
    log = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        name, architecture = re.match(r"Compiling entry function '(.+)' for '(\w+)'", part).groups()
        # void mtml::cuda::sgd_step<float>(...) -> sgd_step<float>
        kernel = re.sub(r"^void |\(.*$|\w+::", "", name)

        def figure(pattern: str, part=part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        found[kernel, architecture] = Resources(
            figure(r"Used (\d+) registers"),
            figure(r"(\d+) bytes smem"),
            figure(r"(\d+) bytes stack frame"),
            figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
        )
    return found


def read_table() -> tuple[str, dict[tuple[str, str], tuple[int, int]]]:
    """The release of nvcc that it is of, and (kernel, architecture) -> registers, shared bytes."""
    lines = TABLE.read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    release = re.match(r"# nvcc ([\d.]+)", lines[0])[1]
    return release, {(kernel, name): (int(registers), int(shared)) for kernel, name, registers, shared in rows}


def write_table(release: str, found: dict[tuple[str, str], Resources]) -> None:
    width = max(len(kernel) for kernel, _ in found)
    lines = [f"# nvcc {release}; written by `make cuda-check UPDATE=1`"]
    lines.append(f"# {'kernel':{width - 2}}  arch   registers  shared bytes, besides what the launch asks for")
    lines += [f"{k:{width}}  {name}  {r.registers:9}  {r.shared:6}" for (k, name), r in sorted(found.items())]
    TABLE.write_text("\n".join(lines) + "\n")


def complaints(release: str, found: dict[tuple[str, str], Resources]) -> list[str]:
    """What is not as it must be: spills with any compiler, and with that of the table all figures but its own."""
    wrong = [
        f"{kernel} spills {r.spills} bytes on {name}, with a stack of {r.stack}"
        for (kernel, name), r in found.items()
        if r.spills or r.stack
    ]
    recorded_release, recorded = read_table()
    if release != recorded_release:
        return wrong
    now = {key: (r.registers, r.shared) for key, r in found.items()}
    for key in sorted({*now, *recorded}):
        if now.get(key) != recorded.get(key):
            had, has = (
                f"{x[0]} registers and {x[1]} bytes" if x else "nothing" for x in (recorded.get(key), now.get(key))
            )
            wrong.append(
                f"{key[0]} on {key[1]} has {has}, and {had} in {TABLE.name}: make cuda-check UPDATE=1, if it must"
            )
    return wrong


def main() -> None:
    """Write the table; what spills is refused."""
    import tempfile

    release = nvcc_release()
    if release is None:
        sys.exit("cuda-check: there is no nvcc, whose figures the table holds")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    write_table(release, found)
    if wrong := complaints(release, found):
        sys.exit("\n".join(wrong))
    print(f"cuda-check: wrote {TABLE.relative_to(ROOT)}, {len(found)} rows")


if __name__ == "__main__":
    main()
