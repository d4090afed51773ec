"""Time the workloads: python -m benchmarks.run [--threads 1] [--seconds 0.5] [--save]

Providers of a workload run interleaved in one process, after a correctness gate: a speed is never reported for a wrong
result. On one thread the clock is thread CPU time, else wall time. The table shows medians and every factor, losses
too.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import subprocess
import time
from pathlib import Path

# before torch starts its threads: waiting ones must not burn the other core
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import mtml_fast
from benchmarks.registry import Workload, workloads
from mtml_fast.ops._library import build_info

COLUMNS = ("op", "provider", "mode", "case", "unit", "q20", "q50", "q80", "n", "device", "threads", "clock")
COLUMNS += ("served_by", "isa", "torch", "version", "commit", "timestamp")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operators against eager PyTorch.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="at least so long for each provider")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/<device>.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if load > 1:
        print(f"warning: the machine is busy (load average {load:.1f}); ratios are safer than times")
    clock = "thread CPU" if options.threads == 1 else "wall"
    print(f"{_device()}, {options.threads} thread(s), {clock} time, torch {torch.__version__}")
    print(f"{'op':10} {'mode':8} {'case':50} {'ours ms':>9} {'peer ms':>9} {'factor':>7}  peer, served by")
    rows = []
    for workload in workloads():
        gate(workload)
        times = measure(workload, options.seconds, options.threads)
        ours = times.pop("mtml_fast")
        rows.append(_row(workload, "mtml_fast", ours, options.threads, clock))
        for name, theirs in times.items():
            rows.append(_row(workload, name, theirs, options.threads, clock))
            a, b = _quantile(ours, 0.5), _quantile(theirs, 0.5)
            print(
                f"{workload.op:10} {workload.mode:8} {workload.case:50} {a:9.3f} {b:9.3f} {b / a:6.2f}x  "
                f"{name}, {workload.served_by}"
            )
    if options.save:
        path = Path(__file__).parent / "results" / f"{_device().replace(' ', '-').replace('/', '-')}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        print(f"{len(rows)} rows appended to {path}")


def gate(workload: Workload) -> None:
    """All providers agree, or nothing is timed."""
    results = {name: call() for name, call in workload.providers.items()}
    ours = results.pop("mtml_fast")
    for name, theirs in results.items():
        for a, b in zip(ours, theirs, strict=True):
            scale = b.abs().max().clamp(min=1e-12)
            error = float((a - b).abs().max() / scale)
            if not error < 1e-4:
                raise SystemExit(
                    f"{workload.op}, {workload.case}: differs from {name} by {error:.1e}; nothing is timed"
                )


def measure(workload: Workload, seconds: float, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the providers taking turns."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    for call in workload.providers.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in workload.providers}
    while min(map(sum, times.values())) < 1e3 * seconds or min(map(len, times.values())) < 5:
        for name, call in workload.providers.items():
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
    return times


def _row(workload, provider, times, threads, clock):
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return dict(
        op=workload.op,
        provider=provider,
        mode=workload.mode,
        case=workload.case,
        unit="ms",
        **{f"q{round(100 * q)}": f"{_quantile(times, q):.4g}" for q in (0.2, 0.5, 0.8)},
        n=len(times),
        device=_device(),
        threads=threads,
        clock=clock,
        served_by=workload.served_by if provider == "mtml_fast" else "",
        isa=(build_info() or {}).get("isa", "") if provider == "mtml_fast" else "",
        torch=torch.__version__,
        version=mtml_fast.__version__,
        commit=commit,
        timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _quantile(times: list[float], q: float) -> float:
    return float(torch.tensor(times, dtype=torch.float64).quantile(q))


def _device() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
