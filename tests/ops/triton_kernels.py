"""Every Triton kernel as it is launched, compiled ahead of time for GPUs that need not be there.

    python -m tests.ops.triton_kernels              compile all, print registers and shared memory, fail if they rose
    python -m tests.ops.triton_kernels --record     and keep these as the table of this Triton

A kernel's arguments are those of a real call on CPU tensors, during which launches are noted and not made.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.precision import products_in

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = ("triton", "kernel", "sm", "registers", "shared_bytes")
ARCHITECTURES = (80, 90)
# several programs are to fit a processor, which has 164 KB on sm_80
MOST_SHARED = 48 << 10

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Launch:
    """A launch that was noted."""

    kernel: object  # triton.runtime.JITFunction
    arguments: dict
    options: dict
    grid: tuple[int, ...]

    def __str__(self) -> str:
        constants = (f"{name}={self.arguments[name]}" for name in self.constants)
        return f"{self.kernel.__name__}[{' '.join([*constants, self.types])}]"

    @property
    def constants(self) -> list[str]:
        return [p.name for p in self.kernel.params if p.is_constexpr]

    @property
    def types(self) -> str:
        """Element types of the tensors among the arguments."""
        return " ".join(type_of(v)[1:] for v in self.arguments.values() if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a GPU's processor."""

    registers: int
    stack: int
    shared: int
    ptx: str


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """The launches inside a `with` block, none of which is made."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        arguments = {name: values.pop(name) for name in self.arg_names}
        launches.append(Launch(self, arguments, values, tuple(grid)))

    before, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = before


def all_launches() -> dict[str, Launch]:
    """Each kernel in each of its variants: element types, sizes of tiles, and what takes most registers of the rest."""
    from mtml_fast.ops.gradient_combine import triton as combine
    from mtml_fast.ops.gradient_gram import triton as gram
    from mtml_fast.ops.heads import triton as heads
    from mtml_fast.ops.heads_loss import triton as heads_loss

    with noted() as launches:
        for dtype in (torch.float32, torch.float64):
            # a small tile, a large one, several
            for tasks in (3, 20, 40):
                leaves = [torch.ones(tasks, 5, dtype=dtype)]
                weights, cotangents = torch.ones(tasks, dtype=dtype), [leaves[0][0]]
                gram.gradient_gram(leaves)
                gram.gradient_gram_backward([torch.ones(tasks, tasks, dtype=torch.float64)], leaves, [True])
                combine.gradient_combine(leaves, weights)
                combine.gradient_combine_backward(cotangents, leaves, weights, [True, True])
            # rounded factors where somebody asks for them: the same kernels, in a sample
            for asked in ("highest", "high", "medium") if dtype == torch.float32 else ("highest",):
                with products_in(asked):
                    for call in list(heads_calls(dtype))[0 if asked == "highest" else -1 :]:
                        inputs = [t for t in (call[0], *call[2:4], *call[5:7]) if t is not None]
                        outputs = (5 * 20,) if call[4] is None else (3 * 2 + 2 * 4,)
                        q = torch.ones(outputs, dtype=dtype)
                        needs = [True] * len(inputs)
                        heads.heads(*call)
                        heads.heads_backward([q], *call, needs)
                        heads.heads_double_backward(inputs, [q], *call, needs, [True, *needs])
                        for options in list(loss_options(call))[0 if asked == "highest" else -1 :]:
                            heads_loss.heads_loss(*options)
                            heads_loss.heads_loss_backward([torch.ones(2, dtype=dtype)], *options, needs)
    return {str(launch): launch for launch in launches}


def sampled(sm: int) -> dict[str, Launch]:
    """Of a kernel's variants for one type of elements all, if they are few, else one, another for each architecture."""
    kinds: dict[tuple, list[tuple[str, Launch]]] = {}
    place = -ARCHITECTURES.index(sm)
    for name, launch in all_launches().items():
        how = launch.arguments.get("PRECISION", "ieee")
        if how in ("ieee", ("tf32", "bfloat16")[place]):
            kinds.setdefault((launch.kernel.fn, launch.types.split()[0], how), []).append((name, launch))
    return dict(variant for kind in kinds.values() for variant in (kind if len(kind) <= 4 else [kind[place]]))


