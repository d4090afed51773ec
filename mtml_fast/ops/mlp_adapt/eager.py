"""mlp_adapt where native kernels serve it and nothing but plain autograd watches: the common case, and the cheap one.

A registered autograd formula costs some 30 us a call, an autograd.Function around operators without autograd 10. Where
a transform, a compiler or a dispatch mode is at work, the registered operator is called instead; what both compute is
the same. The backward passes here have no derivative of their own and say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtml_fast.ops._define import OPERATORS, in_given_dtype
from mtml_fast.ops._library import LIB
from mtml_fast.ops._route import apply_of, foreach_mul, has_kernel, is_plain, versions
from mtml_fast.ops.mlp_adapt import factored

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

# Operators without autograd, for the functions below. Each argument of an operator costs 0.1 us and more, so they take
# the tensors in one list (as _tensors has them) and everything else in one tensor of numbers (as _settings has it).
# Their outputs and losses have an axis of steps only where there are several; a cotangent without elements stands for
# zeros, a state without elements asks to recompute it.
# outputs, losses, adapted parameters, and the state for the backward pass (empty where nothing is needed)
LIB.define("_mlp_adapt_saving(Tensor[] tensors, Tensor settings) -> Tensor[]")
LIB.define("_mlp_adapt_backward(Tensor[] grad_outputs, Tensor[] tensors, Tensor settings, Tensor state) -> Tensor[]")
# outputs, losses, the mean over the tasks of the last losses, and the gradients of this mean
LIB.define("_mlp_adapt_gradients(Tensor[] tensors, Tensor settings) -> Tensor[]")
# the plan of the kernels and its cost, as JSON text
LIB.define("_mlp_adapt_plan(Tensor[] tensors, Tensor settings, bool keeps_state) -> Tensor")

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
    tensors = _tensors(arguments)
    if tensors is None:
        return None
    by_kernels = _served(tensors)
    if _is_factored(arguments, by_kernels):
        with in_given_dtype(tensors[0]):
            if store == "all":
                return factored.adapt(*arguments)
            return checkpoint(_again(tensors), *arguments, use_reentrant=False, preserve_rng_state=False)
    if not by_kernels:
        return None
    needs = _needs(arguments, tensors)
    nothing = (False,) * len(needs)
    if True not in needs or not torch.is_grad_enabled():
        return _SAVING(tensors, _settings(arguments, nothing))[:3]
    settings = _settings(arguments, needs)
    saving_settings = settings if store == "all" else _settings(arguments, nothing)
    return _apply_adapt(tensors, needs, settings, saving_settings, *compress(tensors, needs))


def adapt_mean(arguments: tuple) -> tuple[Tensor, Tensor, Tensor] | None:
    """Outputs, losses and the mean over the tasks of the last losses; `None` as above."""
    tensors = _tensors(arguments)
    if tensors is None:
        return None
    if not _has_gradients_at_once(tensors):
        results = adapt(arguments, "all")
        if results is None:
            return None
        outputs, losses, _ = results
        return outputs, losses, (losses[-1] if losses.dim() > 1 else losses).mean()
    needs = _needs(arguments, tensors)
    if True not in needs or not torch.is_grad_enabled():
        return tuple(_GRADIENTS(tensors, _settings(arguments, (False,) * len(needs))))
    return _apply_adapt_mean(tensors, needs, _settings(arguments, needs), *compress(tensors, needs))


def adapt_mean_or_none(arguments: tuple) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `adapt_mean` for arguments that nobody has checked: `None` too where no kernel checks them, or one refuses."""
    _, _, support_x, support_y, _, query_y, *_ = arguments
    if support_y.requires_grad or query_y.requires_grad:
        return None
    if _is_factored(arguments, _served([support_x])):
        return None
    try:
        return adapt_mean(arguments)
    except ValueError:
        return None


def plan(arguments: tuple, backward: bool, keeps_state: bool) -> dict | None:
    """Each layer's form and what it costs: layers, bytes and perhaps operations; `None` where the reference serves.

    keeps_state: whether the forward sweep leaves its state for the backward sweep.
    """
    tensors = _tensors(arguments)
    if tensors is None:
        return None
    by_kernels = _served(tensors)
    if _is_factored(arguments, by_kernels):
        return factored.plan(arguments)
    if not by_kernels:
        return None
    needs = tuple([backward and needed for needed in _needs(arguments, tensors)])
    with torch.no_grad():
        text = _PLAN(tensors, _settings(arguments, needs), keeps_state)
    return json.loads(bytes(text.tolist()))


def _tensors(arguments: tuple) -> list[Tensor] | None:
    """The tensors of a call, those that may have a gradient first; `None` where somebody else is to serve it."""
    if not is_plain():
        return None
    params, rates, support_x, support_y, query_x, *optional = arguments[:9]
    tensors = [*params, *rates, support_x, query_x, support_y, *[t for t in optional if t is not None]]
    if not _TENSORS.issuperset(map(type, tensors)):
        return None
    if False not in [t.is_cpu for t in tensors]:
        return tensors if NATIVE else None
    device = support_x.device
    return tensors if not support_x.is_meta and all(t.device == device for t in tensors) else None


def _served(tensors: list[Tensor]) -> bool:
    """Whether there are kernels for the device of the tensors."""
    return tensors[0].is_cpu or OPERATORS["mlp_adapt"].has_kernels(tensors[0].device)


