"""mlp_adapt where native kernels serve it and nothing but plain autograd watches: the common case, and the cheap one.

A registered autograd formula costs some 30 us a call, an autograd.Function around operators without autograd 10. Where
a transform, a compiler or a dispatch mode is at work, the registered operator is called instead; what both compute is
the same. The backward passes here have no derivative of their own and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor, nn

from mtml_fast.ops._library import LIB
from mtml_fast.ops._route import foreach_mul, has_kernel, is_plain

INPUTS = (
    "Tensor[] params, Tensor[] lr, Tensor support_x, Tensor support_y, Tensor query_x, Tensor? query_y, "
    "Tensor? support_offsets, Tensor? query_offsets, Tensor? class_mask, bool[] adapted, int steps, str loss, "
    "str activation, bool bias, bool norm, float norm_eps, float momentum, float weight_decay, float? clip, "
    "bool first_order, bool every_step, bool return_parameters"
)
REFUSED = (
    "a derivative of the meta-gradient (third order) is not offered; "
    "mtml_fast.backend('reference') and torch.func have it"
)

# Operators without autograd, for the functions below. Their outputs and losses have an axis of steps only where there
# are several; a cotangent without elements stands for zeros, a state without elements asks to recompute it.
# outputs, losses, adapted parameters, and the state for the backward pass (empty where nothing is needed)
LIB.define(f"_mlp_adapt_saving({INPUTS}, bool[] needs) -> Tensor[]")
LIB.define(f"_mlp_adapt_backward(Tensor[] grad_outputs, {INPUTS}, bool[] needs, Tensor state) -> Tensor[]")
# outputs, losses, adapted parameters, the mean over the tasks of the last losses, and the gradients of this mean
LIB.define(f"_mlp_adapt_gradients({INPUTS}, bool[] needs) -> Tensor[]")
# the plan of the kernels and its cost, as JSON text
LIB.define(f"_mlp_adapt_plan({INPUTS}, bool[] needs, bool keeps_state) -> Tensor")

_SAVING, _BACKWARD, _GRADIENTS, _PLAN = (
    getattr(torch.ops.mtml_fast, f"_mlp_adapt_{name}").default for name in ("saving", "backward", "gradients", "plan")
)

NATIVE = has_kernel("mtml_fast::_mlp_adapt_gradients", "cpu")
# whatever the defaults are while this is imported
with torch.inference_mode(False):
    _NOTHING = torch.empty(0, device="cpu")
_TENSORS = frozenset((Tensor, nn.Parameter))


def adapt(arguments: tuple, store: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Outputs, losses and adapted parameters; `None` where this is not the way to compute them.

    Args:
        arguments: those of the operator.
        store: "all" keeps the forward sweep's state for the backward pass, "recompute" nothing.
    """
    if not _is_served(arguments):
        return None
    inputs = _differentiable(arguments)
    needs = [t.requires_grad for t in inputs]
    if True not in needs or not torch.is_grad_enabled():
        return _SAVING(*arguments, [False] * len(inputs))[:3]
    return _Adapt.apply(arguments, needs, store, *compress(inputs, needs))


def adapt_mean(arguments: tuple) -> tuple[Tensor, Tensor, Tensor] | None:
    """Outputs, losses and the mean over the tasks of the last losses; `None` as above."""
    if not _is_served(arguments):
        return None
    inputs = _differentiable(arguments)
    needs = [t.requires_grad for t in inputs]
    if True not in needs or not torch.is_grad_enabled():
        outputs, losses, _, mean = _GRADIENTS(*arguments, [False] * len(inputs))
        return outputs, losses, mean
    return _AdaptMean.apply(arguments, needs, *compress(inputs, needs))


