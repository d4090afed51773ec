"""The command line: every verb from end to end, every error in one line, stopped and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mtml_fast as mf

typer = pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from mtml_fast.cli import main, report, train  # noqa: E402
from mtml_fast.cli.config import open_run  # noqa: E402
from mtml_fast.cli.presets import PRESETS  # noqa: E402
from mtml_fast.files import load_tensors  # noqa: E402


def run(capsys, *arguments, code=0):
    """Run a command; returns what it printed."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    if code:
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line
    return out


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "digits", "--iterations", "60", "--eval-tasks", "20", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def sinusoid_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sinusoid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_SPEED_SECONDS", 0.1)
        assert main(["train", "--iterations", "5", "--eval-tasks", "10", "--out", str(folder)]) == 0
    return folder


def test_version_and_help(capsys):
    assert run(capsys, "--version").startswith(f"mtml_fast {mf.__version__}, torch {torch.__version__}")
    for command in (
        ["train"],
        ["train", "sinusoid"],
        ["train", "omniglot"],
        ["train", "digits"],
        ["evaluate"],
        ["adapt"],
    ):
        text = run(capsys, *command, "--help")
        assert "Usage: mtml-fast" in text
        assert command == ["train"] or "Example: mtml-fast " + " ".join(command) in text
    assert "Example: mtml-fast env" in run(capsys, "env", "--help")


def test_presets_are_the_papers_settings():
    adam = {"meta_lr": 1e-3, "seed": 0, "first_order": False, "steps": 1, "eval_tasks": 1000}
    sinusoid = {"shots": 10, "query_shots": 10, "hidden": [40, 40], "norm": None, "lr": 0.01, "meta_batch": 25}
    omniglot = {"ways": 5, "hidden": [256, 128, 64, 64], "norm": "batch", "lr": 0.4, "meta_batch": 32, "eval_steps": 3}
    expected = {
        "maml-sinusoid": (70_000, {**adam, **sinusoid}),
        "maml-omniglot-mlp-5w1s": (60_000, {**adam, **omniglot, "shots": 1, "query_shots": 1}),
        "maml-omniglot-mlp-5w5s": (60_000, {**adam, **omniglot, "shots": 5, "query_shots": 5}),
    }
    assert expected.keys() == PRESETS.keys()
    for name, (iterations, settings) in expected.items():
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "_run", lambda *arguments, seen=seen: seen.append(arguments))
            root = ["--root", "data"] if "omniglot" in name else []
            assert main(["train", "--preset", name, *root]) == 0
            assert main(["train", "--lr", "0.5", f"--preset={name}", *root, "--seed", "3", "--out", "there"]) == 0
            command, _ = PRESETS[name]
            assert main(["train", command, *root, "--preset", name]) == 0
        (config, count, minutes, out, *_), (other, _, _, there, *_), (named, *_) = seen
        assert (count, minutes, out) == (iterations, None, Path("runs") / name)
        assert {**vars(config), **settings} == vars(config)
        assert {**vars(config), "lr": 0.5, "seed": 3} == vars(other)
        assert there == Path("there")
        assert named == config


