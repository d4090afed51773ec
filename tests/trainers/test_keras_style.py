"""MultiTaskMetaLearningModel: the articles' example, plain torch as the yardstick, and what it refuses."""

import copy
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtml_fast.trainers.keras_style import History, MultiTaskMetaLearningModel


def data(rows=96, features=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, features))
    return x, np.tanh(x[:, :1] + x[:, 1:2] * x[:, 2:3])


def compiled(*args, loss="mse", metrics=("mae",), optimizer="adam", learning_rate=None, **options):
    model = MultiTaskMetaLearningModel(*args, **options)
    model.compile(optimizer=optimizer, loss=loss, metrics=metrics, learning_rate=learning_rate)
    return model


def test_the_articles_example():
    x, y = data(160)
    x_train, y_train, x_val, y_val, x_test = x[:96], y[:96], x[96:128], y[96:128], x[128:]

    model = MultiTaskMetaLearningModel()
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    history = model.fit(x_train, y_train, epochs=100, batch_size=32, validation_data=(x_val, y_val))
    predictions = model.predict(x_test)

    assert [list(p.shape) for p in model.network.parameters()] == [[128, 3], [128], [64, 128], [64], [1, 64], [1]]
    assert isinstance(history, History)
    assert set(history.history) == {"loss", "mae", "val_loss", "val_mae"}
    assert all(len(values) == 100 for values in history.history.values())
    assert history.epoch == list(range(100))
    assert history.history["loss"][-1] < history.history["loss"][0] / 10
    assert isinstance(predictions, np.ndarray)
    assert predictions.shape == (32, 1)
    assert history.history["val_mae"][-1] == pytest.approx(np.abs(model.predict(x_val) - y_val).mean(), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", torch.optim.RMSprop])
def test_fit_equals_plain_torch(optimizer):
    x, y = data(10)
    model = compiled((5,), optimizer=optimizer, in_features=3, learning_rate=0.01)
    plain = nn.Sequential(copy.deepcopy(model.network.trunk), model.network.task_modules[0])
    made = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}.get(optimizer, optimizer)(plain.parameters(), lr=0.01)
    history = model.fit(x, y, epochs=3, batch_size=4, shuffle=False, verbose=0)
    xs, ys = torch.tensor(x).float().split(4), torch.tensor(y).float().split(4)
    for epoch in range(3):
        losses, errors = [], []
        for part, target in zip(xs, ys, strict=True):
            made.zero_grad()
            z = plain(part)
            loss = F.mse_loss(z, target)
            loss.backward()
            made.step()
            losses.append(loss.item() * len(part))
            errors.append((z - target).abs().sum().item())
        assert history.history["loss"][epoch] == pytest.approx(sum(losses) / 10, rel=1e-5)
        assert history.history["mae"][epoch] == pytest.approx(sum(errors) / 10, rel=1e-5)
    np.testing.assert_allclose(model.predict(x), plain(torch.tensor(x).float()).detach(), rtol=1e-4, atol=1e-5)


