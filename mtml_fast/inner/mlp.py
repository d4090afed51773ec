"""The plan `mlp`: an nn.Sequential MLP, or a linear head on a body that stays, through one mlp_adapt call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mtml_fast.inner.loop import InnerLoop, masked_outputs
from mtml_fast.nn.mlp import MLPForm, mlp_form
from mtml_fast.ops import mlp_adapt
from mtml_fast.ops.mlp_adapt import MLPAdapted
from mtml_fast.tasks import TaskBatch, TaskRows

# layers whose answer to a row depends on the other rows of a batch, or on chance
MIXING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
MIXING += (nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class MLPPlan:
    """All tasks and all steps in one operator."""

    name = "mlp"

    def __init__(self, model: nn.Module, inner: InnerLoop, form: MLPForm, body: nn.Module | None, prefix: str):
        self.model, self.inner, self.form, self.body, self.prefix = model, inner, form, body, prefix
        what = f"a linear head on {type(body).__name__}" if body is not None else "an MLP of nn.Linear layers"
        self.why = f"the model is {what}"

    @classmethod
    def fit(cls, model: nn.Module, inner: InnerLoop, support: TaskRows) -> MLPPlan | str:
        """The plan for this model and these rows, or in a few words why there is none."""
        if callable(inner.loss):
            return "the loss is a function of the user's"
        form = mlp_form(model)
        if isinstance(form, MLPForm):
            rows = support.x.dim() - (1 if support.is_ragged else 2)
            if rows != 1 and not form.flatten:
                return f"its rows have {rows} axes"
            if form.norm and inner.batch_stats != "transductive":
                return f"batch_stats={inner.batch_stats!r} needs statistics other than those of the rows at hand"
            return cls(model, inner, form, None, "")
        if inner.layers != "head":
            return form
        return cls._head(model, inner, form)

    @classmethod
    def _head(cls, model: nn.Module, inner: InnerLoop, reason: str) -> MLPPlan | str:
        children = list(model.named_children()) if type(model) is nn.Sequential else []
        if len(children) < 2 or type(children[-1][1]) is not nn.Linear:
            return f"{reason}, and no nn.Sequential that ends with a linear head"
        body = nn.Sequential(*(child for _, child in children[:-1]))
        for module in body.modules():
            if isinstance(module, MIXING):
                return f"the body has {type(module).__name__}, which mixes rows or draws at random"
        name, head = children[-1]
        form = mlp_form(head)
        return form if isinstance(form, str) else cls(model, inner, form, body, f"{name}.")

    def query(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Query outputs [T, Q, C] or [R, C], and the tasks' query losses [T]."""
        result = self._run(batch.support, batch.query)
        return result.outputs, result.losses

    def parameters(self, support: TaskRows, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list]:
        """The adapted parameters, name -> [T, ...]; there are no statistics to keep."""
        # the operator answers for query rows too: one support row of each task is enough
        if support.is_ragged:
            first = support.offsets[:-1]
            query = TaskRows(support.x[first][:, None])
        else:
            query = TaskRows(support.x[:, :1])
        result = self._run(support, query, start=start, return_parameters=True)
        moved = set(self.inner.adapted_names(self.model))
        names = [self.prefix + name for name in self.form.names]
        return {n: p for n, p in zip(names, result.parameters, strict=True) if n in moved}, []

    def _run(self, support: TaskRows, query: TaskRows, start: dict[str, Tensor] | None = None, **options) -> MLPAdapted:
        inner, form = self.inner, self.form
        names = [self.prefix + name for name in form.names]
        moved = set(inner.adapted_names(self.model))
        params = [(start or {}).get(name, p) for name, p in zip(names, form.params, strict=True)]
        return mlp_adapt(
            params,
            self._features(support),
            support.y,
            self._features(query),
            query.y,
            lr=self._rates(names, moved),
            steps=inner.steps,
            loss=inner.loss_for(support),
            activation=form.activation,
            bias=form.bias,
            norm=form.norm,
            norm_eps=form.norm_eps,
            momentum=inner.momentum,
            weight_decay=inner.weight_decay,
            clip=inner.clip,
            support_offsets=support.offsets,
            query_offsets=query.offsets,
            class_mask=support.class_mask,
            adapted=[name in moved for name in names],
            first_order=inner.first_order,
            **options,
        )

    def _rates(self, names: list[str], moved: set[str]):
        """The adapted parameters' rates, with any rate in the places of the others."""
        lr = self.inner.lr
        if not isinstance(lr, dict) and (not isinstance(lr, Tensor) or lr.dim() < 2):
            return lr
        places = [i for i, name in enumerate(names) if name in moved]
        rates = self.inner.rates([names[i] for i in places], [self.form.params[i] for i in places])
        if len(rates) == 1 and rates[0].dim() == 2:
            columns = torch.zeros(len(names), dtype=torch.int64, device=rates[0].device)
            if rates[0].shape[1] > 1:
                columns[places] = torch.arange(len(places), device=columns.device)
            return rates[0][:, columns]
        filled = [torch.zeros((), dtype=rates[0].dtype, device=rates[0].device)] * len(names)
        for i, rate in zip(places, rates, strict=True):
            filled[i] = rate
        return filled

    def _features(self, rows: TaskRows) -> Tensor:
        lead = 1 if rows.is_ragged else 2
        x = rows.x
        if self.body is not None:
            return self.body(x.flatten(0, lead - 1)).unflatten(0, x.shape[:lead])
        return x.flatten(lead) if self.form.flatten else x

    def predict(self, parameters: dict[str, Tensor], statistics: list, rows: TaskRows) -> Tensor:
        """Outputs of the adapted networks: [T, Q, C] or [R, C]."""
        still = replace(self.inner, steps=0, lr=0.0)
        labels = torch.zeros((), dtype=torch.int64, device=rows.x.device)
        unlabelled = replace(rows, y=labels.expand(rows.x.shape[: 1 if rows.is_ragged else 2]))
        plan = MLPPlan(self.model, replace(still, loss="cross_entropy"), self.form, self.body, self.prefix)
        # no step is taken, so the support rows do not matter
        outputs = plan._run(replace(unlabelled, class_mask=None), rows.without_labels(), start=parameters).outputs
        loss = self.inner.loss
        mask = rows.class_mask
        if mask is not None and rows.is_ragged:
            mask = mask.repeat_interleave(rows.offsets.diff(), 0)
        elif mask is not None:
            mask = mask[:, None]
        return masked_outputs(outputs, mask, loss or "cross_entropy")

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
        return operations, values * form.params[0].element_size()