def test_a_preset_trains_and_keeps_its_result(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_SPEED_SECONDS", 0.1)
    options = ["--iterations", 4, "--eval-tasks", 10, "--out", tmp_path, "--seed", 2, "--steps", 2]
    out = run(capsys, "train", "--preset", "maml-sinusoid", *options)
    last = out.splitlines()[-1]
    figure = re.fullmatch(r"test MSE of 5 shots after 2 steps (\d+\.\d+) \+- (\d+\.\d+) over 10 tasks", last)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"] == json.loads((tmp_path / "config.json").read_text())
    assert result["settings"]["seed"] == 2
    assert (result["iterations"], result["threads"], result["device"]) == (4, 1, "cpu")
    assert result["training_seconds"] > 0
    figures = {(f["shots"], f["steps"]): f for f in result["figures"]}
    assert sorted(figures) == [(shots, steps) for shots in (5, 10) for steps in (0, 1, 2, 5, 10)]
    key = figures[5, 2]
    assert (key["split"], key["metric"], key["tasks"]) == ("test", "MSE", 10)
    assert figure.groups() == (f"{key['mean']:.3f}", f"{key['ci95']:.3f}")
    assert run(capsys, "evaluate", tmp_path).splitlines()[-1] == last

    command = [sys.executable, Path(__file__).parents[1] / "docs/results_table.py", tmp_path, tmp_path]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    head, row, mean = (dict(enumerate(lines[i].strip("| ").split(" | "))) for i in (3, 5, 7))
    (place,) = (i for i, name in head.items() if name == "MSE, 5 shots, 2 steps")
    assert (row[0], row[1], row[place]) == ("2", "4", f"{key['mean']:.3f} ± {key['ci95']:.3f}")
    assert (mean[0], mean[place]) == ("mean of 2", f"{key['mean']:.3f} (s 0.000)")


def test_env_prints_the_operators(capsys):
    assert "mlp_adapt" in run(capsys, "env")


def test_train_alone_is_the_sinusoid_experiment(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_SPEED_SECONDS", 0.1)
    out = run(capsys, "train", "--iterations", 3, "--eval-tasks", 10, "--out", tmp_path)
    assert re.search(r"^3 meta-steps, about \d+ s at [\d,]+ a second", out, re.M)
    figures = re.search(r"^5 shots, published: MAML, 70,000 iterations(.*)$", out, re.M)[1]
    assert figures.split() == ["0.67", "0.38", "0.35"]
    assert re.search(r"^10 shots( +\d+\.\d\d \+- \d+\.\d\d){4}$", out, re.M)
    assert re.search(r"^speed: [\d,]+ meta-steps a second, \d+\.\d+ times the [\d,]+ of the same loop", out, re.M)
    for name in ("adapted.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "config.json").read_text())
    paper = {"shots": 10, "query_shots": 10, "hidden": [40, 40], "steps": 1, "lr": 0.01, "meta_lr": 1e-3}
    assert {**saved, **paper, "meta_batch": 25} == saved


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_loop_it_is_compared_with_computes_the_same(sinusoid_run, steps, first_order):
    config, _, _ = open_run(sinusoid_run)
    config = report.replace(config, steps=steps, first_order=first_order)
    maml = config.algorithm().double()
    batch = config.tasks("train").sample(4).to(torch.float64)
    ours = maml(batch).loss
    gradients = torch.autograd.grad(ours, list(maml.parameters()))
    theirs = report._functional_loss(maml.model, batch, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(gradients, torch.autograd.grad(theirs, list(maml.model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_digits_run_ends_with_an_accuracy_and_evaluates_to_the_same(capsys, digits_run):
    out = run(capsys, "evaluate", digits_run)
    found = re.search(r"^test accuracy (0\.\d+) \+- 0\.\d+ over 20 tasks$", out, re.M)
    # chance is a third; these few steps are enough to be clear of it
    assert float(found[1]) > 0.45
    again = run(capsys, "train", "digits", "--iterations", 60, "--eval-tasks", 20, "--out", digits_run)
    assert found[0] in again
    assert "meta-steps" not in again
    assert "over 30 tasks" in run(capsys, "evaluate", digits_run, "--split", "validation", "--tasks", 30, "--steps", 1)


def test_the_best_weights_are_evaluated(digits_run):
    _, algorithm, step = open_run(digits_run)
    tensors, metadata = load_tensors(digits_run / "best.safetensors")
    assert step == metadata["step"] == 50
    assert torch.equal(algorithm.model[0].weight, tensors["model.0.weight"])


def test_evaluating_the_sinusoid_prints_its_table(capsys, sinusoid_run):
    out = run(capsys, "evaluate", sinusoid_run, "--tasks", 8, "--steps", 2)
    assert "2 steps" in out
    assert "8 test tasks, weights of iteration 5" in out


def test_another_run_in_the_folder_is_named(capsys, digits_run):
    line = run(capsys, "train", "digits", "--out", digits_run, "--lr", 0.3, "--shots", 2, code=2)
    assert line.endswith("holds another run: shots was 1, is 2; lr was 0.4, is 0.3")


def test_omniglot_from_the_official_files(capsys, tmp_path):
    root = os.environ.get("MTML_FAST_DATA")
    if root is None:
        pytest.skip("MTML_FAST_DATA names no folder with the official archives")
    folder = tmp_path / "run"
    options = ["--iterations", 2, "--eval-tasks", 10, "--out", folder]
    out = run(capsys, "train", "omniglot", "--root", root, *options)
    assert re.search(r"^published: MAML, no conv, 60,000 iterations +0\.897 \+- 0\.011$", out, re.M)
    assert re.fullmatch(r"test accuracy 0\.\d+ \+- 0\.\d+ over 10 tasks", out.splitlines()[-1])
    (figure,) = json.loads((folder / "result.json").read_text())["figures"]
    assert out.splitlines()[-1] == f"test accuracy {figure['mean']:.3f} +- {figure['ci95']:.3f} over 10 tasks"
    assert (figure["shots"], figure["steps"]) == (1, 3)
    line = run(capsys, "evaluate", folder, "--root", tmp_path, code=2)
    assert "images_background" in line


def digit_tasks():
    tasks = mf.data.Digits("test", ways=3, shots=2, query_shots=3)
    return tasks.sample(4)


def test_adapt_to_the_users_tasks(capsys, tmp_path, digits_run):
    batch = digit_tasks()
    np.savez(tmp_path / "s.npz", x=batch.support.x.numpy(), y=batch.support.y.numpy())
    np.savez(tmp_path / "q.npz", x=batch.query.x.numpy(), y=batch.query.y.numpy())
    folders = ["--support", tmp_path / "s.npz", "--query", tmp_path / "q.npz", "--out", tmp_path / "out"]
    out = run(capsys, "adapt", digits_run, *folders, "--steps", 2)
    assert re.search(r"^query accuracy \d\.\d+ over all rows$", out, re.M)

    _, algorithm, _ = open_run(digits_run)
    adapted = algorithm.adapt(batch.support, steps=2)
    predictions = np.load(tmp_path / "out" / "predictions.npz")
    np.testing.assert_array_equal(predictions["outputs"], adapted(batch.query).numpy())
    np.testing.assert_array_equal(predictions["classes"], predictions["outputs"].argmax(-1))
    loaded = mf.Adapted.load(tmp_path / "out" / "adapted.safetensors", algorithm.model)
    assert torch.equal(loaded(batch.query), adapted(batch.query))


def test_adapt_to_tasks_of_different_sizes(capsys, tmp_path, sinusoid_run):
    x, offsets = np.linspace(-5, 5, 9)[:, None], np.array([0, 4, 9])
    np.savez(tmp_path / "s.npz", x=x, y=np.sin(x), offsets=offsets)
    np.savez(tmp_path / "q.npz", x=x[:5], offsets=np.array([0, 2, 5]))
    folders = ["--support", tmp_path / "s.npz", "--query", tmp_path / "q.npz", "--out", tmp_path / "out"]
    out = run(capsys, "adapt", sinusoid_run, *folders)
    assert "loss" not in out
    predictions = np.load(tmp_path / "out" / "predictions.npz")
    assert predictions["outputs"].shape == (5, 1)
    assert predictions["offsets"].tolist() == [0, 2, 5]
    assert "classes" not in predictions


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ({"x": np.zeros((2, 3, 64))}, r"s\.npz must hold an array 'y', got 'x'"),
        ({"x": np.zeros((2, 3, 64)), "y": np.zeros((2, 3), int), "z": np.zeros(1)}, "x, y and offsets alone, got 'z'"),
        (
            {"x": np.zeros((2, 3, 64)), "y": np.zeros((2, 3))},
            r"y in .*s\.npz must hold classes as integers, got float64",
        ),
        ({"x": np.array([["a"]]), "y": np.zeros((1, 1), int)}, r"x in .*s\.npz must hold numbers, got <U1"),
        ({"x": np.zeros((2, 3, 64)), "y": np.zeros((2, 4), int)}, r"s\.npz: y must have the rows of x \[2, 3\]"),
        ({"x": np.zeros((3, 3, 64)), "y": np.zeros((3, 3), int)}, "--query must hold the 3 tasks of --support, got 2"),
        (
            {"x": np.full((2, 3, 64), np.nan), "y": np.zeros((2, 3), int)},
            r"x in .*s\.npz must hold finite .* got nan at",
        ),
        (
            {"x": np.full((2, 3, 64), 1e300), "y": np.zeros((2, 3), int)},
            r"x in .*s\.npz must hold finite .* got 1e\+300",
        ),
        (
            {"x": np.zeros((6, 64)), "y": np.zeros(6, int), "offsets": np.array([0.0, 2.5, 6.0])},
            r"offsets in .*s\.npz must hold integers, got float64",
        ),
        (
            {"x": np.zeros((2, 3, 63)), "y": np.zeros((2, 3), int)},
            r"x in .*s\.npz must have rows of shape \[64\], got \[63\]",
        ),
        (
            {"x": np.zeros((2, 3, 64)), "y": np.zeros((2, 3, 1), int)},
            r"y in .*s\.npz must have rows of shape \[\], got \[1\]",
        ),
        ({"x": np.zeros((2, 3, 64)), "y": np.full((2, 3), 3)}, r"y in .*s\.npz must hold classes in 0 \.\. 2, got 3"),
        ({"x": np.zeros((2, 3, 64)), "y": np.full((2, 3), -1)}, r"y in .*s\.npz must hold classes in 0 \.\. 2, got -1"),
        (np.zeros((2, 3, 64)), r"s\.npz is not an npz file of arrays"),
        (b"not an archive", r"s\.npz is not an npz file of arrays"),
        (None, r"s\.npz does not exist"),
    ],
)
def test_bad_files_for_adapt_are_one_line(capsys, tmp_path, digits_run, support, message):
    if isinstance(support, dict):
        np.savez(tmp_path / "s.npz", **support)
    elif isinstance(support, np.ndarray):
        with open(tmp_path / "s.npz", "wb") as file:
            np.save(file, support)
    elif support is not None:
        (tmp_path / "s.npz").write_bytes(support)
    np.savez(tmp_path / "q.npz", x=np.zeros((2, 3, 64)))
    folders = ["--support", tmp_path / "s.npz", "--query", tmp_path / "q.npz", "--out", tmp_path / "out"]
    assert re.search(message, run(capsys, "adapt", digits_run, *folders, code=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"x": np.full((4, 3, 64), np.inf)}, r"x in .*q\.npz must hold finite numbers, got inf at \[0, 0, 0\]"),
        ({"x": np.zeros((4, 3, 64)), "y": np.full((4, 3), 7)}, r"y in .*q\.npz must hold classes in 0 \.\. 2, got 7"),
        ({"x": np.zeros((4, 3, 8, 8))}, r"x in .*q\.npz must have rows of shape \[64\], got \[8, 8\]"),
    ],
)
def test_a_bad_query_is_one_line_before_anything_is_written(capsys, tmp_path, digits_run, query, message):
    batch = digit_tasks()
    np.savez(tmp_path / "s.npz", x=batch.support.x.numpy(), y=batch.support.y.numpy())
    np.savez(tmp_path / "q.npz", **query)
    folders = ["--support", tmp_path / "s.npz", "--query", tmp_path / "q.npz", "--out", tmp_path / "out"]
    assert re.search(message, run(capsys, "adapt", digits_run, *folders, code=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("y", [np.full((2, 3, 1), np.nan), np.zeros((2, 3)), np.zeros((2, 3, 2))])
def test_bad_targets_for_adapt_are_one_line(capsys, tmp_path, sinusoid_run, y):
    np.savez(tmp_path / "s.npz", x=np.zeros((2, 3, 1)), y=y)
    np.savez(tmp_path / "q.npz", x=np.zeros((2, 3, 1)))
    folders = ["--support", tmp_path / "s.npz", "--query", tmp_path / "q.npz", "--out", tmp_path / "out"]
    message = r"y in .*s\.npz must (hold finite numbers, got nan|have rows of shape \[1\], got \[2?\])"
    assert re.search(message, run(capsys, "adapt", sinusoid_run, *folders, code=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["train", "bogus"], "No such command 'bogus'"),
        (["train", "--bogus", "1"], "No such option: --bogus"),
        (["train", "--iterations", "x"], "'--iterations'"),
        (["train", "--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["train", "--minutes", "-1"], "--minutes must be above 0, got -1"),
        (["train", "--lr", "nan"], "--lr must be a finite number above 0, got nan"),
        (["train", "--meta-lr", "0"], r"--meta-lr must be a finite number above 0, got 0\.0"),
        (["train", "--meta-batch", "0"], "--meta-batch must be at least 1, got 0"),
        (["train", "--query-shots", "0"], "--query-shots must be at least 1, got 0"),
        (["train", "--eval-tasks", "1"], "--eval-tasks must be at least 2, got 1"),
        (["train", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["train", "--device", "nonsense"], "--device must be a device that torch can use here, got 'nonsense'"),
        (["train", "--device", "meta"], "--device must be a device that torch can use here, got 'meta'"),
        (["train", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["train", "--threads", "100000000000"], r"--threads must be at most \d+, got 100000000000"),
        (["train", "--iterations", str(2**40)], "--iterations must be at most 1099511627775, got 1099511627776"),
        (["train", "--threads", "many"], "--threads must be auto or a number, got 'many'"),
        (["train", "--preset", "maml"], "--preset must be one of maml-sinusoid, .*, got maml$"),
        (["train", "--seed", "1", "--preset"], "--preset must be one of maml-sinusoid, .*, got nothing$"),
        (
            ["train", "digits", "--preset", "maml-sinusoid"],
            "maml-sinusoid must stand with sinusoid or alone, got digit",
        ),
        (["train", "--preset", "maml-omniglot-mlp-5w1s"], "Missing option '--root'"),
        (["train", "digits", "--ways", "4"], "ways must be at most the number of classes, 3, got 4"),
        (["train", "digits", "--norm", "layer"], "'--norm'.*'layer'"),
        (["train", "omniglot"], "Missing option '--root'"),
        (["train", "omniglot", "--root", "nowhere"], "images_background.*nowhere"),
        (["evaluate"], "Missing argument 'RUN'"),
        (["evaluate", "nowhere"], r"nowhere is not a run of mtml-fast train: it holds no config\.json"),
        (["adapt", "nowhere", "--support", "a", "--query", "b", "--out", "c"], "nowhere is not a run"),
    ],
)
def test_errors_are_one_line_with_the_name_and_the_value(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, run(capsys, *arguments, code=2), re.I)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: Expecting"),
        ('{"a": 1}', "unknown entry 'a'"),
        ("{}", "missing 13"),
        ("[1]", "it must hold an object, got list"),
        ({"experiment": "digit"}, "experiment must be one of sinusoid, digits, omniglot, got 'digit'"),
        ({"shots": "1"}, "shots must be int, got '1'"),
        ({"shots": True}, "shots must be int, got True"),
        ({"hidden": [64, "64"]}, "hidden must be a list of widths, got [64, '64']"),
        ({"hidden": 64}, "hidden must be list, got 64"),
        ({"lr": None}, "lr must be float or int, got None"),
        ({"norm": "layer"}, "norm must be 'batch' or null, got 'layer'"),
        ({"first_order": 0}, "first_order must be bool, got 0"),
        ({"ways": None}, "ways must be given but for sinusoid, got None for digits"),
        ({"root": 3}, "root must be str or null, got 3"),
    ],
)
def test_a_damaged_config_is_one_line(capsys, tmp_path, digits_run, text, message):
    if isinstance(text, dict):
        text = json.dumps({**json.loads((digits_run / "config.json").read_text()), **text})
    (tmp_path / "config.json").write_text(text)
    for command in (["evaluate", tmp_path], ["train", "digits", "--out", tmp_path]):
        line = run(capsys, *command, code=2)
        assert f"{tmp_path / 'config.json'} is damaged: " in line
        assert message in line
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_run_without_a_checkpoint_is_one_line(capsys, tmp_path, digits_run):
    for name in ("config.json", "history.csv"):
        (tmp_path / name).write_bytes((digits_run / name).read_bytes())
    assert run(capsys, "evaluate", tmp_path, code=2) == f"error: {tmp_path} holds no checkpoint"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "history.csv"]


def test_the_sinusoid_has_no_other_split(capsys, sinusoid_run):
    line = run(capsys, "evaluate", sinusoid_run, "--split", "train", code=2)
    assert "--split must be test for a sinusoid run, whose tasks are always new ones, got train" in line


def test_a_damaged_checkpoint_is_a_warning_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_SPEED_SECONDS", 0.1)
    options = ["train", "--eval-tasks", "2", "--out", str(tmp_path), "--iterations"]
    run(capsys, *options, 2)
    path = tmp_path / "step-00000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    # outside of pytest's rule that a warning is an error
    with monkeypatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert main([*options, "3"]) == 0
    out, err = capsys.readouterr()
    assert "3 meta-steps, about" in out
    assert re.search(r"^warning: .*step-00000002\.safetensors is damaged: .*; going on from step-00000000", err, re.M)


def test_the_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("MTML_FAST_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", str(tmp_path)])


def test_without_its_library_the_command_line_says_what_to_install(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mtml_fast.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert run(capsys, "env", code=2) == "error: the command line needs typer: pip install 'mtml_fast[train]'"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["before", "after", "imports"])
def test_a_signal_outside_of_training_stops_without_a_traceback(capsys, tmp_path, monkeypatch, number, code, moment):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), number)
        pytest.fail("the signal must act at once")

    if moment == "imports":
        monkeypatch.setattr("mtml_fast.cli._run", stopped)
    else:
        owner, name = (train, "_steps_per_second") if moment == "before" else (report, "evaluation")
        monkeypatch.setattr(owner, name, stopped)
    try:
        exit_code = main(["train", "--iterations", "1", "--out", str(tmp_path)])
    except SystemExit as stop:
        exit_code = stop.code
    assert exit_code == code
    assert "Traceback" not in "".join(capsys.readouterr())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_exits_as_a_shell_expects_and_goes_on(tmp_path, number, code):
    command = [sys.executable, "-m", "mtml_fast", "train", "--iterations", "10000000", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "stopping after this step" in err
    assert "Traceback" not in err
    _, _, step = open_run(tmp_path)
    assert step > 0
