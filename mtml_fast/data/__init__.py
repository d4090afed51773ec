"""Episodes, tasks as a pure function of (seed, step); and data sets of a few tasks that are given as they are."""

from mtml_fast.data.digits import Digits as Digits
from mtml_fast.data.folds import folds as folds
from mtml_fast.data.heart_disease import HeartDisease as HeartDisease
from mtml_fast.data.omniglot import Omniglot as Omniglot
from mtml_fast.data.sinusoid import Sinusoid as Sinusoid
from mtml_fast.data.snips_slots import SnipsSlots as SnipsSlots
from mtml_fast.data.tensors import TensorClasses as TensorClasses
from mtml_fast.data.tensors import TensorTasks as TensorTasks
