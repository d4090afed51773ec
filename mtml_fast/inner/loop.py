"""InnerLoop: what the inner loop does, apart from the model and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mtml_fast.ops import _check
from mtml_fast.ops._rates import rate_list
from mtml_fast.ops.heads_loss.reference import LOSSES, task_losses
from mtml_fast.tasks import TaskRows

BATCH_STATS = ("transductive", "support", "running")
PLANS = ("auto", "mlp", "functional")
STORES = ("gradient", "all", "recompute")


@dataclass(frozen=True, eq=False)
class InnerLoop:
    """The settings of K gradient steps on a task's support rows.

    Args:
        lr: the rate: a number, a tensor `[]`, `[K]` (per step), `[1 or K, L]` (per layer) or `[1 or K, P]` (per
            parameter tensor), or a dict from parameter names to tensors `[]`, the parameter's shape, or
            `[1 or K, *shape]` (Meta-SGD). Tensors that require a gradient are learned.
        steps: K.
        loss: "cross_entropy", "mse", "bce" (with logits), or a function `(outputs, y) -> scalar` of one task's rows;
            `None` takes cross_entropy for integer labels and mse for floating ones.
        layers: which parameters move: "all", "head" (the last layer: ANIL), "body" (all but the last: BOIL), or a
            list of names of modules and parameters. Parameters that do not require a gradient stay.
        first_order: treat the inner gradient as a constant.
        momentum, weight_decay, clip: as in `mtml_fast.ops.sgd_step`.
        batch_stats: how batch norms see the query rows. "transductive": by the statistics of the query rows
            themselves, as the MAML paper does (the answer to one row depends on the other rows of its task, which
            leaks what they have in common); "support": by those of the task's support rows; "running": always by the
            stored running statistics, on support rows too. No policy changes the stored ones.
        chunk: at most so many tasks at a time in the functional plan; `None` takes as many as fit in 2 GiB. It bounds
            what a step needs in passing; where a gradient is wanted, the graphs of all tasks are kept until backward.
        plan: "auto", or "mlp" or "functional" to insist on one.
        store: what the plan `mlp` keeps for the backward pass. "gradient": the gradient of the mean query loss is
            computed along with the loss; another use of the results runs the sweeps again. "all": what the forward
            sweep computed. "recompute": nothing; the backward pass runs the forward sweep again. (The functional plan
            keeps what autograd keeps.)
    """

    lr: float | Tensor | Mapping[str, Tensor] = 0.01
    steps: int = 1
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None
    layers: str | Sequence[str] = "all"
    first_order: bool = False
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    batch_stats: str = "transductive"
    chunk: int | None = None
    plan: str = "auto"
    store: str = "gradient"

    def __post_init__(self):
        _check.number("steps", self.steps, low=0, integer=True)
        if not callable(self.loss) and self.loss is not None:
            _check.choice("loss", self.loss, LOSSES)
        if isinstance(self.layers, str):
            _check.choice("layers", self.layers, ("all", "head", "body"))
        elif not isinstance(self.layers, Sequence) or not all(isinstance(layer, str) for layer in self.layers):
            raise TypeError(f"layers must be 'all', 'head', 'body' or a list of names, got {self.layers!r}")
        if not isinstance(self.first_order, bool):
            raise TypeError(f"first_order must be a bool, got {self.first_order!r}")
        _check.number("momentum", self.momentum, low=0.0, below=1.0)
        _check.number("weight_decay", self.weight_decay, low=0.0)
        if self.clip is not None:
            _check.number("clip", self.clip, low=0.0, exclusive=True)
        _check.choice("batch_stats", self.batch_stats, BATCH_STATS)
        if self.chunk is not None:
            _check.number("chunk", self.chunk, low=1, integer=True)
        _check.choice("plan", self.plan, PLANS)
        _check.choice("store", self.store, STORES)
        for name, rate in self.lr.items() if isinstance(self.lr, Mapping) else [("", self.lr)]:
            name = f"lr[{name!r}]" if name else "lr"
            if isinstance(rate, Tensor):
                _check.rate(name, rate, like=rate)
            else:
                _check.number(name, rate)

    def for_rows(self, name: str, rows: TaskRows) -> InnerLoop:
        """The same with the loss that these rows' labels ask for, where none was chosen."""
        if rows.y is None:
            raise ValueError(f"{name} must have labels y, got None")
        if self.loss is not None:
            return self
        return replace(self, loss="mse" if rows.y.is_floating_point() else "cross_entropy")

    def adapted_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that move, in the model's order."""
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        owners = [name.rpartition(".")[0] for name in trainable]
        if self.layers == "all":
            chosen = trainable
        elif self.layers in ("head", "body"):
            head = owners[-1] if owners else ""
            chosen = [
                n for n, owner in zip(trainable, owners, strict=True) if (owner == head) == (self.layers == "head")
            ]
        else:
            for layer in self.layers:
                if not any(n == layer or n.startswith(f"{layer}.") for n in trainable):
                    raise ValueError(f"layers must name modules or parameters that require a gradient, got {layer!r}")
            chosen = [n for n in trainable if any(n == layer or n.startswith(f"{layer}.") for layer in self.layers)]
        if not chosen:
            raise ValueError(f"layers must leave a parameter to adapt, got {self.layers!r}")
        return chosen

    def rates(self, names: Sequence[str], params: Sequence[Tensor], *, read: bool = True) -> list[Tensor]:
        """The rates of the named parameters, one tensor each: `[1 or K, *shape]`, or ones in the place of the shape.

        `read`: whether to look for values that are not finite; native kernels do so themselves.
        """
        shapes = [p.shape for p in params]
        if isinstance(self.lr, Mapping):
            missing = [name for name in names if name not in self.lr]
            if missing:
                raise ValueError(f"lr must have a rate for every adapted parameter, got none for {missing[0]!r}")
            return rate_list([self.lr[name] for name in names], self.steps, shapes, [], like=params[0], read=read)
        owners = [name.rpartition(".")[0] for name in names]
        order = list(dict.fromkeys(owners))
        layer_of = [order.index(owner) for owner in owners]
        (table,) = rate_list(self.lr, self.steps, shapes, layer_of, like=params[0], read=read)
        columns = [table[:, min(i, table.shape[1] - 1)] for i in range(len(names))]
        return [column.reshape(-1, *[1] * len(shape)) for column, shape in zip(columns, shapes, strict=True)]


