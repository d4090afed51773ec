"""A Trainer with cuda_graph=True, with a stand-in for CUDA's graphs that keeps their rules on the CPU.

The stand-in records every operation below autograd while a step is captured, with the tensors themselves, and a replay
does them again on the same tensors, in the same places. Python does not run again, so what a graph would repeat for
ever (a rate, a step's tasks, a number read on the host) is repeated here too.
"""

import contextlib
import inspect
import re

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtml_fast as mf
from mtml_fast.ops import _check
from mtml_fast.trainers import cuda_graph, trainer
from mtml_fast.trainers.cuda_graph import WARM_UP, CudaGraphs, GraphedStep
from mtml_fast.trainers.trainer import Trainer

from .runs import Lines, Pooled, make
from .test_trainer import assert_same, end_state

LOG = 7


class Recorder(TorchDispatchMode):
    """What was done while it was on: (operator, arguments, results)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    def again(self):
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for held, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                    # neither changed in place nor a view of what is there
                    if isinstance(held, torch.Tensor) and held.data_ptr() != new.data_ptr():
                        held.detach().copy_(new)


class StandIn:
    """In the place of CudaGraphs: the first replay is that of the capture, which CUDA only notes down."""

    captures = 0

    def __init__(self, device):
        self.warmed_up = 0

    @contextlib.contextmanager
    def warming_up(self):
        self.warmed_up += 1
        yield

    def capture(self, function):
        StandIn.captures += 1
        assert self.warmed_up >= WARM_UP, "kernels are compiled and states made before a capture"
        recorder, replays = Recorder(), []
        with recorder:
            outcome = function()

        def replay():
            if replays:
                recorder.again()
            replays.append(None)
            return outcome

        return replay


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    StandIn.captures = 0
    monkeypatch.setattr(trainer, "CudaGraphs", StandIn)
    # as on a CUDA device: values are not looked at, and the operator itself is called, not the CPU's way around it
    monkeypatch.setattr(_check, "readable", lambda value: False)
    monkeypatch.setattr(trainer, "readable", lambda value: False)
    with mf.backend("operator"):
        yield


def test_the_stand_in_has_the_same_calls():
    for name in ("__init__", "warming_up", "capture"):
        parameters = [[*inspect.signature(getattr(kind, name)).parameters] for kind in (StandIn, CudaGraphs)]
        assert parameters[0] == parameters[1]


def sinusoid(**options):
    torch.manual_seed(3)
    maml = mf.MAML(mf.nn.mlp(1, (8, 8), 1), lr=0.01, steps=2)
    return Trainer(maml, mf.data.Sinusoid(shots=5), meta_batch=4, log_every=LOG, progress=False, **options)


def digits(**options):
    torch.manual_seed(3)
    pool = torch.randn(60, 6)
    tasks = mf.data.TensorClasses(pool, torch.arange(60) % 6, ways=3, shots=1, query_shots=2)
    maml = mf.MAML(mf.nn.mlp(6, (8,), 3), lr=torch.nn.Parameter(torch.tensor(0.1)), steps=2)
    return Trainer(maml, tasks, meta_batch=4, log_every=LOG, progress=False, **options)


def copied(**options):
    torch.manual_seed(3)
    tasks = mf.data.TensorTasks(torch.randn(9, 6, 2), torch.randn(9, 6, 1), shots=3)
    maml = mf.MAML(mf.nn.mlp(2, (8,), 1), lr=0.05, layers="head")
    return Trainer(maml, tasks, meta_batch=4, log_every=LOG, progress=False, **options)


def functional(**options):
    """Batch norm, by torch.func."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 8), torch.nn.BatchNorm1d(8), torch.nn.Softplus(), torch.nn.Linear(8, 1)
    )
    maml = mf.MAML(model, lr=0.01, plan="functional")
    return Trainer(maml, Lines(), meta_batch=4, log_every=LOG, progress=False, **options)


# a rate that float32 holds exactly, as it is halved
HALVED = dict(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5), meta_lr=2.0**-6)
OPTIONS = {
    "adam": dict(),
    "adamw-clipped": dict(optimizer="adamw", clip_grad=0.1),
    "sgd": dict(optimizer=lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)),
    "adam-halved": HALVED,
    "sgd-halved": HALVED | dict(optimizer=lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, fused=True)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make_trainer", [sinusoid, digits, copied, functional], ids=lambda f: f.__name__)
