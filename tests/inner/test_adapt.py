"""adapt, explain and Adapted: both plans, all settings, files, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import mtml_fast as mf
from mtml_fast.ops import OPERATORS, backend
from mtml_fast.ops._route import TorchDispatchMode
from tests.algorithms.test_maml import Conv, episode

PLANS = ["mlp", "functional"]


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return mf.nn.mlp(6, (8, 5), 3, **options).double()


def loop(model, rows, lr, steps, names=None, momentum=0.0, weight_decay=0.0, clip=None):
    """Each task's adapted parameters by torch.optim.SGD on a copy of the model."""
    adapted = []
    for t in range(rows.num_tasks):
        x, y = rows.task(t)
        own = copy.deepcopy(model)
        params = [p for n, p in own.named_parameters() if names is None or n in names]
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for _ in range(steps):
            own.zero_grad()
            F.cross_entropy(own(x), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
        adapted.append(dict(own.named_parameters()))
    return adapted


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.7}, {"weight_decay": 0.2}, {"clip": 0.3}, {"momentum": 0.5, "weight_decay": 0.1, "clip": 0.4}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_parameters_equal_a_loop_of_optimizers(plan, ragged, options):
    model, batch = model_of(), episode((6,), ragged=ragged)
    adapted = mf.adapt(model, batch.support, lr=0.3, steps=4, plan=plan, **options)
    expected = loop(model, batch.support, 0.3, 4, **options)
    for t, own in enumerate(expected):
        for name, value in own.items():
            torch.testing.assert_close(adapted.parameters[name][t], value, rtol=1e-11, atol=1e-12)
    outputs = adapted(batch.query)
    parts = outputs.split(batch.query.counts.tolist()) if ragged else outputs
    for t, (own, z) in enumerate(zip(expected, parts, strict=True)):
        torch.testing.assert_close(z, functional_call(model, own, (batch.query.task(t)[0],)), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(adapted.module(t)(batch.query.task(t)[0]), z, rtol=1e-10, atol=1e-11)
        loss = F.cross_entropy(z, batch.query.task(t)[1])
        torch.testing.assert_close(adapted.loss(batch.query)[t], loss, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("head", ["4.weight", "4.bias"]),
        ("body", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["2", "4.bias"], ["2.weight", "2.bias", "4.bias"]),
    ],
    ids=str,
)
def test_layers(plan, layers, names):
    model, batch = model_of(activation="tanh"), episode((6,))
    adapted = mf.adapt(model, batch.support, lr=0.3, steps=3, layers=layers, plan=plan)
    assert list(adapted.parameters) == names
    for t, own in enumerate(loop(model, batch.support, 0.3, 3, names)):
        for name in names:
            torch.testing.assert_close(adapted.parameters[name][t], own[name], rtol=1e-11, atol=1e-12)


def test_a_head_on_any_body_is_an_mlp_of_depth_one():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(108, 3)).double()
    batch = episode((1, 8, 8), ragged=True)
    assert mf.explain(model, batch, layers="head").plan == "mlp"
    grads = []
    for plan in PLANS:
        maml = mf.MAML(model, lr=0.2, steps=3, layers="head", plan=plan)
        grads.append(torch.autograd.grad(maml(batch).loss, model.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (3, 3), (3, 6)], ids=str)
def test_rates_agree_between_the_plans(shape):
    model, batch = model_of(), episode((6,))
    lr = 0.1 + 0.3 * torch.rand(shape, dtype=torch.float64)
    a, b = (mf.adapt(model, batch.support, lr=lr, steps=3, plan=plan).parameters for plan in PLANS)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-11, atol=1e-12)


def test_frozen_parameters_stay():
    model, batch = model_of(), episode((6,))
    model[0].requires_grad_(False)
    for plan in PLANS:
        adapted = mf.adapt(model, batch.support, lr=0.3, steps=2, plan=plan)
        assert not any(name.startswith("0.") for name in adapted.parameters)


def test_tasks_of_different_ways():
    model, batch = model_of(), episode((6,), ways=2)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    rows = [mf.TaskRows(r.x, r.y, class_mask=mask) for r in (batch.support, batch.query)]
    outputs = []
    for plan in PLANS:
        adapted = mf.adapt(model, rows[0], lr=0.3, steps=2, plan=plan)
        result = mf.MAML(model, lr=0.3, steps=2, plan=plan)(mf.TaskBatch(*rows))
        torch.testing.assert_close(adapted(rows[1]), result.outputs)
        torch.testing.assert_close(adapted.loss(rows[1]), result.task_losses)
        assert bool((result.outputs[0, :, 2] == -torch.inf).all())
        outputs.append(result.outputs)
        # two of three classes: the same as a model without the third
        small = copy.deepcopy(model)
        small[4] = nn.Linear(5, 2).double()
        with torch.no_grad():
            small[4].weight.copy_(model[4].weight[:2]), small[4].bias.copy_(model[4].bias[:2])
        own = mf.MAML(small, lr=0.3, steps=2)(batch)
        torch.testing.assert_close(result.task_losses[[0, 2]], own.task_losses[[0, 2]])
    torch.testing.assert_close(*outputs)


