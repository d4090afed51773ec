"""MetaLearnerTrainer: the articles' example, its four steps against plain loops, and what it refuses."""

import copy
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtml_fast.nn.meta_learner import MetaLearner, TaskModule
from mtml_fast.trainers.meta_learner import MetaLearnerTrainer


def toy(num_tasks=4, rows=32, features=3):
    """A linear function a task, with a nonlinearity, and noise that a module can learn away."""
    x = torch.randn(num_tasks, rows, features)
    return x, torch.tanh(x @ torch.randn(num_tasks, features, 1))


def test_the_articles_example():
    num_tasks = 3
    inputs, targets = toy(num_tasks)
    tasks = list(range(num_tasks))

    learner = MetaLearner(num_tasks); trainer = MetaLearnerTrainer(learner, num_tasks)  # fmt: skip  # noqa: E702
    losses = [trainer.train(inputs, tasks, targets) for _ in range(400)]
    test_loss = trainer.test(inputs, tasks, targets)
    outputs = learner(inputs, tasks)

    assert isinstance(losses[0], float)
    assert isinstance(test_loss, float)
    assert losses[-1] < losses[0] / 10
    assert [list(z.shape) for z in outputs] == [[32, 1]] * 3
    expected = sum(F.mse_loss(z, target).item() for z, target in zip(outputs, targets, strict=True))
    assert test_loss == pytest.approx(expected, rel=1e-5)
    assert trainer.history["train"] == losses
    assert trainer.task_losses.sum().item() == pytest.approx(test_loss)


@pytest.mark.parametrize("loss", [None, "mse", "mae", "huber", nn.SmoothL1Loss()])
@pytest.mark.parametrize("own", [False, True])
def test_training_equals_a_loop_over_modules(loss, own):
    """A few Adam steps, ragged rows: the same losses and parameters as one module, one loss, one sum a step."""
    trunk = nn.Linear(4, 6)
    options = (
        {"task_module": lambda: TaskModule(6, 2, 5)} if own else {"hidden": 5, "in_features": 6, "out_features": 2}
    )
    learner = MetaLearner(4, trunk=trunk, **options).double()
    modules, plain_trunk = list(learner.task_modules), copy.deepcopy(learner.trunk)
    trainer = MetaLearnerTrainer(learner, 4, loss=loss)
    plain = torch.optim.Adam([*plain_trunk.parameters(), *(p for m in modules for p in m.parameters())], lr=1e-3)
    function = {None: F.mse_loss, "mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}.get(loss, loss)
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 1, 5, 2)]
    targets = [torch.randn(n, 2, dtype=torch.float64) for n in (3, 1, 5, 2)]
    for _ in range(4):
        plain.zero_grad()
        losses = [function(modules[t](plain_trunk(x)), y) for t, (x, y) in enumerate(zip(inputs, targets, strict=True))]
        sum(losses).backward()
        plain.step()
        assert trainer.train(inputs, range(4), targets) == pytest.approx(sum(losses).item(), abs=1e-12)
        torch.testing.assert_close(trainer.task_losses, torch.stack(losses).detach(), rtol=0, atol=1e-12)
    # Adam divides by the root of a squared gradient, which magnifies the last bits
    for module, reference in zip([learner.trunk, *learner.task_modules], [plain_trunk, *modules], strict=True):
        for value, expected in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


def test_classes_of_different_number_a_task():
    learner = MetaLearner(3, 5, [2, 4, 3])
    trainer = MetaLearnerTrainer(learner, 3, lr=1e-2)
    inputs = [torch.randn(n, 5) for n in (8, 12, 6)]
    targets = [torch.randint(width, (n,)) for n, width in zip((8, 12, 6), (2, 4, 3), strict=True)]
    expected = sum(F.cross_entropy(z, y) for z, y in zip(learner(inputs), targets, strict=True))
    assert trainer.train(inputs, None, targets) == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.train(inputs, None, targets, epochs=200) < expected / 10


def test_rows_with_task_ids_are_grouped_with_their_targets():
    learner = MetaLearner(4, 3, 2)
    trainer = MetaLearnerTrainer(learner, 4)
    x, y, ids = torch.randn(9, 3), torch.randint(2, (9,)), torch.tensor([3, 0, 3, 2, 2, 2, 0, 3, 0])
    expected = sum(F.cross_entropy(learner.task_modules[t](x[ids == t]), y[ids == t]) for t in (0, 2, 3))
    assert trainer.test(x, ids, y) == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.test(x.numpy(), ids.numpy(), y.numpy()) == pytest.approx(expected.item(), rel=1e-5)