def heads_calls(dtype: torch.dtype) -> Iterator[list]:
    """Arguments of heads: ragged and narrow, equally wide behind a hidden layer; with aligned rows and without."""
    rows, ones = torch.tensor([0, 3, 5]), lambda *shape: torch.ones(shape, dtype=dtype)
    for features, hidden in ((7, 9), (16, 32)):
        yield [ones(5, features), rows, ones(6, features), ones(6), torch.tensor([0, 2, 6]), None, None, "relu"]
        layer = ones(2, hidden, features), ones(2, hidden), "tanh"
        yield [ones(5, features), rows, ones(40, hidden), ones(40), None, *layer]


def loss_options(call: list) -> Iterator[list]:
    """Arguments of heads_loss for a call of heads: one loss and no option, all options with a mask of either kind."""
    x, *of_head, activation = call
    labels, targets = torch.zeros(5, dtype=torch.int64), x.new_ones(5 * 20 if call[4] is None else 3 * 2 + 2 * 4)
    yield [x, labels, None, *of_head, None, None, activation, [0], 0.0, -100, 1.0]
    for mask in (labels == 0, targets == 1):
        weights = torch.ones_like(call[2][:, 0])
        yield [x, labels, targets, *of_head, weights, mask, activation, [0, 3], 0.1, -100, 1.0]


def compiled(launch: Launch, sm: int) -> Compiled:
    """A launch's kernel for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: type_of(value) for name, value in launch.arguments.items()}
    source = ASTSource(
        fn=launch.kernel,
        signature={**types, **dict.fromkeys(launch.constants, "constexpr")},
        constexprs={name: launch.arguments[name] for name in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, v in enumerate(launch.arguments.values()) if is_aligned(v)},
    )
    result = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    return Compiled(registers, stack, result.metadata.shared, result.asm["ptx"])


def is_aligned(value) -> bool:
    """Whether Triton compiles a launch for a tensor at an address like this one."""
    return isinstance(value, torch.Tensor) and value.data_ptr() % 16 == 0


def type_of(value) -> str | tuple:
    """The type of an argument in Triton's words."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    return "i32" if isinstance(value, int) and value < 2**31 else "i64"


def recorded() -> dict[tuple[str, str, int], tuple[int, int]]:
    """(Triton's version, kernel, architecture) -> (registers, bytes of shared memory)."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(r["triton"], r["kernel"], int(r["sm"])): (int(r["registers"]), int(r["shared_bytes"])) for r in rows}


def complaints(name: str, sm: int, result: Compiled, limits: tuple[int, int] | None) -> list[str]:
    """What is wrong with a compiled kernel; `limits` are those recorded, if any are for this Triton."""
    found = []
    if result.stack:
        found.append(f"{name} for sm_{sm} spills registers: {result.stack} bytes")
    if result.shared > MOST_SHARED:
        found.append(f"{name} for sm_{sm} takes {result.shared} bytes of shared memory, more than {MOST_SHARED}")
    if limits and (result.registers > limits[0] or result.shared > limits[1]):
        found.append(
            f"{name} for sm_{sm} takes {result.registers} registers and {result.shared} bytes of shared memory, "
            f"recorded are {limits[0]} and {limits[1]}: mend it, or record it with --record"
        )
    return found


def main(record: bool) -> int:
    """Compile, print and compare; the number of complaints."""
    if importlib.util.find_spec("triton") is None:
        print("cuda-check: left out are the Triton kernels: Triton is not installed")
        return 0
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    table, mine, found = recorded(), {}, []
    print(f"Triton {triton.__version__}\n{'registers':>9}  {'shared':>6}  kernel")
    for name, launch in all_launches().items():
        for sm in ARCHITECTURES:
            result = compiled(launch, sm)
            print(f"{result.registers:9}  {result.shared:6}  sm_{sm} {name}")
            mine[version, name, sm] = (result.registers, result.shared)
            found += complaints(name, sm, result, None if record else table.get((version, name, sm)))
    if record:
        kept = {key: value for key, value in table.items() if key[0] != version}
        with TABLE.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([*key, *value] for key, value in sorted({**kept, **mine}.items()))
    print("\n".join(found) or f"cuda-check: {len(mine)} Triton kernels compile, none spills")
    return len(found)


if __name__ == "__main__":
    sys.exit(min(1, main("--record" in sys.argv[1:])))
