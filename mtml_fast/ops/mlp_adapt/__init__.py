"""mlp_adapt: K gradient steps of an MLP on every task's support rows, then the query rows, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtml_fast.ops import _check
from mtml_fast.ops._define import define_op
from mtml_fast.ops._rates import rate_list
from mtml_fast.ops.heads.reference import ACTIVATIONS
from mtml_fast.ops.heads_loss.reference import LOSSES
from mtml_fast.ops.mlp_adapt import eager, reference


def _fake(params, lr, support_x, support_y, query_x, query_y, support_offsets, query_offsets, class_mask, *options):
    _, steps, _, _, bias, norm, *_, every_step, return_parameters = options
    tasks = support_x.shape[0] if support_offsets is None else support_offsets.shape[0] - 1
    saved = steps + 1 if every_step else 1
    weights = params[:: 1 + bias + 2 * norm]
    outputs = support_x.new_empty(saved, *query_x.shape[:-1], weights[-1].shape[-2])
    ranks = [2 if i % (1 + bias + 2 * norm) == 0 else 1 for i in range(len(params))]
    size = sum(p.shape[-rank:].numel() for p, rank in zip(params, ranks, strict=True))
    fast = support_x.new_empty(tasks, size) if return_parameters else support_x.new_empty(0)
    return outputs, support_x.new_empty(saved, tasks), fast


OPERATOR = define_op(
    "mlp_adapt",
    f"({eager.INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference.mlp_adapt,
    fake=_fake,
    differentiable=("params", "lr", "support_x", "query_x"),
    refuse=eager.REFUSED,
)


class MLPAdapted(NamedTuple):
    """What the adapted networks say about the query rows."""

    outputs: Tensor  # [T, Q, C] or [R, C]; with every_step [K + 1, ...], the first before any step
    losses: Tensor  # [T], or [K + 1, T]: each task's mean query loss (zeros without labels)
    parameters: list[Tensor] | None  # as params, each [T, ...], where they were asked for


def mlp_adapt(
    params: Sequence[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor | None = None,
    *,
    lr: float | Tensor | Sequence[Tensor],
    steps: int = 1,
    loss: str = "cross_entropy",
    activation: str = "relu",
    bias: bool = True,
    norm: bool = False,
    norm_eps: float = 1e-5,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    support_offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    class_mask: Tensor | None = None,
    adapted: Sequence[bool] | None = None,
    first_order: bool = False,
    every_step: bool = False,
    return_parameters: bool = False,
    store: str = "all",
) -> MLPAdapted:
    r"""K SGD steps of an MLP on every task's support rows, then the query rows through each task's own weights.

    .. math::
        \theta_{t,0} = \theta, \qquad
        \theta_{t,k+1} = \theta_{t,k} - a_k \nabla_\theta L\bigl(\theta_{t,k}; \text{support}_t\bigr), \qquad
        J_t = L\bigl(\theta_{t,K}; \text{query}_t\bigr)

    Args:
        params: layer after layer the weight `[O, I]`, then the bias `[O]` (where `bias`), then, on all layers but the
            last (where `norm`), gain and shift `[O]` of a batch norm. Any of them may be `[T, ...]`: a start per task.
            One layer is a linear head. float32 or float64.
        support_x: `[T, N, D]`, or packed rows `[R, D]` with `support_offsets`.
        support_y: int64 classes `[T, N]` or `[R]` for cross_entropy; else float targets `[T, N, C]` or `[R, C]`.
        query_x, query_y: as the support rows; without labels the losses are zeros.
        lr: the rates a: a number; a tensor `[]`, `[K]` (per step), `[1 or K, L]` (per layer) or
            `[1 or K, len(params)]`; or one tensor a parameter, `[]`, its shape, or `[1 or K, *shape]` (Meta-SGD). More
            rows than K are allowed: the first K are used.
        steps: K, the number of inner steps, 0 or more.
        loss: "cross_entropy", "mse" or "bce" (with logits): the mean over a task's rows (and outputs).
        activation: relu, tanh, gelu, gelu_tanh, silu, elu, leaky_relu, sigmoid, softplus or identity.
        norm: batch norm between the linear layer and the activation, by the statistics of the task's own rows at hand
            (support rows in the inner loop, query rows at the end: what the MAML paper calls its batch norm, and
            others call transductive); `norm_eps` is added to the variance.
        momentum, weight_decay, clip: of the inner steps, as in `sgd_step`.
        support_offsets, query_offsets: int64 `[T + 1]`: tasks of different shots.
        class_mask: bool `[T, C]`: the outputs that a task has (tasks of different ways). The others take no part in
            the loss; they come out as -inf under cross_entropy, else as 0.
        adapted: which of `params` the inner loop moves; all by default (ANIL: the last layer; BOIL: all but the last).
        first_order: treat the inner gradient as a constant (FOMAML).
        every_step: query outputs and losses after 0, 1, ..., K steps (the multi-step loss of MAML++).
        return_parameters: return the adapted parameters too.
        store: what native kernels keep for the backward pass: "all" keeps what the forward sweep computed;
            "recompute" keeps nothing but the arguments, and the backward pass runs the forward sweep again.

    Returns:
        `MLPAdapted(outputs, losses, parameters)`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: exact for params, lr, support_x and query_x, through all the inner steps (second order). A derivative
    of that gradient (third order) is exact where torch's operations serve; kernels raise RuntimeError.

    Source: Finn et al., "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017.

    Example:
        >>> import torch
        >>> weight, bias = torch.zeros(2, 3, requires_grad=True), torch.zeros(2)
        >>> x, y = torch.eye(3).expand(4, 3, 3), torch.tensor([0, 1, 0]).expand(4, 3)
        >>> result = mlp_adapt([weight, bias], x, y, x, y, lr=1.0, steps=5)
        >>> result.outputs.shape, bool((result.losses < 0.6).all())
        (torch.Size([4, 3, 2]), True)
        >>> result.losses.mean().backward()
    """
    _check.choice("store", store, ("all", "recompute"))
    arguments, shapes = _arguments(
        params,
        support_x,
        support_y,
        query_x,
        query_y,
        lr=lr,
        steps=steps,
        loss=loss,
        activation=activation,
        bias=bias,
        norm=norm,
        norm_eps=norm_eps,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip,
        support_offsets=support_offsets,
        query_offsets=query_offsets,
        class_mask=class_mask,
        adapted=adapted,
        first_order=first_order,
        every_step=every_step,
        return_parameters=return_parameters,
    )
    outputs, losses, fast = eager.adapt(arguments, store) or _by_operator(arguments)
    parameters = None
    if return_parameters:
        parts = fast.split([shape.numel() for shape in shapes], 1)
        parameters = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return MLPAdapted(outputs, losses, parameters)


class MLPAdaptedMean(NamedTuple):
    """As `MLPAdapted`, with the mean over the tasks of the last losses."""

    outputs: Tensor
    losses: Tensor
    mean_loss: Tensor  # []


def mlp_adapt_mean(
    params: Sequence[Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, **options
) -> MLPAdaptedMean:
    r"""`mlp_adapt` and the mean over the tasks of their query losses, whose gradient native kernels compute at once.

    .. math::
        J = \frac{1}{T} \sum_t L\bigl(\theta_{t,K}; \text{query}_t\bigr)

    This is what MAML minimises. While a task's results are in the cache its part of the gradient of J is computed too
    and kept until `mean_loss.backward()` asks for it. Any other use of the results has its exact gradient as well: the
    backward pass then runs the sweeps again.

    Args:
        params, support_x, support_y, query_x, query_y, options: as for `mlp_adapt`, but for `return_parameters` and
            `store`. With `every_step` the mean is that of the losses after the last step.

    Example:
        >>> import torch
        >>> weight, bias = torch.zeros(2, 3, requires_grad=True), torch.zeros(2)
        >>> x, y = torch.eye(3).expand(4, 3, 3), torch.tensor([0, 1, 0]).expand(4, 3)
        >>> result = mlp_adapt_mean([weight, bias], x, y, x, y, lr=1.0, steps=5)
        >>> result.mean_loss.backward()
        >>> torch.allclose(result.mean_loss, result.losses.mean()), weight.grad.shape
        (True, torch.Size([2, 3]))
    """
    if query_y is None:
        raise ValueError("query_y must be given where the mean loss is wanted, got None")
    arguments, _ = _arguments(params, support_x, support_y, query_x, query_y, **options)
    results = eager.adapt_mean(arguments)
    if results is None:
        outputs, losses, _ = _by_operator(arguments)
        results = outputs, losses, (losses[-1] if losses.dim() > 1 else losses).mean()
    return MLPAdaptedMean(*results)


def _by_operator(arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator or the reference, without the axis of steps where there is but one evaluation."""
    outputs, losses, fast = OPERATOR(*arguments)
    every_step = arguments[-2]
    return (outputs, losses, fast) if every_step else (outputs.squeeze(0), losses.squeeze(0), fast)


