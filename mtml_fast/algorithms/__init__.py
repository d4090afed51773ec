"""The second floor: meta-learning algorithms, each a pure function and a thin nn.Module around it."""

from mtml_fast.algorithms.maml import FOMAML as FOMAML
from mtml_fast.algorithms.maml import MAML as MAML
from mtml_fast.algorithms.maml import Result as Result
from mtml_fast.algorithms.maml import meta_loss as meta_loss
