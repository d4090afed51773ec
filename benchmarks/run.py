"""Time the workloads: python -m benchmarks.run [--suite inner] [--threads 1] [--only K=5] [--peers bmm,jax] [--save]

Providers of a workload take turns, after a correctness gate against float64: a speed is never reported for a wrong
result. On one thread the clock is thread CPU time (process CPU time for JAX, which has a process of its own), else wall
time. Every factor is shown, losses too. The floor is the time that the counted operations would take at the peak that
was measured in the same run; where memory is what limits, a call of torch's that does no more than read, timed in turns
with the others. MTML_FAST_ISA=avx2 holds everybody to AVX2.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import mtml_fast
from benchmarks.peers import PEERS, Settings, Unavailable
from benchmarks.registry import SUITES, Workload, workloads
from benchmarks.verify import gate
from mtml_fast.cli.timing import Provider, measure, peak, quantile
from mtml_fast.ops import OPERATORS
from mtml_fast.ops._library import build_info

RESULTS = Path(__file__).parent / "results"
# columns are only ever added at the end, so that old rows stay as they are
COLUMNS = ("op", "provider", "mode", "case", "unit", "q20", "q50", "q80", "n", "device", "threads", "clock")
COLUMNS += ("served_by", "isa", "torch", "version", "commit", "timestamp")
COLUMNS += ("suite", "run", "error", "floor_ms", "peak_gflops", "compile_s", "provider_version", "note")
# the load average when the run began
COLUMNS += ("load",)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(options.threads, options.compile_limit, options.jax or Settings.jax)
    load = os.getloadavg()[0]
    if load > 1:
        print(f"warning: the machine is busy (load average {load:.1f}); ratios are safer than times")
    facts = _facts(options.threads)
    isa = f"{facts['isa']} instructions, " if facts["isa"] else ""
    print(
        f"{facts['device']}, {isa}{options.threads} thread(s), {facts['clock']} time, torch {torch.__version__}, "
        f"peak {facts['peak_gflops']} GFLOP/s"
    )
    chosen = [w for w in workloads(options.suite) if options.only in f"{w.op} {w.mode} {w.case}"]
    if not chosen:
        raise SystemExit(f"--only must be part of a workload's name, got {options.only!r}")
    path = RESULTS / f"{facts['device'].replace(' ', '-').replace('/', '-')}.csv"
    for workload in chosen:
        rows = time_workload(workload, settings, options.peers, options.seconds, facts)
        # one by one: a run that is stopped has not been for nothing
        if options.save:
            append(path, rows)
    if options.save:
        print(f"\nrows appended to {path}")


def _options(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Time the operators and their peers.")
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="workloads with this in their name")
    parser.add_argument("--peers", type=_names, help=f"some of {', '.join(PEERS)}; none for ours alone")
    parser.add_argument("--seconds", type=float, default=0.5, help="at least so long for each provider")
    parser.add_argument("--compile-limit", type=float, default=180.0, help="seconds that torch.compile may take")
    parser.add_argument("--jax", metavar="PYTHON", help="a Python that has JAX, else MTML_FAST_JAX_PYTHON")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/<device>.csv")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be 1 or more, got {options.threads}")
    unknown = {*(options.peers or [])} - {"none", *PEERS}
    if unknown:
        parser.error(f"--peers must be some of {', '.join(PEERS)}, got {min(unknown)!r}")
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def time_workload(
    workload: Workload, settings: Settings, peers: list[str] | None, seconds: float, facts: dict
) -> list[dict]:
    """Build, check, time and print one workload; returns its rows."""
    floor = None if workload.operations is None else workload.operations / facts["peak_gflops"] / 1e6
    served_by = OPERATORS[workload.op].served_by(settings.device)
    print(f"\n{workload.case} {workload.mode}" + (f", floor {floor:.3f} ms" if floor else "") + f", ours {served_by}")
    builds = workload.ours | {n: build for n, build in workload.peers.items() if peers is None or n in peers}
    providers: dict[str, Provider] = {}
    times: dict[str, list[float]] = {}
    failed: dict[str, tuple[str, bool]] = {}  # name -> why, and whether that is a result to record
    try:
        for name, build in builds.items():
            try:
                providers[name] = settings.timed(build(settings))
            except Unavailable as why:
                failed[name] = str(why), why.recorded
        errors, wrong = gate(workload, providers)
        failed |= {name: (why, True) for name, why in wrong.items()}
        right = {n: p for n, p in providers.items() if n not in wrong}
        if workload.floor:
            right["floor"] = settings.timed(Provider(workload.floor))
        times = measure(right, seconds, settings.threads)
    finally:
        for provider in providers.values():
            provider.close()

    if workload.floor:
        floor = quantile(times["floor"], 0.5)
        print(f"  {'floor':20} {floor:10.3f} ms")
    rows = []
    ours = quantile(times[next(iter(workload.ours))], 0.5)
    for name in builds:
        about = dict(
            op=workload.op,
            provider=name,
            mode=workload.mode,
            case=workload.case,
            unit="ms",
            served_by=served_by if name in workload.ours else "",
            suite=workload.suite,
            floor_ms=f"{floor:.4g}" if floor else "",
            timestamp=_now(),
        )
        if name in failed:
            why, recorded = failed[name]
            print(f"  {name:20} {why}")
            if recorded:
                rows.append(facts | about | dict(note=why))
            continue
        provider, (q20, q50, q80) = providers[name], (quantile(times[name], q) for q in (0.2, 0.5, 0.8))
        compiled = f"  compiled in {provider.compile_s:.1f} s" if provider.compile_s else ""
        reached = f"  {100 * floor / q50:3.0f} % of floor" if floor else ""
        print(
            f"  {name:20} {q50:10.3f} ms ({q20:.3f} .. {q80:.3f})  {q50 / ours:6.2f}x{reached}  "
            f"error {errors[name]:.1e}{compiled}",
            flush=True,
        )
        rows.append(
            facts
            | about
            | dict(
                q20=f"{q20:.4g}",
                q50=f"{q50:.4g}",
                q80=f"{q80:.4g}",
                n=len(times[name]),
                error=f"{errors[name]:.2g}",
                compile_s=f"{provider.compile_s:.3g}" if provider.compile_s else "",
                provider_version=mtml_fast.__version__ if name in workload.ours else provider.version,
            )
        )
    return rows


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a file of results; a file from before some columns gets them in its header."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    header = ",".join(COLUMNS) + "\n"
    if lines and lines[0] != header:
        if not header.startswith(lines[0].rstrip("\r\n")):
            raise SystemExit(f"{path} has columns that this program does not write")
        lines[0] = header
    path.write_text("".join(lines or [header]))
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


def _facts(threads: int) -> dict:
    """What is the same in all rows of this run."""
    return dict(
        device=device(),
        threads=threads,
        clock="thread CPU" if threads == 1 else "wall",
        isa=(build_info() or {}).get("isa", ""),
        **versions(),
        peak_gflops=round(peak(threads) / 1e9, 1),
    )


def versions() -> dict:
    """Of all that has a say in a run, and when it began."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        # a machine without git
        commit = ""
    return dict(
        torch=torch.__version__,
        version=mtml_fast.__version__,
        commit=commit,
        run=_now(),
        load=f"{os.getloadavg()[0]:.1f}",
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def device() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
