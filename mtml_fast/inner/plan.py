"""plan_for: which plan runs a model's inner loop, and explain, which says so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mtml_fast.inner.functional import FunctionalPlan
from mtml_fast.inner.loop import InnerLoop
from mtml_fast.inner.mlp import MLPPlan
from mtml_fast.ops import OPERATORS
from mtml_fast.tasks import TaskBatch, TaskRows


def plan_for(model: nn.Module, inner: InnerLoop, support: TaskRows) -> MLPPlan | FunctionalPlan:
    """The plan that was asked for, or else the first that can take this model and these rows."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if inner.plan == "functional":
        return FunctionalPlan(model, inner, "it was asked for")
    plan = MLPPlan.fit(model, inner, support)
    if isinstance(plan, MLPPlan):
        return plan
    if inner.plan == "mlp":
        raise ValueError(f"plan must be 'auto' or 'functional' for this model ({plan}), got 'mlp'")
    return FunctionalPlan(model, inner, f"not 'mlp': {plan}")


class KnownPlan:
    """`plan_for` that remembers its last answer, while model, settings and rows ask for the same one."""

    def __init__(self):
        self._known: tuple[InnerLoop, bool, MLPPlan] | None = None

    def __call__(self, model: nn.Module, inner: InnerLoop, support: TaskRows) -> MLPPlan | FunctionalPlan:
        known, targets = self._known, support.y is not None and support.y.is_floating_point()
        if known is not None:
            settings, floating, plan = known
            if settings is inner and floating == targets and plan.model is model and plan.still_fits(support):
                return plan
        plan = plan_for(model, inner.for_rows("support", support), support)
        self._known = (inner, targets, plan) if isinstance(plan, MLPPlan) else None
        return plan

    def __deepcopy__(self, memo) -> KnownPlan:
        return KnownPlan()

    def __reduce__(self):
        return KnownPlan, ()


@dataclass(frozen=True)
class Explanation:
    """A plan in words and numbers; str() gives the lines that `explain` prints."""

    plan: str
    why: str
    served_by: dict[str, str]  # operator -> "native", "triton" or "reference"
    tasks: int
    steps: int
    operations: int
    bytes: int
    forms: tuple[str, ...] = ()  # of each layer, but by the reference

    def __str__(self) -> str:
        served = ", ".join(f"{name}: {by}" for name, by in self.served_by.items())
        forms = [f"layers      {', '.join(self.forms)}"] if self.forms else []
        return "\n".join(
            [
                f"plan        {self.plan}: {self.why}",
                f"operators   {served}",
                *forms,
                f"operations  {self.operations:.3g} in a meta-step of {self.tasks} tasks and {self.steps} steps",
                f"memory      {self.bytes / 2**20:.3g} MiB of parameters and intermediate results",
            ]
        )


def explain(model: nn.Module, batch: TaskBatch, **inner) -> Explanation:
    """Print which plan `adapt` would use for a model and a batch, why, and what it would cost.

    Args:
        model, inner: as for `adapt`.
        batch: the rows of a meta-step.

    Returns:
        The same as an object: plan, why, served_by, operations and bytes of forward and backward, predicted by
        counting and not measured; and, but for the reference, the form in which each layer is computed: "dense" (a
        weight for each task), "factored" (the shared weight, and the task's change as a product of factors) or
        "gram" (the same where the layer's input stays: only products of rows).

    Example:
        >>> import torch
        >>> import mtml_fast as mf
        >>> model, batch = mf.nn.mlp(1, (40, 40), 1), mf.data.Sinusoid().sample(25)
        >>> mf.explain(model, batch, steps=5).plan  # doctest: +ELLIPSIS
        plan        mlp: the model is an MLP of nn.Linear layers
        ...
        'mlp'
    """
    if not isinstance(batch, TaskBatch):
        raise TypeError(f"batch must be a TaskBatch, got {type(batch).__name__}")
    settings = InnerLoop(**inner)
    if batch.support.y is not None:
        settings = settings.for_rows("support", batch.support)
    plan = plan_for(model, settings, batch.support)
    used = ["mlp_adapt"] if plan.name == "mlp" else ["sgd_step"]
    explanation = Explanation(
        plan.name,
        plan.why,
        {name: OPERATORS[name].served_by(batch.support.x.device) for name in used},
        batch.num_tasks,
        settings.steps,
        *plan.cost(batch),
        tuple(plan.forms(batch)),
    )
    print(explanation)
    return explanation
