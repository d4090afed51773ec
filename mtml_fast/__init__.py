"""mtml_fast: multi-task meta-learning on PyTorch, all tasks and all inner steps in one call."""

__version__ = "0.1.0"

from mtml_fast.tasks import TaskBatch as TaskBatch
from mtml_fast.tasks import TaskRows as TaskRows
from mtml_fast.ops import backend as backend
