"""What the CUDA kernels take of a GPU, found without one: nvcc's figures, as it says them where the library is built,
held against csrc/cuda/resources.txt. `make cuda-check UPDATE=1` writes that table anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.cuda.library import ROOT, build, nvcc_release

TABLE = ROOT / "csrc/cuda/resources.txt"


class Resources(NamedTuple):
    """Of one kernel on one architecture."""

    registers: int  # of a thread
    shared: int  # bytes of a block, without what a launch asks for
    stack: int  # bytes of a thread
    spills: int  # bytes that did not fit into registers


def parse(log: str) -> dict[tuple[str, str], Resources]:
    """(kernel, architecture) -> its figures, from what `library.build` tells."""
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
        _, log = build(Path(folder))
    found = parse(log)
    write_table(release, found)
    if wrong := complaints(release, found):
        sys.exit("\n".join(wrong))
    print(f"cuda-check: wrote {TABLE.relative_to(ROOT)}, {len(found)} rows")


if __name__ == "__main__":
    main()
