"""kill -9, Ctrl-C and SIGTERM at any moment: nothing is lost, and the resumed run ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mtml_fast.files import load_tensors
from mtml_fast.trainers.checkpoint import Checkpoints
from mtml_fast.trainers.interrupts import Interrupts

from .runs import make
from .test_trainer import assert_same, end_state

RUNS = Path(__file__).with_name("runs.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(autouse=True)
def one_thread():
    """The thread count of the runs in other processes: torch's sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state_of(folder):
    state = Checkpoints(folder).load()
    for row in state["history"]:
        del row["seconds"], row["tasks_per_second"]
    del state["seconds"]
    return state


def test_twenty_kills_change_no_bit(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    command = [sys.executable, str(RUNS), "kill", str(tmp_path / "killed"), "20", str(seed)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    print(f"seed {seed}, checkpoints at the kills: {done.stdout}{done.stderr}")
    assert done.returncode == 0
    reached = [int(step) for step in done.stdout.split()]
    # the kills met a run that moved on, and none of them threw it back
    assert len({*reached}) > 3
    assert reached == sorted(reached)
    make(tmp_path / "whole").fit(reached[-1] + 37)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))
    assert_same(*(load_tensors(tmp_path / run / "best.safetensors") for run in ("whole", "killed")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number, code):
    command = [sys.executable, str(RUNS), "train", str(tmp_path), "1000000"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    # past the first few checkpoints: certainly training
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("step-0000001*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    # python turns an uncaught KeyboardInterrupt into the death that a shell reports as 130
    assert process.returncode == code, err
    assert "stopping after this step" in err
    resumed = make(tmp_path)
    assert_same(end_state(make().fit(resumed.step))["algorithm"], end_state(resumed)["algorithm"])


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def at_call(monkeypatch, owner, name, call=1, action=interrupt):
    """Run `action` at the start of the given call of `owner.name`."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("name", "call", "saved"),
    [
        # before the first step; in a step; in a validation; in a save; in the last save
        ("_save", 1, 0),
        ("_train_step", 3, 3),
        ("_validate", 1, 8),
        ("_save", 2, 5),
        ("_save", 6, 20),
    ],
)
def test_ctrl_c_in_every_phase(tmp_path, monkeypatch, name, call, saved):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = make(tmp_path)
    at_call(monkeypatch, trainer, name, call)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(20)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = make(tmp_path)
    assert resumed.step == saved
    assert_same(end_state(make().fit(20)), end_state(resumed.fit(20)))


@pytest.mark.parametrize("owner", [torch.Tensor, os])
def test_the_second_signal_acts_at_once(tmp_path, monkeypatch, owner):
    trainer = make(tmp_path, checkpoint_every=4)

    def twice():
        interrupt()
        interrupt()
        pytest.fail("the second signal must not wait")

    with monkeypatch.context() as patch:
        # in the middle of a step, and in the middle of writing a checkpoint
        if owner is os:
            at_call(patch, os, "replace", 4, twice)
        else:
            at_call(patch, torch.Tensor, "backward", 6, twice)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(20)
    resumed = make(tmp_path, checkpoint_every=4)
    assert resumed.step in (0, 4)
    assert_same(end_state(make().fit(20)), end_state(resumed.fit(20)))


def test_sigterm_in_a_library_is_system_exit(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    at_call(monkeypatch, trainer, "_train_step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        trainer.fit(20)
    assert stop.value.code == 143
    assert make(tmp_path).step == 2


def test_without_a_folder_the_step_is_still_finished(monkeypatch):
    trainer = make()
    at_call(monkeypatch, trainer, "_train_step", 2)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(20)
    assert trainer.step == 2
    assert_same(end_state(make().fit(20)), end_state(trainer.fit(20)))


def test_other_threads_train_without_handlers():
    before, seen, trainer = signal.getsignal(signal.SIGINT), [], make()
    step = trainer._train_step

    def look():
        seen.append(signal.getsignal(signal.SIGINT))
        step()

    trainer._train_step = look
    thread = threading.Thread(target=trainer.fit, args=(3,))
    thread.start()
    thread.join()
    assert trainer.step == 3
    assert seen == [before] * 3


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            interrupt()
        assert interrupts.received is None
    finally:
        signal.signal(signal.SIGINT, before)
