"""Models and settings that a plan could read wrongly: each against a plain loop, or refused in one line."""

import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mtml_fast as mf
from tests.algorithms.test_maml import assert_same_meta_gradient, episode

LR, STEPS = 0.3, 2


def check(model, batch=None, names=None, **inner):
    """MAML's meta-gradient equals the loop's, by whatever plan is chosen; the model stays as it was."""
    model, batch = model.double(), batch or episode((6,))
    before = dict(model.named_parameters())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    maml = mf.MAML(model, lr=LR, steps=STEPS, **inner)
    for _ in range(2):
        assert_same_meta_gradient(maml, loop_loss(model, batch, names), batch)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def loop_loss(model, batch, names=None):
    """The query loss after SGD steps of some parameters, written through a deep dictionary of tied tensors."""
    total = 0.0
    params = dict(model.named_parameters())
    names = names or [n for n, p in params.items() if p.requires_grad]
    for t in range(batch.num_tasks):
        (sx, sy), (qx, qy) = batch.support.task(t), batch.query.task(t)
        fast = {n: params[n] for n in names}
        for _ in range(STEPS):
            inner = F.cross_entropy(call(model, fast, sx), sy)
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
            fast = {n: p - LR * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        total = total + F.cross_entropy(call(model, fast, qx), qy)
    return total / batch.num_tasks


def call(model, values, x):
    """The model with other values in every place of its parameters, put there and taken out by hand."""
    params = dict(model.named_parameters())
    names = {id(params[n]): n for n in values}
    places = [
        (module, key, p)
        for module in model.modules()
        for key, p in list(module._parameters.items())
        if p is not None and id(p) in names
    ]
    statistics = [(module, key, b) for module in model.modules() for key, b in module._buffers.items()]
    try:
        for module, key, b in statistics:
            module._buffers[key] = b.clone()
        for module, key, p in places:
            del module._parameters[key]
            setattr(module, key, values[names[id(p)]])
        return model(x)
    finally:
        for module, key, p in places:
            delattr(module, key)
            module._parameters[key] = p
        for module, key, b in statistics:
            module._buffers[key] = b


class Twice(nn.Module):
    """One submodule under two names, used twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


class Tied(nn.Module):
    """One parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=True)


class Square(nn.GELU):
    def forward(self, x):
        return x * x


def shared_block():
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return nn.Sequential(block, block, nn.Linear(6, 3))


def shared_activation():
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(6, 6), tanh, nn.Linear(6, 6), tanh, nn.Linear(6, 3))


def hooked():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def hooked_inside():
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    inner.register_forward_hook(lambda module, args, output: 2 * output)
    return nn.Sequential(inner, nn.Linear(6, 3))


