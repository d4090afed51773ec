"""A call of every operator, forward and backward: python -m benchmarks.gpu.calls [--device cuda]

Run like this it makes each call once, which is what compute-sanitizer looks at.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtml_fast.cli.timing import allowed_error, largest_error
from mtml_fast.ops import (
    OPERATORS,
    backend,
    gradient_combine,
    gradient_gram,
    heads,
    heads_loss,
    mlp_adapt,
    sgd_step,
)
from mtml_fast.testing.arguments import floats, in_dtype, map_tensors, tensors_in


@dataclass
class Call:
    """A public function with arguments, and the gradients of all its differentiable results."""

    name: str
    operator: str
    function: Callable
    arguments: dict
    _cotangents: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_in(self.arguments)

    @property
    def served_by(self) -> str:
        return OPERATORS[self.operator].served_by(self.tensors[0].device)

    def __call__(self) -> list[Tensor]:
        results = [r for r in floats(self.function(**self.arguments)) if r.requires_grad]
        leaves = [t for t in self.tensors if t.requires_grad]
        if not self._cotangents:
            draws = torch.Generator().manual_seed(1)
            self._cotangents = [torch.randn(r.shape, generator=draws, dtype=torch.float64).to(r) for r in results]
        gradients = torch.autograd.grad(results, leaves, self._cotangents, allow_unused=True, materialize_grads=True)
        return [*(r.detach() for r in results), *gradients]

    def take(self, other: Call) -> None:
        """The other call's values, in the place of its own."""
        with torch.no_grad():
            for own, new in zip(self.tensors, other.tensors, strict=True):
                own.copy_(new)


def calls(device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Call]:
    """One or more for each operator; the same numbers for every device and dtype."""
    draws = torch.Generator().manual_seed(seed)
    made = []
    for name, operator, function, make in _CALLS:
        arguments = in_dtype(make(lambda *shape: torch.randn(shape, generator=draws, dtype=torch.float32)), dtype)
        arguments = map_tensors(arguments, lambda t: t.to(device))
        for leaf in floats([arguments.get(argument) for argument in _leaves(operator)]):
            leaf.requires_grad_()
        made.append(Call(name, operator, function, arguments))
    return made


class Exact:
    """What calls must give: the reference in float64 on the CPU, and how far from it float32 may be."""

    def __init__(self, seed: int = 0):
        with backend("reference"):
            self._exact = {call.name: call() for call in calls("cpu", seed, torch.float64)}
            eager = {call.name: call() for call in calls("cpu", seed)}
        self._allowed = {name: allowed_error(largest_error(eager[name], self._exact[name])) for name in eager}

    def fault(self, call: Call, results: list[Tensor]) -> str:
        """What is wrong with the results; nothing where they are right."""
        error, allowed = largest_error(results, self._exact[call.name]), self._allowed[call.name]
        # a NaN is not below anything
        return "" if error <= allowed else f"off by {error:.1e} (allowed {allowed:.1e})"


def _leaves(operator: str) -> tuple[str, ...]:
    return OPERATORS[operator].differentiable


def _offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _mlp(widths: list[int], tasks: int, support: int, query: int, **options) -> Callable[[Callable], dict]:
    def arguments(draw) -> dict:
        params = []
        for i, o in itertools.pairwise(widths):
            params += [draw(o, i) / i**0.5, 0.1 * draw(o)]
        labels = lambda rows: (torch.arange(rows) % widths[-1]).repeat(tasks, 1)  # noqa: E731
        return dict(
            params=params,
            support_x=draw(tasks, support, widths[0]),
            support_y=labels(support),
            query_x=draw(tasks, query, widths[0]),
            query_y=labels(query),
            lr=torch.tensor(0.1),
            steps=3,
            **options,
        )

    return arguments


def _on_fixed_features(**arguments):
    """mlp_adapt whose features have no gradient: a large first layer is then in Gram form."""
    fixed = {name: arguments[name].detach() for name in ("support_x", "query_x")}
    return mlp_adapt(**arguments | fixed)


def _ragged(hidden: int | None) -> Callable[[Callable], dict]:
    counts, features = (5, 1, 40, 17), 33

    def arguments(draw) -> dict:
        tasks, outputs, rows = len(counts), 5, sum(counts)
        call = dict(x=draw(rows, features), offsets=_offsets(*counts), weight=draw(tasks * outputs, hidden or features))
        call["bias"] = draw(tasks * outputs)
        if hidden:
            call |= dict(hidden_weight=draw(tasks, hidden, features), hidden_bias=draw(tasks, hidden))
        return call

    return arguments


def _ragged_loss(draw) -> dict:
    call = _ragged(None)(draw)
    return call | dict(y=torch.arange(len(call["x"])) % 5, loss="cross_entropy")


def _tree(draw, tasks: int = 6) -> list[Tensor]:
    return [draw(tasks, *shape) for shape in ((65, 31), (65,), (5, 65), (5,))]


_CALLS = (
    ("mlp_adapt", "mlp_adapt", mlp_adapt, _mlp([12, 40, 40, 5], 4, 5, 9)),
    ("mlp_adapt first order", "mlp_adapt", mlp_adapt, _mlp([12, 40, 5], 4, 5, 9, first_order=True)),
    ("mlp_adapt of a wide network", "mlp_adapt", mlp_adapt, _mlp([200, 128, 64, 5], 4, 5, 9)),
    ("mlp_adapt on fixed features", "mlp_adapt", _on_fixed_features, _mlp([200, 128, 64, 5], 4, 5, 9)),
    # wide enough to go layer by layer: 5 rows with 412,800 weights behind the first layer
    ("mlp_adapt layer by layer", "mlp_adapt", mlp_adapt, _mlp([24, 640, 640, 5], 3, 5, 4)),
    ("mlp_adapt of linear heads", "mlp_adapt", mlp_adapt, _mlp([96, 5], 4, 10, 12)),
    ("heads", "heads", heads, _ragged(None)),
    ("heads with a hidden layer", "heads", heads, _ragged(24)),
    ("heads_loss", "heads_loss", heads_loss, _ragged_loss),
    (
        "sgd_step",
        "sgd_step",
        sgd_step,
        lambda draw: dict(params=_tree(draw), grads=_tree(draw), lr=torch.tensor(0.1), weight_decay=0.01, clip=1.0),
    ),
    ("gradient_gram", "gradient_gram", gradient_gram, lambda draw: dict(gradients=_tree(draw))),
    (
        "gradient_combine",
        "gradient_combine",
        gradient_combine,
        lambda draw: dict(gradients=_tree(draw), weights=draw(6)),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.calls")
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    exact = Exact()
    faults = [(call.name, exact.fault(call, call())) for call in calls(device)]
    for name, fault in faults:
        print(f"{name}: {fault or 'right'}")
    raise SystemExit(any(fault for _, fault in faults))


if __name__ == "__main__":
    main()
