"""MAML and FOMAML against hand-written loops in float64, for every kind of model that a plan takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import mtml_fast as mf


def hand_written_loss(model, batch, lr, steps, loss, first_order=False):
    """MAML in a dozen lines of plain autograd, one task after the other; batch norm by the rows at hand."""
    total = 0.0
    for t in range(batch.num_tasks):
        (sx, sy), (qx, qy) = batch.support.task(t), batch.query.task(t)
        fast = dict(model.named_parameters())
        for _ in range(steps):
            inner = loss(functional_call(model, fast, (sx,)), sy)
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=not first_order)
            fast = {name: p - lr * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        total = total + loss(functional_call(model, fast, (qx,)), qy)
    return total / batch.num_tasks


class Conv(nn.Module):
    """A small CNN whose forward calls F.batch_norm itself as well."""

    def __init__(self, ways):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.gain, self.shift = (
            nn.Conv2d(4, 4, 3),
            nn.Parameter(torch.ones(4)),
            nn.Parameter(torch.zeros(4)),
        )
        self.head = nn.Linear(4 * 2 * 2, ways)

    def forward(self, x):
        x = F.max_pool2d(torch.tanh(self.norm1(self.conv1(x))), 2)
        x = F.batch_norm(self.conv2(x), None, None, self.gain, self.shift, training=True)
        return self.head(F.softplus(x).flatten(1))


class Attention(nn.Module):
    def __init__(self, width, ways):
        super().__init__()
        self.embed = nn.Linear(width, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, ways)

    def forward(self, x):
        x = self.embed(x.unflatten(1, (2, -1)))
        return self.head(self.norm(x + self.attend(x, x, x, need_weights=False)[0]).mean(1))


def bn_without_statistics(*widths):
    return nn.Sequential(
        nn.Linear(widths[0], widths[1]),
        nn.BatchNorm1d(widths[1], track_running_stats=False),
        nn.Tanh(),
        nn.Linear(widths[1], widths[2]),
    )


def conv_with(norm):
    return nn.Sequential(nn.Conv1d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


MODELS = {
    "mlp": (lambda: mf.nn.mlp(6, (8, 7), 3, activation="tanh"), (6,), "mlp"),
    "linear": (lambda: nn.Linear(6, 3), (6,), "mlp"),
    "mlp-norm": (lambda: bn_without_statistics(6, 8, 3), (6,), "mlp"),
    "mlp-flatten": (lambda: nn.Sequential(nn.Flatten(), mf.nn.mlp(6, (5,), 3, activation="silu")), (2, 3), "mlp"),
    "mlp-two-kinds": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)),
                      (6,), "functional"),
    "conv": (lambda: Conv(3), (1, 8, 8), "functional"),
    "attention": (lambda: Attention(3, 3), (6,), "functional"),
    "group-norm": (lambda: conv_with(nn.GroupNorm(2, 4)),
                   (1, 6), "functional"),
    "instance-norm": (lambda: conv_with(nn.InstanceNorm1d(4, affine=True)), (1, 6), "functional"),
}  # fmt: skip


def episode(shape, tasks=3, shots=5, query=4, loss="cross_entropy", ways=3, ragged=False):
    generator = torch.Generator().manual_seed(7)

    def rows(count):
        counts = [count + t for t in range(tasks)] if ragged else [count] * tasks
        x = torch.randn(sum(counts), *shape, generator=generator, dtype=torch.float64)
        if loss == "cross_entropy":
            y = torch.randint(0, ways, (sum(counts),), generator=generator)
        else:
            y = torch.rand(sum(counts), ways, generator=generator, dtype=torch.float64)
        if ragged:
            return mf.TaskRows(x, y, torch.tensor([0, *counts]).cumsum(0))
        return mf.TaskRows(x.unflatten(0, (tasks, count)), y.unflatten(0, (tasks, count)))

    return mf.TaskBatch(rows(shots), rows(query))


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


def assert_same_meta_gradient(algorithm, expected_loss, batch, rtol=1e-10):
    model = algorithm.model
    names, params = zip(*model.named_parameters(), strict=True)
    result = algorithm(batch)
    torch.testing.assert_close(result.loss, expected_loss, rtol=1e-12, atol=1e-13)
    mine = torch.autograd.grad(result.loss, params)
    theirs = torch.autograd.grad(expected_loss, params)
    for name, a, b in zip(names, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradient_equals_a_hand_written_loop(name, ragged, first_order):
    build, shape, plan = MODELS[name]
    torch.manual_seed(1)
    model = build().double()
    batch = episode(shape, ragged=ragged)
    kind = mf.FOMAML if first_order else mf.MAML
    algorithm = kind(model, lr=0.3, steps=3)
    assert mf.explain(model, batch, steps=3).plan == plan
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        expected = hand_written_loss(model, batch, 0.3, 3, F.cross_entropy, first_order)
    assert_same_meta_gradient(algorithm, expected, batch)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("plan", ["mlp", "functional"])
def test_losses(loss, plan):
    torch.manual_seed(2)
    model = mf.nn.mlp(6, (5,), 3, activation="elu").double()
    batch = episode((6,), loss=loss)
    expected = hand_written_loss(model, batch, 0.2, 2, LOSSES[loss])
    assert_same_meta_gradient(mf.MAML(model, lr=0.2, steps=2, loss=loss, plan=plan), expected, batch)
    if loss != "bce":
        # the labels' dtype names the loss
        assert_same_meta_gradient(mf.MAML(model, lr=0.2, steps=2, plan=plan), hand_written_loss(
            model, batch, 0.2, 2, LOSSES[loss]), batch)  # fmt: skip


def test_a_loss_of_the_users():
    torch.manual_seed(3)
    model = mf.nn.mlp(6, (5,), 3).double()
    batch = episode((6,), loss="mse")
    expected = hand_written_loss(model, batch, 0.2, 2, F.huber_loss)
    assert_same_meta_gradient(mf.MAML(model, lr=0.2, steps=2, loss=F.huber_loss), expected, batch)


def test_second_order_differs_from_first_order():
    for name in ("mlp", "conv"):
        build, shape, _ = MODELS[name]
        torch.manual_seed(4)
        model = build().double()
        batch = episode(shape)
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(kind(model, 0.3, 2)(batch).loss, model.parameters())])
            for kind in (mf.MAML, mf.FOMAML)
        ]
        assert (grads[0] - grads[1]).norm() > 1e-3 * grads[0].norm()


def test_user_never_creates_a_graph():
    """A plain training step: no create_graph, no retain_graph, any optimizer, and the loss falls."""
    torch.manual_seed(5)
    tasks = mf.data.Sinusoid(seed=3)
    maml = mf.MAML(mf.nn.mlp(1, (20, 20), 1), lr=0.02, steps=2)
    optimizer = torch.optim.Adam(maml.parameters(), lr=5e-3)
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        result = maml(tasks.sample(25, step))
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_learned_rates():
    """Rates that are nn.Parameters are the algorithm's own, and get the gradient of the hand-written loop."""
    torch.manual_seed(6)
    model = mf.nn.mlp(6, (5,), 3, activation="tanh").double()
    batch = episode((6,))
    rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    for plan in ("mlp", "functional"):
        maml = mf.MAML(model, lr=rate, steps=2, plan=plan)
        assert len(list(maml.parameters())) == 5
        assert "lr" in maml.state_dict()
        mine = torch.autograd.grad(maml(batch).loss, rate)[0]
        expected = torch.autograd.grad(hand_written_loss(model, batch, rate, 2, F.cross_entropy), rate)[0]
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
        rates = {n: nn.Parameter(torch.full_like(p, 0.3)) for n, p in model.named_parameters()}
        sgd = mf.MAML(model, lr=rates, steps=2, plan=plan)
        assert len(list(sgd.parameters())) == 8
        mine = torch.autograd.grad(sgd(batch).loss, list(rates.values()))
        torch.testing.assert_close(sum(g.sum() for g in mine), expected, rtol=1e-10, atol=1e-12)


