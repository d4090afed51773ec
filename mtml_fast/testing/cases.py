"""What a battery runs on: calls of a public function, and what changes of them must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    Args:
        id: its name in the test's id.
        make: `(dtype, generator) -> keyword arguments`; tensors among the operator's differentiable arguments are
            differentiated.
        axes: for each argument with rows of tasks, "T" (tasks lead) or the name of the argument with its offsets.
        tiny: small enough for finite differences and compilation (at most a few dozen numbers).
    """

    id: str
    make: Callable[[torch.dtype, torch.Generator], dict]
    axes: dict[str, str] = field(default_factory=dict)
    tiny: bool = False


@dataclass(frozen=True)
class BadInput:
    """A change of a good call's arguments, and the one-line error that it must give."""

    id: str
    change: Callable[[dict], dict]
    error: type[Exception]
    message: str  # a piece of the text: the argument's name and the value
    reads: bool = False  # whether it is found by reading values, which is done on the CPU alone


@dataclass(frozen=True)
class Check:
    """A check of the battery with its name."""

    id: str
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.id
