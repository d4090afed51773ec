r"""mlp_adapt layer by layer, every task's weights in factored form: for wide networks on a GPU.

A weight is :math:`W_k = W_0 + \sum_{j<k} (-a_j D_j)^T H_j` and never built (docs/maths/mlp_adapt.md): the rows of all
tasks share one product with :math:`W_0`, and what a task has of its own are products with its few rows. All products
are torch's. The inner gradient is written out, and autograd differentiates it once: exact to second order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtml_fast.ops.heads.reference import ACTIVATIONS
from mtml_fast.ops.heads_loss.reference import task_losses
from mtml_fast.ops.mlp_adapt.reference import rate_of_step

# A task's support rows times the weights that a block would keep for it, from which on this is the faster way. On
# paper: where a block has a task, one processor of an H100 makes its products, some 7e10 multiply-adds a second, 9 for
# a weight, a row and a step; here a step of a layer is some 37 launches, 7 us each.
WIDE = 2e6


def fits(arguments: tuple) -> bool:
    """Whether a call has this form: several layers, plain steps, equally many rows, a weight's rate one number."""
    params, lr, *_ = arguments
    bias, norm, _, momentum, weight_decay, clip = arguments[13:19]
    weights = range(0, len(params), 1 + bias + 2 * norm)
    is_ragged = any(offsets is not None for offsets in arguments[6:8])
    if len(weights) == 1 or is_ragged or momentum or weight_decay or clip is not None:
        return False
    is_table = len(lr) == 1 and lr[0].dim() == 2
    return is_table or all(_is_one_number(lr[i]) for i in weights if arguments[9][i])


def pays(arguments: tuple) -> bool:
    """Whether, on paper, this is faster on a GPU than a block of threads for each task, which has 16 layers at most."""
    params, _, support_x, _, query_x, *_ = arguments
    bias, norm, return_parameters = arguments[13], arguments[14], arguments[21]
    weights = params[:: 1 + bias + 2 * norm]
    # a block has the first layer in Gram form but where somebody asks for what the weight alone knows
    asked = return_parameters or support_x.requires_grad or query_x.requires_grad or weights[0].dim() == 3
    own = weights if asked else weights[1:]
    return len(weights) > 16 or support_x.shape[1] * sum(w.shape[-2] * w.shape[-1] for w in own) >= WIDE


