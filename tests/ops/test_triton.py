"""The Triton kernels without a GPU: run by Triton's interpreter, compiled ahead of time, their launches counted."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.precision import products_in
from mtml_fast.ops import OPERATORS, _triton
from tests.ops import triton_kernels

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent

WITH_KERNELS = [name for name in OPERATORS if _triton.has_file(name)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpret(*arguments):
    """pytest in a process of its own, in which the kernels run on the CPU: the variable must be set before they are."""
    # of the interpreter of Triton 3.6 itself
    quiet = ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.ops.triton_on_cpu", *quiet, *map(str, arguments)]
    # what another test has set for torch.compile is not for this process
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)(?:,|$)", last_line(done.stdout, "called: "))}


def last_line(text, start):
    return re.findall(f"{start}(.+)", text)[-1]


@pytest.fixture
def interpreter():
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}")


# Of an operator's own battery what does not take minutes there, as finite differences do, of many calls: the values of
# all cases, and of some the rest.
SELECTED = {
    "heads": "battery and (values or bad- or ragged or tiny-equal-maml) or double_backward and (odd or ragged)",
    "heads_loss": "battery and (values or bad- or odd-tasks or everything-tasks or outputs-purity or bce-layouts)",
}


@needs_triton
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_battery_in_the_interpreter(name, interpreter):
    """The operator's own battery, without the cases that take minutes there."""
    selected = SELECTED.get(name, "battery and not wide and not T40")
    called = interpret(TESTS / f"test_{name}.py", "-k", selected)
    assert set(called) == set(_triton.targets(name))
    assert called[name] > 50
    assert called[f"{name}_backward"] > 30
    # two cases in two types, twice
    assert called.get(f"{name}_double_backward", 8) >= 8


@needs_triton
def test_more_of_everything_in_the_interpreter(interpreter):
    called = interpret(TESTS / "triton_in_interpreter.py")
    assert set(called) == {t for name in WITH_KERNELS for t in (name, f"{name}_backward")}


