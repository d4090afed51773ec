"""What must hold on a GPU and can be seen nowhere else: python -m benchmarks.gpu.checks PART [--device cuda]

operators  right values; on another stream than the default one; on another device than the current one; captured in a
           CUDA graph, forward and backward; how many kernels a call starts
trainers   loss curves as on the CPU, within float32's rounding; a meta-step in a CUDA graph

Each check prints a line; a check that needs what is not there says so. The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import mtml_fast as mf
from benchmarks.gpu.calls import Call, Exact, calls
from mtml_fast.cli.timing import allowed_error, largest_error

# cycles that a stream is kept busy, so that who does not wait for it reads old values: about 20 ms
_BUSY = 40_000_000


class Checks:
    """Lines of what was found, and whether anything failed."""

    def __init__(self):
        self.failed = 0

    def result(self, name: str, fault: str, note: str = "") -> None:
        self.failed += bool(fault)
        print(
            f"{'FAILED' if fault else 'ok':8}{name}{f': {fault}' if fault else ''}{f' ({note})' if note else ''}",
            flush=True,
        )

    def left_out(self, name: str, why: str) -> None:
        print(f"{'left out':8} {name}: {why}", flush=True)

    def run(self, name: str, check: Callable[[], str]) -> None:
        """A check that returns its fault; one that raises has failed."""
        try:
            fault = check()
        except Exception as error:
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.result(name, fault)


# operators


def operators(checks: Checks, device: str) -> None:
    exact, others = Exact(0), Exact(1)
    for call in calls(device):
        checks.run(f"values of {call.name}, {call.served_by}", lambda call=call: exact.fault(call, call()))
    if device == "cpu":
        for name in ("streams", "devices", "captures", "launches"):
            checks.left_out(name, "needs a CUDA device")
        return
    for call, other in _pairs(device):
        checks.run(f"on another stream: {call.name}", lambda call=call, other=other: _on_a_stream(call, other, others))
    if torch.cuda.device_count() > 1:
        last = f"cuda:{torch.cuda.device_count() - 1}"
        for call in calls(last):
            checks.run(f"on {last}, while cuda:0 is current: {call.name}", lambda call=call: exact.fault(call, call()))
    else:
        checks.left_out("another device than the current one", "there is one")
    for call, other in _pairs(device):
        name = f"captured in a graph: {call.name}"
        if call.served_by == "reference" and call.operator in ("heads", "heads_loss"):
            checks.left_out(name, "the reference serves it, which reads the rows' offsets on the host")
        else:
            checks.run(name, lambda call=call, other=other: _captured(call, other, others))
    counted = {f"{call.name}, {call.served_by}": call for call in calls(device)}
    counted |= {f"a meta-step of mf.MAML on sinusoids, K={steps}": _meta_step(steps, device) for steps in (1, 5)}
    for name, call in counted.items():
        try:
            print(f"{'launches':8} {name}: {launches(call)}", flush=True)
        except RuntimeError as error:
            checks.left_out(f"launches of {name}", f"the profiler says {str(error).splitlines()[0]}")


def launches(call: Callable) -> int:
    """Kernels, copies and fills that a call starts on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _pairs(device: str) -> Iterator[tuple[Call, Call]]:
    return zip(calls(device, 0), calls(device, 1), strict=True)


def _on_a_stream(call: Call, other: Call, exact: Exact) -> str:
    call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_BUSY)
        call.take(other)
        results = call()
    stream.synchronize()
    return exact.fault(call, results)


def _captured(call: Call, other: Call, exact: Exact) -> str:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    # the stream by itself too: a capture that fails does not give the one before back
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        results = call()
    call.take(other)
    for _ in range(2):
        # what a replay does not write stays NaN
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    return exact.fault(call, results)


# trainers