def plan(arguments: tuple) -> dict:
    """Each layer's form, "dense" where its weight stays, and the bytes of what autograd keeps: the most are factors."""
    params, _, support_x, _, query_x, *_ = arguments
    adapted, steps, bias, norm = *arguments[9:11], *arguments[13:15]
    per_layer = 1 + bias + 2 * norm
    weights, moves = params[::per_layer], [bool(steps) and moved for moved in adapted[::per_layer]]
    begin = _first_moving(adapted, per_layer)
    forms = [("gram" if i == begin else "factored") if moved else "dense" for i, moved in enumerate(moves)]
    factors = sum(w.shape[-1] + w.shape[-2] for w, form in zip(weights, forms, strict=True) if form == "factored")
    outputs, still = (sum(w.shape[-2] for w in part) for part in (weights[begin:], weights[:begin]))
    # every step keeps the factors of those before it, and its rows at each layer on both ways; all evaluations theirs
    rows, query_rows = support_x.shape[:2].numel(), query_x.shape[:2].numel()
    numbers = rows * (steps * (steps + 1) // 2 * factors + 4 * steps * outputs)
    numbers += query_rows * outputs * (steps + 1 if arguments[20] else 1) + (rows + query_rows) * still
    layers = [{"in": w.shape[-1], "out": w.shape[-2], "form": form} for w, form in zip(weights, forms, strict=True)]
    return {"layers": layers, "bytes": numbers * support_x.element_size()}


def adapt(
    params: list[Tensor],
    lr: list[Tensor],
    support_x: Tensor,  # [T, N, D]
    support_y: Tensor,
    query_x: Tensor,  # [T, Q, D]
    query_y: Tensor | None,
    support_offsets: None,
    query_offsets: None,
    class_mask: Tensor | None,
    adapted: Sequence[bool],
    steps: int,
    loss: str,
    activation: str,
    bias: bool,
    norm: bool,
    norm_eps: float,
    momentum: float,
    weight_decay: float,
    clip: None,
    first_order: bool,
    every_step: bool,
    return_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the operator, without an axis of steps where there is one evaluation."""
    tasks, per_layer, last = len(support_x), 1 + bias + 2 * norm, len(params) - 1 - bias
    layers = []
    for i in range(0, len(params), per_layer):
        vectors = [p.unsqueeze(-2) for p in params[i + 1 : i + per_layer]]
        layers.append(_Layer(params[i], vectors, bias, norm_eps if norm and i < last else None, activation, i == last))
    # what stays in front of all that moves is passed once; the first that moves has the same rows in every step
    begin = _first_moving(adapted, per_layer)
    support, query = (_forward(layers[:begin], x) for x in (support_x, query_x))
    if first_order:
        # the inner gradient is a constant; the rates are not
        support = support.detach()
    moving = layers[begin:]
    moving[0].weight = _FirstWeight(params[begin * per_layer], support)
    slope = _slope_of(loss, support_y, class_mask, params[last])
    known = None
    if query_y is not None and loss == "cross_entropy":
        query_y, is_class = _of_classes(query_y, params[last].shape[-2])
        # as a factor: of a task that is NaN the gradients are too
        known = torch.where(is_class.all(1), support_x.new_ones(()), torch.nan)
    downhill = [-rate for rate in lr]
    outputs, losses = [], []

    def answer() -> None:
        z = _forward(moving, query)
        j = z.new_zeros(tasks) if query_y is None else task_losses(z, query_y, loss, None, class_mask)
        losses.append(j if known is None else j * known)
        if class_mask is not None:
            z = torch.where(class_mask[:, None], z, -torch.inf if loss == "cross_entropy" else 0.0)
        outputs.append(z)

    for k in range(steps):
        if every_step:
            answer()
        if not any(adapted):
            continue
        with torch.no_grad() if first_order else contextlib.nullcontext():
            e = slope(_forward(moving, support))
            for layer in reversed(moving):
                e = layer.backward(e, layer is not moving[0])
        for i, layer in enumerate(moving, begin):
            places = range(i * per_layer, min((i + 1) * per_layer, len(params)))
            layer.move([rate_of_step(downhill, k, p) if adapted[p] else None for p in places])
    answer()
    fast = support_x.new_zeros(0)
    if return_parameters:
        dense = [t for layer in layers for t in (layer.weight.dense(), *layer.vectors)]
        fast = torch.cat([t.expand(tasks, *t.shape[-2:]).flatten(1) for t in dense], 1)
    # the caller may write into what it gets, and autograd keeps the outputs
    results = (torch.stack(outputs), torch.stack(losses)) if every_step else (outputs[0].clone(), losses[0])
    # of what takes no part the gradient is zero, as the operator's is
    idle = [*lr, support_x, *([*params, query_x] if query_y is None or return_parameters else [])]
    idle = [t for t in idle if t.requires_grad]
    return _Dependent.apply(*results, fast, *idle) if idle else (*results, fast)


def _first_moving(adapted: Sequence[bool], per_layer: int) -> int:
    """The layer in front of which all stay."""
    return adapted.index(True) // per_layer if any(adapted) else 0


def _forward(layers: Sequence[_Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer.forward(x)
    return x


class _Weight:
    """W_k of all tasks, as its start [O, I] or [T, O, I] and its factors, steps one after the other."""

    def __init__(self, start: Tensor):
        self.start = start
        self.h: Tensor | None = None  # [T, k N, I]
        self.d: Tensor | None = None  # [T, k N, O]

    def forward(self, x: Tensor) -> Tensor:
        """x W_k^T"""
        return _plus(x @ self.start.mT, x, self.h, self.d)

    def backward(self, d: Tensor) -> Tensor:
        """d W_k"""
        return _plus(d @ self.start, d, self.d, self.h)

    def move(self, h: Tensor, d: Tensor) -> None:
        """W_k+1 = W_k + d^T h"""
        self.h = h if self.h is None else torch.cat((self.h, h), 1)
        self.d = d if self.d is None else torch.cat((self.d, d), 1)

    def dense(self) -> Tensor:
        return self.start if self.d is None else self.start + self.d.mT @ self.h


class _FirstWeight(_Weight):
    """In Gram form: its rows are the same in every step, so that products are made once, and factors are one sum."""

    def __init__(self, start: Tensor, support_x: Tensor):
        super().__init__(start)
        self.h = support_x
        self.products: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if id(x) not in self.products:
            self.products[id(x)] = x @ self.start.mT, x @ self.h.mT
        z, gram = self.products[id(x)]
        return z if self.d is None else torch.baddbmm(z, gram, self.d)

    def move(self, h: Tensor, d: Tensor) -> None:
        self.d = d if self.d is None else self.d + d


def _plus(z: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """z + (x a^T) b"""
    return z if a is None else torch.baddbmm(z, x @ a.mT, b)


class _Layer:
    """A linear layer, perhaps a batch norm by each task's own rows, and, but for the last, an activation."""

    def __init__(self, weight: Tensor, vectors: list[Tensor], bias: bool, norm_eps, activation: str, is_last: bool):
        self.weight, self.norm_eps, self.is_last = _Weight(weight), norm_eps, is_last
        # [1, O] or [T, 1, O]: bias, gain, shift
        self.vectors, self.has_bias = vectors, bias
        self.activation, self.slope = ACTIVATIONS[activation], SLOPES[activation]

    def forward(self, h: Tensor) -> Tensor:
        """[T, N, I] -> [T, N, O]; what `backward` needs is that of the latest rows."""
        self.h, y = h, self.weight.forward(h)
        if self.has_bias:
            y = y + self.vectors[0]
        if self.norm_eps is not None:
            gain, shift = self.vectors[-2:]
            centred = y - y.mean(1, keepdim=True)
            self.scale = (centred.square().mean(1, keepdim=True) + self.norm_eps).rsqrt()
            self.normal = centred * self.scale
            y = self.normal * gain + shift
        self.y, self.out = y, y if self.is_last else self.activation(y)
        return self.out

    def backward(self, e: Tensor, goes_on: bool) -> Tensor | None:
        """From the derivative by the output to that by the input, where it goes on; keeps what `move` takes."""
        d = e if self.is_last else self.slope(e, self.y, self.out)
        self.gradients: list[Tensor | None] = [d.sum(1, keepdim=True)] if self.has_bias else []
        if self.norm_eps is not None:
            of_gain, of_shift = (d * self.normal).sum(1, keepdim=True), d.sum(1, keepdim=True)
            # no bias matters in front of a norm
            self.gradients = [*[None] * self.has_bias, of_gain, of_shift]
            mean, slope = of_shift / d.shape[1], of_gain / d.shape[1]
            d = (d - mean - self.normal * slope) * (self.scale * self.vectors[-2])
        self.d = d
        return self.weight.backward(d) if goes_on else None

    def move(self, rates: list[Tensor | None]) -> None:
        """A step, by minus the rate of each parameter; None: it stays."""
        of_weight, *of_vectors = rates
        if of_weight is not None:
            # one number, of a table or expanded
            self.weight.move(self.h, (of_weight if of_weight.dim() == 0 else of_weight[0, 0, 0]) * self.d)
        for i, (rate, g) in enumerate(zip(of_vectors, self.gradients, strict=True)):
            if rate is not None and g is not None:
                self.vectors[i] = torch.addcmul(self.vectors[i], rate, g)


# the cotangent of an activation's input from that of its output: e, input and output -> e act'(y)
_aten = torch.ops.aten
SLOPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda e, y, h: _aten.threshold_backward(e, h, 0),
    "tanh": lambda e, y, h: _aten.tanh_backward(e, h),
    "gelu": lambda e, y, h: _aten.gelu_backward(e, y),
    "gelu_tanh": lambda e, y, h: _aten.gelu_backward(e, y, approximate="tanh"),
    "silu": lambda e, y, h: e * torch.sigmoid(y) * (1 + y - h),
    "elu": lambda e, y, h: _aten.elu_backward(e, 1, 1, 1, False, y),
    "leaky_relu": lambda e, y, h: _aten.leaky_relu_backward(e, y, 0.01, False),
    "sigmoid": lambda e, y, h: _aten.sigmoid_backward(e, h),
    "softplus": lambda e, y, h: _aten.softplus_backward(e, y, 1, 20),
    "identity": lambda e, y, h: e,
}


def _slope_of(loss: str, targets: Tensor, class_mask: Tensor | None, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The derivative of a task's mean loss by its outputs [T, N, C]; like: the last weight [..., C, I]."""
    mask = None if class_mask is None else class_mask[:, None]
    classes, count = like.shape[-2], 1
    if loss == "cross_entropy":
        labels, is_class = _of_classes(targets, classes)
        targets = (labels[:, :, None] == torch.arange(classes, device=like.device)).to(like.dtype)
        targets = torch.where(is_class[:, :, None], targets, torch.nan)
    else:
        count = classes if mask is None else mask.sum(2, keepdim=True).clamp(min=1).to(like.dtype)
    # of no tasks there may be no rows
    factor = (2 if loss == "mse" else 1) / (count * max(targets.shape[1], 1))

    def slope(z: Tensor) -> Tensor:
        if loss == "cross_entropy":
            z = torch.softmax(z if mask is None else torch.where(mask, z, -torch.inf), 2)
        elif loss == "bce":
            z = torch.sigmoid(z)
        d = (z - targets) * factor
        return d if mask is None else torch.where(mask, d, 0.0)

    return slope


def _of_classes(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels [T, N] that are classes, and which were so: on a device nobody has looked, and a task of others is NaN."""
    is_class = (labels >= 0) & (labels < classes)
    return torch.where(is_class, labels, 0), is_class


def _is_one_number(rate: Tensor) -> bool:
    """Whether a rate [1 or K, *shape] is one number a step: such are expanded."""
    if not _is_expanded(rate):
        return False
    # a leaf that is expanded itself has a derivative by each element
    function = rate.grad_fn
    leaf = rate if function is None else getattr(function.next_functions[0][0], "variable", None)
    return leaf is None or not leaf.requires_grad or leaf.numel() == 1 or 0 not in leaf.stride()


def _is_expanded(rate: Tensor) -> bool:
    return all(size == 1 or stride == 0 for size, stride in zip(rate.shape[1:], rate.stride()[1:], strict=True))


class _Dependent(torch.autograd.Function):
    """Outputs, losses and parameters, with derivatives by others that are zero."""

    @staticmethod
    def forward(ctx, outputs, losses, fast, *idle):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*idle)
        # the same tensors: of a view nobody could change an element
        ctx.mark_dirty(outputs, losses, fast)
        return outputs, losses, fast

    @staticmethod
    def backward(ctx, *cotangents):
        return *cotangents, *[torch.zeros_like(t) for t in ctx.saved_tensors]
