"""The identity of a run: what must be the same for a checkpoint to be resumed, and what differs where it is not."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["differences", "identity"]

# how torch computes a step, which may change between machines, not what it computes
_IMPLEMENTATION = ("params", "fused", "foreach", "capturable")
# what a scheduler's step moves, and the rates, which the groups name as well; names with an underscore are its own
# affair, but for those of the schedules inside it
_MOVED = ("last_epoch", "T_cur", "T_i", "verbose", "base_lrs")
_INNER = ("_schedulers", "_milestones")


def identity(algorithm: nn.Module, tasks: Any, optimizer: Optimizer, scheduler: Any, **settings: Any) -> dict:
    """A description of a run in strings and plain values, taken before its first step.

    Modules are described by their type and their `extra_repr`, so an algorithm's own settings belong into that.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
        >>> run = identity(model, "waves", torch.optim.SGD(model.parameters(), lr=0.1), None, meta_batch=32)
        >>> run["algorithm"], run["module"]["0"], run["optimizer group 0"]["lr"], run["meta_batch"]
        ('Sequential()', 'Linear(in_features=1, out_features=2, bias=True)', '0.1', 32)
    """
    return {
        "algorithm": _described(algorithm),
        "parameter": {name: _kind(value) for name, value in algorithm.state_dict().items()},
        "module": {name: _described(module) for name, module in algorithm.named_modules() if name},
        "tasks": str(getattr(tasks, "fingerprint", type(tasks).__name__)),
        "seed": getattr(tasks, "seed", None),
        **settings,
        "optimizer": type(optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "scheduler setting": {} if scheduler is None else _schedule(scheduler),
        **{f"optimizer group {i}": _hyperparameters(group) for i, group in enumerate(optimizer.param_groups)},
    }


def differences(saved: dict, here: dict) -> list[str]:
    """What differs between two descriptions of a run, one phrase each."""
    phrases = []
    for key in [*here, *(key for key in saved if key not in here)]:
        a, b = saved.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            phrases += [f"{key} {phrase}" for phrase in differences(a, b)]
        elif a != b:
            phrases.append(f"{key} was {_absent(a)}, is {_absent(b)}")
    return phrases


def _described(module: nn.Module) -> str:
    return _without_addresses(" ".join(f"{type(module).__name__}({module.extra_repr()})".split()))


def _without_addresses(text: str) -> str:
    # the address of a function is another one in every process
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _kind(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _hyperparameters(group: dict) -> dict[str, str]:
    # a scheduler moves lr, and keeps where it began
    began = {**group, "lr": group.get("initial_lr", group.get("lr"))}
    return {name: repr(value) for name, value in began.items() if name not in _IMPLEMENTATION and name != "initial_lr"}


def _schedule(scheduler: Any) -> dict[str, str]:
    # only torch's own schedulers: which entries of another one's state it moves is not known
    if type(scheduler).__module__ != "torch.optim.lr_scheduler":
        return {}
    return {name: _without_addresses(str(value)) for name, value in _unmoved(scheduler.state_dict()).items()}


def _unmoved(state: dict) -> dict:
    names = [name for name in state if name in _INNER or (not name.startswith("_") and name not in _MOVED)]
    # a Counter by its values
    kept = {name: dict(state[name]) if isinstance(state[name], dict) else state[name] for name in names}
    if "_schedulers" in kept:
        kept["_schedulers"] = [_unmoved(inner) for inner in kept["_schedulers"]]
    return kept


def _absent(value: Any) -> str:
    return "absent" if value is None else str(value)