def test_single_rows_and_shared_rows():
    learner = MetaLearner(3, 4, 2)
    trainer = MetaLearnerTrainer(learner, 3)
    x, y = torch.randn(3, 4), torch.tensor([1, 0, 1])
    expected = sum(F.cross_entropy(learner.task_modules[t](x[t]), y[t]) for t in range(3))
    assert trainer.test(x, [0, 1, 2], y) == pytest.approx(expected.item(), rel=1e-5)
    shared = torch.randn(5, 4)
    targets = torch.randint(2, (3, 5))
    expected = sum(F.cross_entropy(learner.task_modules[t](shared), targets[t]) for t in range(3))
    assert trainer.test(shared, None, targets) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("targets", "loss", "widths"),
    [
        (torch.tensor([[0, 4], [1, 2]]), None, [5, 5, 5]),
        (torch.zeros(2, 2), None, [1, 1, 1]),
        (torch.zeros(2, 2, 3), None, [3, 3, 3]),
        ([torch.zeros(2, 3), torch.zeros(2)], None, [3, 3, 1]),
        (torch.tensor([[0, 4], [1, 2]]), "mse", [1, 1, 1]),
        (torch.tensor([[0, 4], [1, 2]]), nn.CrossEntropyLoss(), [5, 5, 5]),
    ],
)
def test_the_targets_give_the_outputs_their_width(targets, loss, widths):
    learner = MetaLearner(3)
    trainer = MetaLearnerTrainer(learner, 3, loss=loss)
    before = list(learner.parameters())
    trainer.train(torch.randn(2, 2, 4), [0, 2], targets)
    assert learner.heads.out_features == widths
    assert all(a is b for a, b in zip(before, learner.parameters(), strict=True))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=0.1)])
def test_absent_tasks_stay_bit_for_bit(own, optimizer):
    learner = MetaLearner(3, task_module=lambda: TaskModule(4)) if own else MetaLearner(3, 4, [1, 2, 3])
    trainer = MetaLearnerTrainer(learner, 3, optimizer=optimizer)
    widths = [1, 1, 1] if own else [1, 2, 3]

    def train(tasks):
        trainer.train([torch.randn(5, 4) for _ in tasks], tasks, [torch.randn(5, widths[t]) for t in tasks])
        return [[p.clone() for p in m.parameters()] for m in learner.task_modules]

    before = train([0, 1, 2])
    after = train([2, 0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert not any(torch.equal(a, b) for t in (0, 2) for a, b in zip(before[t], after[t], strict=True))


@pytest.mark.parametrize("layers", ["head", "all"])
@pytest.mark.parametrize("own", [False, True])
def test_adapt_learns_new_tasks_and_leaves_the_learner_alone(layers, own):
    trunk = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh())
    options = (
        {"task_module": lambda: nn.Linear(16, 1)} if own else {"in_features": 16, "out_features": 1, "hidden": None}
    )
    learner = MetaLearner(4, trunk=trunk, **options)
    trainer = MetaLearnerTrainer(learner, 4, lr=1e-2)
    x, y = toy(6, 40)
    trainer.pretrain(x[:4], range(4), y[:4], epochs=100)
    assert len(trainer.history["pretrain"]) == 100
    state, mode = copy.deepcopy(learner.state_dict()), learner.training
    # ragged new tasks
    inputs, targets = [x[4], x[5, :25]], [y[4], y[5, :25]]
    adapted = trainer.adapt(inputs, targets, layers=layers, steps=200, lr=0.1)
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert learner.training == mode
    assert adapted.num_tasks == 2
    assert not adapted.training
    losses = [F.mse_loss(z, y).item() for z, y in zip(adapted(inputs), targets, strict=True)]
    constant = [y.var(correction=0).item() for y in targets]
    assert all(loss < best / 3 for loss, best in zip(losses, constant, strict=True))
    if layers == "head":
        for name, value in adapted.trunk.state_dict().items():
            assert torch.equal(value, state[f"trunk.{name}"])


def test_adapt_starts_from_the_task_that_fits_best():
    learner = MetaLearner(3, 3, [1, 1, 2], hidden=8)
    trainer = MetaLearnerTrainer(learner, 3)
    x = torch.randn(1, 30, 3)
    target = learner(x, [1])[0].detach()
    adapted = trainer.adapt(x, target[None], steps=1, lr=1e-9)
    torch.testing.assert_close(adapted(x)[0], target)
    classes = trainer.adapt(x, (x[..., 0] > 0).long(), out_features=[5], steps=1)
    assert classes(x)[0].shape == (30, 5)


def test_initialize_starts_anew():
    learner = MetaLearner(3, 3, 1, trunk=nn.Linear(3, 3))
    trainer = MetaLearnerTrainer(learner, 3)
    x, y = toy(3)
    states = []
    for _ in range(2):
        trainer.initialize(seed=4)
        states.append((copy.deepcopy(learner.state_dict()), trainer.train(x, range(3), y, epochs=3)))
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert len(trainer.history["train"]) == 3


def test_test_uses_and_restores_the_mode():
    learner = MetaLearner(2, task_module=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1)))
    trainer = MetaLearnerTrainer(learner, 2)
    x, y = torch.randn(2, 50, 3), torch.randn(2, 50, 1)
    assert trainer.test(x, [0, 1], y) == trainer.test(x, [0, 1], y)
    assert learner.training
    assert all(p.grad is None for p in learner.parameters())


