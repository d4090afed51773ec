"""The plan `mlp`: an nn.Sequential MLP, or a linear head on a body that stays, through one mlp_adapt call."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor, nn

from mtml_fast.inner.loop import InnerLoop, masked_outputs
from mtml_fast.nn.mlp import ACTIVATIONS, MLPForm, mlp_form
from mtml_fast.ops import _check, mlp_adapt, mlp_adapt_mean
from mtml_fast.ops._rates import rate_list
from mtml_fast.ops._route import has_hooks, hook_tables, part_tables
from mtml_fast.ops.mlp_adapt import MLPAdapted, eager
from mtml_fast.tasks import TaskBatch, TaskRows

# layers whose answer to a row depends on that row alone, and not on chance: a body of these may see all tasks at once
ROWWISE = {nn.Linear, nn.Identity, nn.Flatten, nn.LayerNorm, nn.GroupNorm, *ACTIVATIONS.values()}
ROWWISE |= {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}
ROWWISE |= {nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d}


class MLPPlan:
    """All tasks and all steps in one operator."""

    name = "mlp"

    def __init__(self, model: nn.Module, inner: InnerLoop, form: MLPForm, body: nn.Module | None, prefix: str):
        self.model, self.inner, self.form, self.body = model, inner, form, body
        self.names = [prefix + name for name in form.names]
        what = f"a linear head on {type(body).__name__}" if body is not None else "an MLP of nn.Linear layers"
        self.why = f"the model is {what}"
        self._unchanged = _Unchanged(model)
        # a rate that is a number: its tensor
        self._number: Tensor | None = None

    @cached_property
    def _moved(self) -> set[str]:
        return {*self.inner.adapted_names(self.model)}

    @cached_property
    def _options(self) -> tuple:
        """The operator's arguments behind the tensors, in the order of its schema."""
        inner, form = self.inner, self.form
        return (
            tuple([name in self._moved for name in self.names]),
            inner.steps,
            inner.loss,
            form.activation,
            form.bias,
            form.norm,
            form.norm_eps,
            float(inner.momentum),
            float(inner.weight_decay),
            inner.clip,
            inner.first_order,
            False,
            False,
        )

    def still_fits(self, rows: TaskRows) -> bool:
        """Whether `fit` would give the same plan again for the model as it is now."""
        axes = rows.x.dim() - (1 if rows.is_ragged else 2)
        return (axes == 1 or self.form.flatten or self.body is not None) and self._unchanged()

    @classmethod
    def fit(cls, model: nn.Module, inner: InnerLoop, rows: TaskRows) -> MLPPlan | str:
        """The plan for this model and these rows, or in a few words why there is none."""
        if callable(inner.loss):
            return "the loss is a function of the user's"
        form = mlp_form(model)
        if isinstance(form, MLPForm):
            axes = rows.x.dim() - (1 if rows.is_ragged else 2)
            if axes != 1 and not form.flatten:
                return f"its rows have {axes} axes"
            if form.norm and inner.batch_stats != "transductive":
                return f"batch_stats={inner.batch_stats!r} needs statistics other than those of the rows at hand"
            return cls(model, inner, form, None, "")
        return cls._head(model, inner, form) if inner.layers == "head" else form

    @classmethod
    def _head(cls, model: nn.Module, inner: InnerLoop, reason: str) -> MLPPlan | str:
        children = list(model) if type(model) is nn.Sequential else []
        if len(children) < 2 or type(children[-1]) is not nn.Linear or has_hooks(model):
            return f"{reason}, and no nn.Sequential that ends with a linear head"
        body, head = nn.Sequential(*children[:-1]), children[-1]
        for module in body.modules():
            if type(module) not in (*ROWWISE, nn.Sequential) or has_hooks(module):
                return f"the body has {type(module).__name__}, which may mix rows, draw at random or keep statistics"
            if isinstance(module, nn.Flatten) and module.start_dim != 1:
                return f"the body has a Flatten from axis {module.start_dim} on"
        if not all(p.requires_grad for p in head.parameters()) or {*head.parameters()} & {*body.parameters()}:
            return "the head shares parameters or does not require a gradient"
        form = mlp_form(head)
        name = next(name for name, child in model.named_children() if child is head)
        return form if isinstance(form, str) else cls(model, inner, form, body, f"{name}.")

    def query(self, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Query outputs [T, Q, C] or [R, C], the tasks' query losses [T], and their mean."""
        support, query = batch.support, batch.query
        x, query_x = self._features(support), self._features(query)
        if self.inner.store == "gradient":
            # the kernels check the arguments; what they refuse, the public function says in full
            results = eager.adapt_mean_or_none(self._arguments(support, x, query, query_x))
            if results is not None:
                return results
            return mlp_adapt_mean(**self._keywords(support, x, query_x, query.y, query.offsets, {}))
        result = self._adapt(support, x, query_x, query.y, query.offsets, {})
        return result.outputs, result.losses, result.losses.mean()

    def parameters(self, support: TaskRows, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list]:
        """The adapted parameters, name -> [T, ...]; there are no statistics to keep."""
        x = self._features(support)
        # the operator answers for query rows too: one row of each task is enough
        result = self._adapt(support, x, _first_rows(x, support.offsets), None, None, start, return_parameters=True)
        return {n: p for n, p in zip(self.names, result.parameters, strict=True) if n in self._moved}, []

    def predict(self, parameters: dict[str, Tensor], statistics: list, rows: TaskRows) -> Tensor:
        """Outputs of the adapted networks: [T, Q, C] or [R, C]."""
        x, offsets = self._features(rows), rows.offsets
        features = self.form.params[0].shape[-1]
        if x.shape[-1] != features:
            raise ValueError(f"query_x must have D={features} features, got shape {list(x.shape)}")
        # no step is taken, so any support rows will do
        support_x = _first_rows(x, offsets)
        labels = torch.zeros(support_x.shape[:2], dtype=torch.int64, device=x.device)
        params = [parameters.get(name, p) for name, p in zip(self.names, self.form.params, strict=True)]
        outputs = mlp_adapt(
            params, support_x, labels, x, lr=0.0, steps=0, query_offsets=offsets, **self._form_options()
        ).outputs
        if rows.class_mask is None:
            return outputs
        if offsets is None:
            return masked_outputs(outputs, rows.class_mask, self.inner.loss)
        # packed rows: each with its own task's mask
        mask = rows.class_mask.repeat_interleave(offsets.diff(), 0)
        return masked_outputs(outputs[:, None], mask, self.inner.loss).squeeze(1)

    def forms(self, batch: TaskBatch) -> list[str]:
        """The form in which each layer is computed; none where the reference serves."""
        known = self._kernel_plan(batch)
        return [f"{layer['in']}-{layer['out']} {layer['form']}" for layer in known["layers"]] if known else []

    def cost(self, batch: TaskBatch) -> tuple[int, int]:
        """Operations and bytes of the meta-step as the present implementation does it, by counting."""
        inner, form = self.inner, self.form
        weights = [p for p in form.params if p.dim() == 2]
        product = sum(2 * w.numel() for w in weights)
        size = sum(p.numel() for p in form.params)
        width = sum(w.shape[0] for w in weights)
        support, query = int(batch.support.counts.sum()), int(batch.query.counts.sum())
        # a gradient is three products; the reverse sweep recomputes two and does six more
        operations = product * (inner.steps * support * (3 if inner.first_order else 11) + 3 * query)
        values = (inner.steps + 1) * batch.num_tasks * size + (inner.steps * support * 2 + query) * width
        known = self._kernel_plan(batch) or {}
        # the kernels know better
        return known.get("operations") or operations, known.get("bytes") or values * form.params[0].element_size()

    def _kernel_plan(self, batch: TaskBatch) -> dict | None:
        support, query = batch.support, batch.query
        if support.y is None or self.inner.loss is None:
            return None
        x, query_x = self._features(support), self._features(query)
        keeps_state = self.inner.store == "all"
        return eager.plan(self._arguments(support, x, query, query_x), backward=True, keeps_state=keeps_state)

    def _arguments(self, support: TaskRows, x: Tensor, query: TaskRows, query_x: Tensor) -> tuple:
        """The operator's, without checks."""
        return (
            self.form.params,
            self._rate_tensors(),
            x,
            self._targets(support.y, x),
            query_x,
            None if query.y is None else self._targets(query.y, query_x),
            support.offsets,
            query.offsets,
            support.class_mask,
            *self._options,
        )

    def _targets(self, y: Tensor, x: Tensor) -> Tensor:
        """Float targets [T, N] of one output as [T, N, 1]."""
        return y.unsqueeze(-1) if y.dim() < x.dim() and self.inner.loss != "cross_entropy" else y

    def _rate_tensors(self) -> list[Tensor]:
        lr, like, number = self.inner.lr, self.form.params[0], self._number
        if number is not None and number.dtype == like.dtype and number.device == like.device:
            return [number]
        if not isinstance(lr, (Tensor, Mapping)):
            self._number = like.new_full((1, 1), lr)
            return [self._number]
        shapes = [p.shape for p in self.form.params]
        per_layer = 1 + self.form.bias + 2 * self.form.norm
        layer_of = [i // per_layer for i in range(len(shapes))]
        return rate_list(self._rates(self._moved, read=False), self.inner.steps, shapes, layer_of, like, read=False)

    def _adapt(self, support, support_x, query_x, query_y, query_offsets, start, **options) -> MLPAdapted:
        store = "recompute" if self.inner.store == "recompute" else "all"
        keywords = self._keywords(support, support_x, query_x, query_y, query_offsets, start)
        return mlp_adapt(**keywords, store=store, **options)

    def _keywords(self, support, support_x, query_x, query_y, query_offsets, start) -> dict:
        inner = self.inner
        return dict(
            params=[start.get(name, p) for name, p in zip(self.names, self.form.params, strict=True)],
            support_x=support_x,
            support_y=support.y,
            query_x=query_x,
            query_y=query_y,
            lr=self._rates(self._moved),
            steps=inner.steps,
            loss=inner.loss,
            momentum=inner.momentum,
            weight_decay=inner.weight_decay,
            clip=inner.clip,
            support_offsets=support.offsets,
            query_offsets=query_offsets,
            class_mask=support.class_mask,
            adapted=self._options[0],
            first_order=inner.first_order,
            **self._form_options(),
        )

    def _form_options(self) -> dict:
        form = self.form
        return dict(activation=form.activation, bias=form.bias, norm=form.norm, norm_eps=form.norm_eps)

    def _rates(self, moved: set[str], *, read: bool = True):
        """The adapted parameters' rates; those of the others do not matter."""
        lr = self.inner.lr
        if not isinstance(lr, Mapping) and (not isinstance(lr, Tensor) or lr.dim() < 2):
            return lr
        params = dict(zip(self.names, self.form.params, strict=True))
        own = {name: p for name, p in params.items() if name in moved}
        rates = dict(zip(own, self.inner.rates(list(own), list(own.values()), read=read), strict=True))
        nothing = self.form.params[0].new_zeros(())
        return [rates[name].expand(-1, *p.shape) if name in own else nothing for name, p in params.items()]

    def _features(self, rows: TaskRows) -> Tensor:
        lead = 1 if rows.is_ragged else 2
        if self.body is not None:
            features = self.body(rows.x.flatten(0, lead - 1)).unflatten(0, rows.x.shape[:lead])
            return _check.widened(features, self.form.params[0])
        return rows.x.flatten(lead) if self.form.flatten else rows.x


def _first_rows(x: Tensor, offsets: Tensor | None) -> Tensor:
    """The first row of each task, [T, 1, D]."""
    return x[:, :1] if offsets is None else x[offsets[:-1]][:, None]


class _Unchanged:
    """Whether a model is still what it was: its modules, their parameters, settings and hooks."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._modules, self._types = modules, list(map(type, modules))
        # the dicts themselves are held, so that no new object can have the place of an old one
        tables = [table for module in modules for table in part_tables(module)]
        self._tables = [table for table in tables if table]
        self._parts = [part for table in self._tables for part in table.values()]
        hooks = [table for module in modules for table in hook_tables(module)]
        self._empty = [*hooks, *(table for table in tables if not table)]
        self._attributes = [vars(module) for module in modules]
        parameters = [part for part in self._parts if isinstance(part, nn.Parameter)]
        self._parameters, self._wanted = parameters, [p.requires_grad for p in parameters]
        settings = [
            (vars(module), name, value)
            for module in modules
            for name, value in vars(module).items()
            if name != "training" and isinstance(value, (bool, int, float, str))
        ]
        self._settings = [[*column] for column in zip(*settings, strict=True)] or [[], [], []]

    def __call__(self) -> bool:
        # in loops of C wherever there are some: this runs in every meta-step
        parts = [part for table in self._tables for part in table.values()]
        holders, names, values = self._settings
        return (
            len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and not any(self._empty)
            # a forward of the object's own, as some libraries put there
            and not any(map(operator.contains, self._attributes, repeat("forward")))
            and [p.requires_grad for p in self._parameters] == self._wanted
            and list(map(type, self._modules)) == self._types
            and list(map(dict.get, holders, names)) == values
        )
