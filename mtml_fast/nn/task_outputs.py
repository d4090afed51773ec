"""TaskOutputs: what a learner's tasks say of the same rows, side by side; the features of a map between outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtml_fast.nn.meta_learner import Entries, MetaLearner

__all__ = ["TaskOutputs", "some_tasks"]


class TaskOutputs(nn.Module):
    r"""The outputs of some of a learner's tasks on the same rows, `[R, ...] -> [R, sum of O_t]`.

    .. math::
        u(x) = \bigl[f_{t_1}(g(x)), f_{t_2}(g(x)), \dots\bigr]

    As the trunk of another MetaLearner it makes that learner's task modules maps from the outputs of learned tasks.

    Args:
        learner: the MetaLearner; it is used, not copied.
        tasks: some of its tasks, in their order side by side; `None`: all.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> from mtml_fast import MetaLearner
        >>> outputs = TaskOutputs(MetaLearner(3, in_features=4, out_features=[2, 1, 5]), tasks=[2, 0])
        >>> outputs(torch.zeros(6, 4)).shape
        torch.Size([6, 7])
    """

    def __init__(self, learner: MetaLearner, tasks: Sequence[int] | None = None):
        super().__init__()
        if not isinstance(learner, MetaLearner):
            raise TypeError(f"learner must be a MetaLearner, got {type(learner).__name__}")
        self.tasks = some_tasks("tasks", tasks, learner.num_tasks)
        self.learner = learner

    def forward(self, x: Tensor) -> Tensor:
        entries = Entries(x, self.tasks, [x.shape[0]] * len(self.tasks), shared=True)
        outputs = self.learner.head_outputs(self.learner.features(entries))
        for t, z in zip(self.tasks, outputs, strict=True):
            if z.dim() != 2:
                raise ValueError(f"learner must have outputs [R, O] of each row, got {list(z.shape)} of task {t}")
        return torch.cat(outputs, 1)

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}"


def some_tasks(name: str, tasks: Sequence[int] | None, num_tasks: int) -> list[int]:
    """Tasks of a learner, each once; `None` for all."""
    if tasks is None:
        return list(range(num_tasks))
    if not isinstance(tasks, (list, tuple, range)) or len(tasks) == 0:
        raise TypeError(f"{name} must be a list of task ids, got {tasks!r}")
    for i, t in enumerate(tasks):
        if type(t) is not int or not 0 <= t < num_tasks:
            raise ValueError(f"{name}[{i}] must be in 0..{num_tasks - 1}, got {t!r}")
        if t in tasks[:i]:
            raise ValueError(f"{name} must hold each task once, got {t} twice")
    return list(tasks)
