"""Trainer: the loop, exact resume, validation, early stopping, and what it refuses."""

import csv
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mtml_fast as mf
from mtml_fast.files import load_tensors
from mtml_fast.trainers.checkpoint import load_best
from mtml_fast.trainers.evaluation import Evaluation, evaluate
from mtml_fast.trainers.trainer import Trainer

from .runs import Lines, Pooled, make

CLOCK = ("tasks_per_second", "seconds")


def without_clock(rows):
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_same(a, b, place="state"):
    """Equal to the last bit, whatever the tree."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}.{i}")
    else:
        assert a == b, place


def end_state(trainer):
    state = {**trainer._state(), "history": without_clock(trainer.history)}
    # the stream of random numbers that the next step will use
    state["random"] = trainer._random
    del state["seconds"]
    return {**state, "algorithm": dict(state["algorithm"])}


def test_the_loop_is_the_plain_one():
    algorithm, tasks = Pooled(), Lines()
    optimizer = torch.optim.Adam(algorithm.parameters(), 0.01)
    losses = []
    for step in range(7):
        loss = algorithm(tasks.sample(3, step)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trained = Pooled()
    trainer = Trainer(
        trained,
        tasks,
        meta_batch=3,
        optimizer=lambda params, lr: torch.optim.Adam(params, lr),
        meta_lr=0.01,
        log_every=7,
        progress=False,
    )
    assert trainer.fit(7) is trainer
    assert_same(dict(algorithm.state_dict()), dict(trained.state_dict()))
    (row,) = trainer.history
    assert row["step"] == 7
    assert row["train_loss"] == pytest.approx(sum(losses) / 7, rel=1e-12)
    assert row["validation"] is None


def test_clip_grad_and_scheduler_act():
    tasks, algorithm = Lines(), Pooled()
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [p.detach().clone() for p in algorithm.parameters()]
    trainer = Trainer(
        algorithm, tasks, optimizer=optimizer, scheduler=schedule, clip_grad=1e-3, meta_batch=2, progress=False
    )
    trainer.fit(1)
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(algorithm.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-2)
    trainer.fit(3)
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("stops", [[5], [1, 2, 13], [8, 16, 24, 32], [39]])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stops, monkeypatch):
    undisturbed = make(tmp_path / "a").fit(40)

    for stop in stops:
        trainer = make(tmp_path / "b")
        step = trainer._train_step

        # stops where a signal would: after a step, not at the end of a fit
        def interrupted(trainer=trainer, step=step, stop=stop):
            step()
            if trainer.step == stop:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(trainer, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(40)
        assert make(tmp_path / "b").step == stop
    resumed = make(tmp_path / "b")
    # what others draw in between must not matter
    torch.manual_seed(12345)
    resumed.fit(40)

    assert_same(end_state(undisturbed), end_state(resumed))
    assert_same(*(load_tensors(tmp_path / run / "best.safetensors") for run in "ab"))
    rows = [list(csv.DictReader((tmp_path / run / "history.csv").read_text().splitlines())) for run in "ab"]
    assert without_clock(rows[0]) == without_clock(rows[1])


def test_maml_resumes_to_the_same_bits(tmp_path):
    def trainer(folder):
        torch.manual_seed(0)
        rate = nn.Parameter(torch.tensor(0.1))
        maml = mf.MAML(mf.nn.mlp(64, (16,), 3, norm="batch"), lr=rate, steps=2)
        tasks, validation = mf.data.Digits("train", ways=3), mf.data.Digits("validation", ways=3)
        return Trainer(
            maml,
            tasks,
            meta_batch=4,
            optimizer=lambda params, lr: torch.optim.Adam(params, lr, fused=True),
            validation=validation,
            validate_every=4,
            validation_tasks=6,
            checkpoint=folder,
            progress=False,
        )

    pytest.importorskip("sklearn")
    whole = trainer(tmp_path / "a").fit(10)
    trainer(tmp_path / "b").fit(3)
    parts = trainer(tmp_path / "b").fit(10)
    assert whole.algorithm.lr.item() != 0.1
    assert_same(dict(whole.algorithm.state_dict()), dict(parts.algorithm.state_dict()))
    assert_same(whole.optimizer.state_dict()["state"], parts.optimizer.state_dict()["state"])
    assert whole.best["value"] == parts.best["value"]
    test = mf.data.Digits("test", ways=3, query_shots=5)
    result = parts.evaluate(test, 30, steps=5)
    assert result.metric == "accuracy"
    assert result.mean == whole.evaluate(test, 30, steps=5, meta_batch=30).mean
    assert parts.evaluate(test, 30, metric="loss").mean == pytest.approx(parts.evaluate(test, 30).loss)
    assert parts.adapt(test.sample(2).support, steps=5).num_tasks == 2


# which torch finds worth a warning
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
def test_a_run_resumes_where_its_algorithm_is(tmp_path):
    """With losses since the last row of history, which those of the next steps will join."""

    def trainer(device):
        return Trainer(Pooled().to(device), Lines(), meta_batch=4, log_every=5, progress=False, checkpoint=tmp_path)

    def interrupted():
        _train_step()
        if first.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    first = trainer("cpu")
    _train_step, first._train_step = first._train_step, interrupted
    with pytest.raises(KeyboardInterrupt):
        first.fit(20)
    resumed = trainer("meta")
    assert (resumed.step, len(resumed._losses), len(resumed._accuracies)) == (7, 2, 2)
    assert {t.device.type for t in (*resumed._losses, *resumed._accuracies)} == {"meta"}


def test_early_stopping_survives_a_resume(tmp_path):
    class Worsening(Pooled):
        def forward(self, batch, steps=None):
            result = super().forward(batch, steps)
            if not self.training:
                result.metrics = {"accuracy": torch.full_like(result.task_losses, 1.0 / (1 + self.validations))}
                self.validations += 1
            return result

    def trainer(folder):
        algorithm = Worsening()
        algorithm.validations = 0
        return Trainer(
            algorithm,
            Lines(),
            validation=Lines(1),
            validate_every=2,
            validation_tasks=5,
            patience=3,
            meta_batch=5,
            checkpoint=folder,
            progress=False,
        )

    first = trainer(tmp_path).fit(100)
    # the first validation is the best, the three after it are not
    assert first.step == 8
    assert first.stopped_early
    assert first.best["step"] == 2
    again = trainer(tmp_path)
    assert again.stopped_early
    assert again.fit(100).step == 8


def test_best_weights(tmp_path):
    trainer = make(tmp_path).fit(40)
    validations = {row["step"]: row["validation"] for row in trainer.history if row["validation"] is not None}
    assert list(validations) == [8, 16, 24, 32, 40]
    assert trainer.best["value"] == max(validations.values()) == validations[trainer.best["step"]]
    trainer.load_best()
    again = evaluate(trainer.algorithm, Lines(1), 5, meta_batch=3, episodes=2**40)
    assert again.mean == trainer.best["value"]

    other = Pooled(width=8)
    assert load_best(other, tmp_path) == trainer.best["step"]
    assert_same(dict(other.state_dict()), dict(trainer.algorithm.state_dict()))


def test_monitoring_the_loss_prefers_the_lower():
    trainer = make(monitor="loss").fit(24)
    validations = [row["validation"] for row in trainer.history if row["validation"] is not None]
    assert trainer.best["value"] == min(validations)


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_a_validation_that_is_not_finite_is_worse_than_any_other(tmp_path, monitor):
    values = [math.nan, math.inf, -math.inf, 0.5, math.nan, 0.75, 0.25, -math.inf, math.inf, 0.5]
    trainer = make(tmp_path, monitor=monitor, validate_every=1)

    def validation(num_tasks):
        result = torch.full((num_tasks,), values[trainer.step - 1], dtype=torch.float64)
        return Evaluation(monitor, result, result)

    trainer._evaluate_validation = validation
    trainer.fit(3)
    assert trainer.best is None
    with pytest.raises(ValueError, match="load_best needs a validation with a finite result"):
        trainer.load_best()
    trainer.fit(9)
    assert trainer.best["step"] == {"loss": 7, "accuracy": 6}[monitor]
    # a best that is not finite, as an older file may have, gives way
    trainer.best["value"] = math.nan
    trainer.fit(10)
    assert trainer.best["value"] == 0.5


def test_evaluation_is_fixed_and_leaves_no_trace():
    trainer = make().fit(3)
    before, random_state = end_state(trainer), torch.get_rng_state()
    frozen = trainer.algorithm.net[1].eval()
    results = [trainer.evaluate(Lines(2, "test"), 20, meta_batch=size) for size in (1, 7, 20)]
    assert not frozen.training
    assert trainer.algorithm.net[3].training
    assert_same(before, end_state(trainer))
    assert torch.equal(random_state, torch.get_rng_state())
    for result in results:
        assert torch.allclose(result.losses, results[0].losses, rtol=1e-6)
        assert torch.equal(result.values, results[0].values)
    assert str(results[0]).startswith("test accuracy 0.")
    assert str(results[0]).endswith("over 20 tasks")


def test_confidence_interval():
    values = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    result = Evaluation("accuracy", values, values)
    assert result.mean == 0.75
    assert result.ci95 == pytest.approx(1.96 * 0.5 / 2)
    assert str(result) == "accuracy 0.750 +- 0.490 over 4 tasks"


def test_tasks_that_are_not_finite_are_counted():
    values, nan = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), math.nan
    losses = torch.tensor([1.0, nan, 1.0], dtype=torch.float64)
    assert str(Evaluation("accuracy", values, losses)).endswith("over 3 tasks, 1 of them not finite")
    values = torch.tensor([nan, 1.0, 1.0], dtype=torch.float64)
    assert str(Evaluation("mae", values, losses, "test")) == "test mae nan +- nan over 3 tasks, 2 of them not finite"


@pytest.mark.parametrize("meta_batch", [1, 3, 100])
def test_a_finite_number_of_tasks_is_not_counted_twice(meta_batch):
    class Seen(Pooled):
        def forward(self, batch, steps=None):
            seen.extend(batch.support.x[:, 0, 0].tolist())
            return super().forward(batch, steps)

    x = torch.arange(7.0)[:, None, None].expand(7, 4, 1)
    tasks, algorithm = mf.data.TensorTasks(x, torch.zeros(7, 4)), Seen()
    for wanted, n in ((600, 7), (8, 7), (7, 7), (5, 5)):
        seen = []
        result = evaluate(algorithm, tasks, wanted, meta_batch=meta_batch)
        assert result.n == len(result.values) == n
        assert len(set(seen)) == len(seen) == n
        assert str(result).endswith(f"over {n} tasks")
    # a single task has a mean and no interval
    alone = evaluate(algorithm, mf.data.TensorTasks(x[:1], torch.zeros(1, 4)), 600)
    assert str(alone) == f"accuracy {alone.mean:.3f} +- nan over 1 task"


class Breaking(Pooled):
    """The loss is NaN from a given call on."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, batch, steps=None):
        result = super().forward(batch, steps)
        if self.calls >= self.at:
            result.loss = result.loss * math.nan
        self.calls += 1
        return result


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    reference = Pooled()
    options = {"meta_batch": 3, "log_every": 4, "checkpoint_every": 5, "progress": False}
    Trainer(reference, Lines(), **options).fit(12)
    algorithm = Breaking(at=12)
    trainer = Trainer(algorithm, Lines(), checkpoint=tmp_path, **options)
    with pytest.raises(FloatingPointError, match=r"training loss is nan at step 12 .*step-00000010\.safetensors") as e:
        trainer.fit(50)
    assert "\n" not in str(e.value)
    assert trainer.step == 12
    assert_same(dict(algorithm.net[0].state_dict()), dict(reference.net[0].state_dict()))
    assert Trainer(Breaking(10**9), Lines(), checkpoint=tmp_path, **options).step == 10


