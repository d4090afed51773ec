"""MetaLearnerTrainer.adapt beyond a head by steps: in closed form, by a map between outputs, with named layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtml_fast import MetaLearner, MetaLearnerTrainer, TaskRows, ridge_head
from mtml_fast.nn import TaskOutputs
from tests.inner.test_ridge import by_lstsq


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 2**32
    torch.manual_seed(value)
    print(f"seed {value}")


def trunk_of(features=3, hidden=8):
    return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, hidden))


def module_of(width):
    # smooth: a unit of ReLU that no row reaches would leave an output without meaning
    return nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, width))


def trainer_of(own=False, loss=None, hidden=None):
    """Three learned tasks of widths 1, 2, 1 over a trunk, after some steps that move its running statistics."""
    if own:
        learner = MetaLearner(3, task_module=[module_of(width) for width in (1, 2, 1)], trunk=trunk_of())
    else:
        learner = MetaLearner(3, 8, [1, 2, 1], hidden=hidden, trunk=trunk_of())
    trainer = MetaLearnerTrainer(learner.double(), 3, loss=loss)
    x = [torch.randn(12, 3, dtype=torch.float64) for _ in range(3)]
    y = [torch.rand(12, width, dtype=torch.float64) for width in (1, 2, 1)]
    trainer.train(x, range(3), y, epochs=3)
    return trainer


def rows_of(counts=(6, 40), outputs=(2, 3)):
    x = [torch.randn(n, 3, dtype=torch.float64) for n in counts]
    return x, [torch.randn(n, o, dtype=torch.float64) for n, o in zip(counts, outputs, strict=True)]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layers", ["head", "outputs"])
def test_ridge_is_least_squares_over_frozen_features(own, layers):
    """Ragged tasks of different widths; each head is the one that lstsq finds on what the learner gives."""
    trainer = trainer_of(own, hidden=5)
    learner = trainer.learner
    state, mode = copy.deepcopy(learner.state_dict()), learner.training
    x, y = rows_of()
    adapted = trainer.adapt(x, y, how="ridge", layers=layers, penalty=0.2)
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert learner.training == mode
    assert not any(module.training for module in adapted.modules())
    frozen = copy.deepcopy(learner).eval()
    for t in range(2):
        with torch.no_grad():
            features = frozen.trunk(x[t])
            if layers == "outputs":
                features = torch.cat([module(features) for module in frozen.task_modules], 1)
        weight, bias = by_lstsq(features, y[t], 0.2)
        head = adapted.heads.head(t)
        torch.testing.assert_close(head.weight, weight, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(head.bias, bias, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(adapted(x)[t], features @ weight.T + bias, rtol=1e-8, atol=1e-9)
    # an ordinary learner: it trains on, its heads alone
    expected = copy.deepcopy(adapted.trunk.state_dict())
    again = MetaLearnerTrainer(adapted, 2, lr=1e-2)
    adapted.trunk.eval()
    losses = [again.test(x, range(2), y)]
    again.train(x, range(2), y)
    assert all(
        torch.equal(value, expected[name]) for name, value in adapted.trunk.named_parameters() if name in expected
    )
    losses.append(again.test(x, range(2), y))
    assert losses[0] != losses[1]


def test_ridge_of_classes_and_of_bce():
    trainer = trainer_of()
    x, _ = rows_of((30, 9))
    classes = [torch.randint(0, 3, (n,)) for n in (30, 9)]
    classes[0][0] = 2
    adapted = trainer.adapt(x, classes, how="ridge", penalty=0.3)
    features = [copy.deepcopy(trainer.learner.trunk).eval()(v).detach() for v in x]
    for t in range(2):
        weight, bias = ridge_head(TaskRows(features[t][None], classes[t][None]), 0.3, classes=3)
        torch.testing.assert_close(adapted.heads.head(t).weight, weight[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(adapted.heads.head(t).bias, bias[0], rtol=1e-9, atol=1e-10)
    # one output a task, whose sign is the class: rows on both sides of the origin
    labels = [(torch.arange(n) % 2).double()[:, None] for n in (30, 9)]
    x = [0.2 * v + 6 * y - 3 for v, y in zip(x, labels, strict=True)]
    features = [copy.deepcopy(trainer.learner.trunk).eval()(v).detach() for v in x]
    binary = trainer_of(loss="bce")
    binary.learner.trunk.load_state_dict(trainer.learner.trunk.state_dict())
    adapted = binary.adapt(x, labels, how="ridge", penalty=1e-3)
    for z, v, y in zip(adapted(x), features, labels, strict=True):
        weight, bias = by_lstsq(v, 2 * y - 1, 1e-3)
        torch.testing.assert_close(z, v @ weight.T + bias, rtol=1e-6, atol=1e-7)
        assert torch.equal(z > 0, y > 0)


def test_ridge_without_a_trunk_is_linear_regression():
    trainer = MetaLearnerTrainer(MetaLearner(2, 3, 1), 2)
    x, y = torch.randn(1, 20, 3), torch.randn(1, 20, 1)
    head = trainer.adapt(x, y, how="ridge").heads.head(0)
    weight, bias = by_lstsq(x[0], y[0], 1.0)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-4, atol=1e-5)


def related(trainer, counts, features=3):
    """New tasks whose targets are affine in the outputs of the learned tasks: rows, targets, the maps."""
    learner = copy.deepcopy(trainer.learner).eval()
    x = [torch.randn(n, features, dtype=torch.float64) for n in counts]
    maps = [(torch.randn(2, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)) for _ in counts]
    with torch.no_grad():
        outputs = [torch.cat([module(learner.trunk(v)) for module in learner.task_modules], 1) for v in x]
    return x, [u @ a.T + b for u, (a, b) in zip(outputs, maps, strict=True)], maps


@pytest.mark.parametrize("own", [False, True])
def test_a_map_between_outputs_needs_fewer_rows_than_a_head(own):
    """Six rows show an affine map of four outputs; for a head over forty features they are far too few."""
    trunk = nn.Sequential(nn.Linear(20, 40), nn.Tanh())
    options = {"task_module": nn.Linear(40, 2)} if own else {"in_features": 40, "out_features": [1, 3], "hidden": None}
    trainer = MetaLearnerTrainer(MetaLearner(2, trunk=trunk, **options).double(), 2)
    x, y, maps = related(trainer, [106, 107], features=20)
    few = [v[:6] for v in x], [v[:6] for v in y]
    rest = [v[6:] for v in x], [v[6:] for v in y]
    mapped = trainer.adapt(*few, layers="outputs", how="ridge", penalty=1e-12)
    head = trainer.adapt(*few, layers="head", how="ridge", penalty=1e-12)
    for t, (weight, bias) in enumerate(maps):
        torch.testing.assert_close(mapped.heads.head(t).weight, weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mapped.heads.head(t).bias, bias, rtol=1e-3, atol=1e-3)
        spread = rest[1][t].var(0).mean()
        assert F.mse_loss(mapped(rest[0])[t], rest[1][t]) < 1e-6 * spread
        assert F.mse_loss(head(rest[0])[t], rest[1][t]) > 0.1 * spread


def test_a_map_by_steps_begins_with_the_nearest_task_and_descends():
    trainer = trainer_of()
    learner = copy.deepcopy(trainer.learner).eval()
    x = [torch.randn(9, 3, dtype=torch.float64)]
    target = learner(x, [1])[0].detach()
    # the second learned task has these outputs; one step of no length keeps them
    adapted = trainer.adapt(x, [target], layers="outputs", steps=1, lr=1e-12)
    torch.testing.assert_close(adapted(x)[0], target, rtol=1e-9, atol=1e-9)
    expected = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(adapted.heads.head(0).weight, expected, rtol=0, atol=1e-9)
    x, y, _ = related(trainer, [50])
    losses = [
        F.mse_loss(trainer.adapt(x, y, layers="outputs", steps=k, lr=0.1)(x)[0], y[0]).item() for k in (1, 10, 500)
    ]
    assert losses[0] > losses[1] > losses[2]
    # the steps are those of a plain loop
    u = TaskOutputs(learner)(x[0]).detach()
    start = trainer.adapt(x, y, layers="outputs", steps=1, lr=1e-15).heads.head(0)
    optimizer = torch.optim.SGD(start.parameters(), 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(start(u), y[0]).backward()
        optimizer.step()
    assert F.mse_loss(start(u), y[0]).item() == pytest.approx(losses[1], rel=1e-9)


def test_a_map_of_chosen_tasks_only():
    trainer = trainer_of()
    learner = copy.deepcopy(trainer.learner).eval()
    x, y = rows_of((20,), (1,))
    adapted = trainer.adapt(x, y, layers="outputs", how="ridge", from_tasks=[2, 1])
    with torch.no_grad():
        u = torch.cat(learner(x * 2, [2, 1]), 1)
    assert adapted.heads.head(0).in_features == 3
    weight, bias = by_lstsq(u, y[0], 1.0)
    torch.testing.assert_close(adapted(x)[0], u @ weight.T + bias, rtol=1e-8, atol=1e-9)
    # of the two chosen tasks only task 2 has one output
    started = trainer.adapt(x, y, layers="outputs", from_tasks=[2, 1], steps=1, lr=1e-12)
    torch.testing.assert_close(started(x)[0], u[:, :1], rtol=0, atol=1e-9)


def loop(trainer, adapted_start, x, y, layers, steps, lr):
    """One task by plain SGD: the trunk with all but the named layers frozen, in evaluation mode, and the head."""
    trunk, head = copy.deepcopy(trainer.learner.trunk).eval(), copy.deepcopy(adapted_start)
    learns = [p for n, p in trunk.named_parameters() if any(n == k or n.startswith(f"{k}.") for k in layers)]
    for name, module in trunk.named_modules():
        module.training = any(name == k or name.startswith(f"{k}.") for k in layers)
    optimizer = torch.optim.SGD([*learns, *head.parameters()], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(head(trunk(x)), y).backward()
        optimizer.step()
    return trunk.eval(), head


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layers", [["3"], ["1"], ["0.bias", "3.weight"], ("0", "1", "3")], ids=str)
def test_named_layers_learn_and_the_others_stay_bit_for_bit(own, layers):
    trainer = trainer_of(own, hidden=4)
    learner = trainer.learner
    state = copy.deepcopy(learner.state_dict())
    x, y = rows_of((6, 40, 6), (1, 2, 1))
    start = trainer.adapt(x, y, steps=1, lr=1e-18)
    adapted = trainer.adapt(x, y, layers=layers, steps=5, lr=0.05)
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert adapted.trunk is None
    assert not any(module.training for module in adapted.modules())
    for t in range(3):
        trunk, head = loop(trainer, start.heads.head(t), x[t], y[t], layers, 5, 0.05)
        own_trunk, own_head = adapted.heads.head(t)
        for ours, theirs in ((own_trunk, trunk), (own_head, head)):
            for name, value in ours.state_dict().items():
                torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-8, atol=1e-10)
        for name, value in own_trunk.state_dict().items():
            named = any(name == k or name.startswith(f"{k}.") for k in layers)
            # a bias before batch statistics has no gradient
            assert torch.equal(value, state[f"trunk.{name}"]) or named, name
        torch.testing.assert_close(adapted(x)[t], head(trunk(x[t])), rtol=1e-8, atol=1e-9)
    learned = [n for n, p in own_trunk.named_parameters() if not torch.equal(p, state[f"trunk.{n}"])]
    assert learned


def test_what_stays_is_held_once_for_all_tasks():
    """A hundred tasks cost a hundred copies of the named layer, not of the trunk."""
    trainer = trainer_of()
    x, y = torch.randn(100, 4, 3, dtype=torch.float64), torch.randn(100, 4, 1, dtype=torch.float64)
    adapted = trainer.adapt(x, y, layers=["3.bias"], steps=1)
    sizes = {name: list(p.shape) for name, p in adapted.heads.named_parameters()}
    assert sizes["groups.0.0.0.weight"] == [8, 3]
    assert sizes["groups.0.0.3.weight"] == [8, 8]
    assert sizes["groups.0.0.3.bias"] == [100, 8]
    # and it goes through files and copies
    fresh = trainer.adapt(x, y, layers=["3.bias"], steps=3)
    fresh.load_state_dict(adapted.state_dict())
    for z, expected in zip(copy.deepcopy(fresh)(x), adapted(x), strict=True):
        torch.testing.assert_close(z, expected, rtol=0, atol=0)


def test_a_learner_with_shared_layers_trains_on_and_starts_anew():
    trainer = trainer_of()
    x, y = rows_of((6, 8), (1, 1))
    adapted = trainer.adapt(x, y, layers=["3"], steps=2)
    frozen = adapted.heads.groups[0][0][0].weight.clone()
    again = MetaLearnerTrainer(adapted, 2, lr=1e-2)
    before = again.test(x, [0, 1], y)
    again.train(x, [0, 1], y, epochs=20)
    again.meta_train(x, [0, 1], y, steps=2)
    other = adapted.task_modules[1].state_dict()
    again.train(x[:1], [0], y[:1])
    assert all(torch.equal(value, other[name]) for name, value in adapted.task_modules[1].state_dict().items())
    assert again.test(x, [0, 1], y) < before
    assert torch.equal(adapted.heads.groups[0][0][0].weight, frozen)
    again.initialize(seed=3)
    assert not torch.equal(adapted.heads.groups[0][0][0].weight, frozen)
    assert torch.equal(adapted.task_modules[0][0][0].weight, adapted.task_modules[1][0][0].weight)


def test_adapt_without_names_is_as_it_was():
    """ "head" and "all" against plain SGD from the nearest module."""
    trainer = trainer_of()
    x, y = rows_of((6, 40), (1, 2))
    start = trainer.adapt(x, y, steps=1, lr=1e-18)
    for layers, learns in (("head", []), ("all", ["0", "1", "2", "3"])):
        adapted = trainer.adapt(x, y, layers=layers, steps=5, lr=0.05)
        for t in range(2):
            trunk, head = loop(trainer, start.heads.head(t), x[t], y[t], learns, 5, 0.05)
            torch.testing.assert_close(adapted(x)[t], head(trunk(x[t])), rtol=1e-8, atol=1e-9)


def images():
    """A trunk over images, so rows of more axes than one."""
    trunk = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
    trainer = MetaLearnerTrainer(MetaLearner(2, 48, [1, 2], trunk=trunk), 2)
    return trainer, torch.randn(2, 7, 1, 6, 6)


@pytest.mark.parametrize("options", [{"layers": "outputs"}, {"how": "ridge"}, {"layers": ["0"]}, {"layers": "all"}])
def test_rows_that_are_images(options):
    trainer, x = images()
    x = list(x)
    adapted = trainer.adapt(x, [torch.randint(0, 3, (7,)) for _ in x], steps=2, out_features=[3, 4], **options)
    assert [list(z.shape) for z in adapted(x)] == [[7, 3], [7, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "newton"}, "how must be one of 'steps', 'ridge', got 'newton'"),
        ({"layers": "last"}, "layers must be one of 'head', 'all', 'outputs', got 'last'"),
        ({"layers": 3}, "layers must be 'head', 'all', 'outputs' or a list of names, got 3"),
        ({"layers": ["7"]}, "layers must name modules or parameters that require a gradient, got '7'"),
        ({"layers": []}, "layers must leave a parameter to adapt, got []"),
        ({"layers": "all", "how": "ridge"}, "how must be 'steps' where the trunk learns (layers='all'), got 'ridge'"),
        ({"layers": ["0"], "how": "ridge"}, "how must be 'steps' where the trunk learns (layers=['0']), got 'ridge'"),
        ({"how": "ridge", "penalty": 0}, "penalty must be finite, above 0, got 0"),
        ({"from_tasks": [0]}, "from_tasks must be None but for layers='outputs', got [0]"),
        ({"layers": "outputs", "from_tasks": [0, 3]}, "from_tasks[1] must be in 0..2, got 3"),
        ({"layers": "outputs", "from_tasks": [1, 1]}, "from_tasks must hold each task once, got 1 twice"),
        ({"layers": "outputs", "from_tasks": []}, "from_tasks must be a list of task ids, got []"),
    ],
)
def test_errors_name_the_argument_and_the_value(options, message):
    x, y = rows_of()
    with pytest.raises((TypeError, ValueError)) as caught:
        trainer_of().adapt(x, y, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_that_is_refused():
    x, y = torch.randn(1, 5, 3), torch.randn(1, 5, 1)
    plain = MetaLearnerTrainer(MetaLearner(2, 3, 1), 2)
    with pytest.raises(ValueError, match=r"^layers must be 'head', 'all' or 'outputs' for a learner without a trunk"):
        plain.adapt(x, y, layers=["0"])
    with pytest.raises(FloatingPointError, match=r"^the head of new task 0 is not finite"):
        plain.adapt(x, y / 0, how="ridge")
    stack = MetaLearnerTrainer(
        MetaLearner(2, task_module=lambda: nn.Sequential(nn.Linear(3, 3), nn.Unflatten(1, (3, 1)))), 2
    )
    with pytest.raises(ValueError, match=r"learner must have outputs \[R, O\] of each row, got \[5, 3, 1\] of task 0"):
        stack.adapt(x, y, how="ridge", layers="outputs")
    wide = MetaLearnerTrainer(MetaLearner(2, 4, 1, trunk=nn.Unflatten(1, (3, 1))), 2)
    with pytest.raises(ValueError, match=r"^inputs must have rows \[D\] for these task modules, got rows \[3, 1\]"):
        wide.adapt(x, y, how="ridge")
    with pytest.raises(ValueError, match=r"^targets\[0\] must have the shape \[5, 2\] of the outputs, got \[5, 1\]"):
        plain.adapt(x, y, how="ridge", out_features=[2])