def _has_gradients_at_once(tensors: list[Tensor]) -> bool:
    """Whether kernels compute a mean loss together with its gradient: it is what a cache makes worth while."""
    return tensors[0].is_cpu


def _is_factored(arguments: tuple, by_kernels: bool) -> bool:
    """Whether all tasks go through a network layer by layer, and not each by a kernel of its own, or by the reference.

    Where a device has no kernels, factors of rows are less work than a weight for each task (28 times on one
    thread of a CPU for 784-1024-1024-10, 5 rows and 5 steps).
    """
    if arguments[0][0].is_cpu or not factored.fits(arguments):
        return False
    return not by_kernels or factored.pays(arguments)


def _again(tensors: list[Tensor]) -> Callable:
    """The factored form, where it runs again in the backward pass: with the values that it had in the forward pass."""
    before = versions(tensors)

    def adapt(*arguments):
        if versions(tensors) != before:
            raise RuntimeError("mlp_adapt: an argument was modified by an inplace operation behind the forward pass")
        return factored.adapt(*arguments)

    return adapt


def _needs(arguments: tuple, tensors: list[Tensor]) -> tuple[bool, ...]:
    """Which tensors of params, lr, support_x and query_x require a gradient."""
    return tuple([t.requires_grad for t in tensors[: len(arguments[0]) + len(arguments[1]) + 2]])


def _settings(arguments: tuple, needs: tuple[bool, ...]) -> Tensor:
    """All that is no tensor, with the derivatives that are asked for."""
    _, _, _, _, _, query_y, support_offsets, query_offsets, class_mask, *options = arguments
    given = (query_y is not None, support_offsets is not None, query_offsets is not None, class_mask is not None)
    return _numbers(len(arguments[0]), given, needs, *options)


@lru_cache(maxsize=1024)
def _numbers(num_params, given, needs, adapted, steps, loss, activation, bias, norm, *options) -> Tensor:
    """The same as numbers: sequences and letters behind their count."""
    texts = [number for text in (loss, activation) for number in (len(text), *text.encode())]
    norm_eps, momentum, weight_decay, clip, *flags = options
    clip = torch.inf if clip is None else clip
    numbers = (bias, norm, norm_eps, momentum, weight_decay, clip, *flags)
    with torch.inference_mode(False):
        return torch.tensor(
            [num_params, *given, len(needs), *needs, len(adapted), *adapted, steps, *texts, *numbers],
            dtype=torch.float64,
            device="cpu",
        )


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensors, needs, settings, saving_settings, *inputs):
        ctx.set_materialize_grads(False)
        *results, state = _SAVING(tensors, saving_settings)
        ctx.save_for_backward(*tensors, state)
        ctx.needs, ctx.settings = needs, settings
        return tuple(results)

    @staticmethod
    def backward(ctx, *cotangents):
        return None, None, None, None, *_backward(ctx, cotangents)


class _AdaptMean(torch.autograd.Function):
    """The gradient of the mean loss is computed with the loss, while a task's results are in the cache."""

    @staticmethod
    def forward(ctx, tensors, needs, settings, *inputs):
        ctx.set_materialize_grads(False)
        outputs, losses, mean, *ctx.gradients = _GRADIENTS(tensors, settings)
        ctx.save_for_backward(*tensors, _NOTHING)
        ctx.needs, ctx.settings, ctx.losses_shape = needs, settings, losses.shape
        return outputs, losses, mean

    @staticmethod
    def backward(ctx, d_outputs, d_losses, d_mean):
        if d_outputs is None and d_losses is None and d_mean is None:
            return None, None, None, *[None] * sum(ctx.needs)
        kept = ctx.gradients
        if d_outputs is None and d_losses is None and kept is not None and not torch.is_grad_enabled():
            scale = d_mean.item()
            if scale != 1:
                return None, None, None, *foreach_mul(kept, scale)
            # handed over for good, so that a parameter's .grad may take them as they are: who comes a second time
            # through a retained graph gets them computed anew
            ctx.gradients = None
            return None, None, None, *kept
        if d_mean is not None:
            # the mean's share of the last evaluation's losses
            share = d_mean.new_zeros(ctx.losses_shape)
            last = share[-1] if share.dim() > 1 else share
            last += d_mean.detach() / last.numel()
            d_losses_total = share if d_losses is None else d_losses.detach() + share
        else:
            d_losses_total = d_losses
        return None, None, None, *_backward(ctx, (d_outputs, d_losses_total, None), (d_outputs, d_losses, d_mean))


class _Final(torch.autograd.Function):
    """Gradients whose own derivative is refused."""

    @staticmethod
    def forward(ctx, compute: Callable[[], Sequence[Tensor]], *depends_on):
        return tuple(compute())

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(f"mlp_adapt: {REFUSED}")


_apply_adapt, _apply_adapt_mean = apply_of(_Adapt), apply_of(_AdaptMean)


def _backward(ctx, cotangents: Sequence[Tensor | None], came_from: Sequence[Tensor | None] = ()) -> Sequence[Tensor]:
    """The gradients that are needed, by the backward sweep; `came_from`: what the cotangents were made of."""
    *tensors, state = ctx.saved_tensors

    def compute() -> list[Tensor]:
        given = [_NOTHING if c is None else c for c in cotangents]
        return _BACKWARD(given, tensors, ctx.settings, state)

    if torch.is_grad_enabled():
        depends_on = [t for t in (came_from or cotangents) if t is not None]
        return _Final.apply(compute, *tensors[: len(ctx.needs)], *depends_on)
    return compute()
