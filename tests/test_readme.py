"""Every snippet of the README runs as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_python(tmp_path, monkeypatch, capsys):
    """One after the other, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace = {"__name__": "readme"}
    assert len(PYTHON) >= 6
    for snippet in PYTHON:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert (tmp_path / "runs/digits/history.csv").is_file()
    assert (tmp_path / "runs/digits/curves.png").is_file()
    assert "accuracy" in capsys.readouterr().out
    assert namespace["logits"].shape[0] == 16
    assert len(namespace["outputs"]) == 3
    assert namespace["predictions"].shape[0] == 20


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets(command):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command.split()[1] in targets


def test_command_line(tmp_path):
    """The commands in their order, shortened."""
    data = os.environ.get("MTML_FAST_DATA")
    short = {"train": ["--iterations", "3", "--eval-tasks", "8"], "evaluate": ["--tasks", "8"], "env": []}
    ran = 0
    for command in (c for c in COMMANDS if c.startswith("mtml-fast")):
        arguments = shlex.split(command)[1:]
        if "omniglot" in command:
            if not data:
                continue
            arguments = [f"{data}/omniglot" if a == "data/omniglot" else a for a in arguments]
        arguments += short[arguments[0]]
        done = subprocess.run(
            [sys.executable, "-m", "mtml_fast", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 2


def test_links():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