def test_running_statistics_stay_bit_for_bit():
    torch.manual_seed(7)
    for model, shape in ((mf.nn.mlp(6, (8,), 3, norm="batch"), (6,)), (Conv(3), (1, 8, 8))):
        model = model.double()
        before = copy.deepcopy(dict(model.named_buffers()))
        maml = mf.MAML(model, lr=0.1, steps=2)
        maml(episode(shape)).loss.backward()
        maml.adapt(episode(shape).support)
        for name, value in model.named_buffers():
            assert torch.equal(value, before[name]), name


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def outcome(maml, batch):
    """Loss, and the gradients of whatever is there to learn, with nothing remembered from before."""
    fresh = mf.MAML(maml.model, **vars(maml.inner))
    results = []
    for algorithm in (maml, fresh):
        learned = [p for p in maml.parameters() if p.requires_grad]
        loss = algorithm(batch).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, learned, allow_unused=True)])
    return results


def assert_follows(maml, batch, before=None):
    """The algorithm that has been called before gives what a new one gives, and something else than before."""
    mine, fresh = outcome(maml, batch)
    for a, b in zip(mine, fresh, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert before is None or not torch.equal(mine[0], before)
    return mine[0]


def test_what_is_remembered_follows_the_model():
    """A model, settings or rows that change between two calls are noticed."""
    torch.manual_seed(8)
    batch = episode((6,))
    model = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3)).double()
    maml = mf.MAML(model, lr=0.3, steps=2)
    loss = assert_follows(maml, batch)
    loss = assert_follows(maml, batch)
    model[1].negative_slope = 0.5
    loss = assert_follows(maml, batch, loss)
    model[1] = nn.Tanh()
    loss = assert_follows(maml, batch, loss)
    model[2] = nn.Linear(5, 3).double()
    loss = assert_follows(maml, batch, loss)
    model[2].weight = nn.Parameter(torch.randn(3, 5).double())
    loss = assert_follows(maml, batch, loss)
    model[0].bias.requires_grad_(False)
    loss = assert_follows(maml, batch, loss)
    model[0].bias.requires_grad_(True)
    loss = assert_follows(maml, batch, loss)
    handle = model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    loss = assert_follows(maml, batch, loss)
    handle.remove()
    loss = assert_follows(maml, batch, loss)
    model[1].forward = lambda x: x.sin()
    loss = assert_follows(maml, batch, loss)
    del model[1].forward
    loss = assert_follows(maml, batch, loss)
    model.append(nn.Tanh())
    loss = assert_follows(maml, batch, loss)
    del model[3]
    loss = assert_follows(maml, batch, loss)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    loss = assert_follows(maml, batch, loss)
    maml.model = mf.nn.mlp(6, (4,), 3, norm="batch").double()
    loss = assert_follows(maml, batch, loss)
    loss = assert_follows(maml, episode((6,), tasks=2, ragged=True), loss)
    loss = assert_follows(maml, episode((6,), loss="mse"), loss)
    loss = assert_follows(maml, batch, loss)
    maml.train(False)
    assert_follows(maml, batch)
    with torch.no_grad():
        for p in maml.parameters():
            p.mul_(1.1)
    assert_follows(maml, batch, loss)


