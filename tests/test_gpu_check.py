"""`make gpu-check` without a GPU: its parts run on the CPU, and what only CUDA has with a stand-in for its calls."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bench, checks, precision
from benchmarks.gpu.calls import Exact, calls
from benchmarks.peers import Settings, Unavailable
from benchmarks.run import COLUMNS
from mtml_fast.cli.timing import Provider
from mtml_fast.ops import OPERATORS
from tests.trainers.test_cuda_graph import Recorder

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks/gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
# dataclasses look for their module there
sys.modules["gpu_check"] = gpu_check
SPEC.loader.exec_module(gpu_check)


def command(*arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_parts_run_on_the_cpu(tmp_path):
    only = "build,env,operators,sanitizer,battery"
    done = command("benchmarks/gpu_check.py", "--device", "cpu", "--only", only, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "cpu.log").read_text()
    assert log == done.stdout
    for part in ("env", "operators", "battery"):
        assert f"== {part} passed in" in log
    assert log.count("left out: it lacks a GPU") == 2
    assert "passed" in log.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line(tmp_path):
    done = command("benchmarks/gpu_check.py", OUT=str(tmp_path))
    assert (done.returncode, done.stdout, [*tmp_path.iterdir()]) == (1, "", [])
    assert done.stderr.startswith("gpu-check: there is no GPU that torch")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def log(tmp_path):
    return gpu_check.Log(tmp_path / "log")


def test_a_part_that_runs_over_is_cut(log, capsys):
    code = "import subprocess, time; print('began', flush=True); subprocess.run(['sleep', '60']); time.sleep(60)"
    part = gpu_check.Part(
        "slow", 5, {"": [sys.executable, "-c", code], "quick": [sys.executable, "-c", "print('done')"]}
    )
    assert gpu_check.run(part, 100, log) == "cut"
    said = capsys.readouterr().out
    assert "began\ncut: after 5 s" in said
    assert "-- quick\ndone" in said
    assert gpu_check.run(part, 3, log) == "cut"
    assert "no time is left" in capsys.readouterr().out


def test_a_part_that_fails(log, capsys):
    part = gpu_check.Part("bad", 30, {"": [sys.executable, "-c", "raise SystemExit(3)"]})
    assert gpu_check.run(part, 100, log) == "failed"
    assert "exit code 3" in capsys.readouterr().out
    lacking = gpu_check.Part("lacking", 30, missing="pytest: less is checked")
    assert gpu_check.run(lacking, 100, log) == "could not run"
    assert "could not run: it lacks pytest: less is checked" in capsys.readouterr().out


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_a_build_without_kernels_shows(log, capsys):
    part = gpu_check.parts("cuda", {"capability": "9.0", "torch": "2.11.0"}, Path("out"))[1]
    part.commands.pop("")
    assert gpu_check.run(part, 100, log) == "failed"
    assert f"no CUDA library: torch {torch.__version__} is built without CUDA" in capsys.readouterr().out


def test_what_is_lacking_is_named(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("pytest", "ninja") else there(name))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: None)
    about = {"device": "a GPU", "capability": "9.0", "torch": "2.11.0"}
    parts = {part.name: part for part in gpu_check.parts("cuda", about, Path("out"))}
    assert parts["build"].missing.startswith("ninja; what was built before serves")
    assert parts["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0+PTX"
    assert parts["battery"].missing.startswith("pytest")
    assert parts["sanitizer"].missing.startswith("compute-sanitizer")
    assert all(part.needed for part in parts.values())
    # what torch itself cannot do is left out by name
    assert parts["battery"].note.endswith("in torch 2.11.0")
    later = gpu_check.parts("cuda", about | {"torch": "2.13.0+cu130"}, Path("out"))[-1]
    assert (later.name, later.note) == ("battery", "")


FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void {kernel}<float>(float const*)+0x4a0
=========     by thread (0,0,0) in block (3,0,0)
========= ERROR SUMMARY: 1 error"""


