"""Checkpoints: what a folder holds, what is refused, what a damaged file does."""

import errno
import os
import re
import signal

import pytest
import torch
from torch import nn

import mtml_fast as mf
from mtml_fast.files import load_tensors, save_tensors
from mtml_fast.trainers.checkpoint import Checkpoints, load_best, pack, unpack
from mtml_fast.trainers.identity import differences, identity
from mtml_fast.trainers.trainer import Trainer

from .runs import Lines, Pooled, make


def names(folder):
    return sorted(os.listdir(folder))


def test_a_folder_holds_the_last_two_and_the_copies(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "runs" / "deep"
    make(folder).fit(23)
    assert names(folder) == [
        "best.safetensors",
        "curves.png",
        "history.csv",
        "step-00000020.safetensors",
        "step-00000023.safetensors",
    ]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "history.csv").read_text().startswith("step,train_loss,train_accuracy,validation,")


def test_a_tree_is_packed_and_unpacked_as_it_was():
    tree = {
        "a": [1, 2.5, None, True, "x", (), {}],
        "betas": (0.9, (0.999, torch.ones(1))),
        "state": {0: {"step": torch.tensor(3.0)}, 1: []},
        "tensor": {"dict": {"tuple": torch.zeros(2)}},
    }
    tensors, json_tree = pack(tree)
    assert set(tensors) == {"betas.1.1", "state.0.step", "tensor.dict.tuple"}
    assert str(unpack(tensors, json_tree)) == str(tree)
    for bad, message in (
        ({"a": {1.5: 0}}, r"a must have str or int keys, got 1\.5"),
        ({"a": [print]}, r"a\.0 must be"),
    ):
        with pytest.raises(TypeError, match=message):
            pack(bad)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
        lambda p, lr: torch.optim.Adam(p, lr, fused=True),
        lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True),
        lambda p, lr: torch.optim.Adagrad(p, lr),
        lambda p, lr: torch.optim.RMSprop(p, lr, centered=True),
        lambda p, lr: torch.optim.Adam([{"params": p[:2]}, {"params": p[2:], "lr": lr / 2}], lr),
    ],
)
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7]),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1),
                torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 50, cycle_momentum=False),
            ],
            [6],
        ),
    ],
)
# SequentialLR itself calls its schedulers in the deprecated way
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_every_optimizer_and_scheduler_resumes_to_the_same_bits(tmp_path, optimizer, scheduler):
    options = {"optimizer": optimizer, "scheduler": scheduler, "clip_grad": None}
    whole = make(tmp_path / "a", **options).fit(12)
    make(tmp_path / "b", **options).fit(5)
    resumed = make(tmp_path / "b", **options)
    assert resumed.step == 5
    resumed.fit(12)
    for a, b in zip(whole.algorithm.state_dict().values(), resumed.algorithm.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert str(whole.optimizer.state_dict()) == str(resumed.optimizer.state_dict())


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path):
    whole = make(tmp_path / "a").fit(20)
    make(tmp_path / "b").fit(15)
    newest = tmp_path / "b" / "step-00000015.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"step-00000015\.safetensors is damaged.*going on from step-00000010"):
        trainer = make(tmp_path / "b")
    assert trainer.step == 10
    trainer.fit(20)
    for a, b in zip(whole.algorithm.parameters(), trainer.algorithm.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "step-00000015.safetensors.damaged" in names(tmp_path / "b")


def test_no_whole_checkpoint_is_one_clear_line(tmp_path):
    make(tmp_path).fit(10)
    for path in tmp_path.glob("step-*"):
        path.write_bytes(path.read_bytes()[:-3])
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"holds no checkpoint that is whole: .*step-00000010\S* is damaged"):
        make(tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_batch": 4}, "holds another run: meta_batch was 3, is 4"),
        ({"meta_lr": 0.02}, r"holds another run: meta_lr was 0\.01, is 0\.02"),
        ({"scheduler": None}, "scheduler was CosineAnnealingLR, is absent"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 400)},
            "another run: scheduler setting T_max was 500, is 400$",
        ),
        ({"validation": Lines(seed=2)}, "another run: validation was lines seed=1, is lines seed=2$"),
        ({"validation_tasks": 6}, "another run: validation_tasks was 5, is 6$"),
        ({"validation_steps": 2}, "another run: validation_steps was absent, is 2$"),
        ({"clip_grad": None}, r"clip_grad was 1\.0, is absent"),
        ({"optimizer": lambda p, lr: torch.optim.SGD(p, lr)}, "optimizer was Adam, is SGD"),
    ],
)
def test_another_run_is_refused_naming_what_differs(tmp_path, changes, message):
    make(tmp_path).fit(1)
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, **changes)
    assert "\n" not in str(error.value)
    assert make(tmp_path).step == 1


