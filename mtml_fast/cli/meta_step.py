"""MetaStep: one meta-step of an MLP, as this library does it, as plain PyTorch does it, in float64, and its cost.

Every way of computing it returns the same list: the meta-loss, its gradient for each of the model's parameters, and
where wanted for the support and the query features.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap

import mtml_fast as mf
from mtml_fast.ops import mlp_adapt
from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["MetaStep", "bmm", "compiled_torch_func", "exact", "maml", "model", "operations", "operator", "own_copy"]
__all__ += ["torch_func"]

NORM_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class MetaStep:
    """K inner steps on every task's support rows, the mean query loss, and its gradient."""

    model: nn.Sequential  # of mf.nn.mlp, with ReLU
    batch: TaskBatch
    lr: float
    steps: int
    loss: str
    first_order: bool = False
    feature_gradients: bool = False

    @classmethod
    def random(
        cls, widths: list[int], tasks: int, support: int, query: int, *, loss: str = "cross_entropy", norm=False, **more
    ) -> MetaStep:
        """Gaussian rows, the classes taking turns; the same on every call."""
        draws = torch.Generator().manual_seed(0)

        def rows(count: int) -> TaskRows:
            if loss == "cross_entropy":
                y = (torch.arange(count) % widths[-1]).repeat(tasks, 1)
            else:
                y = torch.randn(tasks, count, widths[-1], generator=draws)
                y = y if loss == "mse" else (y > 0).float()
            return TaskRows(torch.randn(tasks, count, widths[0], generator=draws), y)

        return cls(model(widths, norm), TaskBatch(rows(support), rows(query)), loss=loss, **more)

    def to(self, device: torch.device | str) -> MetaStep:
        """The same on another device."""
        return replace(self, model=copy.deepcopy(self.model).to(device), batch=self.batch.to(device))

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def norm(self) -> bool:
        return any(isinstance(layer, nn.BatchNorm1d) for layer in self.model)

    @property
    def wanted(self) -> list[Tensor]:
        """What the gradient is for."""
        features = [self.batch.support.x, self.batch.query.x] if self.feature_gradients else []
        return [*self.params, *features]

    def padded(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Support and query rows as rectangles: x, y, and for ragged tasks row weights [T, N] and class mask [T, C]."""
        return _padded(self.batch.support), _padded(self.batch.query)


def model(widths: list[int], norm: bool = False) -> nn.Sequential:
    """An MLP with the same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mf.nn.mlp(widths[0], widths[1:-1], widths[-1], norm="batch" if norm else None)


# ours: as users write it, and the operator below it


def maml(step: MetaStep) -> Callable[[], list[Tensor]]:
    """mf.MAML, and backward() into .grad."""
    algorithm = mf.MAML(step.model, lr=step.lr, steps=step.steps, loss=step.loss, first_order=step.first_order)
    params, batch = step.params, step.batch

    def call() -> list[Tensor]:
        for p in params:
            p.grad = None
        loss = algorithm(batch).loss
        loss.backward()
        return [loss, *(p.grad for p in params)]

    return call


def operator(step: MetaStep) -> Callable[[], list[Tensor]]:
    """mlp_adapt alone, and autograd.grad."""
    return _operator(step, step.params, step.batch.support, step.batch.query, step.wanted)


def _operator(step, params, support, query, wanted):
    def call() -> list[Tensor]:
        losses = mlp_adapt(
            params,
            support.x,
            support.y,
            query.x,
            query.y,
            lr=step.lr,
            steps=step.steps,
            loss=step.loss,
            norm=step.norm,
            norm_eps=NORM_EPS,
            support_offsets=support.offsets,
            query_offsets=query.offsets,
            class_mask=support.class_mask,
            first_order=step.first_order,
        ).losses
        loss = losses.mean()
        return [loss, *torch.autograd.grad(loss, wanted)]

    return call


def exact(step: MetaStep) -> list[Tensor]:
    """The same by the operator's reference, in float64."""
    params = [p.detach().double().requires_grad_() for p in step.params]
    batch = step.batch.to(torch.float64)
    features = [rows.x.detach().requires_grad_(step.feature_gradients) for rows in (batch.support, batch.query)]
    support, query = (
        TaskRows(x, rows.y, rows.offsets, rows.class_mask)
        for x, rows in zip(features, (batch.support, batch.query), strict=True)
    )
    with mf.backend("reference"):
        wanted = [*params, *(features if step.feature_gradients else [])]
        return [t.detach() for t in _operator(step, params, support, query, wanted)()]


# in plain PyTorch


def torch_func(step: MetaStep) -> Callable[[], list[Tensor]]:
    """vmap over tasks of a loop of torch.func.grad, and autograd.grad over all of it."""
    support, query = step.padded()
    meta_loss, params, wanted = _func_meta_loss(step), step.params, step.wanted

    def call() -> list[Tensor]:
        loss = meta_loss(params, support["x"], query["x"], support, query)
        return [loss, *torch.autograd.grad(loss, wanted)]

    return call


def compiled_torch_func(step: MetaStep) -> Callable[[], list[Tensor]]:
    """The whole meta-gradient in one graph: torch.compile of grad(mean(vmap(grad))); compiles in its first call."""
    support, query = step.padded()
    arguments = (0, 1, 2) if step.feature_gradients else (0,)
    compiled = torch.compile(grad_and_value(_func_meta_loss(step), arguments), fullgraph=True, dynamic=False)
    # dictionaries without what is passed beside them, and leaves without a graph of their own
    rest = [{name: t for name, t in rows.items() if name != "x"} for rows in (support, query)]
    params, xs, xq = [p.detach() for p in step.params], support["x"].detach(), query["x"].detach()

    def call() -> list[Tensor]:
        (grads, *features), loss = compiled(params, xs, xq, *rest)
        return [loss, *grads, *features]

    return call


def _func_meta_loss(step: MetaStep) -> Callable[..., Tensor]:
    """(params, support_x, query_x, the rest of the support and query rows) -> mean query loss."""
    lr, steps, loss, first_order = step.lr, step.steps, step.loss, step.first_order

    def task_loss(params, x, rows):
        return _rows_loss(_network(params, x, step.norm), rows, loss)

    def task(params, xs, xq, support, query):
        for _ in range(steps):
            grads = grad(task_loss)(params, xs, support)
            if first_order:
                grads = [g.detach() for g in grads]
            params = [p - lr * g for p, g in zip(params, grads, strict=True)]
        return task_loss(params, xq, query)

    def meta_loss(params, xs, xq, support, query):
        return vmap(task, in_dims=(None, 0, 0, 0, 0))(params, xs, xq, support, query).mean()

    return meta_loss


def bmm(step: MetaStep) -> Callable[[], list[Tensor]]:
    """Batched by hand: weights [T, O, I] in torch.baddbmm, and autograd through the inner gradients."""
    support, query = step.padded()
    params, wanted, norm, create_graph = step.params, step.wanted, step.norm, not step.first_order
    tasks = support["x"].shape[0]

    def forward(theta: list[Tensor], x: Tensor) -> Tensor:  # [T, N, D] -> [T, N, C]
        for weight, bias, gain, shift in _layers(theta, norm):
            x = torch.baddbmm(bias[:, None], x, weight.mT)
            if gain is not None:
                x = _batch_norm(x, 1) * gain[:, None] + shift[:, None]
            if weight is not theta[-2]:
                x = x.relu()
        return x

    def call() -> list[Tensor]:
        theta = [p.expand(tasks, *p.shape) for p in params]
        for _ in range(step.steps):
            inner = _rows_loss(forward(theta, support["x"]), support, step.loss).sum()
            grads = torch.autograd.grad(inner, theta, create_graph=create_graph)
            theta = [p - step.lr * g for p, g in zip(theta, grads, strict=True)]
        loss = _rows_loss(forward(theta, query["x"]), query, step.loss).mean()
        return [loss, *torch.autograd.grad(loss, wanted)]

    return call


def _network(params: list[Tensor], x: Tensor, norm: bool) -> Tensor:
    """One task: [N, D] -> [N, C]."""
    for weight, bias, gain, shift in _layers(params, norm):
        x = F.linear(x, weight, bias)
        if gain is not None:
            # by primitives: vmap(grad) over torch's own batch norm has a wrong second order
            x = _batch_norm(x, 0) * gain + shift
        if weight is not params[-2]:
            x = x.relu()
    return x


def _rows_loss(outputs: Tensor, rows: dict[str, Tensor], loss: str) -> Tensor:
    """Mean loss over the rows: [N, C] -> [], or [T, N, C] -> [T]."""
    y = rows["y"]
    if loss == "cross_entropy":
        if "mask" in rows:
            outputs = outputs.masked_fill(~rows["mask"].unsqueeze(-2), -1e30)
        values = F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
    elif loss == "mse":
        values = (outputs - y).square().mean(-1)
    else:
        values = F.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(-1)
    return (values * rows["weights"]).sum(-1) if "weights" in rows else values.mean(-1)


def _layers(params: list[Tensor], norm: bool):
    """weight, bias, gain, shift of each layer; the last has no norm."""
    stride = 4 if norm else 2
    for start in range(0, len(params), stride):
        layer = params[start : start + stride]
        yield (*layer, None, None) if len(layer) == 2 else layer


def _batch_norm(x: Tensor, rows: int) -> Tensor:
    centred = x - x.mean(rows, keepdim=True)
    return centred * (centred.square().mean(rows, keepdim=True) + NORM_EPS).rsqrt()


def _padded(rows: TaskRows) -> dict[str, Tensor]:
    result = {} if rows.class_mask is None else {"mask": rows.class_mask}
    if not rows.is_ragged:
        return {"x": rows.x, "y": rows.y, **result}
    counts = rows.counts
    exists = torch.arange(int(counts.max())) < counts[:, None]  # [T, N]
    x = rows.x.new_zeros(*exists.shape, *rows.x.shape[1:])
    y = rows.y.new_zeros(*exists.shape, *rows.y.shape[1:])
    x[exists], y[exists] = rows.x.detach(), rows.y
    return {"x": x, "y": y, "weights": exists / counts[:, None], **result}


def own_copy(step: MetaStep) -> nn.Sequential:
    """The model for libraries that loop over tasks: batch norm by the rows at hand, no statistics kept."""
    twin = copy.deepcopy(step.model)
    for layer in twin:
        if isinstance(layer, nn.BatchNorm1d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
            layer.num_batches_tracked = None
    return twin


# what it costs at the least


def operations(step: MetaStep) -> int:
    """Multiplications and additions of the matrix products, by the cheaper known way for each layer of each task.

    *Dense*: weights of the task's own, updated in every step. *Factored*: the start's weights, shared by all tasks,
    and the task's change as a product of factors (docs/maths/mlp_adapt.md). Elementwise work is not counted, so no
    program reaches this floor.
    """
    weights = [p for p in step.params if p.dim() == 2]
    support, query = step.batch.support.counts.tolist(), step.batch.query.counts.tolist()
    mask = step.batch.support.class_mask
    ways = [weights[-1].shape[0]] * len(support) if mask is None else mask.sum(1).tolist()
    products = 0
    for n, q, c in zip(support, query, ways, strict=True):
        widths = [weights[0].shape[1], *(w.shape[0] for w in weights[:-1]), c]
        for layer, (i, o) in enumerate(itertools.pairwise(widths)):
            options = (step.steps, step.first_order, layer > 0 or step.feature_gradients)
            factored = _factored_first if layer == 0 else _factored_later
            products += min(_dense(i, o, n, q, layer > 0, *options), factored(i, o, n, q, *options))
    return 2 * products


def _dense(i, o, n, q, later, steps, first_order, carried) -> int:
    inner = n * (3 if later else 2)
    # the Hessian-vector product: forward and to the weights one or two products each, down the layer two
    reverse = 0 if first_order else n * ((4 if later else 2) + 2 * carried)
    return i * o * (steps * (inner + reverse) + q * (2 + carried))


def _factored_first(i, o, n, q, steps, first_order, carried) -> int:
    if steps == 0:
        return i * o * q * (2 + carried)
    gram = (n * (n + 1) // 2) * i if steps > 1 else 0
    forward = n * i * o + q * i * o + gram + (steps - 1) * n * n * o
    # between support and query rows: through their inner products, or through the task's own weights
    uses = 1 if first_order else 2
    between = min(uses * n * i * o, q * n * i + uses * q * n * o)
    reverse = q * i * o if first_order else (q + n) * i * o + (steps - 1) * n * n * o
    features = 0
    if carried:
        features = q * i * o + q * n * (i + o)
        features += 0 if first_order else n * i * o + q * n * i + n * n * i + steps * n * n * o
    return forward + between + reverse + features


def _factored_later(i, o, n, q, steps, first_order, carried) -> int:
    both, pairs = i + o, steps * (steps - 1)
    inner = 2 * steps * n * i * o + pairs * n * n * both
    query = 2 * q * i * o + 2 * steps * q * n * both
    if first_order:
        return inner + query + q * i * o
    # the cotangent of the weights is a product of factors too, of rank q + 2n more with every step back
    reverse = inner + 2 * n * both * (steps * q + n * pairs)
    return inner + query + reverse + (q + 2 * n * steps) * i * o