def test_an_interrupt_lets_the_step_finish():
    x, y = toy(2)

    def run(epochs, interrupt_at):
        torch.manual_seed(0)
        learner, calls = MetaLearner(2, 3, 1), []

        def loss(outputs, targets):
            calls.append(1)
            if len(calls) == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            return F.mse_loss(outputs, targets)

        trainer = MetaLearnerTrainer(learner, 2, loss=loss)
        if interrupt_at:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(x, [0, 1], y, epochs=epochs)
        else:
            trainer.train(x, [0, 1], y, epochs=epochs)
        return learner.state_dict(), trainer.history["train"]

    # two tasks, so the fifth call is in the middle of the third step
    (interrupted, history), (whole, expected) = run(100, 5), run(3, None)
    assert history == expected
    assert all(torch.equal(value, whole[name]) for name, value in interrupted.items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_takes_no_step():
    learner = MetaLearner(2, 3, 1)
    trainer = MetaLearnerTrainer(learner, 2)
    before = copy.deepcopy(learner.state_dict())
    x, y = toy(2)
    with pytest.raises(FloatingPointError, match="the loss of epoch 1 is inf; the step is not taken"):
        trainer.train(x * 1e30, [0, 1], y)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_adapt_that_diverges_returns_no_learner(own, steps):
    learner = MetaLearner(2, task_module=lambda: TaskModule(3)) if own else MetaLearner(2, 3, 1)
    x, y = toy(2)
    # the first step already throws the loss out of float32, whichever number of steps follows
    with pytest.raises(
        FloatingPointError, match=r"the loss after 1 steps of adapt is (inf|nan); a smaller lr may help"
    ):
        MetaLearnerTrainer(learner, 2).adapt(x, y, steps=steps, lr=1e30)


@pytest.mark.parametrize("layers", ["head", "all"])
def test_batch_norm_of_one_row_names_the_inputs(layers):
    trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    trainer = MetaLearnerTrainer(MetaLearner(2, 4, 1, trunk=trunk), 2)
    x, y = torch.randn(2, 2, 3), torch.randn(2, 2, 1)
    calls = {
        "head": lambda: trainer.train(x[:1, :1], [0], y[:1, :1]),
        # a trunk of its own for each task, so a single row each
        "all": lambda: trainer.adapt(x[:, :1], y[:, :1], layers="all"),
    }
    with pytest.raises(ValueError, match=r"^inputs \[1, 3\] of .*: Expected more than 1 value per channel"):
        calls[layers]()


def at(x, i, value):
    """A copy with another value in a slice of the first axis."""
    x = x.clone()
    x[i].flatten()[-1] = value
    return x


def trained():
    trainer = MetaLearnerTrainer(MetaLearner(2, 3, 1), 2)
    return trainer, torch.randn(2, 6, 3), torch.randn(2, 6, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, x, y: MetaLearnerTrainer(nn.Linear(1, 1), 1), "learner must be a MetaLearner, got Linear"),
        (lambda t, x, y: MetaLearnerTrainer(t.learner, 3), "num_tasks must be the learner's 2, got 3"),
        (lambda t, x, y: MetaLearnerTrainer(t.learner, 2, lr=0), "lr must be finite, above 0, got 0"),
        (
            lambda t, x, y: MetaLearnerTrainer(t.learner, 2, optimizer="adamm"),
            "optimizer must be one of 'adam', 'adamw', 'nadam', 'radam', 'rmsprop', 'adagrad', 'sgd', or callable, "
            "got 'adamm'",
        ),
        (
            lambda t, x, y: MetaLearnerTrainer(t.learner, 2, optimizer=torch.optim.SGD([torch.zeros(1)], 1.0)),
            "optimizer must hold the parameters of the model that it trains, got one of other tensors",
        ),
        (
            lambda t, x, y: MetaLearnerTrainer(t.learner, 2, optimizer=lambda p, lr: 3),
            "optimizer must make a torch.optim.Optimizer, got int",
        ),
        (lambda t, x, y: MetaLearnerTrainer(t.learner, 2, loss="l7"), "loss must be one of 'cross_entropy', "),
        (lambda t, x, y: MetaLearnerTrainer(t.learner, 2, loss=7), "loss must be a name or callable, got int"),
        (lambda t, x, y: t.train(x, [0, 2], y), "tasks[1] must be in 0..1, got 2"),
        (lambda t, x, y: t.train(x, [0, 1], y[:1]), "targets must be 2, one an entry of inputs, got 1"),
        (
            lambda t, x, y: t.train(x, [0, 1], y[:, :5]),
            "targets[0] must have the shape [6, 1] of the outputs, got [5, 1]",
        ),
        (lambda t, x, y: t.train(at(x, 1, torch.nan), [0, 1], y), "inputs must be finite, got nan in inputs[1]"),
        (lambda t, x, y: t.test([x[0], at(x[1], 3, torch.inf)], [0, 1], y), "inputs must be finite, got inf in inputs"),
        (
            lambda t, x, y: t.train(at(x[0], 4, torch.nan), torch.tensor([1, 0, 1, 0, 0, 1]), y[0]),
            "inputs must be finite, got nan in inputs[4]",
        ),
        (lambda t, x, y: t.train(at(x[0], 5, -torch.inf), None, y), "inputs must be finite, got -inf in inputs[5]"),
        (lambda t, x, y: t.meta_train(at(x, 0, torch.nan), [0, 1], y), "inputs must be finite, got nan in inputs[0]"),
        (lambda t, x, y: t.adapt(at(x, 1, torch.nan), y), "inputs must be finite, got nan in inputs[1]"),
        (
            lambda t, x, y: t.train(x.double(), [0, 1], y),
            "inputs must have the dtype of the learner (torch.float32), got torch.float64",
        ),
        (
            lambda t, x, y: t.adapt([x[0], x[1].double()], y),
            "inputs[1] must have the dtype of the learner (torch.float32), got torch.float64",
        ),
        (lambda t, x, y: t.train(x, [0, 1], y.log()), "targets must not be NaN, got NaN in targets["),
        (
            lambda t, x, y: t.train(x, [0, 1], [y[0], y[1].long()]),
            "targets must be all integers (classes) or all floats, got both",
        ),
        (lambda t, x, y: t.train(x, [0, 1], (y > 0).long() + 1), "targets[0] must be in 0..0, got "),
        (lambda t, x, y: t.train(x, [0, 1], y, epochs=0), "epochs must be finite, at least 1, got 0"),
        (
            lambda t, x, y: t.train(x[0], torch.zeros(6, dtype=torch.int64), y[0, :4]),
            "targets must have 6 rows as inputs, got [4, 1]",
        ),
        (lambda t, x, y: t.train(x, [0, 1], "yy"), "targets must be a tensor or an array of numbers, got str"),
        (lambda t, x, y: t.meta_train(x, [0, 0], y), "tasks must hold each task once, got 0 twice"),
        (lambda t, x, y: t.meta_train(x[:, :1], [0, 1], y[:, :1]), "inputs must have two rows or more of each task"),
        (lambda t, x, y: t.meta_train(x, [0, 1], y, steps=0), "steps must be finite, at least 1, got 0"),
        (lambda t, x, y: t.meta_train(x, [0, 1], y, lr=-1), "lr must be finite, above 0, got -1"),
        (
            lambda t, x, y: t.meta_train(x, [0, 1], y, support=1.0),
            "support must be finite, above 0 and below 1, got 1.0",
        ),
        (lambda t, x, y: t.meta_train(x, [0, 1], y, layers="last"), "layers must be one of 'head', 'all', got 'last'"),
        (lambda t, x, y: t.adapt(x, y, out_features=[1]), "out_features must be 2 widths, one a task, got 1"),
        (lambda t, x, y: t.adapt(x[0], y[0]), "inputs must be [T, N, D] or a list of [N, D], got rows without an axis"),
        (
            lambda t, x, y: MetaLearnerTrainer(MetaLearner(2), 2).adapt(x, y),
            "adapt must come after the learner's first call or training: it has no widths yet",
        ),
        (
            lambda t, x, y: MetaLearnerTrainer(MetaLearner(2, task_module=nn.Linear(3, 1)), 2).adapt(
                x, y, out_features=[1, 2]
            ),
            "out_features must be the outputs of some task module of the learner, got 2",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call(*trained())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