def test_another_model_or_data_set_is_refused_naming_what_differs(tmp_path, monkeypatch):
    make(tmp_path).fit(1)
    with monkeypatch.context() as patch:
        patch.setitem(make.__globals__, "Lines", lambda *args, **kwargs: Lines(seed=7))
        with pytest.raises(ValueError, match="tasks was lines seed=0, is lines seed=7; seed was 0, is 7"):
            make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(make.__globals__, "Pooled", lambda: Pooled(width=9))
        message = r"parameter net\.0\.weight was \[8, 1\] torch\.float32, is \[9, 1\] torch\.float32; .* and \d+ more"
        with pytest.raises(ValueError, match=message):
            make(tmp_path)


class Settings(Pooled):
    """What another experiment may change without any tensor's shape telling."""

    def __init__(self, activation=nn.Tanh, **settings):
        super().__init__()
        self.net[2] = activation()
        self.settings = settings

    def extra_repr(self):
        return f"{self.settings}, {print}, {make}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, r"algorithm was Settings\(\{'lr': 0\.1\}.*\), is Settings\(\{'lr': 0\.2\}"),
        ({"activation": nn.ReLU}, r"module net\.2 was Tanh\(\), is ReLU\(\)$"),
        ({"betas": (0.8, 0.999)}, r"optimizer group 0 betas was \(0\.9, 0\.999\), is \(0\.8, 0\.999\)$"),
        ({"weight_decay": 0.1}, r"optimizer group 0 weight_decay was 0, is 0\.1$"),
    ],
)
def test_other_settings_of_algorithm_and_optimizer_are_another_run(tmp_path, changes, message):
    def trainer(betas=(0.9, 0.999), weight_decay=0, lr=0.1, fused=True, **model):
        def adam(params, lr):
            return torch.optim.Adam(params, lr, betas, weight_decay=weight_decay, fused=fused)

        return Trainer(Settings(lr=lr, **model), Lines(), optimizer=adam, checkpoint=tmp_path, progress=False)

    trainer().fit(1)
    with pytest.raises(ValueError, match=message) as error:
        trainer(**changes)
    assert "\n" not in str(error.value)
    assert trainer().step == 1
    assert "<function make>" in trainer()._run["algorithm"]
    # how the step is computed is no part of the experiment
    assert trainer(fused=False).step == 1


@pytest.mark.parametrize("changes", [{"steps": 2}, {"lr": 0.02}, {"first_order": True}, {"momentum": 0.5}])
def test_another_inner_loop_is_another_run(tmp_path, changes):
    def trainer(**inner):
        model = mf.nn.mlp(1, (4,), 1)
        options = {"meta_batch": 2, "checkpoint": tmp_path, "progress": False}
        return Trainer(mf.MAML(model, **{"lr": 0.01, "steps": 1, **inner}), Lines(), **options)

    trainer().fit(1)
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"algorithm was MAML.*, is MAML.*{name}={value}"):
        trainer(**changes)
    assert trainer().step == 1