def test_non_finite_weights_are_not_saved(tmp_path):
    trainer = make(tmp_path, checkpoint_every=4, validation=None, patience=None)
    step = trainer._train_step

    def poisoned():
        step()
        if trainer.step == 8:
            trainer.algorithm.net[0].weight.data[0] = math.inf

    trainer._train_step = poisoned
    with pytest.raises(FloatingPointError, match=r"net\.0\.weight is not finite after step 7: not saved"):
        trainer.fit(20)
    assert make(tmp_path, validation=None, patience=None).step == 4


class Sum(nn.Module):
    """Loss without any metric, on one parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, batch, steps=None):
        losses = self.w.sum().expand(batch.num_tasks)
        return SimpleNamespace(loss=losses.mean(), task_losses=losses, metrics={})


def test_an_algorithm_without_metrics_is_judged_by_its_loss(tmp_path):
    trainer = Trainer(Sum(), Lines(), validation=Lines(1), validate_every=5, checkpoint=tmp_path, progress=False)
    trainer.fit(10)
    assert trainer.monitor == "loss"
    assert trainer.history[-1]["train_accuracy"] is None
    assert trainer.best["step"] == 10
    with pytest.raises(ValueError, match="metric or monitor must be one of loss, got 'f1'"):
        Trainer(Sum(), Lines(), validation=Lines(1), monitor="f1", progress=False)
    with pytest.raises(ValueError, match="metric or monitor must be one of loss, got 'f1'"):
        evaluate(Sum(), Lines(), 4, metric="f1")


def test_minutes_caps_the_run(tmp_path):
    trainer = make(tmp_path, log_every=10**6, validation=None, patience=None)
    trainer.fit(10**9, minutes=0.005)
    assert 0 < trainer.step < 10**6
    assert make(tmp_path, log_every=10**6, validation=None, patience=None).step == trainer.step


def test_progress_goes_to_stderr_in_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("mtml_fast.trainers.progress._LINE_SECONDS", 0.0)
    make(progress=True).fit(3)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step 2 of 3  loss ")
    assert "accuracy" in lines[1]
    assert "tasks/s" in lines[1]


def test_progress_bar_in_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("mtml_fast.trainers.progress._BAR_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    make(progress=True).fit(3)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"meta_batch": 0}, ValueError, "meta_batch must be an int >= 1, got 0"),
        ({"meta_batch": 2.0}, ValueError, r"meta_batch must be an int >= 1, got 2\.0"),
        ({"log_every": None}, ValueError, "log_every must be an int >= 1, got None"),
        ({"meta_lr": None}, ValueError, "meta_lr must be a finite number > 0, got None"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be an int >= 1, got -1"),
        ({"meta_lr": math.nan}, ValueError, "meta_lr must be a finite number > 0, got nan"),
        ({"clip_grad": 0.0}, ValueError, r"clip_grad must be a finite number > 0, got 0\.0"),
        ({"validation": None}, ValueError, "patience needs validation tasks, got patience=1000"),
        ({"validation": [1]}, TypeError, "validation must be a data set with a sample method, got list"),
        ({"validation_steps": -1}, ValueError, "validation_steps must be an int >= 0 or None, got -1"),
        ({"validation_steps": 1.0}, ValueError, r"validation_steps must be an int >= 0 or None, got 1\.0"),
        ({"monitor": 3}, TypeError, "monitor must be the name of a metric or None, got int"),
        ({"monitor": "f1"}, ValueError, "metric or monitor must be one of loss, accuracy, got 'f1'"),
        (
            {"optimizer": lambda params, lr: torch.optim.LBFGS(params, lr), "scheduler": None},
            TypeError,
            "optimizer must step once a gradient, without a closure, got LBFGS",
        ),
        ({"resume": "yes"}, ValueError, "resume must be 'auto', True or False, got 'yes'"),
        ({"resume": True}, ValueError, "resume=True needs a checkpoint folder"),
        ({"scheduler": "cosine"}, TypeError, "scheduler must be a torch scheduler or a callable giving one, got str"),
        (
            {"scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)},
            TypeError,
            "scheduler must step without a metric, got ReduceLROnPlateau",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 1.0), 1)},
            ValueError,
            "scheduler must belong to the trainer's optimizer",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_bad_algorithm_tasks_and_steps_are_named():
    with pytest.raises(TypeError, match=r"algorithm must be an nn\.Module, got int"):
        Trainer(3, Lines())
    with pytest.raises(TypeError, match="tasks must be a data set with a sample method, got int"):
        Trainer(Pooled(), 3)
    with pytest.raises(ValueError, match="algorithm must have parameters to train"):
        Trainer(nn.Identity(), Lines())
    for steps in (-1, 1.0, 2**40):
        with pytest.raises(ValueError, match=rf"steps must be an int in 0 \.\. 2\^40 - 1, got {steps}"):
            make().fit(steps)
    for minutes in (0, "a", math.nan):
        with pytest.raises(ValueError, match=f"minutes must be a number > 0, got {minutes!r}"):
            make().fit(1, minutes=minutes)
    with pytest.raises(TypeError, match="tasks must be a data set with a sample method, got int"):
        make().evaluate(3)
    with pytest.raises(ValueError, match="num_tasks must be an int >= 2"):
        make().evaluate(Lines(), 1)
    with pytest.raises(ValueError, match="meta_batch must be an int >= 1, got 0"):
        make().evaluate(Lines(), 4, meta_batch=0)
    with pytest.raises(ValueError, match="load_best needs a validation"):
        make().load_best()