def test_batch_statistics():
    torch.manual_seed(3)
    model, batch = Conv(3).double().train(), episode((1, 8, 8))
    model.norm1(torch.randn(16, 4, 8, 8, dtype=torch.float64))
    losses = {}
    for policy in ("transductive", "support"):
        adapted = mf.adapt(model, batch.support, lr=0.2, steps=2, batch_stats=policy)
        result = mf.MAML(model, lr=0.2, steps=2, batch_stats=policy)(batch)
        torch.testing.assert_close(adapted.loss(batch.query), result.task_losses)
        losses[policy] = result.task_losses
        # the answer to a row depends on its neighbours only where the policy says so
        alone = adapted(batch.query.x[:, :1])
        same = torch.allclose(alone, adapted(batch.query)[:, :1])
        assert same == (policy == "support")
    assert not torch.allclose(losses["transductive"], losses["support"])


def test_support_statistics_by_hand():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = episode((6,))
    adapted = mf.adapt(model, batch.support, lr=0.2, steps=2, batch_stats="support")
    for t in range(3):
        own = adapted.module(t)
        z = own[0](batch.support.x[t])
        norm = nn.BatchNorm1d(4).double().eval()
        norm.load_state_dict({**own[1].state_dict(), "running_mean": z.mean(0), "running_var": z.var(0, correction=0)})
        expected = own[3](torch.tanh(norm(own[0](batch.query.x[t]))))
        torch.testing.assert_close(adapted(batch.query)[t], expected, rtol=1e-10, atol=1e-11)


def test_running_statistics_by_hand():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    model(torch.randn(50, 6, dtype=torch.float64))
    batch = episode((6,))
    adapted = mf.adapt(model, batch.support, lr=0.2, steps=3, batch_stats="running")
    for t, own in enumerate(loop(model.eval(), batch.support, 0.2, 3)):
        for name, value in own.items():
            torch.testing.assert_close(adapted.parameters[name][t], value, rtol=1e-10, atol=1e-11)


def test_chunks_and_order_of_tasks_do_not_matter():
    torch.manual_seed(4)
    model = Conv(3).double()
    for ragged in (False, True):
        batch = episode((1, 8, 8), tasks=5, ragged=ragged)
        whole = mf.MAML(model, lr=0.2, steps=2)(batch)
        for chunk in (1, 2, 7):
            part = mf.MAML(model, lr=0.2, steps=2, chunk=chunk)(batch)
            torch.testing.assert_close(part.outputs, whole.outputs)
            torch.testing.assert_close(part.task_losses, whole.task_losses)
        order = torch.tensor([3, 0, 4, 2, 1])
        permuted = mf.MAML(model, lr=0.2, steps=2)(batch.select(order))
        torch.testing.assert_close(permuted.task_losses, whole.task_losses[order])


@pytest.mark.parametrize("plan", PLANS)
def test_graph_only_where_wanted(plan):
    model, batch = model_of(), episode((6,))
    adapted = mf.adapt(model, batch.support, lr=0.3, steps=2, plan=plan)
    assert adapted.loss(batch.query).requires_grad
    assert not adapted.detach().loss(batch.query).detach().requires_grad
    assert not any(p.requires_grad for p in adapted.detach().parameters.values())
    assert not any(p.requires_grad for p in mf.MAML(model, plan=plan).adapt(batch.support).parameters.values())
    with torch.no_grad():
        assert not mf.adapt(model, batch.support, plan=plan).loss(batch.query).requires_grad
        assert not mf.MAML(model, plan=plan)(batch).loss.requires_grad


