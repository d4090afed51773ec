"""Timings on a GPU: python -m benchmarks.gpu.bench [--device cuda] [--out FOLDER] [--limit SECONDS]

The workloads and peers of benchmarks/registry.py, on the device, and whoever can be captured in a CUDA graph as a
provider of its own. Milliseconds between two events of the device around ten calls, medians of many, the providers
taking turns. What is wrong against float64 is not timed. Rows go to <device>.csv, as those of benchmarks.run.

With --device cpu the same workloads run in small, to try the program; nothing is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.peers import Build, Settings, Unavailable
from benchmarks.peers.jax_jit import JaxProvider
from benchmarks.registry import Workload, drawings, heads_of, inner_of, sinusoid, surgery_of
from benchmarks.run import RESULTS, append, time_workload, versions
from mtml_fast.cli import meta_step
from mtml_fast.cli.meta_step import MetaStep
from mtml_fast.cli.timing import Provider

# calls between two events: one alone would be timed with its launch
GROUP = 10
# those that loop over tasks in Python, and their libraries, are slower by two orders of magnitude here
LEFT_OUT = ("higher", "TorchOpt", "learn2learn", "TorchJD")
COMPILED = "torch.func compiled"
# seconds that a workload takes without compiling, about; JAX alone takes most of it to start
EACH = 9


class Timed(Provider):
    """A provider whose calls are timed by the device's clock."""

    def __init__(self, provider: Provider):
        super().__init__(provider.call, provider.version, provider.compile_s)
        self._provider = provider

    def results(self):
        return self._provider.results()

    def turn(self, seconds: float, threads: int) -> list[float]:
        times = []
        while GROUP * sum(times) < 1e3 * seconds or not times:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(GROUP):
                self.call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / GROUP)
        return times

    def close(self) -> None:
        self._provider.close()


def timed(provider: Provider) -> Provider:
    # it has a process, and there a clock, of its own
    return provider if isinstance(provider, JaxProvider) else Timed(provider)


def as_graph(build: Build) -> Build:
    """The same calls, captured in a CUDA graph after some to warm up; a call is a replay."""

    def captured(settings: Settings) -> Provider:
        if settings.device == "cpu":
            raise Unavailable("needs a CUDA device")
        provider = build(settings)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    provider.call()
                # before the capture: one that fails leaves torch's allocator in the middle of it
                torch.cuda.set_sync_debug_mode("error")
                provider.call()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(stream)
            # the stream by itself too: a capture that fails does not give the one before back
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                # without what autograd knows: it would tie the parameters, which all share, to this stream
                results = [result.detach() for result in provider.call()]
        except RuntimeError as error:
            raise Unavailable(f"cannot be captured: {' '.join(str(error).split())[:120]}", recorded=True) from None
        finally:
            torch.cuda.set_sync_debug_mode("default")

        def call():
            graph.replay()
            return results

        return Provider(call, provider.version, provider.compile_s)

    return captured


def tried(build: Build) -> Build:
    """A peer that cannot compute this on a device is left out with its own words."""

    def made(settings: Settings) -> Provider:
        provider = build(settings)
        try:
            provider.results()
        except Exception as error:
            # of whatever kind: the workload's other providers have done nothing wrong
            provider.close()
            raise Unavailable(f"cannot: {' '.join(str(error).split())[:120]}", recorded=True) from None
        return provider

    return made


def workloads(device: str, small: bool) -> list[Callable[[], Workload]]:
    """The workloads, the most telling first; each is made when it is its turn."""
    made: list[Callable[[], Workload]] = []
    for steps in (5, 1):
        made.append(partial(inner, f"sinusoid 1-40-40-1 T=25 N=Q=10 K={steps}", partial(sinusoid, steps), device))
    for query, steps in ((75, 5), (75, 1), (5, 5), (5, 1)):
        widths, tasks = ([20, 16, 5], 3) if small else ([784, 256, 128, 64, 64, 5], 32)
        case = f"omniglot {'-'.join(map(str, widths))} T={tasks} N=5 Q={query} K={steps}"
        made.append(partial(inner, case, partial(_classes, widths, tasks, query, steps), device))
    wide, tasks = ([20, 24, 24, 5], 3) if small else ([784, 1024, 1024, 10], 32)
    step = partial(MetaStep.random, wide, tasks, 5, 15, lr=0.01, steps=5)
    made.append(partial(inner, f"wide {'-'.join(map(str, wide))} T={tasks} N=5 Q=15 K=5", step, device))
    features = 16 if small else 512
    head = partial(MetaStep.random, [features, 5], 32, 25, 75, lr=0.01, steps=5)
    made.append(partial(inner, f"head {features}-5 T=32 N=25 Q=75 K=5", head, device))
    rows, width = (256, 32) if small else (16384, 512)
    made.append(partial(heads, (64, None, 5, False, rows, width, device), ("bmm",)))
    for sizes in ((6, 8, 4), (5, 4)) if small else ((2048, 2048, 2048, 1280), (600, 640, 640, 320)):
        made.append(partial(surgery, sizes, device))
    for tasks in (10, 100, 1000):
        rows = 512 if small else 4096
        # a loop: a thousand times three kernels and more, forth and back
        without = () if tasks < 1000 else ("loop",)
        made.append(partial(heads, (tasks, 32, 5, False, rows, 64, device), ("bmm", "grouped_mm"), without))
    return made


