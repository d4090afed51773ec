"""The correctness gate: a speed is never reported for a wrong result."""

from __future__ import annotations

from benchmarks.registry import Workload
from mtml_fast.cli.timing import Provider, allowed_error, largest_error


def errors(workload: Workload, providers: dict[str, Provider]) -> tuple[dict[str, float], float]:
    """Each provider's largest error against float64, and how large it may be: a multiple of eager PyTorch's own."""
    exact = [t.detach() for t in workload.exact()]
    eager = largest_error([t.detach() for t in workload.eager()], exact)
    found = {name: largest_error(provider.results(), exact) for name, provider in providers.items()}
    return found, allowed_error(eager)


def gate(workload: Workload, providers: dict[str, Provider]) -> tuple[dict[str, float], dict[str, str]]:
    """The errors, and of those who may not be timed what to say. If ours is wrong, the program ends.

    Raises:
        SystemExit: where one of ours is wrong.
    """
    found, allowed = errors(workload, providers)
    wrong = {}
    for name, error in found.items():
        # a NaN is not below anything
        if not error <= allowed:
            wrong[name] = f"wrong by {error:.1e} (allowed {allowed:.1e})"
            if name in workload.ours:
                raise SystemExit(f"{workload.op}, {workload.case}: {name} is {wrong[name]}; nothing is timed")
    return found, wrong