def test_the_same_run_to_the_last_bit(make_trainer, options):
    plain = make_trainer(**options).fit(25)
    graphed = make_trainer(cuda_graph=True, **options).fit(25)
    assert StandIn.captures == 1
    assert_same(end_state(plain), end_state(graphed))
    assert len({row["train_loss"] for row in graphed.history}) == len(graphed.history) == 4


def test_random_numbers_statistics_and_validation():
    """Dropout, batch norm, the best so far, all as without a graph; the schedule up to rounding."""
    plain = make(scheduler=None).fit(30)
    graphed = make(scheduler=None, cuda_graph=True).fit(30)
    assert_same(end_state(plain), end_state(graphed))
    plain, graphed = make().fit(30), make(cuda_graph=True).fit(30)
    for a, b in zip(plain.history, graphed.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    # outside of the graph the optimizer's settings are what they were
    assert_same(plain.scheduler.state_dict(), graphed.scheduler.state_dict())
    settings = [[{**g, "params": None} for g in t.optimizer.param_groups] for t in (plain, graphed)]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("first", [2, WARM_UP, 11])
def test_resume(tmp_path, first):
    """From a run with a graph or without, into one with or without: the same bits."""
    whole = sinusoid().fit(23)
    for i, (before, after) in enumerate([(True, True), (False, True), (True, False)]):
        folder = tmp_path / str(i)
        sinusoid(checkpoint=folder, cuda_graph=before).fit(first)
        resumed = sinusoid(checkpoint=folder, cuda_graph=after)
        assert resumed.step == first
        resumed.fit(23)
        weights = [dict(t.algorithm.state_dict()) for t in (whole, resumed)]
        assert_same(*weights)


def test_a_fit_captures_anew():
    """What was changed between two fits is in force."""
    plain, graphed = sinusoid(), sinusoid(cuda_graph=True)
    for one in (plain, graphed):
        one.fit(9)
        one.optimizer.param_groups[0]["lr"] = 0.1
        one.optimizer.load_state_dict(one.optimizer.state_dict())
        one.fit(18)
    assert StandIn.captures == 2
    assert_same(end_state(plain), end_state(graphed))


def test_few_steps_are_never_captured():
    graphed = sinusoid(cuda_graph=True).fit(WARM_UP)
    assert StandIn.captures == 0
    assert_same(end_state(sinusoid().fit(WARM_UP)), end_state(graphed))


def test_tasks_are_drawn_many_steps_ahead(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_TASKS_AHEAD", 24)
    trainer = digits(cuda_graph=True)
    drawn, sampled = [], []
    monkeypatch.setattr(trainer.tasks, "sample", lambda *a, **k: sampled.append(a))
    monkeypatch.setattr(
        trainer.tasks,
        "drawn",
        lambda n, step, steps, own=trainer.tasks.drawn: drawn.append(step) or own(n, step, steps),
    )
    trainer.fit(20)
    assert (drawn, sampled) == ([0, 6, 12, 18], [])
    assert_same(end_state(digits().fit(20)), end_state(trainer))


@pytest.mark.parametrize(
    "tasks",
    [
        mf.data.Sinusoid(seed=4),
        mf.data.TensorClasses(torch.randn(60, 6), torch.arange(60) % 6, ways=3, seed=2),
        mf.data.TensorClasses((torch.arange(60)[:, None] % 7).byte(), torch.arange(60) % 6, ways=3, query_shots=4),
    ],
    ids=["sinusoid", "classes", "bytes"],
)
def test_drawn_and_assembled_is_sampled(tasks):
    drawn = tasks.drawn(5, 17, 3)
    for i in range(3):
        a, b = tasks.assembled(*(part[i] for part in drawn)), tasks.sample(5, 17 + i)
        for rows in ("support", "query"):
            assert_same(getattr(a, rows).x, getattr(b, rows).x)
            assert_same(getattr(a, rows).y, getattr(b, rows).y)


class Changing(Lines):
    """Tasks that are not what a graph can take from step `at` on."""

    def __init__(self, at, change):
        super().__init__()
        self.at, self.change = at, change

    def sample(self, num_tasks, step=0, *, first_task=0):
        batch = super().sample(num_tasks, step, first_task=first_task)
        return self.change(batch) if step >= self.at else batch


def ragged(batch):
    rows = mf.TaskRows(batch.query.x.flatten(0, 1), batch.query.y.flatten(0, 1), torch.tensor([0, 2, 8, 12]))
    return mf.TaskBatch(batch.support, rows)


def fewer(batch):
    rows = mf.TaskRows(batch.query.x[:, :3], batch.query.y[:, :3])
    return mf.TaskBatch(batch.support, rows)


def doubled(batch):
    return batch.to(torch.float64)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, ragged, "tasks must be rectangles [T, N, ...] with cuda_graph=True, got ragged query rows at step 0"),
        (6, ragged, "tasks must be rectangles [T, N, ...] with cuda_graph=True, got ragged query rows at step 6"),
        (6, fewer, "got query.x [3, 3, 1] torch.float32 at step 6 after [3, 4, 1] torch.float32"),
        (2, doubled, "got support.x [3, 4, 1] torch.float64 at step 2 after [3, 4, 1] torch.float32"),
    ],
)
def test_other_tasks_are_refused(at, change, message):
    trainer = Trainer(Pooled(), Changing(at, change), meta_batch=3, progress=False, cuda_graph=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.fit(10)
    assert trainer.step == at


def moving_momentum(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=100)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(cuda_graph=1), TypeError, "cuda_graph must be a bool, got 1"),
        (dict(balance="pcgrad"), ValueError, "balance must be None with cuda_graph=True"),
        (dict(optimizer="adagrad"), ValueError, "or SGD, with cuda_graph=True, got Adagrad"),
    ],
)
def test_refused_at_once(options, kind, message):
    with pytest.raises(kind) as error:
        sinusoid(**{"cuda_graph": True, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_schedule_of_more_than_rates_is_refused():
    with pytest.raises(ValueError, match="scheduler must move lr alone with cuda_graph=True, got one that moves betas"):
        sinusoid(cuda_graph=True, scheduler=moving_momentum).fit(10)


def test_a_cpu_has_no_graphs(monkeypatch):
    monkeypatch.setattr(trainer, "CudaGraphs", CudaGraphs)
    text = "cuda_graph must be False for an algorithm on cpu: only CUDA has graphs, got True"
    with pytest.raises(ValueError, match=f"^{text}$"):
        sinusoid(cuda_graph=True)


def test_the_loss_is_looked_at_when_a_row_is_written():
    """As on a device: a read in every step would stop the stream."""
    graphed = sinusoid(cuda_graph=True)
    with torch.no_grad():
        graphed.algorithm.model[0].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the training loss is nan at step 0"):
        graphed.fit(20)
    assert graphed.step == LOG


class Reads(Pooled):
    """Reads a number on the host."""

    def forward(self, batch, steps=None):
        result = super().forward(batch, steps)
        result.loss.item()
        return result


def test_a_read_cannot_be_captured():
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        Trainer(Reads(), Lines(), meta_batch=3, progress=False, cuda_graph=True).fit(10)


class NoCopies(TorchFunctionMode):
    """Nothing goes from the host to the device: a graph cannot capture such a copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sources = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.is_meta:
            made = func in (torch.tensor, torch.as_tensor, torch.asarray)
            assert not made, f"{func.__name__} copies numbers to the device"
            assert all(t.is_meta or t.dim() == 0 for t in sources), f"{func.__name__} copies a tensor to the device"
        return result


@pytest.mark.parametrize(
    "inner",
    [
        dict(lr=0.1),
        dict(lr=0.1, steps=3, store="all"),
        dict(lr=0.1, layers="head"),
        dict(lr="one a layer", steps=2),
        dict(lr=torch.nn.Parameter(torch.tensor(0.1, device="meta")), clip=1.0, momentum=0.9),
        dict(lr=0.1, steps=2, plan="functional"),
        dict(lr=0.1, plan="functional", chunk=3),
    ],
    ids=["number", "three", "head", "layers", "learned", "functional", "chunks"],
)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_meta_step_reads_and_copies_nothing(inner, norm):
    """On the device `meta`, which has no values to read, as on every device by the reference."""
    if isinstance(inner["lr"], str):
        inner = inner | dict(lr=torch.full((2, 3 if norm else 2), 0.1, device="meta"))
    maml = mf.MAML(mf.nn.mlp(6, (8,), 3, norm=norm).to("meta"), **inner)
    rows = lambda n: mf.TaskRows(torch.zeros(4, n, 6), torch.zeros(4, n, dtype=torch.int64)).to("meta")  # noqa: E731
    batch = mf.TaskBatch(rows(5), rows(7))
    with mf.backend("reference"):
        # what is found out about a model once is found out while warming up
        maml(batch).loss.backward()
        with NoCopies():
            result = maml(batch)
            result.loss.backward()
            assert result.metrics["accuracy"].is_meta
    assert all(p.grad.is_meta for p in maml.parameters())


class Repeating(StandIn):
    """Runs the function again, and lets it copy nothing to the device."""

    def capture(self, function):
        def replay():
            with NoCopies():
                return function()

        return replay


@pytest.mark.parametrize(
    "tasks",
    [
        mf.data.Sinusoid(device="meta"),
        mf.data.TensorClasses(torch.randn(60, 1), torch.arange(60) % 6, ways=3, device="meta"),
        mf.data.TensorClasses((torch.arange(60)[:, None] % 7).float(), torch.arange(60) % 6, ways=3),
    ],
    ids=["sinusoid", "classes", "from-the-host"],
)
def test_a_step_of_the_optimizer_copies_nothing(monkeypatch, tasks):
    """Nor does sampling, where the tasks lie on the device."""
    monkeypatch.setattr(trainer, "CudaGraphs", Repeating)
    maml = mf.MAML(mf.nn.mlp(1, (8,), tasks.outputs), lr=0.1).to("meta")
    with mf.backend("reference"):
        run = Trainer(maml, tasks, meta_batch=4, optimizer="sgd", clip_grad=1.0, progress=False, cuda_graph=True)
        graphed = GraphedStep(run._descend, tasks, 4, run.optimizer, False, run._device, run._graphs)
        run._graphed = graphed
        for step in range(WARM_UP + 2):
            loss, _ = graphed(step)
            assert loss.is_meta


class Calls(list):
    """CUDA's part of torch, as far as CudaGraphs uses it: notes who is called."""

    def __init__(self, monkeypatch):
        super().__init__()
        calls = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self):
                calls.append("replay")

        @contextlib.contextmanager
        def capturing(graph, stream):
            calls.append(f"capture on {stream.name}")
            try:
                yield
            except BaseException:
                # CUDA's own words at the end of a capture that has failed
                raise RuntimeError("capture_end: operation failed due to a previous error during capture") from None

        fakes = dict(
            Stream=lambda device: Stream(f"side of {device}"),
            current_stream=lambda: Stream("current"),
            stream=contextlib.nullcontext,
            device=contextlib.nullcontext,
            CUDAGraph=Graph,
            graph=capturing,
        )
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        self.graphs = CudaGraphs(torch.device("cuda:0"))


def test_what_is_asked_of_cuda(monkeypatch):
    calls = Calls(monkeypatch)
    with calls.graphs.warming_up():
        calls.append("warm up")
    outcome = torch.ones(()), None
    replay = calls.graphs.capture(lambda: outcome)
    assert replay() is outcome
    assert replay() is outcome
    side = "side of cuda:0"
    waits = [f"{side} waits for current", "warm up", f"current waits for {side}"]
    assert calls == [*waits, f"capture on {side}", "replay", "replay"]


def test_a_failed_capture_says_why(monkeypatch):
    def fails():
        raise ValueError("no such thing\nin the middle")

    with pytest.raises(RuntimeError) as error:
        Calls(monkeypatch).graphs.capture(fails)
    text = "the meta-step cannot be captured, train it with cuda_graph=False: ValueError: no such thing"
    assert str(error.value) == text


def test_random_numbers_of_the_cpu_cannot_be_captured(monkeypatch):
    with pytest.raises(RuntimeError, match="it draws random numbers on the CPU, which every replay would repeat"):
        Calls(monkeypatch).graphs.capture(lambda: (torch.rand(()), None))