@needs_triton
@pytest.mark.parametrize("sm", triton_kernels.ARCHITECTURES)
def test_every_kernel_compiles(sm):
    """Without spilling registers, and with no more than recorded for this Triton: a sample of `triton_kernels`."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    table, found = triton_kernels.recorded(), []
    for name, launch in triton_kernels.sampled(sm).items():
        result = triton_kernels.compiled(launch, sm)
        found += triton_kernels.complaints(name, sm, result, table.get((version, name, sm)))
        if name.startswith("_gram"):
            # the products are those of the tensor cores, in float64
            assert re.search(r"mma\.sync\S*f64", result.ptx), name
        rounded = {"tf32": "tf32", "bfloat16": "bf16"}.get(launch.arguments.get("PRECISION"))
        if rounded and name.startswith(("_forward", "_gradients", "_losses")):
            assert re.search(rf"mma\S*\.{rounded}\.{rounded}", result.ptx), name
    assert not found, "\n".join(found)


@needs_triton
def test_no_kernel_is_left_out():
    """What is compiled here is all there is."""
    from triton.runtime.jit import JITFunction

    files = sorted((ROOT / "mtml_fast/ops").glob("*/triton.py"))
    modules = [importlib.import_module(f"mtml_fast.ops.{file.parent.name}.triton") for file in files]
    # what is called by kernels and not launched has a public name
    there = {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.startswith("_") and value.fn.__module__ == module.__name__
    }
    noted = {(launch.kernel.fn.__module__, launch.kernel.__name__) for launch in triton_kernels.all_launches().values()}
    assert len(files) >= 7
    assert noted == there


def test_complaints():
    fine = triton_kernels.Compiled(registers=32, stack=0, shared=128, ptx="")
    assert triton_kernels.complaints("k", 90, fine, None) == []
    assert triton_kernels.complaints("k", 90, fine, (32, 128)) == []
    assert "32 registers" in triton_kernels.complaints("k", 90, fine, (31, 128))[0]
    assert "recorded are 32 and 127" in triton_kernels.complaints("k", 90, fine, (32, 127))[0]
    bad = triton_kernels.Compiled(registers=255, stack=8, shared=1 << 16, ptx="")
    assert [c.split(" for ")[0] for c in triton_kernels.complaints("k", 80, bad, None)] == ["k", "k"]


def launched(function, *arguments):
    with triton_kernels.noted() as launches:
        function(*arguments)
    return [(launch.kernel.__name__, launch.grid) for launch in launches]


@needs_triton
def test_launches():
    """One for sixteen leaves that are not empty, and one to add up what is summed."""
    from mtml_fast.ops.gradient_combine import triton as combine
    from mtml_fast.ops.gradient_gram import triton as gram

    tasks = 20
    leaves = [torch.ones(tasks, *shape) for shape in ((700,), (0,), (), (3, 400), *[(2,)] * 30)]
    weights, q, square = torch.ones(tasks), [leaf[0].clone() for leaf in leaves], torch.ones(tasks, tasks).double()
    # 33 leaves; pieces of 64 columns for each of 20 tasks, to the next power of two
    pieces = (1 + 1 + 1 + 13, 16, 1)
    assert launched(gram.gradient_gram, leaves) == [*[("_gram", (n, 1, 1)) for n in pieces], ("_add_up", (100,))]
    # of 1,024 and of 256 columns
    assert launched(gram.gradient_gram_backward, [square], leaves, [True] * 34) == [
        ("_gram_backward", (n, 1)) for n in (1 + 1 + 2 + 13, 16, 1)
    ]
    tiles = (3 + 1 + 5 + 13, 16, 1)
    assert launched(combine.gradient_combine, leaves, weights) == [("_combine", (n,)) for n in tiles]
    assert launched(combine.gradient_combine_backward, q, leaves, weights, [True] * 35) == [
        *[("_spread", (n,)) for n in tiles],
        *[("_dots", (n, 3)) for n in pieces],
        ("_add_up", (5,)),
    ]
    # only what is needed
    needs = [i == 3 for i in range(34)]
    assert launched(gram.gradient_gram_backward, [square], leaves, needs) == [("_gram_backward", (2, 1))]
    assert launched(combine.gradient_combine_backward, q, leaves, weights, [*needs, False]) == [("_spread", (5,))]
    # nothing to read: the sums are zero all the same
    assert launched(gram.gradient_gram, leaves[1:2]) == [("_add_up", (100,))]
    assert launched(combine.gradient_combine, leaves[1:2], weights) == []
    none = [torch.ones(0, 3)]
    assert launched(gram.gradient_gram, none) == []
    assert launched(combine.gradient_combine_backward, q[:1], none, weights[:0], [False, True]) == []
    # 11 million columns are about a thousand pieces
    (_, (pieces, *_)), _ = launched(gram.gradient_gram, [torch.empty(10, 11_000_000, device="meta")])
    assert pieces == 672


def heads_call(rows, outputs, features, hidden=None):
    """The operator's arguments, with gradients for all; outputs: of each task, or one number for all."""
    tasks, total = len(rows), outputs * len(rows) if isinstance(outputs, int) else sum(outputs)
    offsets = lambda counts: torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])  # noqa: E731
    layer = (None, None) if hidden is None else (torch.ones(tasks, hidden, features), torch.ones(tasks, hidden))
    weight = torch.ones(total, features if hidden is None else hidden)
    ragged = None if isinstance(outputs, int) else offsets(outputs)
    return [torch.ones(sum(rows), features), offsets(rows), weight, torch.ones(total), ragged, *layer, "tanh"]


