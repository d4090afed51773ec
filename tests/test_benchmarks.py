"""The benchmarks: every workload passes its correctness gate, and a row has what it needs."""

import pytest

from benchmarks import run
from benchmarks.registry import Workload, workloads


@pytest.mark.parametrize("workload", workloads(), ids=lambda w: f"{w.op}-{w.mode}-{w.case}")
def test_providers_agree(workload):
    run.gate(workload)


def test_a_wrong_result_is_not_timed():
    workload = next(iter(workloads()))
    wrong = {**workload.providers, "eager": lambda: [t * 1.01 for t in workload.providers["eager"]()]}
    with pytest.raises(SystemExit, match="nothing is timed"):
        run.gate(Workload(workload.op, workload.case, workload.mode, wrong, workload.served_by))


def test_rows():
    workload = list(workloads())[-1]
    times = run.measure(workload, seconds=0.01, threads=1)
    assert all(len(t) >= 5 for t in times.values())
    row = run._row(workload, "mtml_fast", times["mtml_fast"], 1, "thread CPU")
    assert set(row) == set(run.COLUMNS)
    assert float(row["q20"]) <= float(row["q50"]) <= float(row["q80"])