def trainers(checks: Checks, device: str) -> None:
    graphs = (False, True) if device != "cpu" else (False,)
    if device == "cpu":
        checks.left_out("a meta-step in a CUDA graph", "needs a CUDA device")
    for name, curve in _RUNS.items():
        exact, eager = curve("cpu", torch.float64, False), curve("cpu", torch.float32, False)
        allowed = allowed_error(largest_error([eager], [exact]))
        curves = {}
        for graph in graphs:
            what = f"{name}, {len(exact)} steps on {device}{', as a CUDA graph' if graph else ''}"

            def check(graph=graph, exact=exact, allowed=allowed, curve=curve, curves=curves) -> str:
                curves[graph] = curve(device, torch.float32, graph)
                error = largest_error([curves[graph]], [exact])
                return "" if error <= allowed else f"its loss curve is off by {error:.1e} (allowed {allowed:.1e})"

            checks.run(what, check)
        if len(curves) == 2:
            same = torch.equal(curves[False], curves[True])
            print(f"{'':8} {name}: with a graph and without {'the same bits' if same else 'other bits'}", flush=True)
    checks.run(f"MetaLearnerTrainer on {device}", lambda: _meta_learner_fault(device))


def _sinusoid(device: str, dtype: torch.dtype, graph: bool, on_device: bool = True) -> Tensor:
    torch.manual_seed(0)
    maml = mf.MAML(mf.nn.mlp(1, (40, 40), 1), lr=0.01, steps=1).to(device, dtype)
    tasks = mf.data.Sinusoid(dtype=dtype, device=device if on_device else None)
    return _losses(maml, tasks, graph)


def _classes(device: str, dtype: torch.dtype, graph: bool) -> Tensor:
    torch.manual_seed(0)
    pool, names = torch.randn(200, 30), torch.arange(200) % 20
    maml = mf.MAML(mf.nn.mlp(30, (64, 32), 5), lr=0.1, steps=3).to(device, dtype)
    tasks = mf.data.TensorClasses(pool, names, ways=5, shots=1, query_shots=3, dtype=dtype, device=device)
    return _losses(maml, tasks, graph, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.98), clip_grad=5)


def _functional(device: str, dtype: torch.dtype, graph: bool) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.BatchNorm1d(20), nn.Softplus(), nn.Linear(20, 1))
    maml = mf.MAML(model, lr=0.01, plan="functional").to(device, dtype)
    return _losses(maml, mf.data.Sinusoid(dtype=dtype, device=device), graph)


_RUNS = {
    "mf.MAML on sinusoids": _sinusoid,
    "mf.MAML on sinusoids that come from the host": lambda *args: _sinusoid(*args, on_device=False),
    "mf.MAML on classes, rates falling": _classes,
    "mf.MAML of any module": _functional,
}


def _losses(algorithm: nn.Module, tasks, graph: bool, **options) -> Tensor:
    """The losses of 40 meta-steps."""
    trainer = mf.Trainer(algorithm, tasks, meta_batch=25, log_every=1, progress=False, cuda_graph=graph, **options)
    return torch.tensor([row["train_loss"] for row in trainer.fit(40).history], dtype=torch.float64)


def _meta_learner_fault(device: str) -> str:
    torch.manual_seed(0)
    x, y = torch.randn(3, 24, 7), torch.randint(0, 4, (3, 24))
    first = mf.MetaLearner(3, 16, 4, trunk=nn.Sequential(nn.Linear(7, 16), nn.Tanh()))
    curves = []
    for where, dtype in (("cpu", torch.float64), ("cpu", torch.float32), (device, torch.float32)):
        # how rows are split in two is drawn on the host
        torch.manual_seed(1)
        learner = copy.deepcopy(first).to(where, dtype)
        trainer = mf.MetaLearnerTrainer(learner, 3)
        inputs, targets = x.to(where, dtype), y.to(where)
        trainer.pretrain(inputs, range(3), targets, epochs=20)
        trainer.meta_train(inputs, range(3), targets, epochs=20, steps=2)
        curves.append(torch.tensor(trainer.history["pretrain"] + trainer.history["meta_train"], dtype=torch.float64))
    exact, eager, mine = curves
    error, allowed = largest_error([mine], [exact]), allowed_error(largest_error([eager], [exact]))
    return "" if error <= allowed else f"its loss curve is off by {error:.1e} (allowed {allowed:.1e})"


def _meta_step(steps: int, device: str) -> Callable:
    torch.manual_seed(0)
    maml = mf.MAML(mf.nn.mlp(1, (40, 40), 1), lr=0.01, steps=steps).to(device)
    batch = mf.data.Sinusoid(device=device).sample(25)
    return lambda: maml(batch).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.checks")
    parser.add_argument("part", choices=("operators", "trainers"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    checks = Checks()
    {"operators": operators, "trainers": trainers}[options.part](checks, options.device)
    sys.exit(checks.failed > 0)


if __name__ == "__main__":
    main()