def test_what_is_remembered_follows_the_settings():
    torch.manual_seed(9)
    batch, model = episode((6,)), mf.nn.mlp(6, (5,), 3, activation="tanh").double()
    maml = mf.MAML(model, lr=nn.Parameter(torch.tensor(0.3).double()), steps=2)
    loss = assert_follows(maml, batch)
    maml.lr = nn.Parameter(torch.tensor(0.1).double())
    loss = assert_follows(maml, batch, loss)
    with torch.no_grad():
        maml.lr.fill_(0.2)
    loss = assert_follows(maml, batch, loss)
    assert maml(batch, steps=5).loss != loss
    assert torch.equal(maml(batch, steps=2).loss, loss)
    assert torch.equal(maml(batch).loss, loss)
    other = copy.deepcopy(maml)
    with torch.no_grad():
        other.model[0].weight.mul_(2.0)
    assert_follows(other, batch, loss)
    assert torch.equal(assert_follows(maml, batch), loss)
    with pytest.raises(ValueError, match="steps must be finite, at least 0, got -1"):
        maml(batch, steps=-1)
    with pytest.raises(TypeError, match="steps must be an integer, got True"):
        maml(batch, steps=True)


@pytest.mark.parametrize("plan", ["mlp", "functional"])
def test_store(plan):
    """What is kept for the backward pass changes nothing but its cost."""
    torch.manual_seed(10)
    batch, model = episode((6,)), mf.nn.mlp(6, (5,), 3, activation="tanh").double()
    for store in ("gradient", "all", "recompute"):
        expected = hand_written_loss(model, batch, 0.3, 2, F.cross_entropy)
        assert_same_meta_gradient(mf.MAML(model, lr=0.3, steps=2, plan=plan, store=store), expected, batch)
        with torch.no_grad():
            assert not mf.MAML(model, lr=0.3, steps=2, plan=plan, store=store)(batch).loss.requires_grad
    with pytest.raises(ValueError, match=r"store must be one of 'gradient', 'all', 'recompute', got 'some'"):
        mf.MAML(model, store="some")