def own_forward(place):
    """A forward of the object's own, as some libraries put there."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    module = model if place is None else model[place]
    module.forward = lambda x: type(module).forward(module, x) * 2
    return model


MODELS = {
    "twice": Twice,
    "tied": Tied,
    "shared-block": shared_block,
    "shared-activation": shared_activation,
    "hooked": hooked,
    "hooked-inside": hooked_inside,
    "own-forward": lambda: own_forward(None),
    "own-forward-of-a-layer": lambda: own_forward(0),
    "subclass-of-an-activation": lambda: nn.Sequential(nn.Linear(6, 6), Square(), nn.Linear(6, 3)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_meta_gradient(name):
    torch.manual_seed(0)
    check(MODELS[name]())


def test_a_repeated_activation_is_still_an_mlp():
    assert mf.explain(shared_activation().double(), episode((6,))).plan == "mlp"
    assert mf.explain(shared_block().double(), episode((6,))).why == "not 'mlp': its layers share parameters"


HEADS = {
    "row-wise": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), "mlp"),
    "centred": (lambda: nn.Sequential(nn.Linear(6, 6), Centred(), nn.Linear(6, 3)), "functional"),
    "own-norm": (lambda: nn.Sequential(nn.Linear(6, 6), OwnNorm(), nn.Linear(6, 3)), "functional"),
    "tracked": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(6, 3)
        ),
        "functional",
    ),
    "hooked": (lambda: hooked(), "functional"),
    "shared-activation": (shared_activation, "mlp"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_on_bodies(name):
    build, plan = HEADS[name]
    torch.manual_seed(1)
    model = build().double()
    assert mf.explain(model, episode((6,)), layers="head").plan == plan
    last = list(dict(model.named_parameters()))[-2:]
    check(model, names=last, layers="head")


def test_a_frozen_head_is_no_head():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[3].requires_grad_(False)
    batch = episode((6,))
    assert mf.explain(model, batch, layers="head").plan == "functional"
    assert list(mf.adapt(model, batch.support, layers="head").parameters) == ["1.weight", "1.bias"]


def test_the_padding_row_of_an_embedding_learns_nothing():
    torch.manual_seed(2)

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4 * 6, 3)

        def forward(self, x):
            return self.head(self.table((x.abs() * 3).long().clamp(max=4)).flatten(1))

    model = Words()
    check(model)
    maml = mf.MAML(model.double(), lr=LR, steps=STEPS)
    maml(episode((6,))).loss.backward()
    assert model.table.weight.grad[0].abs().max() == 0


@pytest.mark.parametrize("plan", ["mlp", "functional"])
def test_rates_of_one_vector_alone(plan):
    """[3] rates of one bias are no table of three layers."""
    torch.manual_seed(3)
    model, batch = mf.nn.mlp(6, (5,), 3).double(), episode((6,))
    rate = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    adapted = mf.adapt(model, batch.support, layers=["2.bias"], lr={"2.bias": rate}, plan=plan)
    for t in range(3):
        loss = F.cross_entropy(model(batch.support.x[t]), batch.support.y[t])
        (grad,) = torch.autograd.grad(loss, model[2].bias)
        torch.testing.assert_close(adapted.parameters["2.bias"][t], model[2].bias - rate * grad)


def test_rates_of_names_alike():
    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ParameterDict({"b_c": nn.Parameter(torch.randn(6, 3))})
            self.a_b = nn.ParameterDict({"c": nn.Parameter(torch.randn(3))})

        def forward(self, x):
            return x @ self.a["b_c"] + self.a_b["c"]

    model = Alike()
    rates = {"a.b_c": nn.Parameter(torch.tensor(0.1)), "a_b.c": nn.Parameter(torch.tensor(0.7))}
    maml = mf.MAML(model, lr=rates)
    assert [float(maml.inner.lr[name].detach()) for name in rates] == pytest.approx([0.1, 0.7])
    assert len(list(maml.parameters())) == 4
    assert mf.MAML(model, lr=types.MappingProxyType(rates)).inner.lr.keys() == rates.keys()
    with pytest.raises(ValueError, match=r"lr must name parameters of the model, got 'a.d'"):
        mf.MAML(model, lr={**rates, "a.d": torch.tensor(0.1)})


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_class_masks_of_outputs_with_places(loss):
    """[N, C, L] outputs: the mask is of the classes, whatever stands behind them."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3)).double()  # [N, 4, 4]
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    y = torch.randint(2, 4, (2, 5, 4)) if loss == "cross_entropy" else torch.randn(2, 5, 4, 4).double()
    rows = mf.TaskRows(torch.randn(2, 5, 6).double(), y, class_mask=mask)
    result = mf.MAML(model, lr=0.1, loss=loss)(mf.TaskBatch(rows, rows))
    absent = -torch.inf if loss == "cross_entropy" else 0.0
    adapted = mf.adapt(model, rows, lr=0.1)
    for t in range(2):
        assert bool((result.outputs[t][:, ~mask[t]] == absent).all())
        z = adapted.module(t)(rows.x[t])
        present = mask[t].nonzero().flatten()
        if loss == "cross_entropy":
            place = torch.full((4,), -1).index_copy(0, present, torch.arange(3))
            expected = F.cross_entropy(z[:, present], place[y[t]])
        else:
            expected = F.mse_loss(z[:, present], y[t][:, present])
        torch.testing.assert_close(result.task_losses[t], expected)
    torch.testing.assert_close(adapted(rows), result.outputs)


def test_masks_without_the_first_class():
    torch.manual_seed(5)
    mask = torch.tensor([[False, True, True], [True, False, True], [True, True, False]])
    batch = episode((6,))
    y = [torch.stack([m.nonzero().flatten()[r % 2] for m, r in zip(mask, rows.y, strict=True)]) for rows in (
        batch.support, batch.query)]  # fmt: skip
    model = mf.nn.mlp(6, (5,), 3).double()
    batch = mf.TaskBatch(
        mf.TaskRows(batch.support.x, y[0], class_mask=mask), mf.TaskRows(batch.query.x, y[1], class_mask=mask)
    )
    results = [mf.MAML(model, lr=LR, steps=2, plan=plan)(batch) for plan in ("mlp", "functional")]
    torch.testing.assert_close(results[0].task_losses, results[1].task_losses)
    torch.testing.assert_close(results[0].outputs, results[1].outputs)
    # a mask on the query alone counts too
    half = mf.TaskBatch(mf.TaskRows(batch.support.x, y[0]), batch.query)
    torch.testing.assert_close(mf.MAML(model, lr=LR, steps=2)(half).task_losses, results[0].task_losses)
    absent = mf.TaskRows(batch.support.x, torch.zeros_like(y[0]), class_mask=mask)
    for plan in ("mlp", "functional"):
        with pytest.raises(ValueError, match="support_y must be a class of its task in class_mask, got 0 in task 0"):
            mf.MAML(model, plan=plan)(mf.TaskBatch(absent, batch.query))


