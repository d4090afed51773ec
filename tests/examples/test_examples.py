"""The examples from end to end, on small files in the layout of the official ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.test_heart_disease import HOSPITALS
from tests.data.test_heart_disease import write as write_hospitals
from tests.data.test_snips_slots import write as write_requests

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, root, out, *options):
    """The tables that an example prints: a list of rows each, the first with the names of the columns."""
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", root, "--out", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert (out / "table.md").read_text(encoding="utf-8") == done.stdout
    (picture,) = out.glob("*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    tables = re.findall(r"((?:^\|.*\n)+)", done.stdout, re.M)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in tables]


def figures(row):
    return [float(cell.split(" ± ")[0]) for cell in row[1:]]


def test_heart_disease(tmp_path):
    root = write_hospitals(tmp_path / "data", rows=40)
    known, new = run("heart_disease", root, tmp_path / "out", "--fast", "--seeds", "2", "--draws", "1")
    assert known[0] == ["hospital", "logistic regression", "own model", "shared trunk", "PCGrad", "uncertainty"]
    assert new[0][1:] == ["logistic regression", "heads of the others", "new head", "new head and trunk", "own model"]
    for table in (known, new):
        assert [row[0] for row in table[2:]] == [*HOSPITALS, "mean"]
        for row in table[2:]:
            assert all(0 <= figure <= 1 for figure in figures(row))
            assert all(" ± " in cell for cell in row[2:])
        means = [sum(column) / 4 for column in zip(*map(figures, table[2:-1]), strict=True)]
        assert figures(table[-1]) == pytest.approx(means, abs=1e-3)


def test_snips_slots_learns(tmp_path):
    root = write_requests(tmp_path / "data")
    options = ["--seeds", "1", "--steps", "50", "--choose"]
    right, slots = run("snips_slots", root, tmp_path / "out", *options)
    assert right[0][2:] == slots[0][1:] == ["own model", "shared trunk", "PCGrad", "uncertainty"]
    assert len(right) == len(slots) == 2 + 7 + 1
    # the held-out requests are as the others but for the hour: whoever learns tags nearly all of them
    for table in (right, slots):
        assert min(figures(table[-1])[-4:]) > 0.95


def test_missing_data_is_one_line(tmp_path):
    command = [sys.executable, EXAMPLES / "heart_disease.py", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "processed.cleveland.data is neither in" in done.stderr.splitlines()[-1]