@pytest.mark.parametrize(
    ("schedule", "other"),
    [
        (lambda o, n: torch.optim.lr_scheduler.StepLR(o, n), "step_size was 3, is 4"),
        (lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [n, 9]), r"milestones was \{3: 1, 9: 1\}, is \{4: 1"),
        (lambda o, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, n), "T_0 was 3, is 4"),
        (lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10 * n), "total_steps was 30, is 40"),
        (
            lambda o, n: torch.optim.lr_scheduler.SequentialLR(
                o,
                [torch.optim.lr_scheduler.LinearLR(o, 0.1), torch.optim.lr_scheduler.CosineAnnealingLR(o, n)],
                milestones=[2],
            ),
            "_schedulers was .*'T_max': 3",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_a_schedule_is_known_by_its_settings_however_far_it_is(tmp_path, schedule, other):
    first = make(tmp_path / "a", scheduler=lambda o: schedule(o, 3)).fit(7)
    assert make(tmp_path / "a", scheduler=lambda o: schedule(o, 3)).step == 7
    with pytest.raises(ValueError, match=f"another run: .*{other}"):
        make(tmp_path / "a", scheduler=lambda o: schedule(o, 4))
    # what has moved describes itself as what has not
    moved = identity(first.algorithm, first.tasks, first.optimizer, first.scheduler)
    assert moved["scheduler setting"] == first._run["scheduler setting"]


def test_a_rate_that_has_been_learned_and_a_schedule_do_not_make_another_run(tmp_path):
    def trainer():
        rate = nn.Parameter(torch.tensor(0.1))
        maml = mf.MAML(mf.nn.mlp(1, (4,), 1), lr=rate)
        options = {"meta_batch": 2, "meta_lr": 0.1, "checkpoint": tmp_path, "progress": False}
        return Trainer(maml, Lines(), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1), **options)

    first = trainer().fit(3)
    assert first.algorithm.lr.item() != 0.1
    # in the same process, and with what the first one has moved
    options = {"meta_batch": 2, "checkpoint": tmp_path / "b", "progress": False}
    optimizer, scheduler = first.optimizer, first.scheduler
    again = [Trainer(first.algorithm, Lines(), optimizer=optimizer, scheduler=scheduler, **options) for _ in range(2)]
    again[0].fit(2)
    assert Trainer(first.algorithm, Lines(), optimizer=optimizer, scheduler=scheduler, **options).step == 2
    assert trainer().step == 3


def test_differences_names_what_is_missing_on_either_side():
    assert differences({"a": 1, "p": {"x": "s", "y": "s"}}, {"p": {"x": "t", "z": "s"}, "b": 2}) == [
        "p x was s, is t",
        "p z was absent, is s",
        "p y was s, is absent",
        "b was absent, is 2",
        "a was 1, is absent",
    ]


def test_resume_false_and_true_insist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume=True needs a checkpoint, and folder .* holds none"):
        make(tmp_path / "new", resume=True)
    make(tmp_path / "run").fit(2)
    with pytest.raises(FileExistsError, match=r"checkpoint folder .*run holds a run: choose another, or resume it"):
        make(tmp_path / "run", resume=False)
    assert make(tmp_path / "run", resume=True).step == 2


def test_a_folder_with_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "history.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds a history\.csv but no checkpoint"):
        make(tmp_path)
    assert (tmp_path / "history.csv").read_text() == "mine"


def test_an_unusable_folder_is_one_line_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"checkpoint folder .*file/run cannot be written: Not a directory"):
        make(tmp_path / "file" / "run")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="cannot be written: Permission denied"):
            make(tmp_path / "run")
        tmp_path.chmod(0o700)


