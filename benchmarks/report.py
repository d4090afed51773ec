"""Make the tables and the picture of the documentation from the saved rows: python -m benchmarks.report

Of each workload the last saved run counts, and factors are taken within one run. README.md and docs/benchmarks.md keep
the tables of a suite between the lines `<!-- benchmarks inner -->` and `<!-- /benchmarks inner -->`, or `heads`, or
`surgery`; nothing there is written by hand.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import HEADS_PEERS, INNER_PEERS, SURGERY_PEERS
from benchmarks.run import RESULTS

ROOT = Path(__file__).parents[1]
OURS = "mtml_fast"
PICTURE = ROOT / "docs/images/benchmarks.png"


@dataclass(frozen=True)
class Suite:
    """What the tables of a suite hold; the README shows the headline, docs/benchmarks.md has everything."""

    name: str
    title: str
    peers: tuple[str, ...]
    headline: tuple[str, ...]
    headline_peers: tuple[str, ...]
    floor: str = "at {peak_gflops} GFLOP/s"
    ours: tuple[str, ...] = (OURS,)

    @property
    def marked(self) -> re.Pattern[str]:
        marks = rf"(<!-- benchmarks {self.name} -->\n).*?(<!-- /benchmarks {self.name} -->)"
        return re.compile(marks, re.DOTALL)


INNER = Suite(
    name="inner",
    title="one meta-step, second order",
    peers=tuple(INNER_PEERS),
    headline=(
        "sinusoid 1-40-40-1 T=25 N=Q=10 K=1",
        "sinusoid 1-40-40-1 T=25 N=Q=10 K=5",
        "omniglot 784-256-128-64-64-5 T=32 N=5 Q=5 K=1",
        "omniglot 784-256-128-64-64-5 T=32 N=5 Q=5 K=5",
        "omniglot 784-256-128-64-64-5 T=32 N=5 Q=75 K=1",
        "omniglot 784-256-128-64-64-5 T=32 N=5 Q=75 K=5",
        "head 512-5 T=32 N=25 Q=75 K=5",
        "ragged 64-64-20 T=32 ways 2-20 shots 1-5 K=5",
    ),
    headline_peers=("jax", "torch.func compiled", "bmm", "torch.func", "learn2learn"),
    ours=(OURS, "mlp_adapt"),
)
HEADS = Suite(
    name="heads",
    title="losses of ragged heads, and all gradients",
    peers=tuple(HEADS_PEERS),
    headline=tuple(f"T={tasks} 64-32-5 R=4096" for tasks in (10, 100, 1000)),
    headline_peers=("loop", "bmm", "grouped_mm", "vmap"),
)
SURGERY = Suite(
    name="surgery",
    title="from T gradients to one",
    peers=tuple(SURGERY_PEERS),
    headline=(
        "PCGrad T=3 P=1,000,000",
        "PCGrad T=10 P=1,000,000",
        "PCGrad T=40 P=300,000",
        "UPGrad T=10 P=1,000,000",
        "MGDA T=10 P=1,000,000",
    ),
    headline_peers=("loop", "matmul", "TorchJD"),
    floor="to read all gradients twice",
)
SUITES = (INNER, HEADS, SURGERY)


@dataclass(frozen=True)
class Measured:
    """One workload as its last run saw it: provider -> row."""

    case: str
    rows: dict[str, dict[str, str]]

    @property
    def ours(self) -> dict[str, str]:
        """mf.MAML, or the operator where that alone was timed."""
        return self.rows.get(OURS) or self.rows["mlp_adapt"]

    def ms(self, provider: str) -> float:
        """The median, or NaN."""
        row = self.ours if provider == OURS else self.rows.get(provider)
        return float(row["q50"]) if row and row["q50"] else math.nan


@dataclass(frozen=True)
class Setting:
    """What rows of one table share."""

    device: str
    isa: str
    threads: str

    def __str__(self) -> str:
        if not self.threads:
            # a GPU
            return f"{self.device}, {self.isa}"
        threads = "one thread" if self.threads == "1" else f"{self.threads} threads"
        return f"{self.device}, {self.isa or 'no native library'}, {threads}"


def main() -> None:
    for suite in SUITES:
        tables = measured(read(RESULTS.glob("*.csv"), suite))
        write(ROOT / "docs/benchmarks.md", suite, full_tables(suite, tables))
        write(ROOT / "README.md", suite, readme_table(suite, tables))
        setting = headline_setting(tables)
        if suite is INNER and setting:
            picture(tables[setting], PICTURE, str(setting))
            print(f"wrote {PICTURE.relative_to(ROOT)}")


def read(paths: Iterable[Path], suite: Suite) -> list[dict[str, str]]:
    """All saved rows of the suite, oldest first."""
    rows = []
    for path in sorted(paths):
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("suite") == suite.name]
    return sorted(rows, key=lambda row: row["run"])


def measured(rows: Sequence[dict[str, str]]) -> dict[Setting, list[Measured]]:
    """The last run of each workload in each setting."""
    runs: dict[Setting, dict[str, dict[str, dict]]] = {}
    last: dict[tuple, str] = {}
    for row in rows:
        setting = Setting(row["device"], row["isa"], row["threads"])
        workloads = runs.setdefault(setting, {})
        key = (setting, row["case"])
        if last.get(key) != row["run"]:
            last[key], workloads[row["case"]] = row["run"], {}
        workloads[row["case"]][row["provider"]] = row
    return {
        setting: [Measured(case, found) for case, found in workloads.items() if OURS in found or "mlp_adapt" in found]
        for setting, workloads in runs.items()
    }


def headline_setting(tables: dict[Setting, list[Measured]]) -> Setting | None:
    """One thread, where the most workloads were timed."""
    single = [setting for setting in tables if setting.threads == "1"]
    return max(single, key=lambda setting: len(tables[setting]), default=None)


def readme_table(suite: Suite, tables: dict[Setting, list[Measured]]) -> str:
    """The headline workloads at one thread: our time, the floor, and the factors of the peers."""
    setting = headline_setting(tables)
    if setting is None:
        return "No measurements have been saved yet.\n"
    found = [m for case in suite.headline for m in tables[setting] if m.case == case]
    lines = [
        f"| {suite.title} | ours, ms | floor, ms | {' | '.join(suite.headline_peers)} |",
        "|---|---|---|" + "---|" * len(suite.headline_peers),
    ]
    for m in found:
        factors = [_factor(m, peer) for peer in suite.headline_peers]
        lines.append(f"| {m.case} | {_ms(m.ms(OURS))} | {_ms(float(m.ours['floor_ms']))} | {' | '.join(factors)} |")
    about = found[0].ours if found else next(iter(tables[setting])).ours
    lines += ["", f"*{setting}; {_conditions(about)}. Peers as multiples of our time: below 1 they are faster.*"]
    return "\n".join(lines) + "\n"


def full_tables(suite: Suite, tables: dict[Setting, list[Measured]]) -> str:
    """Every setting, workload and provider."""
    if not tables:
        return "No measurements have been saved yet.\n"
    parts = []
    for setting in sorted(tables, key=str):
        # of some suites nothing is compiled
        compiles = any(row["compile_s"] for m in tables[setting] for row in m.rows.values())
        columns = ["provider", "ms", "20-80 %", "factor", "of floor", "error", *["compiled in"] * compiles]
        parts += [f"### {setting}", "", f"{_conditions(tables[setting][-1].ours)}.", ""]
        for m in tables[setting]:
            ours = m.ours
            floor = float(ours["floor_ms"])
            limit = suite.floor.format(peak_gflops=f"{float(ours['peak_gflops']):.0f}")
            parts += [
                f"**{m.case}**: floor {_ms(floor)} ms {limit}, ours {ours['served_by']}, commit {ours['commit']}",
                "",
                f"| {' | '.join(columns)} |",
                "|---" * len(columns) + "|",
            ]
            # on a GPU some are there twice, once as a graph
            for name in dict.fromkeys((*suite.ours, *suite.peers, *m.rows)):
                row = m.rows.get(name)
                if row is None:
                    continue
                # torch's own version stands above the table
                others = name not in suite.ours and row["provider_version"] not in (row["torch"], row["version"])
                label = f"{name} {row['provider_version']}".rstrip() if others else name
                if row["note"]:
                    parts.append(f"| {label} | {row['note']} " + "| " * (len(columns) - 2) + "|")
                    continue
                spread = f"{_ms(float(row['q20']))}-{_ms(float(row['q80']))}"
                cells = [label, _ms(m.ms(name)), spread, _factor(m, name), f"{floor / m.ms(name):.0%}"]
                cells.append(f"{float(row['error']):.0e}")
                if compiles:
                    cells.append(f"{float(row['compile_s']):.1f} s" if row["compile_s"] else "")
                parts.append(f"| {' | '.join(cells)} |")
            parts.append("")
    return "\n".join(parts)


def picture(found: list[Measured], path: Path, title: str) -> None:
    """Times of all providers on a logarithmic scale, the floor as a tick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [m for case in INNER.headline for m in found if m.case == case] or found
    names = [n for n in (OURS, *INNER.peers) if any(m.ms(n) == m.ms(n) for m in shown)]
    figure = Figure(figsize=(9, 0.5 + 0.17 * (len(names) + 1) * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 1 / (len(names) + 1.5)
    for k, name in enumerate(names):
        places = [w + (k + 0.5) * height for w in range(len(shown))]
        values = [m.ms(name) for m in shown]
        axes.barh(places, values, height, label=name, color=f"C{k}", zorder=2)
    for w, m in enumerate(shown):
        floor, top = float(m.ours["floor_ms"]), w + len(names) * height
        axes.plot([floor, floor], [w, top], color="black", zorder=3, label="arithmetic floor" if w == 0 else None)
    axes.set_yticks([w + len(names) * height / 2 for w in range(len(shown))], [_wrapped(m.case) for m in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms per meta-step, forward and backward")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3, zorder=0)
    axes.legend(fontsize=8)
    # without the version of matplotlib and the date: the same rows give the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write(path: Path, suite: Suite, table: str) -> None:
    """Replace what stands between the suite's two marks."""
    before = path.read_text()
    after, places = suite.marked.subn(lambda marks: marks[1] + table + marks[2], before)
    if not places:
        print(f"{path.name} has no lines <!-- benchmarks {suite.name} --> and <!-- /benchmarks {suite.name} -->")
    elif after != before:
        path.write_text(after)
        print(f"wrote the {suite.name} table of {path.name}")


def _factor(m: Measured, provider: str) -> str:
    """How many times our time: below one it is faster."""
    factor = m.ms(provider) / m.ms(OURS)
    if factor != factor:
        return "-"
    return f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _conditions(row: dict[str, str]) -> str:
    peak = f"peak {float(row['peak_gflops']):.0f} GFLOP/s"
    busy = f", load average {row['load']}" if row.get("load") else ""
    return f"{row['clock']} time, torch {row['torch']}, {peak}, {row['run'][:10]}{busy}"


def _wrapped(case: str) -> str:
    name, rest = case.split(" ", 1)
    network, _, sizes = rest.partition(" ")
    return f"{name} {network}\n{sizes}"


if __name__ == "__main__":
    main()
