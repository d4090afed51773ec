"""TaskStack: the user's own modules, one a task, with stacked parameters; modules of one structure run as one."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

__all__ = ["TaskStack", "reset_parameters", "run_stacked"]


class TaskStack(nn.Module):
    """T modules as a few: those of equal structure share one module whose parameters and buffers are `[T_g, ...]`.

    Inputs of one shape for tasks of one structure run in one `torch.func.vmap`: 500 modules cost a few calls, not 500.
    Each task keeps its own batch statistics and draws its own dropout. A module that vmap cannot take (one that reads a
    value in its forward, say) runs task by task, with a warning. A parameter without a gradient that several modules of
    one structure hold in common, the same tensor, stays a single one: tasks may share a frozen part.

    Args:
        modules: one a task; their values are copied. Two modules are of equal structure where their classes, the shapes
            of their parameters and buffers, and their other attributes (numbers, strings, functions, dataclasses, and
            lists of these) agree.

    Derivatives: any that autograd takes of the call, exact for normalisation layers too: vmap covers the forward alone
    (under `vmap` of `torch.func.grad` torch's own are wrong at second order).

    Example:
        >>> stack = TaskStack([nn.Linear(3, 2) for _ in range(5)])
        >>> {name: list(p.shape) for name, p in stack.named_parameters()}
        {'groups.0.weight': [5, 2, 3], 'groups.0.bias': [5, 2]}
        >>> [list(y.shape) for y in stack([torch.zeros(4, 3), torch.zeros(7, 3)], tasks=[0, 3])]
        [[4, 2], [7, 2]]
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        members = {}
        for t, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules[{t}] must be an nn.Module, got {type(module).__name__}")
            members.setdefault(_structure(module), []).append(t)
        self.members = list(members.values())
        # the names of what the tasks of each group have in common; it has no axis for them
        self._common = [_common([modules[t] for t in tasks]) for tasks in self.members]
        self.groups = nn.ModuleList(
            _stacked([modules[t] for t in tasks], common)
            for tasks, common in zip(self.members, self._common, strict=True)
        )
        # task -> its group and its place there
        self._place = {t: (g, i) for g, tasks in enumerate(self.members) for i, t in enumerate(tasks)}

    @property
    def num_tasks(self) -> int:
        return len(self._place)

    def forward(self, inputs: Sequence[Tensor], tasks: Sequence[int] | None = None) -> list[Tensor]:
        """One output an input: `inputs[i]` through the module of task `tasks[i]` (of task i without `tasks`)."""
        tasks = range(self.num_tasks) if tasks is None else tasks
        if len(inputs) != len(tasks):
            raise ValueError(f"inputs must be {len(tasks)} tensors, one an entry of tasks, got {len(inputs)}")
        calls, seen = {}, {}
        for i, t in enumerate(tasks):
            # a task that comes twice runs twice, one after the other: its batch statistics move twice
            seen[t] = seen.get(t, -1) + 1
            calls.setdefault((seen[t], self._place[t][0], inputs[i].shape, inputs[i].dtype), []).append(i)
        outputs = [None] * len(inputs)
        for (_, g, *_), entries in sorted(calls.items(), key=lambda call: call[0][0]):
            slots = [self._place[tasks[i]][1] for i in entries]
            results = self._run(g, slots, torch.stack([inputs[i] for i in entries]))
            for i, result in zip(entries, results.unbind(), strict=True):
                outputs[i] = result
        return outputs

    def _run(self, g: int, slots: list[int], x: Tensor) -> Tensor:
        """The modules in the given slots of group g on `x [E, ...]`."""
        group, common = self.groups[g], self._common[g]
        state = dict(group.named_parameters()) | dict(group.named_buffers())
        index = torch.tensor(slots, device=x.device)
        every = slots == list(range(len(self.members[g])))
        selected = state
        if not every:
            selected = {name: value if name in common else value[index] for name, value in state.items()}
        try:
            outputs, buffers = run_stacked(group, selected, x, common)
        except ValueError as error:
            # batch norm of a single row, say
            raise ValueError(f"inputs {list(x.shape[1:])} of {type(group).__name__}: {error}") from error
        with torch.no_grad():
            for name, value in buffers.items():
                state[name][index] = value
        return outputs

    def head(self, t: int) -> nn.Module:
        """A copy of task t's module as an ordinary module."""
        if not 0 <= t < self.num_tasks:
            raise IndexError(f"t must be a task in 0..{self.num_tasks - 1}, got {t}")
        g, slot = self._place[t]
        return _replaced(self.groups[g], lambda name, value: value if name in self._common[g] else value[slot])

    @torch.no_grad()
    def load_heads(self, modules: Sequence[nn.Module]) -> None:
        """Takes the values of T modules of the structures of its own."""
        if len(modules) != self.num_tasks:
            raise ValueError(f"modules must be {self.num_tasks} modules, one a task, got {len(modules)}")
        for t, module in enumerate(modules):
            g, slot = self._place[t]
            stacked, own = self.groups[g].state_dict(keep_vars=True), module.state_dict()
            places = {name: value if name in self._common[g] else value[slot] for name, value in stacked.items()}
            if {name: value.shape for name, value in places.items()} != {n: v.shape for n, v in own.items()}:
                raise ValueError(f"modules[{t}] must have the parameters of task {t}'s module, got {list(own)}")
            for name, value in places.items():
                # the first module of the group gives what is common
                if name in self._common[g] and slot > 0 and not torch.equal(value, own[name]):
                    raise ValueError(f"modules[{t}] must hold the values of {name} that the tasks have in common")
                value.copy_(own[name])

    def owners(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter that is not common, and the task that each index of its first axis belongs to."""
        return [
            (parameter, torch.tensor(tasks, device=parameter.device))
            for tasks, group, common in zip(self.members, self.groups, self._common, strict=True)
            for name, parameter in group.named_parameters()
            if name not in common
        ]


def run_stacked(
    module: nn.Module, state: dict[str, Tensor], x: Tensor, common: Set[str] = frozenset()
) -> tuple[Tensor, dict[str, Tensor]]:
    """E modules of one structure, each on its own input.

    Args:
        module: the structure.
        state: its parameters and buffers, each `[E, ...]`.
        x: `[E, ...]`.
        common: the names of the parameters that are one for all E, without that axis.

    Returns:
        The outputs `[E, ...]`, and the buffers `[E, ...]` after the call.
    """
    buffers = [name for name, _ in module.named_buffers()]

    def one(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = functional_call(module, state, (x,))
        if not isinstance(output, Tensor):
            raise TypeError(f"the task's module must return one tensor, got {type(output).__name__}")
        return output, {name: state[name] for name in buffers}

    def fresh() -> dict[str, Tensor]:
        # buffers change in place, and vmap may give up half way
        return state | {name: state[name].clone() for name in buffers}

    try:
        axes = {name: None if name in common else 0 for name in state}
        return vmap(one, (axes, 0), randomness="different")(fresh(), x)
    except torch.OutOfMemoryError:
        # a RuntimeError too, and no reason to try again
        raise
    except RuntimeError as error:
        # what the module itself refuses, it refuses here once more, in its own words
        again = fresh()
        results = [
            one({name: value if name in common else value[i] for name, value in again.items()}, x[i])
            for i in range(x.shape[0])
        ]
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"torch.func.vmap cannot run {type(module).__name__}, one call a task instead: {reason}", stacklevel=2
        )
        outputs, buffers_of = zip(*results, strict=True)
        return torch.stack(outputs), {name: torch.stack([b[name] for b in buffers_of]) for name in buffers}


def reset_parameters(module: nn.Module) -> None:
    """New first values in every layer that has `reset_parameters`; parameters outside of such layers stay."""
    for layer in module.modules():
        if callable(getattr(layer, "reset_parameters", None)):
            layer.reset_parameters()


def _common(modules: list[nn.Module]) -> frozenset[str]:
    """The names of the frozen parameters that several modules hold in common."""
    if len(modules) == 1:
        return frozenset()
    # by all of its names, where layers are tied
    first, *others = [dict(module.named_parameters(remove_duplicate=False)) for module in modules]
    return frozenset(
        name for name, p in first.items() if not p.requires_grad and all(other.get(name) is p for other in others)
    )


def _stacked(modules: list[nn.Module], common: Set[str]) -> nn.Module:
    """The first module with the parameters and buffers of all, stacked, but for those in common."""
    states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]

    def value(name: str, first: Tensor) -> Tensor:
        return first if name in common else torch.stack([state[name].detach() for state in states])

    return _replaced(modules[0], value)


def _replaced(module: nn.Module, value) -> nn.Module:
    """A copy of a module with other values, `value(name, old)`, in its parameters and buffers."""
    old = dict(module.named_parameters()) | dict(module.named_buffers())
    memo = {}
    for name, tensor in old.items():
        new = value(name, tensor.detach()).clone()
        # as deep copies go: whoever refers to the old tensor (tied layers too) refers to the new one
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(module, memo)


def _structure(module: nn.Module) -> tuple:
    """What two modules must have in common to run as one."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    own = set(vars(nn.Module()))
    return (
        tuple((name, value.shape, value.dtype, value.requires_grad) for name, value in tensors),
        tuple(
            (name, type(layer), _comparable({k: v for k, v in vars(layer).items() if k not in own or k == "training"}))
            for name, layer in module.named_modules(remove_duplicate=False)
        ),
    )


def _comparable(value):
    """A hashable stand-in, equal for values that make a module behave alike; unknown objects equal only themselves."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_comparable(v) for v in value)
    if isinstance(value, dict):
        return dict, tuple((_comparable(k), _comparable(v)) for k, v in value.items())
    if isinstance(value, types.FunctionType):
        # a function among them goes by identity: it may well be this one
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        cells = [id(cell) if callable(cell) else cell for cell in cells]
        return value.__code__, _comparable([value.__defaults__, value.__kwdefaults__, cells])
    if dataclasses.is_dataclass(value):
        return type(value), _comparable(vars(value))
    return id(value)