def test_evaluate_returns_what_keras_returns():
    x, y = data()
    model = compiled(metrics=["mae", "mse"], in_features=3)
    error = model.predict(x) - y
    values = model.evaluate(x, y, batch_size=7, return_dict=True)
    assert list(values) == ["loss", "mae", "mse"]
    assert values["loss"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert values["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert model.evaluate(x, y) == pytest.approx(list(values.values()), rel=1e-5)


@pytest.mark.parametrize("none", [{}, {"metrics": None}, {"metrics": []}])
def test_without_metrics_there_is_the_loss_alone(none):
    x, y = data()
    model = MultiTaskMetaLearningModel(in_features=3)
    model.compile(loss="mse", **none)
    expected = pytest.approx(((model.predict(x) - y) ** 2).mean(), rel=1e-5)
    loss = model.evaluate(torch.tensor(x), torch.tensor(y[:, 0]))
    assert isinstance(loss, float)
    assert loss == expected
    assert model.evaluate(x, y, return_dict=True) == {"loss": expected}
    assert list(model.fit(x, y, verbose=0).history) == ["loss"]


def test_seed_fixes_everything():
    x, y = data()
    # the number that came before must not matter, nor be disturbed
    first, second = compiled(), compiled()
    a = first.fit(x, y, epochs=2, seed=3, verbose=0)
    torch.rand(7)
    state = torch.get_rng_state()
    b = second.fit(x, y, epochs=2, seed=3, verbose=0)
    assert torch.equal(state, torch.get_rng_state())
    assert a.history == b.history
    assert np.array_equal(first.predict(x), second.predict(x))
    assert compiled().fit(x, y, epochs=2, seed=4, verbose=0).history != a.history


def test_classes_and_accuracy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 2))
    y = (x[:, 0] > 0).astype(int) + 2 * (x[:, 1] > 0)
    model = compiled(outputs=4, loss="sparse_categorical_crossentropy", metrics=["accuracy"], learning_rate=1e-2)
    history = model.fit(x, y, epochs=40, verbose=0, seed=0)
    assert history.history["accuracy"][-1] > 0.9
    assert model.evaluate(x, y, return_dict=True)["accuracy"] == (model.predict(x).argmax(1) == y).mean()
    one_hot = np.eye(4)[y]
    assert model.evaluate(x, one_hot) == pytest.approx(model.evaluate(x, y), rel=1e-5)
    binary = compiled(loss="binary_crossentropy", metrics=["acc"], learning_rate=1e-2)
    binary.fit(x, x[:, 0] > 0, epochs=30, verbose=0, seed=0)
    right = (binary.predict(x)[:, 0] > 0) == (x[:, 0] > 0)
    assert binary.evaluate(x, x[:, 0] > 0)[1] == right.mean()
    assert right.mean() > 0.9


@pytest.mark.parametrize("outputs", [1, [1, 3]])
def test_tasks_that_share_all_rows(outputs):
    x, _ = data()
    rng = np.random.default_rng(1)
    targets = [rng.normal(size=(96, width)) for width in (outputs if isinstance(outputs, list) else [1, 1])]
    model = compiled(outputs=outputs, num_tasks=2, in_features=3)
    predictions = model.predict(x)
    if outputs == 1:
        assert predictions.shape == (96, 2)
        predictions = [predictions[:, :1], predictions[:, 1:]]
        columns = np.concatenate(targets, 1)
        assert model.evaluate(x, columns) == pytest.approx(model.evaluate(x, targets))
    errors = [z - y for z, y in zip(predictions, targets, strict=True)]
    loss, mae = model.evaluate(x, targets)
    assert loss == pytest.approx(sum((e**2).mean() for e in errors), rel=1e-5)
    assert mae == pytest.approx(np.mean([np.abs(e).mean() for e in errors]), rel=1e-5)
    history = model.fit(x, targets, epochs=3, verbose=0)
    assert history.history["loss"][-1] < loss


def test_tasks_of_their_own_rows():
    x, y = data()
    tasks = np.random.default_rng(2).integers(0, 3, 96)
    y = y[:, 0] * np.array([1.0, -1.0, 0.5])[tasks]
    model = compiled(num_tasks=4, learning_rate=1e-2)
    history = model.fit(x, y, tasks=tasks, epochs=100, validation_data=(x[:9], y[:9], tasks[:9]), verbose=0, seed=0)
    assert history.history["loss"][-1] < history.history["loss"][0] / 10
    predictions = model.predict(x, batch_size=10, tasks=tasks)
    heads, trunk = model.network.task_modules, model.network.trunk
    with torch.no_grad():
        features = trunk(torch.tensor(x).float())
        expected = torch.stack([heads[t](row) for t, row in zip(tasks.tolist(), features, strict=True)])
    np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-5)
    assert model.evaluate(x, y, tasks=tasks)[0] == pytest.approx(((predictions[:, 0] - y) ** 2).mean(), rel=1e-4)
    # task 3 had no rows, task 0 is not in these
    before = [[p.clone() for p in head.parameters()] for head in heads]
    some = tasks > 0
    model.fit(x[some], y[some], tasks=tasks[some], verbose=0)
    same = [
        all(torch.equal(a, b) for a, b in zip(old, new.parameters(), strict=True))
        for old, new in zip(before, heads, strict=True)
    ]
    assert same == [True, False, False, True]