@needs_triton
def test_launches_of_heads():
    """One for each layer one way; two for the gradients of its parameters. No grid depends on what offsets hold."""
    from mtml_fast.ops.heads import triton as heads

    rows, slots = [100, 0, 30], 130 // 64 + 3
    plain, ragged, hidden = heads_call(rows, 20, 70), heads_call(rows, [1, 30, 9], 70), heads_call(rows, 20, 70, 33)
    z, zs = torch.ones(130 * 20), torch.ones(100 + 30 * 9)
    three, five = [True] * 3, [True] * 5
    # 20 outputs are one tile of 32, of ragged ones 14 in the mean one of 16; 70 columns are three
    assert launched(heads.heads, *plain) == [("_forward", (slots, 1))]
    assert launched(heads.heads, *ragged) == [("_starts", (1,)), ("_forward", (slots, 1))]
    parameters = [("_gradients", (3 * 3, 3, 1)), ("_add_parts", (3, 2))]
    assert launched(heads.heads_backward, [z], *plain, three) == [("_backward", (slots, 3)), *parameters]
    assert launched(heads.heads_backward, [z], *plain, [True, False, False]) == [("_backward", (slots, 3))]
    of_bias = [("_gradients", (9, 1, 1)), ("_add_parts", (3, 2))]
    assert launched(heads.heads_backward, [z], *plain, [False, False, True]) == of_bias
    assert launched(heads.heads_backward, [zs], *ragged, [False, True, False])[0] == ("_starts", (1,))
    layer = ("_forward", (slots, 2))
    assert launched(heads.heads, *hidden) == [layer, ("_forward", (slots, 1))]
    names = [name for name, _ in launched(heads.heads_backward, [z], *hidden, five)]
    assert names == ["_forward", "_backward", *("_gradients", "_add_parts", "_backward"), "_gradients", "_add_parts"]
    # in the second derivative pairs of products are one launch
    of_plain = launched(heads.heads_double_backward, plain[:1] + plain[2:4], [z], *plain, three, [True, *three])
    assert [name for name, _ in of_plain] == ["_backward", "_gradients", "_add_parts", "_forward"]
    of_hidden = hidden[:1] + hidden[2:4] + hidden[5:7]
    names = [name for name, _ in launched(heads.heads_double_backward, of_hidden, [z], *hidden, five, [True, *five])]
    assert len(names) == 2 + 2 + 2 + 1 + 2 + 1
    # many tasks with few rows do not keep sums of parts that they do not have
    many = heads_call([3] * 1000, 5, 8)
    with triton_kernels.noted() as launches:
        heads.heads_backward([torch.ones(3000 * 5)], *many, three)
    assert launches[1].arguments["weights"].shape == ((3000 // 64 + 1000) * 5, 8)
    for nothing in (heads_call([], 2, 4), heads_call([0, 0], 2, 4)):
        assert launched(heads.heads, *nothing) == []
    no_rows = launched(heads.heads_backward, [z[:0]], *nothing, three)
    assert no_rows == [("_add_parts", (2, 1))], "gradients are zero all the same"


def loss_call(call, losses, mask=None):
    x, *of_head, activation = call
    labels = torch.zeros(x.shape[0], dtype=torch.int64) if 0 in losses else None
    tasks = max(len(call[1]) - 1, 1)
    sizes = call[1].diff() * (call[4].diff() if call[4] is not None else call[2].shape[0] // tasks)
    targets = torch.zeros(int(sizes.sum())) if any(losses) else None
    return [x, labels, targets, *of_head, None, mask, activation, losses, 0.1, -100, 1.0]


@needs_triton
def test_launches_of_heads_loss():
    """Two forward and three backward, for any losses; those of a hidden layer besides."""
    from mtml_fast.ops._losses import triton as losses
    from mtml_fast.ops.heads_loss import triton as loss

    rows, slots = [100, 0, 30], 130 // 64 + 3
    d, three, five = torch.ones(3), [True] * 3, [True] * 5
    plain, ragged, hidden = heads_call(rows, 20, 70), heads_call(rows, [1, 30, 9], 70), heads_call(rows, 20, 70, 33)
    means, parts = ("_means", (3,)), ("_add_parts", (3, 2))
    both, backward = [("_losses", (slots,)), means], [("_counts", (slots,)), ("_backward", (9,)), parts]
    assert launched(loss.heads_loss, *loss_call(plain, [0])) == both
    assert launched(loss.heads_loss_backward, [d], *loss_call(plain, [0]), three) == backward
    assert launched(loss.heads_loss_backward, [d], *loss_call(plain, [1]), [True, False, False]) == backward[:2]
    # where packed targets of ragged outputs begin; labels are a row's
    assert launched(loss.heads_loss, *loss_call(ragged, [0])) == both
    assert launched(loss.heads_loss, *loss_call(ragged, [2])) == [("_starts", (1,)), *both]
    # which loss is whose
    mixed = [name for name, _ in launched(loss.heads_loss, *loss_call(plain, [0, 3, 1]))]
    assert mixed == ["_unpack", "_losses", "_means"]
    names = [name for name, _ in launched(loss.heads_loss_backward, [d], *loss_call(hidden, [0]), five)]
    assert names == ["_forward", "_counts", "_backward", "_gradients", "_add_parts", "_backward", "_add_parts"]
    assert launched(loss.heads_loss, *loss_call(heads_call([], 2, 4), [0])) == []
    assert launched(loss.heads_loss, *loss_call(heads_call([0, 0], 2, 4), [1])) == [("_means", (2,))]
    # two bits a task, for 480 tasks a launch
    with triton_kernels.noted() as launches:
        losses.kinds_of([3, 0, 2] * 200, torch.zeros(601, dtype=torch.int64))
    words = [launch.arguments["words"] for launch in launches]
    assert [launch.arguments["first"] for launch in launches] == [0, 480]
    kinds = [words[i // 480][i % 480 // 30] >> 2 * (i % 30) + 1 & 3 for i in range(600)]
    assert kinds == [3, 0, 2] * 200


@needs_triton
def test_factors_are_rounded_where_torch_is_asked_to():
    """Float32 products by default and whatever is asked of others; float64 always."""
    from mtml_fast.ops.heads import triton as heads

    def of(call):
        with triton_kernels.noted() as launches:
            heads.heads(*call)
        return {launch.arguments["PRECISION"] for launch in launches}

    call = heads_call([100, 0, 30], 20, 70, 33)
    double = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in call]
    assert of(call) == {"ieee"}
    for asked, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "bfloat16")):
        with products_in(asked):
            assert of(call) == {expected}
            assert of(double) == {"ieee"}
    # by torch's newer switch, which does not like to be asked by the older one
    newer = """
import torch
from mtml_fast.ops._ragged.triton import precision
torch.backends.cuda.matmul.fp32_precision = "tf32"
print(precision(torch.float32), precision(torch.float64))
"""
    done = subprocess.run([sys.executable, "-c", newer], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tf32", "ieee"]


@needs_triton
def test_the_grid_of_a_large_head():
    """CUDA takes 65535 programs along the second axis."""
    from mtml_fast.ops._ragged.triton import Sums
    from mtml_fast.ops._tiles.triton import Rows, equal_outputs

    rows, x = Rows(torch.tensor([0, 64], device="meta"), 1, 64), torch.empty(64, 4096, device="meta")
    with triton_kernels.noted() as launches:
        Sums(rows, equal_outputs(rows, 40_000), x, (True, True)).added()
    assert [launch.grid for launch in launches] == [(1, 65535)]


@needs_triton
def test_one_kernel_for_all_leaves():
    """Triton makes kernels of their own for small numbers, for 1 and for multiples of 16: no address is one of them."""
    launches = triton_kernels.all_launches().values()
    tables = [v for launch in launches for v in launch.arguments.values() if isinstance(v, tuple)]
    assert len(tables) > 0
    assert all(len(table) == 16 and all(a % 2 == 1 and a >= 2**31 for a in table) for table in tables)
    for launch in launches:
        special = {p.name for p in launch.kernel.params if not (p.do_not_specialize or p.is_constexpr)}
        assert not any(isinstance(launch.arguments[name], int) for name in special), launch.kernel.__name__


@needs_triton
def test_nothing_is_read_back():
    """No value comes to the host and none is copied to the device, which is what capturing a graph asks for."""
    from mtml_fast.ops.gradient_combine import triton as combine
    from mtml_fast.ops.gradient_gram import triton as gram
    from mtml_fast.ops.heads import triton as heads
    from mtml_fast.ops.heads_loss import triton as loss

    class Called(TorchDispatchMode):
        names: set = set()  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    leaves, weights = [torch.ones(3, 5), torch.ones(3)], torch.ones(3)
    with Called() as called, triton_kernels.noted():
        gram.gradient_gram(leaves)
        gram.gradient_gram_backward([torch.ones(3, 3)], leaves, [True, True])
        combine.gradient_combine(leaves, weights)
        combine.gradient_combine_backward([torch.ones(5), torch.ones(())], leaves, weights, [True, True, True])
    # `ones` are this test's own, `add` and the transpose are the cotangent's and its mirror image's
    assert called.names <= {"new_empty", "empty", "empty_like", "ones", "transpose", "add"}

    ragged, equal = heads_call([3, 2], [1, 4], 5), heads_call([3, 2], 2, 5)
    labels, targets = loss_call(ragged, [0]), loss_call(ragged, [0, 3], ragged[0][:, 0] == 1)
    q, d, needs = torch.ones(10), torch.ones(2), [True] * 3
    called.names.clear()
    with called, triton_kernels.noted():
        heads.heads(*equal)
        heads.heads_backward([q], *equal, needs)
        heads.heads_backward([q[:11]], *ragged, needs)
        heads.heads_double_backward(equal[:1] + equal[2:4], [q], *equal, needs, [True, *needs])
        for call in (labels, targets):
            loss.heads_loss(*call)
            loss.heads_loss_backward([d], *call, needs)
    # views, and zeros: a bias has no second derivative
    views, written = {"view", "unbind", "slice", "detach"}, {"new_empty", "empty", "empty_like", "new_zeros", "zero_"}
    assert called.names <= views | written, called.names


class Registered:
    """Takes the place of the operator library."""

    def __init__(self):
        self.calls = []

    def impl(self, target, function, key):
        self.calls.append((target, key))


def test_registered_where_they_can_run(monkeypatch):
    name = "gradient_gram"
    monkeypatch.setattr(_triton, "has_kernel", lambda *_: False)
    cases = [
        (None, True, "torch is built without CUDA"),
        ("13.0", False, "Triton is not installed"),
        ("13.0", True, None),
    ]
    for cuda, installed, reason in cases:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, installed=installed: installed or None)
        library = Registered()
        assert _triton.missing() == reason
        assert _triton.register(name, library) == (reason is None)
        assert library.calls == ([(name, "CUDA"), (f"{name}_backward", "CUDA")] if reason is None else [])
        library = Registered()
        _triton.register("heads", library)
        assert [target for target, _ in library.calls][2:] == (["heads_double_backward"] if reason is None else [])
    assert not _triton.register("an_operator_without_them", library)
    monkeypatch.setattr(_triton, "has_kernel", lambda *_: True)
    assert not _triton.register(name, library), "C++ comes first"


def test_one_warning_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    # a torch without CUDA has no devices to be slow on
    monkeypatch.setattr(torch.version, "cuda", None)
    _triton.warn_of_missing("gradient_gram")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(OPERATORS["gradient_gram"]._known, "cuda", None)
    del OPERATORS["gradient_gram"]._known["cuda"]
    with pytest.warns(RuntimeWarning, match="gradient_gram runs on its PyTorch reference.*Triton is not installed"):
        assert OPERATORS["gradient_gram"].served_by("cuda") == "reference"
    assert OPERATORS["gradient_gram"].served_by("cuda") == "reference"


CUDA_TORCH = """
import sys, torch
torch.version.cuda = "13.0"
from mtml_fast import env
for s in env.services():
    if s.device == "cuda":
        print(s.operator, s.served_by)
print(sorted(m for m in sys.modules if "triton" in m and m.startswith("mtml_fast")))
"""


@needs_triton
def test_import_loads_no_kernels():
    """Even where they serve: a torch that says it has CUDA stands for one that has."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CUDA_TORCH], env=environment, capture_output=True, text=True, cwd=ROOT)
    *served, modules = done.stdout.splitlines()
    assert modules == "['mtml_fast.ops._triton']", done.stderr
    served = dict(line.split() for line in served)
    assert {name for name, by in served.items() if by == "triton"} == {
        "gradient_gram",
        "gradient_combine",
        "heads",
        "heads_loss",
    }
    assert served["sgd_step"] == "reference"