def mean_loss(loss: str | Callable, outputs: Tensor, y: Tensor, class_mask: Tensor | None = None) -> Tensor:
    """The mean loss of one task's rows: outputs [N, C] or [N, C, ...], labels to match, class_mask [C]."""
    if not isinstance(loss, str):
        return loss(outputs, y)
    if outputs.dim() == 1:
        outputs = outputs[:, None]
    if loss != "cross_entropy":
        if y.dim() == outputs.dim() - 1 and outputs.shape[-1] == 1:
            y = y[..., None]
        if y.shape != outputs.shape:
            raise ValueError(f"y must have the shape of the outputs {list(outputs.shape)}, got {list(y.shape)}")
    if outputs.dim() > 2:
        # every place behind the classes counts as a row
        y = y.flatten() if loss == "cross_entropy" else y.movedim(1, -1).flatten(0, -2)
        outputs = outputs.movedim(1, -1).flatten(0, -2)
    mask = None if class_mask is None else class_mask[None]
    return task_losses(outputs[None], y[None], loss, None, mask)[0]


def masked_outputs(outputs: Tensor, class_mask: Tensor | None, loss: str | Callable) -> Tensor:
    """Outputs [T, N, C, ...] with those that a task does not have at -inf under cross_entropy, else at 0."""
    if class_mask is None:
        return outputs
    tasks, classes = class_mask.shape
    mask = class_mask.reshape(tasks, 1, classes, *[1] * (outputs.dim() - 3))
    return torch.where(mask, outputs, -torch.inf if loss == "cross_entropy" else 0.0)