def test_validation_split_keeps_the_last_rows_out():
    x, y = data()
    y = y.copy()
    model = compiled(in_features=3)
    history = model.fit(x, y, validation_split=0.25, verbose=0)
    assert history.history["val_loss"][0] == pytest.approx(model.evaluate(x[72:], y[72:])[0], rel=1e-5)
    # what those rows say is not learned
    same = compiled(in_features=3)
    same.network.load_state_dict(model.network.state_dict())
    y[72:] = 1e6
    for each in (model, same):
        each.compile(optimizer="sgd")
    model.fit(x[:72], y[:72], seed=0, verbose=0)
    same.fit(x, y, validation_split=0.25, seed=0, verbose=0)
    assert np.array_equal(model.predict(x), same.predict(x))


def test_objects_in_place_of_names():
    def worst(outputs, targets):
        return (outputs - targets).abs().max()

    x, y = data()
    model = MultiTaskMetaLearningModel(in_features=3)
    optimizer = torch.optim.Adam(model.network.parameters(), lr=0.01)
    model.compile(optimizer=optimizer, loss=nn.HuberLoss(), metrics=[worst, nn.L1Loss()])
    history = model.fit(x, y, epochs=20, verbose=0)
    assert model.optimizer is optimizer
    assert set(history.history) == {"loss", "worst", "L1Loss"}
    assert history.history["loss"][-1] < history.history["loss"][0] / 2


def test_verbose_prints_a_line_an_epoch(capsys):
    x, y = data(8)
    compiled().fit(x, y, epochs=2, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2 of 2  loss ")
    assert "mae " in lines[1]
    compiled().fit(x, y, epochs=2, verbose=0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("optimizer", "rate"), [("Adam", 1e-3), ("SGD", 1e-2), ("RMSprop", 1e-3)])
def test_names_are_taken_in_any_case(optimizer, rate):
    x, y = data()
    model = compiled(optimizer=optimizer, loss="MSE", metrics=["MAE"], in_features=3)
    assert type(model.optimizer) is getattr(torch.optim, optimizer)
    assert model.optimizer.param_groups[0]["lr"] == rate
    loss, mae = model.evaluate(x, y)
    error = model.predict(x) - y
    assert (loss, mae) == (pytest.approx((error**2).mean(), rel=1e-5), pytest.approx(np.abs(error).mean(), rel=1e-5))


def test_settings_of_a_loss_object_count():
    """Ignored rows, smoothing and delta are the object's own; the checks of its targets are those of the named loss."""
    x, _ = data(12)
    y = torch.arange(12) % 3
    y[4] = -100
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.3)):
        model = compiled(outputs=3, loss=loss, metrics=None, in_features=3)
        expected = loss(torch.tensor(model.predict(x)), y).item()
        assert model.evaluate(x, y) == pytest.approx(expected, rel=1e-5)
        assert model.evaluate(x, y[:, None]) == pytest.approx(expected, rel=1e-5)
    huber = compiled(loss=nn.HuberLoss(delta=0.1), metrics=None, in_features=3)
    expected = F.huber_loss(torch.tensor(huber.predict(x)), y[:, None].float(), delta=0.1).item()
    assert huber.evaluate(x, y) == pytest.approx(expected, rel=1e-5)


def test_summary_counts_the_parameters(capsys):
    MultiTaskMetaLearningModel(in_features=3, num_tasks=2).summary()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "MultiTaskMetaLearningModel: 3 inputs, 8,898 parameters"
    assert [line.split()[-1] for line in lines[1:]] == ["512", "8,256", "130"]