def _arguments(
    params,
    support_x,
    support_y,
    query_x,
    query_y,
    *,
    lr,
    steps=1,
    loss="cross_entropy",
    activation="relu",
    bias=True,
    norm=False,
    norm_eps=1e-5,
    momentum=0.0,
    weight_decay=0.0,
    clip=None,
    support_offsets=None,
    query_offsets=None,
    class_mask=None,
    adapted=None,
    first_order=False,
    every_step=False,
    return_parameters=False,
) -> tuple[tuple, list[torch.Size]]:
    """The operator's arguments, checked, and the shape of each parameter without a task axis."""
    params = _check.tensor_list("params", params)
    _check.number("steps", steps, low=0, integer=True)
    _check.choice("loss", loss, LOSSES)
    _check.choice("activation", activation, tuple(ACTIVATIONS))
    _check.number("norm_eps", norm_eps, low=0.0, exclusive=True)
    _check.number("momentum", momentum, low=0.0, below=1.0)
    _check.number("weight_decay", weight_decay, low=0.0)
    if clip is not None:
        _check.number("clip", clip, low=0.0, exclusive=True)

    support_x, query_x = (_check.widened(x, params[0]) for x in (support_x, query_x))
    tasks = _tasks("support", support_x, support_offsets)
    widths, shapes = _layers(params, tasks, bias, norm)
    for name, x, offsets in (("support", support_x, support_offsets), ("query", query_x, query_offsets)):
        _check.floating(f"{name}_x", x, like=params[0], like_name="params[0]")
        if _tasks(name, x, offsets) != tasks:
            raise ValueError(f"{name}_x must hold the {tasks} tasks of support_x, got {_tasks(name, x, offsets)}")
        if x.shape[-1] != widths[0]:
            raise ValueError(f"{name}_x must have D={widths[0]} features, as params[0] has, got shape {list(x.shape)}")
        if tasks and offsets is None and x.shape[1] == 0:
            raise ValueError(f"{name}_x must hold at least one row in every task, got shape {list(x.shape)}")
    if class_mask is not None:
        _check.tensor("class_mask", class_mask)
        if class_mask.dtype != torch.bool:
            raise TypeError(f"class_mask must be bool, got {class_mask.dtype}")
        _check.shape("class_mask", class_mask, ("T", tasks), ("C", widths[-1]))
        _check.same_device("class_mask", class_mask, support_x, "support_x")
    support_y = _targets("support_y", support_y, support_x, support_offsets, loss, widths[-1], class_mask)
    if query_y is not None:
        query_y = _targets("query_y", query_y, query_x, query_offsets, loss, widths[-1], class_mask)
    if adapted is None:
        adapted = [True] * len(params)
    elif len(adapted) != len(params):
        raise ValueError(f"adapted must hold one bool for each of the {len(params)} params, got {len(adapted)}")

    per_layer = 1 + bias + 2 * norm
    arguments = (
        params,
        rate_list(lr, steps, shapes, [i // per_layer for i in range(len(params))], like=params[0]),
        support_x,
        support_y,
        query_x,
        query_y,
        support_offsets,
        query_offsets,
        class_mask,
        tuple([bool(moves) for moves in adapted]),
        steps,
        loss,
        activation,
        bool(bias),
        bool(norm),
        float(norm_eps),
        float(momentum),
        float(weight_decay),
        clip,
        bool(first_order),
        bool(every_step),
        bool(return_parameters),
    )
    return arguments, shapes


def _tasks(name: str, x: Tensor, offsets: Tensor | None) -> int:
    _check.tensor(f"{name}_x", x)
    if offsets is None:
        _check.shape(f"{name}_x", x, ("T", None), (name[0].upper().replace("S", "N"), None), ("D", None))
        return x.shape[0]
    _check.shape(f"{name}_x", x, ("R", None), ("D", None))
    _check.offsets(f"{name}_offsets", offsets, x)
    return offsets.numel() - 1


def _layers(params: list[Tensor], tasks: int, bias: bool, norm: bool) -> tuple[list[int], list[torch.Size]]:
    """The widths [D, H, ..., C], and each parameter's shape without a task axis."""
    per_layer = 1 + bias + 2 * norm
    # the last layer has no norm
    layers, rest = divmod(len(params) + 2 * norm, per_layer)
    if layers < 1 or rest:
        form = "weight" + ", bias" * bool(bias) + ", gain, shift" * bool(norm)
        raise ValueError(f"params must hold {form} for every layer (the last without norm), got {len(params)} tensors")
    widths: list[int] = []
    shapes: list[torch.Size] = []
    for i, p in enumerate(params):
        _check.floating(f"params[{i}]", p, like=params[0], like_name="params[0]")
        rank = 1 if i % per_layer else 2
        if p.dim() not in (rank, rank + 1):
            expected = "[O, I] or [T, O, I]" if rank == 2 else "[O] or [T, O]"
            raise ValueError(f"params[{i}] must be {expected}, got shape {list(p.shape)}")
        if p.dim() == rank + 1 and p.shape[0] != tasks:
            raise ValueError(f"params[{i}] must have a task axis of T={tasks}, got shape {list(p.shape)}")
        if rank == 1:
            own = (widths[-1],)
        else:
            own = (p.shape[-2], widths[-1] if widths else p.shape[-1])
            widths.extend([own[0]] if widths else [own[1], own[0]])
        if p.shape[p.dim() - rank :] != own:
            raise ValueError(f"params[{i}] must have shape {list(own)} per task, got {list(p.shape)}")
        shapes.append(torch.Size(own))
    return widths, shapes


def _targets(name, y, x, offsets, loss, classes, class_mask) -> Tensor:
    _check.same_device(name, _check.tensor(name, y), x, "its rows")
    _check.no_gradient(name, y)
    rows = [("T", x.shape[0]), ("N", x.shape[1])] if offsets is None else [("R", x.shape[0])]
    if loss == "cross_entropy":
        task = None
        if class_mask is not None and _check.readable(y):
            counts = offsets.diff() if offsets is not None else torch.full((x.shape[0],), x.shape[1])
            task = torch.arange(counts.numel()).repeat_interleave(counts)
        _check.labels(name, y, classes, class_mask if task is not None else None, task)
        _check.shape(name, y, *rows)
        return y
    if classes == 1 and y.dim() == len(rows):
        y = y.unsqueeze(-1)
    _check.floating(name, y, like=x, like_name="its rows")
    _check.shape(name, y, *rows, ("C", classes))
    return y
