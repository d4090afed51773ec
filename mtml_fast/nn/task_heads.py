"""TaskHeads: a linear head, or one with a hidden layer, of its own for every task, all computed in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mtml_fast.nn.mlp import ACTIVATIONS, activation_name
from mtml_fast.ops import _check, heads, heads_loss
from mtml_fast.tasks import TaskRows

__all__ = ["TaskHeads"]


class TaskHeads(nn.Module):
    r"""T heads in packed parameters: every task's rows through the task's own head, in one operator call.

    .. math::
        z_t = h_t W_t^\top + b_t, \qquad h_t = x_t \ \text{ or, with `hidden`, } \ \sigma(x_t V_t^\top + c_t)

    Args:
        in_features: D, the width of the rows; `None`: that of the first rows it sees.
        out_features: the number of outputs of each task, a list of T; `None` in it: given to `materialize`, or one.
        hidden: H, the width of a hidden layer in every head; `None` for linear heads.
        activation: of the hidden layer: relu, tanh, gelu, silu, elu, leaky_relu, sigmoid, softplus or identity.
        bias: whether the layers have one.

    Parameters: `weight [sum of O_t, D or H]`, `bias [sum of O_t]`, `hidden_weight [T, H, D]`, `hidden_bias [T, H]`,
    drawn for each task as nn.Linear draws them. Where a width is unknown they exist without a shape until the first
    rows come, so that an optimizer may be made before.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Derivatives: any order (see `mtml_fast.ops.heads`).

    Example:
        >>> head = TaskHeads(4, [2, 3])
        >>> rows = TaskRows(torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1]), offsets=torch.tensor([0, 2, 5]))
        >>> [list(outputs.shape) for outputs in head.outputs(rows)]
        [[2, 2], [3, 3]]
        >>> head.loss(rows).backward()
    """

    def __init__(
        self,
        in_features: int | None,
        out_features: Sequence[int | None],
        hidden: int | None = None,
        activation: str = "relu",
        bias: bool = True,
    ):
        super().__init__()
        if not isinstance(out_features, (list, tuple)) or not out_features:
            raise TypeError(f"out_features must be a list of one width a task, got {out_features!r}")
        widths = {"in_features": in_features, "hidden": hidden}
        widths |= {f"out_features[{t}]": width for t, width in enumerate(out_features)}
        for name, width in widths.items():
            if width is not None:
                _check.number(name, width, low=1, integer=True)
        _check.choice("activation", activation, tuple(ACTIVATIONS))
        self.in_features, self.out_features = in_features, list(out_features)
        self.hidden, self.activation = hidden, activation
        for name, exists in (
            ("hidden_weight", hidden),
            ("hidden_bias", hidden and bias),
            ("weight", 1),
            ("bias", bias),
        ):
            self.register_parameter(name, UninitializedParameter() if exists else None)
        self.register_buffer("out_offsets", torch.zeros(len(out_features) + 1, dtype=torch.int64))
        if in_features is not None and None not in self.out_features:
            self.materialize(in_features)

    @property
    def num_tasks(self) -> int:
        return len(self.out_features)

    @property
    def is_lazy(self) -> bool:
        """Whether the parameters still wait for their widths."""
        return isinstance(self.weight, UninitializedParameter)

    def materialize(self, in_features: int, out_features: Sequence[int] | None = None) -> None:
        """Gives the parameters their shapes and first values; widths that are known stay, and `None` becomes one."""
        if not self.is_lazy:
            raise RuntimeError(f"materialize must be called once; the heads have in_features={self.in_features}")
        given = out_features or [1] * self.num_tasks
        widths = [known or width or 1 for known, width in zip(self.out_features, given, strict=True)]
        self._allocate(self.in_features or in_features, widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New first values, uniform in plus and minus one over the root of the inputs, as for nn.Linear."""
        inner = self.hidden or self.in_features
        for parameter, inputs in (
            (self.hidden_weight, self.in_features),
            (self.hidden_bias, self.in_features),
            (self.weight, inner),
            (self.bias, inner),
        ):
            if parameter is not None and not self.is_lazy:
                nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(
        self, rows: TaskRows | Tensor, tasks: Sequence[int] | None = None, *, task_index: Tensor | None = None
    ) -> Tensor:
        """The outputs of all rows, packed.

        Args:
            rows: task t's rows go through head t.
            tasks: or through head `tasks[t]`; then `rows` may hold any number of tasks, one of them also twice.
            task_index: int64 `[R]`, the head of each row; `rows` is then a tensor `[R, D]` of rows in any order.

        Returns:
            `[T, N, O]` for rectangular rows, `[R, O]` for packed ones; task after task, flattened
            `[sum of R_t * O_t]`, where the heads have different widths.
        """
        x, offsets = self._packed(rows, tasks, task_index)
        widths, lead = self._widths(tasks), rows.shape[:-1] if task_index is not None else rows.x.shape[:-1]
        parameters = self._parameters_of(tasks, task_index)
        outputs = heads(x, offsets, **parameters, activation=self.activation, task_index=task_index)
        return outputs.view(*lead, widths[0]) if len(set(widths)) == 1 else outputs

    def outputs(self, rows: TaskRows, tasks: Sequence[int] | None = None) -> list[Tensor]:
        """Each task's outputs `[R_t, O_t]`; arguments as for `forward`."""
        widths, counts = self._widths(tasks), rows.counts.tolist()
        flat = self(rows, tasks).flatten()
        parts = flat.split([n * width for n, width in zip(counts, widths, strict=True)])
        return [part.view(n, width) for part, n, width in zip(parts, counts, widths, strict=True)]

    def task_losses(
        self,
        rows: TaskRows | Tensor,
        loss: str | Sequence[str] = "cross_entropy",
        *,
        tasks: Sequence[int] | None = None,
        task_index: Tensor | None = None,
        y: Tensor | tuple[Tensor, Tensor] | None = None,
        **options,
    ) -> Tensor:
        """Each task's mean loss `[T]`, computed together with the outputs; zero for a task without rows.

        Args:
            rows, tasks, task_index: as for `forward`.
            loss: cross_entropy (`y` int64 `[R]`), mse, bce or huber (`y` like the outputs); or one of these a task.
            y: the targets, if not `rows.y`; flattened `[sum of R_t * O_t]` where the heads have different widths; the
                pair `(classes, targets)` where cross_entropy and other losses are mixed.
            options: mask, label_smoothing, ignore_index, class_weights, delta, as for `mtml_fast.ops.heads_loss`.
        """
        x, offsets = self._packed(rows, tasks, task_index)
        y = rows.y if y is None and task_index is None else y
        if y is None:
            raise ValueError(f"{'rows.y' if task_index is None else 'y'} must hold the targets, got None")
        y = y.flatten() if isinstance(y, Tensor) else tuple(part.flatten() for part in y)
        if isinstance(mask := options.get("mask"), Tensor):
            options = options | {"mask": mask.flatten()}
        options = options | {"activation": self.activation, "loss": loss, "task_index": task_index}
        return heads_loss(x, y, offsets, **self._parameters_of(tasks, task_index), **options)

    def loss(self, rows: TaskRows | Tensor, loss: str | Sequence[str] = "cross_entropy", **options) -> Tensor:
        """The sum over the tasks of each task's mean loss; options as for `task_losses`."""
        return self.task_losses(rows, loss, **options).sum()

    def head(self, t: int) -> nn.Module:
        """A copy of head t as an ordinary module: nn.Linear, or nn.Sequential(Linear, activation, Linear)."""
        if self.is_lazy:
            raise RuntimeError("the heads have no widths yet: give in_features and out_features, or call them once")
        if not 0 <= t < self.num_tasks:
            raise IndexError(f"t must be a task in 0..{self.num_tasks - 1}, got {t}")
        start, stop = self.out_offsets[t : t + 2].tolist()
        last = _linear(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])
        if self.hidden is None:
            return last
        first = _linear(self.hidden_weight[t], None if self.hidden_bias is None else self.hidden_bias[t])
        return nn.Sequential(first, ACTIVATIONS[self.activation](), last)

    @torch.no_grad()
    def load_heads(self, modules: Sequence[nn.Module]) -> None:
        """Takes the values of T modules as `head` gives them."""
        if len(modules) != self.num_tasks:
            raise ValueError(f"modules must be {self.num_tasks} heads, one a task, got {len(modules)}")
        layers = [self._layers(t, module) for t, module in enumerate(modules)]
        if self.is_lazy:
            self.materialize(layers[0][0].in_features, [each[-1].out_features for each in layers])
        for t, each in enumerate(layers):
            first, last = each[0], each[-1]
            # of a linear head, whose only layer is both, the hidden width is not asked for
            widths = [first.in_features, first.out_features if self.hidden else None, last.out_features]
            expected = [self.in_features, self.hidden, self.out_features[t]]
            if widths != expected or (last.bias is None) != (self.bias is None):
                expected = [width for width in expected if width is not None]
                bias = "without" if self.bias is None else "with"
                got = _line(modules[t])
                raise ValueError(f"modules[{t}] must have the widths {expected} {bias} bias, got {got}")
        self.weight.copy_(torch.cat([each[-1].weight for each in layers]))
        if self.bias is not None:
            self.bias.copy_(torch.cat([each[-1].bias for each in layers]))
        if self.hidden is not None:
            self.hidden_weight.copy_(torch.stack([each[0].weight for each in layers]))
        if self.hidden_bias is not None:
            self.hidden_bias.copy_(torch.stack([each[0].bias for each in layers]))

    def owners(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter, and the task that each index of its first axis belongs to."""
        tasks = torch.arange(self.num_tasks, device=self.out_offsets.device)
        packed = tasks.repeat_interleave(self.out_offsets.diff())
        pairs = ((self.hidden_weight, tasks), (self.hidden_bias, tasks), (self.weight, packed), (self.bias, packed))
        return [(parameter, tasks) for parameter, tasks in pairs if parameter is not None]

    def extra_repr(self) -> str:
        outputs = self.out_features if len(set(self.out_features)) > 1 else self.out_features[0]
        hidden = "" if self.hidden is None else f"hidden={self.hidden}, activation={self.activation}, "
        return f"tasks={self.num_tasks}, in_features={self.in_features}, {hidden}out_features={outputs}"

    def _packed(
        self, rows: TaskRows | Tensor, tasks: Sequence[int] | None, task_index: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows as `[R, D]` and their offsets, checked."""
        if task_index is not None:
            if tasks is not None:
                raise ValueError(f"tasks must be None where task_index is given, got {tasks!r}")
            _check.shape("rows", _check.tensor("rows", rows), ("R", None), ("D", self.in_features))
            if self.is_lazy:
                self.materialize(rows.shape[1])
            return rows, None
        if not isinstance(rows, TaskRows):
            raise TypeError(f"rows must be TaskRows, or a tensor with task_index, got {type(rows).__name__}")
        given = self.num_tasks if tasks is None else len(tasks)
        if rows.num_tasks != given:
            raise ValueError(f"rows must hold {given} tasks, got {rows.num_tasks}")
        if rows.class_mask is not None:
            raise ValueError("rows.class_mask must be None (each head has the outputs of its own task)")
        if rows.x.dim() != (2 if rows.is_ragged else 3):
            axes = "[R, D] with offsets" if rows.is_ragged else "[T, N, D]"
            raise ValueError(f"rows.x must be {axes}, got shape {list(rows.x.shape)}")
        if self.is_lazy:
            self.materialize(rows.x.shape[-1])
        if rows.x.shape[-1] != self.in_features:
            raise ValueError(f"rows.x must have {self.in_features} features, got shape {list(rows.x.shape)}")
        if rows.is_ragged:
            return rows.x, rows.offsets
        count = rows.x.shape[1]
        return rows.x.flatten(0, 1), torch.arange(0, count * given + 1, count, device=rows.x.device)

    def _widths(self, tasks: Sequence[int] | None) -> list[int]:
        # a width that nobody gave becomes one, see materialize
        widths = [width or 1 for width in self.out_features]
        return widths if tasks is None else [widths[t] for t in tasks]

    def _parameters_of(self, tasks: Sequence[int] | None, task_index: Tensor | None = None) -> dict[str, Tensor | None]:
        """The parameters of the given tasks, or of all, packed as the operators take them."""
        named = {name: getattr(self, name) for name in ("weight", "bias", "hidden_weight", "hidden_bias")}
        out_offsets = self.out_offsets
        if tasks is not None:
            tasks = torch.tensor(tasks, dtype=torch.int64, device=out_offsets.device)
            widths = out_offsets.diff()[tasks]
            selected = torch.cat([widths.new_zeros(1), widths.cumsum(0)])
            # first row of the task, plus the row's place inside the task
            place = torch.arange(int(selected[-1]), device=tasks.device) - selected[:-1].repeat_interleave(widths)
            rows = out_offsets[tasks].repeat_interleave(widths) + place
            index = {"weight": rows, "bias": rows, "hidden_weight": tasks, "hidden_bias": tasks}
            named = {name: None if value is None else value[index[name]] for name, value in named.items()}
            out_offsets = selected
        # a task index alone does not say how many tasks there are
        equal = len(set(self.out_features)) == 1 and task_index is None
        return named | {"out_offsets": None if equal else out_offsets}

    def _layers(self, t: int, module: nn.Module) -> list[nn.Module]:
        """The layers of a module as `head` gives it."""
        layers = list(module) if isinstance(module, nn.Sequential) else [module]
        expected = ["Linear"] if self.hidden is None else ["Linear", self.activation, "Linear"]
        if ["Linear" if type(layer) is nn.Linear else activation_name(layer) for layer in layers] != expected:
            raise ValueError(f"modules[{t}] must be {', '.join(expected)}, got {_line(module)}")
        return layers

    def _allocate(self, in_features: int, out_features: Sequence[int]) -> None:
        self.in_features, self.out_features = in_features, list(out_features)
        tasks, inner, outputs = self.num_tasks, self.hidden or in_features, sum(out_features)
        shapes = {
            "hidden_weight": (tasks, self.hidden, in_features),
            "hidden_bias": (tasks, self.hidden),
            "weight": (outputs, inner),
            "bias": (outputs,),
        }
        for name, shape in shapes.items():
            if getattr(self, name) is not None:
                getattr(self, name).materialize(shape)
        self.out_offsets[1:] = torch.tensor(out_features).cumsum(0)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.is_lazy:
            raise RuntimeError("the heads have no widths yet: give in_features and out_features, or call them once")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        offsets = state_dict.get(prefix + "out_offsets")
        source = state_dict.get(prefix + ("weight" if self.hidden is None else "hidden_weight"))
        if offsets is not None and source is not None and offsets.shape == self.out_offsets.shape:
            # equal sums would hide that the widths of two tasks are swapped
            held, own = [source.shape[-1], *offsets.diff().tolist()], [self.in_features, *self.out_features]
            if any(mine not in (None, width) for mine, width in zip(own, held, strict=True)):
                raise ValueError(f"state_dict must hold heads of widths {own}, the first that of the rows, got {held}")
            if self.is_lazy:
                self._allocate(held[0], held[1:])
        elif self.is_lazy:
            raise ValueError(
                f"state_dict must hold {self.num_tasks} heads with hidden={self.hidden}, got {[*state_dict]}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear of copies."""
    # skip_init: a copy draws no random numbers
    layer = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _line(module: nn.Module) -> str:
    return " ".join(repr(module).split())