def test_an_interrupt_lets_the_step_finish():
    x, y = data()

    def run(interrupt_at):
        calls = []

        def loss(outputs, targets):
            calls.append(1)
            if len(calls) == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            return F.mse_loss(outputs, targets)

        torch.manual_seed(0)
        model = compiled(loss=loss, metrics=[])
        if interrupt_at:
            with pytest.raises(KeyboardInterrupt):
                model.fit(x, y, epochs=100, shuffle=False, verbose=0)
        else:
            # one epoch is three batches, and these are two thirds of the second
            model.fit(x, y, shuffle=False, verbose=0)
            model.fit(x[:64], y[:64], shuffle=False, verbose=0)
        return model

    interrupted, whole = run(5), run(None)
    assert len(interrupted.history.history["loss"]) == 1
    assert np.array_equal(interrupted.predict(x), whole.predict(x))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


X, Y = data(12)


def at(array, row, value):
    """A copy with another value in a row."""
    array = array.copy()
    array[row, -1] = value
    return array


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiTaskMetaLearningModel().fit(X, Y), "the model must be compiled first: call compile("),
        (lambda: MultiTaskMetaLearningModel(in_features=3).evaluate(X, Y), "the model must be compiled first: call"),
        (lambda: MultiTaskMetaLearningModel().predict(X), "the model must be built first: call fit, or build(in_feat"),
        (lambda: compiled().evaluate(X, Y), "the model must be built first: call fit, or build(in_features)"),
        (lambda: MultiTaskMetaLearningModel().summary(), "the model must be built first: call fit, or build(in_feat"),
        (lambda: MultiTaskMetaLearningModel(in_features=3).build(3), "build must be called once; the model is built"),
        (lambda: MultiTaskMetaLearningModel((0,)), "hidden[0] must be finite, at least 1, got 0"),
        (
            lambda: MultiTaskMetaLearningModel(outputs=[1, 2]),
            "outputs must be a number or a list of 1, one a task, got",
        ),
        (lambda: MultiTaskMetaLearningModel(activation="sine"), "activation must be one of 'relu', 'tanh', 'gelu', "),
        (lambda: compiled(optimizer="adamm"), "optimizer must be one of 'adam', 'adamw', "),
        (lambda: compiled(loss="l7"), "loss must be one of 'cross_entropy', "),
        (lambda: compiled(metrics=["maee"]), "metrics must be one of 'accuracy', 'acc', 'mae', "),
        (lambda: compiled(metrics="mae"), "metrics must be a list, got 'mae'"),
        (lambda: compiled(metrics=["mae", "mae"]), "metrics must have names of their own, got ['mae', 'mae']"),
        (lambda: compiled(learning_rate=0), "lr must be finite, above 0, got 0"),
        (
            lambda: compiled(optimizer=torch.optim.SGD([torch.zeros(1)], 1.0), in_features=3),
            "optimizer must hold the parameters of the model that it trains, got one of other tensors",
        ),
        (lambda: compiled().fit(X, Y[:5]), "y must have the 12 rows of x, got shape [5, 1]"),
        (lambda: compiled().fit(X, Y * np.nan), "y must be finite, got nan in row 0"),
        (lambda: compiled().fit(X, at(Y, 7, -np.inf)), "y must be finite, got -inf in row 7"),
        (lambda: compiled().fit(at(X, 5, np.nan), Y), "x must be finite, got nan in row 5"),
        (lambda: compiled(in_features=3).evaluate(at(X, 11, np.inf), Y), "x must be finite, got inf in row 11"),
        (lambda: compiled(in_features=3).predict(at(X, 3, np.nan), batch_size=2), "x must be finite, got nan in row 3"),
        (
            lambda: compiled().fit(X, Y, validation_data=(at(X, 2, np.nan), Y), verbose=0),
            "x must be finite, got nan in row 2",
        ),
        (lambda: compiled().fit(X + 1j, Y), "x must be real numbers, got torch.complex128"),
        (lambda: compiled().fit(X, Y + 1j), "y must be real numbers, got torch.complex128"),
        (
            lambda: compiled(num_tasks=2).fit(X, [Y, torch.tensor(Y, dtype=torch.complex64)]),
            "y[1] must be real numbers, got torch.complex64",
        ),
        (lambda: compiled().fit(X, np.ones((12, 2)), verbose=0), "y must have the shape [12, 1] of the outputs, got"),
        (lambda: compiled().fit(X[None], Y), "x must be [R, D] with at least one row, got shape [1, 12, 3]"),
        (lambda: compiled().fit("x", Y), "x must be an array or a tensor of numbers, got str"),
        (lambda: compiled(in_features=2).fit(X, Y), "x must have 2 features, got shape [12, 3]"),
        (lambda: compiled().fit(X, Y, epochs=0), "epochs must be finite, at least 1, got 0"),
        (lambda: compiled().fit(X, Y, batch_size=0), "batch_size must be finite, at least 1, got 0"),
        (lambda: compiled().fit(X, Y, verbose=3), "verbose must be one of 0, 1, 2, got 3"),
        (lambda: compiled().fit(X, Y, validation_split=1), "validation_split must be finite, at least 0 and below 1"),
        (lambda: compiled().fit(X, Y, validation_split=0.01), "validation_split must leave at least one row to valid"),
        (lambda: compiled().fit(X, Y, validation_data=X), "validation_data must be (x, y) or (x, y, tasks), got ndarr"),
        (lambda: compiled(num_tasks=3).fit(X, [Y, Y]), "y must be 3 arrays, one a task, got 2"),
        (lambda: compiled(num_tasks=3).fit(X, Y), "y must be [R, T=3] or a list of 3 arrays, got shape [12, 1]"),
        (lambda: compiled(num_tasks=3).fit(X, Y, tasks=[0, 1]), "tasks must be [R=12], got shape [2]"),
        (lambda: compiled(num_tasks=3).fit(X, Y, tasks=[3] * 12, verbose=0), "tasks[0] must be in 0..2, got 3"),
        (
            lambda: compiled(outputs=[1, 2], num_tasks=2).fit(X, Y, tasks=[0] * 12),
            "tasks must be None for tasks of different outputs [1, 2]",
        ),
        (
            lambda: compiled(loss="cross_entropy", outputs=2).fit(X, [2] * 12, verbose=0),
            "y must be in 0..1, got 2",
        ),
        (
            lambda: compiled(loss=nn.CrossEntropyLoss(), outputs=2).fit(X, [5] * 12, verbose=0),
            "y must be in 0..1, got 5",
        ),
        (
            lambda: compiled(loss=nn.CrossEntropyLoss(label_smoothing=0.1), outputs=2).fit(X, [-1] * 12, verbose=0),
            "y must be in 0..1, got -1",
        ),
        (
            lambda: compiled(loss="bce").fit(X, at(np.ones((12, 1)), 4, 1.5), verbose=0),
            "y must be in [0, 1] for bce, got 1.5",
        ),
        (
            lambda: compiled(loss=nn.BCEWithLogitsLoss(), in_features=3).evaluate(X, [-1] * 12),
            "y must be in [0, 1] for bce, got -1",
        ),
        (
            lambda: compiled(loss=nn.MSELoss()).fit(X, np.ones((12, 2)), verbose=0),
            "y must have the shape [12, 1] of the outputs, got [12, 2]",
        ),
        (
            lambda: compiled().fit(X * 1e30, Y, verbose=0),
            "the loss of batch 0 is inf; its step is not taken",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError, FloatingPointError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loss_objects_see_targets_in_the_shape_of_the_outputs(rng):
    """[N] beside [N, 1] would broadcast to [N, N]: the same numbers by name and by object."""
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 3))
    histories = []
    for loss, metric in (("mse", "mae"), (torch.nn.MSELoss(), torch.nn.L1Loss())):
        torch.manual_seed(0)
        model = MultiTaskMetaLearningModel(num_tasks=3)
        model.compile(optimizer="sgd", loss=loss, metrics=[metric])
        history = model.fit(x, y, epochs=2, shuffle=False, verbose=0).history
        histories.append([history[key] for key in history])
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-5)
