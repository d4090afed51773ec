"""The benchmarks: what is timed is right, wrong results are caught, and rows become tables."""

import csv
import dataclasses
import itertools
import re
import stat
import sys

import pytest
import torch

import mtml_fast as mf
from benchmarks import report, run
from benchmarks.peers import INNER_PEERS, SURGERY_PEERS, Settings, Unavailable
from benchmarks.peers.surgery import Gradients, matmul
from benchmarks.registry import workloads
from benchmarks.verify import gate
from mtml_fast.cli import main, meta_step
from mtml_fast.cli.meta_step import MetaStep
from mtml_fast.cli.timing import Provider, largest_error, measure, peak

# no compiler, no other environment, no libraries that are not installed
PEERS = ("bmm", "torch.func", "eager", "matmul")
WORKLOADS = workloads()
FACTS = dict.fromkeys(("device", "isa", "torch", "version", "commit"), "x")
FACTS |= dict(threads=1, clock="thread CPU", run="2026-01-01T00:00:00+00:00", peak_gflops=100.0)


def providers_of(workload, names=PEERS):
    builds = workload.ours | {name: build for name, build in workload.peers.items() if name in names}
    return {name: build(Settings()) for name, build in builds.items()}


def small(**changes):
    options = dict(lr=0.1, steps=2, loss="cross_entropy") | changes
    return MetaStep.random([6, 8, 7, 3], 3, 4, 5, **options)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: f"{w.op}-{w.mode}-{w.case}")
def test_providers_agree(workload):
    providers = providers_of(workload)
    errors, wrong = gate(workload, providers)
    assert wrong == {}
    assert set(errors) == set(providers)
    assert len(providers) >= 2


def test_workloads_have_names_of_their_own():
    names = [(w.op, w.case, w.mode) for w in WORKLOADS]
    assert len({*names}) == len(names)
    for suite in report.SUITES:
        workloads_of_suite = [w for w in WORKLOADS if w.suite == suite.name]
        assert {*suite.headline} <= {w.case for w in workloads_of_suite}
        assert {*suite.headline_peers} <= {*suite.peers}
        for w in workloads_of_suite:
            assert {*w.ours} <= {*suite.ours}
            assert {*w.peers} <= {*suite.peers}
            # one or the other
            assert (w.operations is None) != (w.floor is None)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_everybody_computes_the_same(loss, norm, first_order):
    """In float64 to rounding, where no kink can hide a difference."""
    step = small(loss=loss, norm=norm, first_order=first_order)
    step = dataclasses.replace(step, model=step.model.double(), batch=step.batch.to(torch.float64))
    exact = meta_step.exact(step)
    for make in (meta_step.maml, meta_step.operator, meta_step.torch_func, meta_step.bmm):
        assert largest_error(make(step)(), exact) < 1e-9, make.__name__


def test_ragged_tasks_are_padded_to_the_same():
    (workload,) = [w for w in WORKLOADS if w.case.startswith("ragged")]
    errors, _ = gate(workload, providers_of(workload))
    assert max(errors.values()) < 1e-5


def test_first_order_in_the_place_of_second_is_caught():
    workload = next(w for w in WORKLOADS if w.case == "sinusoid 1-40-40-1 T=25 N=Q=10 K=5")
    other = next(w for w in WORKLOADS if w.case == "sinusoid 1-40-40-1 T=25 N=Q=10 K=5 first order")
    _, wrong = gate(workload, {"bmm": other.peers["bmm"](Settings())})
    assert wrong["bmm"].startswith("wrong by ")


@pytest.mark.parametrize("damage", [1.01, float("nan")])
def test_a_wrong_result_of_ours_ends_the_run(damage):
    workload = WORKLOADS[0]
    right = workload.ours["mlp_adapt"](Settings())
    wrong = Provider(lambda: [t * damage for t in right.call()])
    with pytest.raises(SystemExit, match=r"mtml_fast is wrong by .* nothing is timed"):
        gate(workload, {"mtml_fast": wrong})