def adapt_mean_or_none(arguments: tuple) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `adapt_mean` for arguments that nobody has checked: `None` too where the kernels refuse them."""
    _, _, _, support_y, _, query_y, *_ = arguments
    if support_y.requires_grad or query_y.requires_grad:
        return None
    try:
        return adapt_mean(arguments)
    except ValueError:
        return None


def plan(arguments: tuple, backward: bool, keeps_state: bool) -> str | None:
    """The native kernels' plan as JSON; `None` where they do not serve.

    keeps_state: whether the forward sweep leaves its state for the backward sweep.
    """
    if not _is_served(arguments):
        return None
    with torch.no_grad():
        text = _PLAN(*arguments, [backward and t.requires_grad for t in _differentiable(arguments)], keeps_state)
    return bytes(text.tolist()).decode()


def _is_served(arguments: tuple) -> bool:
    if not NATIVE or not is_plain():
        return False
    tensors = [*arguments[0], *arguments[1], *[t for t in arguments[2:9] if t is not None]]
    return _TENSORS.issuperset(map(type, tensors)) and all(t.is_cpu for t in tensors)


def _differentiable(arguments: tuple) -> list[Tensor]:
    return [*arguments[0], *arguments[1], arguments[2], arguments[4]]


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments, needs, store, *inputs):
        ctx.set_materialize_grads(False)
        *results, state = _SAVING(*arguments, needs if store == "all" else [False] * len(needs))
        _save(ctx, arguments, needs, state)
        return tuple(results)

    @staticmethod
    def backward(ctx, *cotangents):
        return None, None, None, *_backward(ctx, cotangents)


class _AdaptMean(torch.autograd.Function):
    """The gradient of the mean loss is computed with the loss, while a task's results are in the cache."""

    @staticmethod
    def forward(ctx, arguments, needs, *inputs):
        ctx.set_materialize_grads(False)
        outputs, losses, _, mean, *ctx.gradients = _GRADIENTS(*arguments, needs)
        ctx.losses_shape = losses.shape
        _save(ctx, arguments, needs, _NOTHING)
        return outputs, losses, mean

    @staticmethod
    def backward(ctx, d_outputs, d_losses, d_mean):
        if d_outputs is None and d_losses is None and d_mean is None:
            return None, None, *[None] * sum(ctx.needs)
        kept = ctx.gradients
        if d_outputs is None and d_losses is None and kept is not None and not torch.is_grad_enabled():
            scale = d_mean.item()
            if scale != 1:
                return None, None, *foreach_mul(kept, scale)
            # handed over for good, so that a parameter's .grad may take them as they are: who comes a second time
            # through a retained graph gets them computed anew
            ctx.gradients = None
            return None, None, *kept
        if d_mean is not None:
            # the mean's share of the last evaluation's losses
            share = d_mean.new_zeros(ctx.losses_shape)
            last = share[-1] if share.dim() > 1 else share
            last += d_mean.detach() / last.numel()
            d_losses_total = share if d_losses is None else d_losses.detach() + share
        else:
            d_losses_total = d_losses
        return None, None, *_backward(ctx, (d_outputs, d_losses_total, None), (d_outputs, d_losses, d_mean))


class _Final(torch.autograd.Function):
    """Gradients whose own derivative is refused."""

    @staticmethod
    def forward(ctx, compute: Callable[[], Sequence[Tensor]], *depends_on):
        return tuple(compute())

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(f"mlp_adapt: {REFUSED}")


def _save(ctx, arguments: tuple, needs: list[bool], state: Tensor) -> None:
    ctx.save_for_backward(*arguments[0], *arguments[1], *arguments[2:9], state)
    ctx.counts = len(arguments[0]), len(arguments[1])
    ctx.options = arguments[9:]
    ctx.needs = needs


def _backward(ctx, cotangents: Sequence[Tensor | None], came_from: Sequence[Tensor | None] = ()) -> Sequence[Tensor]:
    """The gradients that are needed, by the backward sweep; `came_from`: what the cotangents were made of."""
    *tensors, state = ctx.saved_tensors
    params, rates = ctx.counts
    params, rates, rest = tensors[:params], tensors[params : params + rates], tensors[params + rates :]
    arguments = (params, rates, *rest, *ctx.options)

    def compute() -> list[Tensor]:
        given = [_NOTHING if c is None else c for c in cotangents]
        return _BACKWARD(given, *arguments, ctx.needs, state)

    if torch.is_grad_enabled():
        depends_on = [t for t in (came_from or cotangents) if t is not None]
        return _Final.apply(compute, *_differentiable(arguments), *depends_on)
    return compute()