@pytest.mark.parametrize("plan", PLANS)
def test_update_goes_on_from_the_adapted_weights(plan):
    model, batch = model_of(), episode((6,))
    twice = mf.adapt(model, batch.support, lr=0.3, steps=2, plan=plan).update(batch.support, steps=3)
    once = mf.adapt(model, batch.support, lr=0.3, steps=5, plan=plan)
    for name in once.parameters:
        torch.testing.assert_close(twice.parameters[name], once.parameters[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("policy", ["transductive", "support"])
def test_save_and_load(tmp_path, policy):
    torch.manual_seed(5)
    model, batch = Conv(3).double(), episode((1, 8, 8))
    rates = {n: torch.full_like(p, 0.2) for n, p in model.named_parameters()}
    for lr in (0.2, rates):
        adapted = mf.adapt(model, batch.support, lr=lr, steps=2, batch_stats=policy, layers="all")
        adapted.save(tmp_path / "adapted.safetensors")
        loaded = mf.Adapted.load(tmp_path / "adapted.safetensors", Conv(3).double())
        assert torch.equal(loaded(batch.query), adapted(batch.query))
        again, more = (a.update(batch.support).parameters for a in (loaded, adapted))
        assert all(torch.equal(again[name], more[name]) for name in more)
        there = mf.Adapted.load(tmp_path / "adapted.safetensors", Conv(3).double().to("meta"))
        assert there(mf.TaskRows(batch.query.x.to("meta"))).device.type == "meta"
    with pytest.raises(ValueError, match="model must be the one that was saved"):
        mf.Adapted.load(tmp_path / "adapted.safetensors", Conv(4).double())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mf.Adapted.load(tmp_path / "nowhere.safetensors", model)
    data = bytearray((tmp_path / "adapted.safetensors").read_bytes())
    data[-3] ^= 4
    (tmp_path / "adapted.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"adapted.safetensors"):
        mf.Adapted.load(tmp_path / "adapted.safetensors", model)


def test_dropout_differs_between_tasks_and_not_in_eval():
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    rows = mf.TaskRows(torch.ones(2, 1, 6).double(), torch.zeros(2, 1).long())
    outputs = mf.adapt(model, rows, steps=0)(rows)
    assert not torch.equal(outputs[0], outputs[1])
    outputs = mf.adapt(model.eval(), rows, steps=0)(rows)
    assert torch.equal(outputs[0], outputs[1])


def test_explain(capsys):
    model, batch = model_of(), episode((6,))
    said = mf.explain(model, batch, steps=2)
    assert str(said) in capsys.readouterr().out
    assert said.plan == "mlp"
    assert said.served_by["mlp_adapt"] in ("native", "reference")
    assert said.operations > 0
    assert said.bytes > 0
    assert mf.explain(model, batch, steps=4).operations > said.operations
    assert mf.explain(model, batch, steps=2, first_order=True).operations < said.operations
    other = mf.explain(Conv(3).double(), episode((1, 8, 8)), steps=2)
    assert other.plan == "functional"
    assert "Conv is no nn.Sequential" in other.why
    assert "it was asked for" in mf.explain(model, batch, plan="functional").why
    assert "the user's" in mf.explain(model, batch, loss=F.cross_entropy).why


@pytest.mark.skipif(OPERATORS["mlp_adapt"].served_by("cpu") != "native", reason="needs native kernels")
def test_explain_counts_what_the_store_keeps():
    """Kept, the state of all tasks; else that of the task at hand, next to what is shared."""
    model = mf.nn.mlp(6, (40, 40), 3).double()
    few, many = (
        {
            store: mf.explain(model, episode((6,), tasks=tasks), steps=30, store=store).bytes
            for store in ("all", "recompute", "gradient")
        }
        for tasks in (8, 80)
    )
    assert few["all"] > 4 * few["recompute"] == 4 * few["gradient"]
    assert many["all"] > 8 * few["all"]
    assert many["recompute"] < 4 * few["recompute"]


@pytest.mark.parametrize("store", ["gradient", "all", "recompute"])
def test_mlp_plan_is_one_call(store):
    """The plan is what it says: one operator for all tasks and steps, and one more where backward needs it."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    model, batch = model_of(), episode((6,), tasks=7)
    maml = mf.MAML(model, lr=0.1, steps=5, store=store)
    with backend("operator"), Watch():
        maml(batch).loss.backward()
    assert [name for name in seen if "mtml_fast" in name] == ["mtml_fast::mlp_adapt", "mtml_fast::mlp_adapt_backward"]


def test_bad_input():
    model, batch = model_of(), episode((6,))
    with pytest.raises(TypeError, match=r"support must be TaskRows, got Tensor"):
        mf.adapt(model, batch.support.x)
    with pytest.raises(ValueError, match=r"layers must be one of 'all', 'head', 'body', got 'tail'"):
        mf.adapt(model, batch.support, layers="tail")
    with pytest.raises(ValueError, match=r"layers must name modules or parameters .*, got '7'"):
        mf.adapt(model, batch.support, layers=["7"])
    with pytest.raises(ValueError, match=r"batch_stats must be one of .*, got 'mine'"):
        mf.adapt(model, batch.support, batch_stats="mine")
    with pytest.raises(ValueError, match=r"chunk must be finite, at least 1, got 0"):
        mf.adapt(model, batch.support, chunk=0)
    with pytest.raises(ValueError, match=r"lr must have a rate for every adapted parameter, got none for '0.bias'"):
        mf.adapt(model, batch.support, lr={"0.weight": torch.tensor(0.1, dtype=torch.float64)})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'learning_rate'"):
        mf.adapt(model, batch.support, learning_rate=0.1)
    adapted = mf.adapt(model, batch.support)
    with pytest.raises(ValueError, match=r"query must hold the 3 tasks that were adapted to, got 2"):
        adapted(batch.query.x[:2])
    with pytest.raises(TypeError, match=r"query must be TaskRows or a tensor"):
        adapted([1, 2])
    with pytest.raises(IndexError, match=r"t must be a task in 0..2, got 3"):
        adapted.module(3)
    with pytest.raises(ValueError, match=r"layers must stay 'all' in an update, got 'head'"):
        adapted.update(batch.support, layers="head")
    with pytest.raises(TypeError, match=r"support_x must have the dtype of params\[0\]"):
        mf.adapt(model, batch.support.to(torch.float32))
