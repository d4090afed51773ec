"""mlp_adapt on random configurations; `python -m mtml_fast.testing.random_mlp` runs any number of them."""

import pytest
import torch

from mtml_fast.ops import _route, mlp_adapt
from mtml_fast.ops.heads.reference import ACTIVATIONS
from mtml_fast.ops.heads_loss.reference import LOSSES
from mtml_fast.ops.mlp_adapt import eager
from mtml_fast.testing import random_mlp

native = pytest.mark.skipif(not eager.NATIVE, reason="the native kernels are not built")


@native
def test_random_configurations(seed):
    """Fresh ones each time; a failure names its own seed."""
    found = random_mlp.Found()
    for configuration in range(256 * seed, 256 * seed + 200):
        random_mlp.check(configuration, found)
    assert found.count == 200


def test_configurations_reach_every_option():
    """What the numbers of a thousand seeds must have met."""
    drawn = [random_mlp.draw(seed) for seed in range(1000)]
    calls = [c.call for c in drawn]
    assert {c["loss"] for c in calls} == set(LOSSES)
    assert {c["activation"] for c in calls} == set(ACTIVATIONS)
    assert {c.form for c in drawn} == set(random_mlp.FORMS)
    assert {c.route for c in drawn} == set(random_mlp.ROUTES)
    assert {c["steps"] for c in calls} >= {0, 1, 10}
    for option in ("bias", "norm", "first_order", "every_step"):
        assert {c[option] for c in calls} == {False, True}
    for option in ("momentum", "weight_decay", "clip", "class_mask", "support_offsets", "query_offsets"):
        assert 50 < sum(option in c for c in calls) < 500
    assert any("query_y" not in c for c in calls)
    assert any(not any(c["adapted"]) for c in calls)
    assert {isinstance(c["lr"], list) for c in calls} == {False, True}
    assert any(not p.is_contiguous() for c in calls for p in c["params"])
    assert max(c["support_x"].shape[-1] for c in calls) > 200


@native
@pytest.mark.parametrize(("dtype", "wrong_by"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_wrong_result_is_found(dtype, wrong_by, monkeypatch):
    """The checks fail where the losses of the kernels are a little wrong in one dtype, and in nothing else."""

    _spoil_losses(monkeypatch, dtype, wrong_by)
    found = 0
    for seed in range(20):
        c = random_mlp.draw(seed)
        if c.route == "mean" or "query_y" not in c.call or c.call["activation"] in random_mlp.KINKED:
            continue
        with pytest.raises(AssertionError, match=f"seed {seed}.*(?s:.)*{str(dtype)[6:]} losses"):
            random_mlp.check(seed)
        found += 1
    assert found > 4


@native
def test_a_wrong_result_is_found_where_the_inner_loop_ran_away(monkeypatch):
    """A float64 rounding of the inputs moves the gradients of this seed by 1e-4, and the losses by 1e-8: the kernels
    may be as far off, but not much further.
    """
    seed = 20272614
    assert random_mlp.check(seed).counts["chaotic"] > 0
    _spoil_losses(monkeypatch, torch.float64, 1e-7)
    with pytest.raises(AssertionError, match="float64 losses"):
        random_mlp.check(seed)


def _spoil_losses(monkeypatch, dtype: torch.dtype, wrong_by: float) -> None:
    """The kernels' losses in this dtype are off by that part."""

    def wrong(*args, **options):
        result = mlp_adapt(*args, **options)
        if _route._backend == "reference" or result.losses.dtype != dtype:
            return result
        return result._replace(losses=result.losses * (1 + wrong_by))

    monkeypatch.setattr(random_mlp, "mlp_adapt", wrong)
