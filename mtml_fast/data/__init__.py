"""Episodes: tasks as a pure function of (seed, step)."""

from mtml_fast.data.omniglot import Omniglot as Omniglot
from mtml_fast.data.sinusoid import Sinusoid as Sinusoid
