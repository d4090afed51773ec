"""Under torch.autocast operators compute in the dtype of their parameters; a trunk's features are widened."""

import contextlib

import pytest
import torch
from torch import nn

import mtml_fast as mf
from mtml_fast.ops import heads, heads_loss, mlp_adapt

given = contextlib.nullcontext()
half = torch.autocast("cpu", dtype=torch.bfloat16)
backends = pytest.mark.parametrize("name", ["auto", "operator", "reference"])
OFFSETS = torch.tensor([0, 6, 10])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1, 0])


def adapted(model, batch, context=given, **options):
    """Outputs and gradients; backward passes are made outside of autocast, as torch asks."""
    maml = mf.MAML(model, lr=0.1, steps=2, loss="cross_entropy", **options)
    with context:
        result = maml(batch)
    return result.outputs.detach(), *torch.autograd.grad(result.loss, list(model.parameters()))


@backends
def test_the_same_bits_as_without(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    rows = mf.TaskRows(torch.randn(3, 4, 8), torch.randint(0, 2, (3, 4)))
    batch = mf.TaskBatch(rows, rows)
    task_heads = mf.nn.TaskHeads(8, [3, 2])
    packed = mf.TaskRows(torch.randn(10, 8), LABELS, offsets=OFFSETS)
    with mf.backend(name):
        before = *adapted(model, batch), task_heads(packed), task_heads.loss(packed)
        with half:
            after = task_heads(packed), task_heads.loss(packed)
        after = *adapted(model, batch, half), *after
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@backends
def test_features_of_a_trunk_are_widened(name):
    torch.manual_seed(0)
    trunk, x = nn.Linear(8, 16), torch.randn(10, 8)
    head = mf.nn.TaskHeads(16, [3, 2])
    with mf.backend(name):
        with half:
            features = trunk(x)
            rows = mf.TaskRows(features, LABELS, offsets=OFFSETS)
            z, loss = head(rows), head.loss(rows)
        wide = mf.TaskRows(features.float(), LABELS, offsets=OFFSETS)
        assert features.dtype == torch.bfloat16
        assert torch.equal(z, head(wide))
        assert torch.equal(loss, head.loss(wide))
    loss.sum().backward()
    assert trunk.weight.grad.abs().sum() > 0


@backends
@pytest.mark.parametrize(
    ("y", "options"),
    [(torch.rand(10, 2), dict(loss="mse")), (LABELS % 2, dict(class_weights=torch.tensor([1.0, 2, 3, 4])))],
    ids=["targets", "class weights"],
)
def test_what_belongs_to_widened_features_is_wide(name, y, options):
    weight, x = torch.linspace(-1, 1, 32).view(4, 8), torch.linspace(-2, 2, 80).view(10, 8).bfloat16()
    with mf.backend(name):
        with half:
            loss = heads_loss(x, y, OFFSETS, weight, **options)
        assert torch.equal(loss, heads_loss(x.float(), y, OFFSETS, weight, **options))


def test_a_body_under_autocast_and_an_adapted_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    rows = mf.TaskRows(torch.randn(3, 4, 8), torch.randint(0, 2, (3, 4)))
    batch = mf.TaskBatch(rows, rows)
    outputs, *gradients = adapted(model, batch, half, layers="head")
    assert {t.dtype for t in (outputs, *gradients)} == {torch.float32}
    expected, *exact = adapted(model, batch, layers="head")
    for mine, right in zip((outputs, *gradients), (expected, *exact), strict=True):
        assert 0 < (mine - right).abs().max() < 0.05 * right.abs().max()


def test_explain_under_autocast():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    rows = mf.TaskRows(torch.randn(3, 4, 8), torch.randint(0, 2, (3, 4)))
    with half:
        said = mf.explain(model, mf.TaskBatch(rows, rows), layers="head")
    assert str(said) == str(mf.explain(model, mf.TaskBatch(rows, rows), layers="head"))


def test_elsewhere_half_precision_is_refused():
    x, weight, y = torch.randn(10, 8), torch.randn(4, 8), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^x must be float32 or float64, got torch\.bfloat16$"):
        heads(x.bfloat16(), OFFSETS, weight)
    with pytest.raises(TypeError, match=r"^support_x must be float32 or float64, got torch\.bfloat16$"):
        mlp_adapt([weight], x.view(2, 5, 8).bfloat16(), y, x.view(2, 5, 8), lr=0.1, bias=False)


def test_ridge_heads_of_a_trunk():
    torch.manual_seed(0)
    learner = mf.nn.MetaLearner(3, 8, [2, 3, 4], trunk=nn.Linear(8, 6))
    trainer = mf.MetaLearnerTrainer(learner, 3)
    x, y = torch.randn(12, 8), torch.arange(12) % 3
    with half:
        features = learner.trunk(x)
        new = trainer.adapt([x], [y], how="ridge")
        weight, bias = mf.ridge_head(mf.TaskRows(features[None], y[None]))
    assert features.dtype == torch.bfloat16
    assert {p.dtype for p in new.parameters()} == {weight.dtype, bias.dtype} == {torch.float32}
    expected, _ = mf.ridge_head(mf.TaskRows(features[None].float(), y[None]))
    assert torch.equal(weight, expected)
    with pytest.raises(TypeError, match=r"^rows\.x must be float32 or float64, got torch\.bfloat16$"):
        mf.ridge_head(mf.TaskRows(features[None], y[None]))


def test_on_a_device_that_autocast_does_not_know():
    x, y = torch.empty(2, 5, 8, device="meta"), torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with pytest.raises(TypeError, match=r"^support_x must be float32 or float64, got torch\.bfloat16$"):
        mlp_adapt([x[0, :4]], x.bfloat16(), y, x, lr=0.1, bias=False)