def test_peers_that_cannot_be_had_say_why(tmp_path):
    step = small()
    with pytest.raises(Unavailable, match="no Python with JAX is named"):
        INNER_PEERS["jax"](step, Settings(jax=None))
    with pytest.raises(Unavailable, match="does not start"):
        INNER_PEERS["jax"](step, Settings(jax=str(tmp_path / "python")))
    # a Python that ends at once
    script = tmp_path / "ends"
    script.write_text("#!/bin/sh\necho 'No module named jax' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(Unavailable, match="No module named jax"):
        INNER_PEERS["jax"](step, Settings(jax=str(script)))


# the compiler is stopped wherever it is, and may be reading a file
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_compilation_that_takes_too_long_is_a_row_of_its_own():
    with pytest.raises(Unavailable, match=r"did not compile in 0 s") as why:
        INNER_PEERS["torch.func compiled"](small(), Settings(compile_limit=1e-3))
    assert why.value.recorded


@pytest.mark.parametrize("name", ["higher", "TorchOpt", "learn2learn"])
@pytest.mark.parametrize("norm", [False, True])
def test_libraries_that_loop(name, norm):
    step = small(norm=norm)
    try:
        provider = INNER_PEERS[name](step, Settings())
    except Unavailable as why:
        assert "cannot be imported" in str(why)  # noqa: PT017
        pytest.skip(f"{name} {why}")
    assert largest_error(provider.results(), meta_step.exact(step)) < 1e-3


def opposed_gradients(method):
    """Two leaves of four tasks, in float64; some of the tasks conflict."""
    common = torch.randn(5, 3, dtype=torch.float64)
    signs = torch.tensor([1, -1, 1, -1.0])[:, None, None]
    leaf = signs * common + torch.randn(4, 5, 3, dtype=torch.float64)
    return Gradients([leaf, torch.randn(4, 7, dtype=torch.float64)], method)


@pytest.mark.parametrize(
    ("name", "method"), [("loop", "PCGrad"), ("TorchJD", "PCGrad"), ("TorchJD", "UPGrad"), ("TorchJD", "MGDA")]
)
def test_gradient_surgery_of_others(name, method):
    problem = opposed_gradients(method)
    try:
        provider = SURGERY_PEERS[name](problem, Settings())
    except Unavailable as why:
        assert "cannot be imported" in str(why)  # noqa: PT017
        pytest.skip(f"{name} {why}")
    expected = matmul(problem, Settings()).results()
    # the tasks conflict: their sum is another direction
    assert largest_error([leaf.sum(0) for leaf in problem.leaves], expected) > 1e-3
    for _ in range(2):
        # its Frank-Wolfe stops at 1e-7 of a step
        assert largest_error(provider.results(), expected) < (1e-4 if method == "MGDA" else 1e-6)


def test_gradients_come_in_leaves_that_hold_as_many_numbers_as_the_name_says():
    for workload in [w for w in WORKLOADS if w.suite == "surgery"]:
        size = re.fullmatch(r"\w+ T=\d+ P=([\d,]+)", workload.case)[1]
        results = workload.ours["mtml_fast"](Settings()).call()
        assert len(results) == 6
        assert sum(t.numel() for t in results) == int(size.replace(",", ""))
        # twice the six leaves
        assert len(workload.floor()) == 12


@pytest.mark.skipif(Settings().jax is None, reason="no Python with JAX is named")
@pytest.mark.parametrize("case", ["second order", "first order", "batch norm", "features", "mse", "ragged"])
def test_jax_computes_the_same(case):
    if case == "ragged":
        workload = next(w for w in WORKLOADS if w.case.startswith("ragged"))
        provider, exact = workload.peers["jax"](Settings()), workload.exact()
    else:
        step = small(
            first_order=case == "first order", norm=case == "batch norm", loss="mse" if case == "mse" else "bce"
        )
        if case == "features":
            step.batch.support.x.requires_grad_()
            step.batch.query.x.requires_grad_()
            step = dataclasses.replace(step, feature_gradients=True)
        provider, exact = INNER_PEERS["jax"](step, Settings()), meta_step.exact(step)
    try:
        assert largest_error(provider.results(), exact) < 1e-3
        assert len(provider.turn(0.01, 1)) >= 1
        assert provider.compile_s > 0
    finally:
        provider.close()


def test_operations_are_counted():
    """Against a count by hand of the dense form, and by the order of the forms."""
    # one task, a linear model 2-3, one support and one query row, one step: dense 5 support-like products and 2 for the
    # query of 6 multiplications each; factored: forward 2, back 2, and 2 + 3 + 3 between the rows
    step = MetaStep.random([2, 3], 1, 1, 1, lr=0.1, steps=1, loss="mse")
    assert meta_step._dense(2, 3, 1, 1, False, 1, False, False) == 6 * (4 + 2)
    assert meta_step.operations(step) == 2 * min(6 * (4 + 2), 6 * 4 + 2 + 3 + 3)
    wide = MetaStep.random([784, 256, 5], 4, 5, 5, lr=0.1, steps=3, loss="cross_entropy")
    dense = (
        2
        * 4
        * (
            meta_step._dense(784, 256, 5, 5, False, 3, False, False)
            + meta_step._dense(256, 5, 5, 5, True, 3, False, True)
        )
    )
    first = dataclasses.replace(wide, first_order=True)
    assert meta_step.operations(first) < meta_step.operations(wide) < dense / 3
    # no step: a forward pass and its gradients
    still = dataclasses.replace(wide, steps=0)
    assert meta_step.operations(still) == 2 * 4 * 5 * (784 * 256 * 2 + 256 * 5 * 3)


def test_the_peak_is_that_of_a_processor():
    assert 1e8 < peak(1) < 1e14


def test_turns():
    calls = []
    providers = {name: Provider(lambda name=name: calls.append(name)) for name in "ab"}
    times = measure(providers, seconds=0.001, threads=1)
    assert all(len(t) >= 5 and sum(t) >= 1 for t in times.values())
    # each has had several turns, not one long one
    assert len([*itertools.groupby(calls)]) > 10


def saved_rows(tmp_path, workload, names=PEERS):
    rows = run.time_workload(workload, Settings(), [*names], 0.001, FACTS)
    path = tmp_path / "x.csv"
    run.append(path, rows)
    return path


def test_rows_and_tables(tmp_path, capsys):
    workload = next(w for w in WORKLOADS if w.case == report.INNER.headline[0])
    path = saved_rows(tmp_path, workload)
    path = saved_rows(tmp_path, workload)
    out = capsys.readouterr().out
    assert re.search(r"^  mtml_fast +\d+\.\d+ ms .* 1\.00x .* of floor  error \d\.\de-\d\d$", out, re.M)
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 2 * len(providers_of(workload))
    assert tuple(rows[0]) == run.COLUMNS
    for row in rows:
        assert 0 < float(row["q20"]) <= float(row["q50"]) <= float(row["q80"])
        assert float(row["floor_ms"]) > 0
        assert int(row["n"]) >= 5
        ours = row["provider"] in workload.ours
        assert row["provider_version"] == (mf.__version__ if ours else torch.__version__)

    assert report.read([path], report.HEADS) == []
    tables = report.measured(report.read([path], report.INNER))
    ((setting, (found,)),) = tables.items()
    assert str(setting) == "x, x, one thread"
    text = report.readme_table(report.INNER, tables)
    factor = found.ms("bmm") / found.ms("mtml_fast")
    assert f"{factor:.2f}x" in text or f"{factor:.0f}x" in text
    for name in ("mtml_fast", "mlp_adapt", "bmm", "torch.func"):
        assert f"| {name}" in report.full_tables(report.INNER, tables)
    report.picture(tables[setting], tmp_path / "a.png", "x")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suite", [report.HEADS, report.SURGERY], ids=lambda suite: suite.name)
def test_tables_of_the_other_suites(suite, tmp_path, capsys):
    workload = next(w for w in WORKLOADS if w.case == suite.headline[0])
    path = saved_rows(tmp_path, workload, ("loop", "bmm", "matmul"))
    (printed,) = re.findall(r"^  mtml_fast .* (\d+) % of floor", capsys.readouterr().out, re.M)
    tables = report.measured(report.read([path], suite))
    ((found,),) = tables.values()
    share = float(found.ours["floor_ms"]) / found.ms("mtml_fast")
    assert 100 * share == pytest.approx(int(printed), abs=1)
    header, _, line, *_ = report.readme_table(suite, tables).splitlines()
    assert header.startswith(f"| {suite.title} | ours, ms | floor, ms | loop |")
    factor = found.ms("loop") / found.ms("mtml_fast")
    assert line.split(" | ")[3] == (f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x")
    # who was not timed
    assert line.endswith("- |")
    table = report.full_tables(suite, tables)
    assert "compiled in" not in table
    assert ("to read all gradients twice" in table) == (suite is report.SURGERY)
    widths = {line.count(" |") for line in table.splitlines() if line.startswith("| ")}
    assert widths == {6}


def test_tables_stand_between_the_marks_of_their_suite(tmp_path, capsys):
    path = tmp_path / "page.md"
    text = "a\n<!-- benchmarks heads -->\nold\n<!-- /benchmarks heads -->\nb\n"
    path.write_text(text)
    report.write(path, report.SURGERY, "new\n")
    assert path.read_text() == text
    assert "page.md has no lines <!-- benchmarks surgery -->" in capsys.readouterr().out
    report.write(path, report.HEADS, "new\n")
    assert path.read_text() == text.replace("old", "new")


def test_a_wrong_peer_is_named_in_its_row(tmp_path, capsys):
    workload = next(w for w in WORKLOADS if w.case == report.INNER.headline[0])
    right = workload.peers["bmm"](Settings())
    wrong = {"bmm": lambda _: Provider(lambda: [2 * t for t in right.call()])}
    path = saved_rows(tmp_path, dataclasses.replace(workload, peers=wrong))
    assert "wrong by 1" in capsys.readouterr().out
    tables = report.measured(report.read([path], report.INNER))
    ((found,),) = tables.values()
    assert found.rows["bmm"]["note"].startswith("wrong by")
    assert found.rows["bmm"]["q50"] == ""
    assert "wrong by" in report.full_tables(report.INNER, tables)


def test_the_last_run_of_a_workload_counts():
    base = dict(device="d", isa="avx2", threads="1", case="c", provider="mtml_fast", q50="2")
    rows = [{**base, "run": "1"}, {**base, "run": "1", "provider": "bmm"}, {**base, "run": "2", "q50": "1"}]
    ((found,),) = report.measured(rows).values()
    assert found.ms("mtml_fast") == 1
    assert "bmm" not in found.rows


def test_old_rows_stay_as_they_are(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text(",".join(run.COLUMNS[:18]) + "\n" + "a," * 17 + "b\n")
    run.append(path, [dict(op="new", note="n")])
    header, old, new = path.read_text().splitlines()
    assert header == ",".join(run.COLUMNS)
    assert old == "a," * 17 + "b"
    assert new.startswith("new,")
    path.write_text("something,else\n")
    with pytest.raises(SystemExit, match="columns that this program does not write"):
        run.append(path, [])


@pytest.mark.parametrize("suite", report.SUITES, ids=lambda suite: suite.name)
def test_the_documentation_is_made_from_the_committed_rows(suite):
    tables = report.measured(report.read(run.RESULTS.glob("*.csv"), suite))
    made = {"docs/benchmarks.md": report.full_tables(suite, tables), "README.md": report.readme_table(suite, tables)}
    for name, table in made.items():
        text = (report.ROOT / name).read_text()
        marked = f"<!-- benchmarks {suite.name} -->\n{table}<!-- /benchmarks {suite.name} -->"
        assert marked in text, f"{name}: run python -m benchmarks.report"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be 1 or more, got 0"),
        (["--peers", "bmm,numpy"], "must be some of .* got 'numpy'"),
        (["--suite", "outer"], "invalid choice: 'outer'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_saving_appends_after_each_workload(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    arguments = [
        "--suite",
        "sgd_step",
        "--only",
        "forward T=1 ",
        "--seconds",
        "0.001",
        "--threads",
        str(threads),
        "--save",
    ]
    run.main(arguments)
    run.main([*arguments, "--peers", "none"])
    (path,) = tmp_path.iterdir()
    with path.open(newline="") as file:
        providers = [row["provider"] for row in csv.DictReader(file)]
    # two workloads, with and without the peer
    assert providers == ["mtml_fast", "eager"] * 2 + ["mtml_fast"] * 2
    assert f"rows appended to {path}" in capsys.readouterr().out


def test_no_such_workload():
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match="--only must be part of a workload's name, got 'nothing like it'"):
        run.main(["--only", "nothing like it", "--threads", str(threads)])


# the command


def command(capsys, *arguments, code=0):
    pytest.importorskip("typer")
    capsys.readouterr()
    assert main(["bench", *arguments]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return err if code else out


@pytest.mark.parametrize("more", [[], ["--norm", "--loss", "mse"], ["--first-order", "--loss", "bce"]])
def test_bench(capsys, more):
    threads = torch.get_num_threads()
    sizes = ["--widths", "6,8,3", "--tasks", "3", "--support", "4", "--query", "5", "--steps", "2"]
    out = command(capsys, *sizes, "--seconds", "0.01", *more)
    assert re.search(r"^floor \d\.\d+ ms: .* GFLOP at \d+ GFLOP/s$", out, re.M)
    assert re.search(r"^mf\.MAML +\d+\.\d{3} +1\.00x +\d+ % +\d\.\de-\d\d$", out, re.M)
    for name in ("mlp_adapt", "torch.func", "bmm"):
        assert re.search(rf"^{re.escape(name)} +\d+\.\d{{3}} +\d+\.\d\dx", out, re.M)
    assert torch.get_num_threads() == threads
    assert "Example: mtml-fast bench" in command(capsys, "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "784"], "--widths must be two or more positive integers with commas between, got '784'"),
        (["--widths", "784,x"], "--widths must be two or more"),
        (["--tasks", "0"], "--tasks must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--loss", "hinge"], "--loss must be one of cross_entropy, mse, bce, got 'hinge'"),
        (["--seconds", "nan"], "--seconds must be a finite number above 0, got nan"),
    ],
)
def test_bench_with_bad_options(capsys, arguments, message):
    (line,) = command(capsys, *arguments, code=2).splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_bench_times_nothing_that_is_wrong(capsys, monkeypatch):
    right = meta_step.operator
    monkeypatch.setitem(
        sys.modules["mtml_fast.cli.bench"]._PROVIDERS, "mlp_adapt", lambda s: lambda: [2 * t for t in right(s)()]
    )
    line = command(capsys, "--widths", "6,8,3", "--tasks", "3", code=1)
    assert "mlp_adapt is off by 1.0e+00 from float64; nothing is timed" in line