def test_other_losses_of_the_results():
    """A loss made of task_losses and outputs has its exact gradient, beside or without the mean loss."""
    torch.manual_seed(11)
    batch, model = episode((6,)), mf.nn.mlp(6, (5,), 3, activation="tanh").double()
    params = list(model.parameters())
    for make in (
        lambda r: r.task_losses.max(),
        lambda r: r.loss + 0.1 * r.outputs.square().mean(),
        lambda r: r.loss * r.loss.detach() + r.task_losses.square().sum(),
    ):
        grads = []
        for plan in ("mlp", "functional"):
            grads.append(torch.autograd.grad(make(mf.MAML(model, lr=0.3, steps=2, plan=plan)(batch)), params))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_result():
    batch = episode((6,), ragged=True)
    model = mf.nn.mlp(6, (5,), 3).double()
    result = mf.MAML(model, lr=0.1)(batch)
    torch.testing.assert_close(result.loss, result.task_losses.mean())
    parts = result.outputs.split(batch.query.counts.tolist())
    for t, z in enumerate(parts):
        expected = (z.argmax(1) == batch.query.task(t)[1]).double().mean()
        torch.testing.assert_close(result.metrics["accuracy"][t], expected)
    assert mf.MAML(model, lr=0.1)(episode((6,), loss="mse")).metrics == {}


def test_bad_input():
    model = mf.nn.mlp(6, (5,), 3).double()
    batch = episode((6,))
    with pytest.raises(TypeError, match="batch must be a TaskBatch, got int"):
        mf.MAML(model)(3)
    with pytest.raises(ValueError, match="query must have labels y, got None"):
        mf.MAML(model)(mf.TaskBatch(batch.support, batch.query.without_labels()))
    with pytest.raises(ValueError, match="support must have labels y, got None"):
        mf.MAML(model)(mf.TaskBatch(batch.support.without_labels(), batch.query))
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got function"):
        mf.MAML(lambda x: x)
    with pytest.raises(ValueError, match="lr must be finite, got nan"):
        mf.MAML(model, lr=float("nan"))
    with pytest.raises(ValueError, match="steps must be finite, at least 0, got -2"):
        mf.MAML(model, steps=-2)
    with pytest.raises(ValueError, match=r"loss must be one of .*, got 'hinge'"):
        mf.MAML(model, loss="hinge")
    with pytest.raises(ValueError, match=r"plan must be 'auto' or 'functional' for this model"):
        mf.MAML(Conv(3).double(), plan="mlp")(episode((1, 8, 8)))
    for plan in ("mlp", "functional"):
        high = mf.TaskRows(batch.query.x, batch.query.y + 5)
        with pytest.raises(ValueError, match="y must be"):
            mf.MAML(model, plan=plan)(mf.TaskBatch(batch.support, high))
        with pytest.raises(ValueError, match=r"support_y must be .*, got -1"):
            mf.MAML(model, plan=plan)(mf.TaskBatch(mf.TaskRows(batch.support.x, batch.support.y * 0 - 1), batch.query))
