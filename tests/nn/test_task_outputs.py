"""TaskOutputs: the outputs of learned tasks side by side."""

import pytest
import torch
from torch import nn

from mtml_fast.nn import MetaLearner, TaskOutputs


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tasks", [None, [2, 0], [1]], ids=str)
def test_outputs_are_those_of_the_task_modules(own, tasks):
    trunk = nn.Linear(4, 3)
    learner = (
        MetaLearner(3, task_module=[nn.Linear(3, width) for width in (2, 1, 5)], trunk=trunk)
        if own
        else MetaLearner(3, 3, [2, 1, 5], trunk=trunk)
    )
    outputs, x = TaskOutputs(learner, tasks), torch.randn(6, 4)
    expected = [learner.task_modules[t](trunk(x)) for t in tasks or range(3)]
    torch.testing.assert_close(outputs(x), torch.cat(expected, 1))
    # the learner itself, not a copy: what trains here trains there
    outputs(x).sum().backward()
    assert all(p.grad is not None for p in trunk.parameters())
    assert f"tasks={tasks or [0, 1, 2]}" in repr(outputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda learner: TaskOutputs(nn.Linear(2, 2)), "learner must be a MetaLearner, got Linear"),
        (lambda learner: TaskOutputs(learner, 1), "tasks must be a list of task ids, got 1"),
        (lambda learner: TaskOutputs(learner, []), "tasks must be a list of task ids, got []"),
        (lambda learner: TaskOutputs(learner, [0, 2]), "tasks[1] must be in 0..1, got 2"),
        (lambda learner: TaskOutputs(learner, [0, True]), "tasks[1] must be in 0..1, got True"),
        (lambda learner: TaskOutputs(learner, [1, 1]), "tasks must hold each task once, got 1 twice"),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(MetaLearner(2, 3, 1))
    assert str(caught.value) == message