def test_what_the_sanitizer_found():
    fault = gpu_check.sanitizer_fault
    assert fault("right\n========= ERROR SUMMARY: 0 errors", 0) == ""
    assert fault("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0) == ""
    assert fault(FOUND.format(kernel="at::native::vectorized_elementwise_kernel"), 0) == ""
    for kernel in ("mtml::cuda::mlp", "_gram"):
        assert fault(FOUND.format(kernel=kernel), 0).startswith("ERROR SUMMARY: 1 error: at void")
    # a word that is a function's name too
    assert fault("========= Host Frame: at::product number\n========= ERROR SUMMARY: 0 errors", 0) == ""
    assert fault("Segmentation fault", 139) == "it did not finish (exit code 139)"
    assert fault("off by 1.0\n========= ERROR SUMMARY: 0 errors", 1) == "exit code 1"


# calls, checks


def test_every_operator_is_called():
    made = calls("cpu")
    assert {call.operator for call in made} == set(OPERATORS)
    assert len({call.name for call in made}) == len(made)
    for call in made:
        assert any(t.requires_grad for t in call.tensors), call.name


def test_a_wrong_call_shows():
    exact = Exact(0)
    for call, other in zip(calls("cpu"), calls("cpu", 1), strict=True):
        assert exact.fault(call, call()) == ""
        # of other values, and one that is missing
        assert exact.fault(call, other()).startswith("off by")
        results = call()
        results[-1].fill_(torch.nan)
        assert exact.fault(call, results).startswith("off by inf")


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's streams, events and graphs: a stream does all at once, a graph what the recorder of the trainers' tests
    does, an event shows a clock that each `record` moves by 5 ms."""
    clock = [0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            clock[0] += 5
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def replay(self):
            self.recorder.again()

    @contextlib.contextmanager
    def graph(captured, stream):
        captured.recorder = Recorder()
        with captured.recorder:
            yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    fakes = dict(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=contextlib.nullcontext,
        synchronize=lambda: None,
        CUDAGraph=Graph,
        graph=graph,
        Event=Event,
        _sleep=lambda cycles: None,
        set_sync_debug_mode=lambda mode: None,
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_streams_and_captures(cuda, monkeypatch):
    # as on a device: who looks at values would stop the stream
    monkeypatch.setattr("mtml_fast.ops._check.readable", lambda value: False)
    monkeypatch.setattr("mtml_fast.ops._route._backend", "operator")
    exact = Exact(1)
    for call, other in checks._pairs("cpu"):
        assert checks._on_a_stream(call, other, exact) == ""
    for call, other in checks._pairs("cpu"):
        assert checks._captured(call, other, exact) == "", call.name


def test_a_capture_that_repeats_old_values_shows(cuda, monkeypatch):
    monkeypatch.setattr("mtml_fast.ops._check.readable", lambda value: False)
    monkeypatch.setattr("mtml_fast.ops._route._backend", "operator")
    monkeypatch.setattr(Recorder, "again", lambda self: None)
    exact = Exact(1)
    for call, other in checks._pairs("cpu"):
        assert checks._captured(call, other, exact).startswith("off by"), call.name


def test_failed_checks_are_counted(capsys):
    found = checks.Checks()
    found.run("good", lambda: "")
    found.run("bad", lambda: "off by 1")

    def raises():
        raise RuntimeError("CUDA error:\nno such thing")

    found.run("worse", raises)
    assert found.failed == 2
    assert capsys.readouterr().out.splitlines() == [
        "ok      good",
        "FAILED  bad: off by 1",
        "FAILED  worse: RuntimeError: CUDA error: no such thing",
    ]


# timings


def test_workloads_are_what_their_names_say():
    for small in (True, False):
        made = bench.workloads("cpu", small)
        assert len(made) == 14
        for make in made if small else made[:2]:
            workload = make()
            assert workload.suite == "surgery" or "mtml_fast graph" in workload.ours
            assert not {*bench.LEFT_OUT} & {*workload.peers}
    # those of the bar, in full size: tasks and rows, without computing them
    cases = {make.args[0]: make.args[1]() for make in bench.workloads("cpu", False) if isinstance(make.args[0], str)}
    for case, step in cases.items():
        parts = dict(part.split("=")[-2:] for part in case.replace("N=Q=10", "N=10").split() if "=" in part)
        assert step.batch.num_tasks == int(parts["T"])
        assert step.batch.support.x.shape[1] == int(parts["N"])
        assert step.steps == int(parts["K"])
        assert step.batch.query.x.shape[1] == int(parts.get("Q", 10))
        widths = [str(step.params[0].shape[1]), *(str(p.shape[0]) for p in step.params if p.dim() == 2)]
        assert case.split()[1] == "-".join(widths)
    assert "omniglot 784-256-128-64-64-5 T=32 N=5 Q=75 K=5" in cases
    assert "head 512-5 T=32 N=25 Q=75 K=5" in cases


def test_bench_on_the_cpu(tmp_path):
    done = command("-m", "benchmarks.gpu.bench", "--device", "cpu", "--only", "head", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for provider in ("mtml_fast", "mlp_adapt", "torch.func", "bmm"):
        assert f"\n  {provider} " in done.stdout
    assert "mtml_fast graph      needs a CUDA device" in done.stdout
    assert [*tmp_path.iterdir()] == []


def test_times_are_the_devices(cuda):
    calls = []
    provider = bench.Timed(Provider(lambda: calls.append(1) or [torch.ones(2)], "7"))
    # 5 ms a group of ten
    assert provider.turn(0.02, 1) == [0.5] * 4
    assert len(calls) == 40
    assert provider.turn(0.0, 1) == [0.5]
    assert provider.results()[0].sum() == 2
    assert provider.version == "7"


def test_a_provider_as_a_graph(cuda):
    x = torch.ones(3)
    captured = bench.as_graph(lambda settings: Provider(lambda: [x * 2], "7"))
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        captured(Settings())
    provider = captured(Settings(device="cuda"))
    x.fill_(5)
    assert provider.results()[0].tolist() == [10, 10, 10]
    assert provider.version == "7"

    def reads(settings):
        return Provider(lambda: [x * x.sum().item()])

    with pytest.raises(Unavailable, match="cannot be captured") as error:
        bench.as_graph(reads)(Settings(device="cuda"))
    assert error.value.recorded


def test_a_peer_that_cannot_is_left_out():
    def cannot():
        raise NotImplementedError("float32\nis refused")

    with pytest.raises(Unavailable, match=r"^cannot: float32 is refused$"):
        bench.tried(lambda settings: Provider(cannot))(Settings())


def test_factors_are_rounded_as_a_gpu_rounds_them():
    x = torch.randn(300, 7).exp() * torch.randn(300, 7)
    with precision.Rounded(7) as to_bfloat16:
        assert torch.equal(to_bfloat16.round(x), x.bfloat16().float())
        mine = x @ x.T
    torch.testing.assert_close(mine, x.bfloat16().float() @ x.bfloat16().float().T)
    tf32 = precision.Rounded(10).round(x)
    assert ((tf32 - x).abs() <= x.abs() * 2**-11).all()
    assert not (tf32.view(torch.int32) & (1 << 13) - 1).any()
    assert not torch.equal(tf32, x)


def test_errors_of_rounded_factors():
    """Each digit that factors lose shows; float64 is the measure."""
    table = precision.table("cpu")
    assert len(table) == 11
    for name, key, exact, tf32, bfloat16 in table:
        assert exact < 2e-6, (name, key)
        assert 100 * exact < tf32 < bfloat16 < 0.1, (name, key)


def test_rows_have_the_columns_of_the_others():
    about = bench.facts("cpu")
    assert {*about} <= {*COLUMNS}
    assert about["threads"] == ""