@pytest.mark.parametrize("plan", ["mlp", "functional"])
def test_the_chosen_loss_stays_with_what_was_adapted(plan):
    """Float labels mean mse: absent outputs are 0 afterwards too, and frozen models still answer."""
    mask = torch.tensor([[True, False, True]] * 2)
    rows = mf.TaskRows(torch.randn(2, 5, 6).double(), torch.randn(2, 5, 3).double(), class_mask=mask)
    model = mf.nn.mlp(6, (5,), 3).double()
    adapted = mf.adapt(model, rows, plan=plan)
    assert bool((adapted(rows)[:, :, 1] == 0).all())
    model.requires_grad_(False)
    assert bool((adapted(rows)[:, :, 1] == 0).all())
    adapted.loss(rows)


def test_flatten_of_some_axes_is_not_flatten():
    model = nn.Sequential(nn.Flatten(1, 2), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    check(model, episode((2, 1, 3)))


def test_random_numbers_are_left_alone():
    """The first call of a process looks at the model; a run that draws dropout must not notice."""
    rows, losses = episode((6,)), []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        torch.nn.init.ones_(model[0].weight)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(mf.MAML(model)(rows).loss.detach())
    assert torch.stack(losses).unique().numel() == 1


def test_threads():
    """Eight threads over one model: everyone's own numbers, the model and the process's switches as they were."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = [episode((6,), tasks=2 + i) for i in range(8)]
    maml = mf.MAML(model, lr=LR, steps=2)
    expected = [maml(batch).loss.detach() for batch in batches]
    kinds = [type(p) for p in model.parameters()]
    switches = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    wrong = []

    def work(i):
        for _ in range(10):
            try:
                if not torch.equal(maml(batches[i]).loss.detach(), expected[i]):
                    wrong.append(i)
                maml.adapt(batches[i].support)(batches[i].query)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [type(p) for p in model.parameters()] == kinds
    assert switches == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


def test_what_cannot_be():
    batch, model = episode((6,)), nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    with pytest.raises(TypeError, match=r"support_x must have the dtype of the model \(torch.float64\), got"):
        mf.MAML(model)(batch.to(torch.float32))
    with pytest.raises(ValueError, match=r"query_y must be in 0..2, got 7"):
        mf.MAML(model)(mf.TaskBatch(batch.support, mf.TaskRows(batch.query.x, batch.query.y + 5)))
    one = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)).double()
    zeros, twos = batch.support.y * 0, batch.query.y * 0 + 2
    beyond = mf.TaskBatch(mf.TaskRows(batch.support.x, zeros), mf.TaskRows(batch.query.x, twos))
    with pytest.raises(ValueError, match=r"query_y must be in 0..0, got 2"):
        mf.MAML(one)(beyond)
    with pytest.raises(TypeError, match="model must return one tensor, got tuple"):
        mf.adapt(nn.LSTMCell(6, 3).double(), batch.support)
    with pytest.raises(TypeError, match="first_order must be a bool, got 'no'"):
        mf.MAML(model, first_order="no")
    with pytest.raises(TypeError, match="layers must be 'all', 'head', 'body' or a list of names, got 3"):
        mf.MAML(model, layers=3)
    with pytest.raises(ValueError, match="support must hold at least one task, got none"):
        mf.adapt(model, mf.TaskRows(torch.ones(0, 2, 6).double(), torch.ones(0, 2).long()))
    adapted = mf.adapt(mf.nn.mlp(6, (4,), 3).double(), batch.support)
    with pytest.raises(ValueError, match="query must have labels y, got None"):
        adapted.loss(batch.query.without_labels())
    with pytest.raises(ValueError, match=r"query_x must have D=6 features, got shape \[3, 4, 2\]"):
        adapted(batch.query.x[..., :2])