def full_disk(monkeypatch, after):
    """The disk has room for `after` more writes."""
    left = [after]
    fsync = os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_shows_before_the_first_step(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    full_disk(monkeypatch, 0)
    with pytest.raises(OSError, match=r"step-00000000\.safetensors cannot be written: No space left on device"):
        trainer.fit(10)
    assert trainer.step == 0
    assert names(tmp_path) == []


@pytest.mark.parametrize("room", range(2, 17))
def test_a_disk_that_fills_up_loses_no_checkpoint(tmp_path, monkeypatch, room):
    with monkeypatch.context() as patch:
        full_disk(patch, room)
        with pytest.raises(OSError, match="cannot be written: No space left on device"):
            make(tmp_path).fit(20)
    for path in tmp_path.glob("*.safetensors"):
        load_tensors(path)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    resumed, whole = make(tmp_path).fit(20), make().fit(20)
    for a, b in zip(whole.algorithm.parameters(), resumed.algorithm.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    make(tmp_path).fit(2)
    (tmp_path / ".step-00000005.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / ".history.csv.123.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    make(tmp_path)
    assert [name for name in names(tmp_path) if name.startswith(".")] == [".mine.tmp"]


@pytest.mark.parametrize("folder", ["", "missing"])
def test_loading_where_there_is_no_checkpoint_is_one_line_and_writes_nothing(tmp_path, folder):
    for read in (Checkpoints(tmp_path / folder).load, lambda: load_best(Pooled(), tmp_path / folder)):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / folder} holds no checkpoint")):
            read()
    assert names(tmp_path) == []


def test_reading_writes_nothing(tmp_path, monkeypatch):
    trainer = make(tmp_path).fit(12)
    (tmp_path / "best.safetensors").unlink()
    newest = tmp_path / "step-00000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    # a live process's file
    (tmp_path / ".step-00000013.safetensors.123.tmp").write_bytes(b"half")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def written(*args, **kwargs):
        pytest.fail("reading must not write")

    with monkeypatch.context() as patch:
        # as a read-only folder would, whoever runs the tests
        for name in ("mkdir", "touch", "unlink", "rename"):
            patch.setattr(type(tmp_path), name, written)
        with pytest.warns(RuntimeWarning, match=r"step-00000012\S* is damaged.*going on from step-00000010"):
            assert load_best(trainer.algorithm, tmp_path) == 10
        with pytest.warns(RuntimeWarning, match="is damaged"):
            assert Checkpoints(tmp_path).load()["step"] == 10
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_second_trainer_in_the_folder_is_refused_while_the_first_trains(tmp_path):
    pytest.importorskip("fcntl")
    trainer, waiting = make(tmp_path), make(tmp_path)
    step = trainer._train_step

    def others():
        step()
        for other in (lambda: make(tmp_path), lambda: waiting.fit(3)):
            with pytest.raises(BlockingIOError, match=r"checkpoint folder .* is in use by another trainer") as error:
                other()
            assert "\n" not in str(error.value)
        # reading is free
        assert Checkpoints(tmp_path).load()["step"] == 0

    trainer._train_step = others
    trainer.fit(2)
    # it does not know what has been trained since it was made
    with pytest.raises(FileExistsError, match=r"written by another trainer meanwhile.* from its step-00000002"):
        waiting.fit(3)
    assert make(tmp_path).fit(3).step == 3


def test_a_killed_trainer_leaves_no_lock(tmp_path):
    pytest.importorskip("fcntl")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Checkpoints(tmp_path).owned():
            os.write(writer, b"x")
            signal.pause()
    try:
        os.read(reader, 1)
        with pytest.raises(BlockingIOError, match="in use by another trainer"):
            make(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    assert make(tmp_path).fit(1).step == 1


def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert make(tmp_path).fit(1).step == 1


def rewritten(path, change):
    """The file again, with its checksums, after a change of its metadata and tensors."""
    tensors, metadata = load_tensors(path)
    save_tensors(path, *(change(tensors, metadata) or (tensors, metadata)))


def other_shape(tensors, metadata):
    name = next(name for name in tensors if name.endswith("net.0.weight"))
    tensors[name] = tensors[name].new_zeros(9, 1)


def without(entry):
    def change(tensors, metadata):
        pairs = metadata["state"]["dict"]
        pairs[:] = [pair for pair in pairs if pair[0] != entry]

    return change


def with_value(entry, value):
    def change(tensors, metadata):
        pairs = metadata["state"]["dict"]
        pairs[:] = [[name, value if name == entry else item] for name, item in pairs]

    return change


UNUSABLE = [
    (lambda tensors, metadata: (tensors, {"kind": "adapted"}), "not a checkpoint of a run"),
    (lambda tensors, metadata: (tensors, [1]), "not a checkpoint of a run"),
    (lambda tensors, metadata: (tensors, {**metadata, "state": 3}), "not a checkpoint of a run"),
    (lambda tensors, metadata: ({}, metadata), "its tree of values does not fit its tensors"),
    (lambda tensors, metadata: (tensors, {**metadata, "state": {"a": 1, "b": 2}}), "its tree of values does not fit"),
    (without("optimizer"), "it lacks 'optimizer'"),
    (without("history"), "it lacks 'history'"),
    (with_value("step", "ten"), "its step must be int, got str"),
    (with_value("history", 0), "its history must be list, got int"),
    (with_value("best", {"dict": [["step", 1]]}), "its best must have a step and a value"),
    (with_value("random", {"dict": [["cpu", 1]]}), "its random holds no state"),
    (with_value("optimizer", {"dict": []}), "its optimizer or scheduler does not fit"),
    (other_shape, r"its net\.0\.weight must be \[8, 1\] torch\.float32, got \[9, 1\]"),
]


@pytest.mark.parametrize(("change", "message"), UNUSABLE)
def test_an_unusable_newest_falls_back_to_the_one_before(tmp_path, change, message):
    make(tmp_path).fit(12)
    rewritten(tmp_path / "step-00000012.safetensors", change)
    with pytest.warns(
        RuntimeWarning, match=rf"step-00000012\S* cannot be used: .*{message}.*going on from step-00000010"
    ):
        trainer = make(tmp_path)
    assert trainer.step == 10
    assert "step-00000012.safetensors.damaged" in names(tmp_path)
    whole = make().fit(14)
    for a, b in zip(whole.algorithm.parameters(), trainer.fit(14).algorithm.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("change", "message"), UNUSABLE)
def test_nothing_but_unusable_checkpoints_is_one_line(tmp_path, change, message):
    make(tmp_path).fit(1)
    for path in tmp_path.glob("step-*"):
        rewritten(path, change)
    with pytest.raises(ValueError, match=rf"{tmp_path}/step-00000001\S* cannot be used: .*{message}") as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: (tensors, {"kind": "adapted"}), "does not hold the best weights of a run"),
        (lambda tensors, metadata: (tensors, []), "does not hold the best weights of a run"),
        (lambda tensors, metadata: (tensors, {**metadata, "step": "8"}), "does not hold the best weights of a run"),
        (lambda tensors, metadata: (tensors, {**metadata, "state": 3}), "its weights must be a dict, got int"),
        (without("net.0.bias"), r"its weights lack 'net\.0\.bias'"),
        (with_value("net.0.bias", 3), r"its net\.0\.bias must be a Tensor, got int"),
        (other_shape, r"its net\.0\.weight must be \[8, 1\] torch\.float32, got \[9, 1\]"),
    ],
)
def test_a_file_that_holds_no_best_weights_is_one_line(tmp_path, change, message):
    make(tmp_path).fit(8)
    rewritten(tmp_path / "best.safetensors", change)
    algorithm = Pooled()
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{tmp_path}/best\.safetensors cannot be used: .*{message}") as error:
        load_best(algorithm, tmp_path)
    assert "\n" not in str(error.value)
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name])