def inner(case: str, step: Callable[[], MetaStep], device: str) -> Workload:
    return with_graphs(inner_of(case, step().to(device)), ("torch.func", "bmm"))


def heads(arguments: tuple, graphs: tuple[str, ...], without: tuple[str, ...] = ()) -> Workload:
    return with_graphs(heads_of(*arguments), graphs, without)


def surgery(sizes: tuple[int, ...], device: str) -> Workload:
    # the weights are found on the host: no graphs
    workload = surgery_of(10, sizes, "PCGrad", device)
    return replace(workload, peers={n: build for n, build in workload.peers.items() if n not in LEFT_OUT})


def with_graphs(workload: Workload, peers: tuple[str, ...], without: tuple[str, ...] = ()) -> Workload:
    """Ours and these peers as graphs besides; without those who cannot keep up."""
    ours = workload.ours | {f"{name} graph": as_graph(build) for name, build in workload.ours.items()}
    kept = {name: tried(build) for name, build in workload.peers.items() if name not in (*LEFT_OUT, *without)}
    return replace(workload, ours=ours, peers=kept | {f"{name} graph": as_graph(kept[name]) for name in peers})


def _classes(widths: list[int], tasks: int, query: int, steps: int) -> MetaStep:
    if widths[0] != 784:
        return MetaStep.random(widths, tasks, 5, query, lr=0.4, steps=steps)
    return MetaStep(meta_step.model(widths), drawings(tasks, 5, query), 0.4, steps, "cross_entropy")


def peak(device: str) -> float:
    """Operations a second of float32 in torch's product of square matrices, tf32 off."""
    best, provider = 0.0, Timed if device != "cpu" else (lambda p: p)
    for size in (2048, 4096, 8192) if device != "cpu" else (128,):
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        product = provider(Provider(lambda a=a, b=b: torch.mm(a, b)))
        product.turn(0.0, 2)
        times = product.turn(0.05, 2)
        best = max(best, 2 * size**3 / (1e-3 * min(times)))
    return best


def facts(device: str) -> dict:
    name, isa, clock = "cpu", "", "wall"
    if device != "cpu":
        major, minor = torch.cuda.get_device_capability()
        name, isa, clock = torch.cuda.get_device_name(), f"sm_{major}{minor}", "CUDA events"
    # no threads: the tables of the processor's rows are those of one thread
    return dict(device=name, threads="", clock=clock, isa=isa, **versions(), peak_gflops=round(peak(device) / 1e9, 1))


def main() -> None:
    options = _options()
    device, small = options.device, options.device == "cpu"
    deadline = time.monotonic() + options.limit
    about = facts(device)
    path = Path(options.out or RESULTS) / f"{about['device'].replace(' ', '-').replace('/', '-')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    jax = sys.executable if importlib.util.find_spec("jax") else None
    settings = Settings(threads=2, jax=jax, device=device, timed=(lambda p: p) if small else timed)
    print(f"{about['device']} {about['isa']}, {about['clock']}, torch {about['torch']}, {about['peak_gflops']} GFLOP/s")
    print("left out: convolutions (no kernels of ours yet: mf.MAML and torch.func do the same there)")
    wrong, chosen = 0, workloads(device, small)
    for i, make in enumerate(chosen):
        left = deadline - time.monotonic()
        if left < 10:
            print(f"left out: {len(chosen) - i} workloads from here on, for want of time")
            break
        workload = make()
        if options.only not in workload.case:
            continue
        peers = list(workload.peers)
        # compiling may take longer than all else together, which comes first
        limit = min(40.0, (left - EACH * (len(chosen) - i)) / 2)
        if COMPILED in peers and (small or limit < 10):
            print(f"left out: {COMPILED}, for want of time")
            peers.remove(COMPILED)
        try:
            rows = time_workload(
                workload, replace(settings, compile_limit=limit), peers, 0.02 if small else options.seconds, about
            )
        except SystemExit as error:
            # ours is wrong: nothing is timed, and all the other workloads are
            print(f"FAILED  {error}")
            wrong += 1
            continue
        except Exception as error:
            print(f"FAILED  {workload.case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            wrong += 1
            continue
        if not small:
            append(path, rows)
        if device != "cpu":
            torch.cuda.empty_cache()
    if not small:
        print(f"rows are in {path}")
    sys.exit(wrong > 0)


def _options():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description="Time everybody on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="folder of the rows, else benchmarks/results")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all of it")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="workloads with this in their name")
    parser.add_argument("--seconds", type=float, default=0.2, help="at least so long for each provider")
    return parser.parse_args()


if __name__ == "__main__":
    main()
