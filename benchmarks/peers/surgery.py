"""From the gradients of T tasks to the one that a step follows, without mtml_fast's operators."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers import Unavailable
from mtml_fast import multitask
from mtml_fast.cli.timing import Provider

# of the random orders in which PCGrad's tasks meet; all providers have the same
_SEED = 0


@dataclass(frozen=True)
class Gradients:
    """T gradients, each spread over a list of parameters, and the method that makes one of them."""

    leaves: list[Tensor]  # [T, ...] a parameter
    method: str  # PCGrad, UPGrad or MGDA

    def weights(self, gram: Tensor) -> Tensor:
        """Of the gradients, [T]: what mtml_fast makes of their Gram matrix [T, T]."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)
            return getattr(multitask, self.method)()(gram)

    def orders(self) -> list[list[int]]:
        """The tasks as each one meets them, [T, T]: what PCGrad draws."""
        tasks = len(self.leaves[0])
        generator = torch.Generator().manual_seed(_SEED)
        return torch.rand(tasks, tasks, generator=generator).argsort(1).tolist()


def loop(problem: Gradients, _) -> Provider:
    """PCGrad as its paper's code does it: whole gradients, each against every other."""
    orders = problem.orders()
    shapes = [leaf.shape[1:] for leaf in problem.leaves]

    def call() -> list[Tensor]:
        g = torch.cat([leaf.flatten(1) for leaf in problem.leaves], 1)  # [T, P]
        total = torch.zeros_like(g[0])
        for own, order, t in zip(g.clone(), orders, range(len(g)), strict=True):
            for j in order:
                product = own @ g[j]
                if j != t and product < 0:
                    own -= product / (g[j] @ g[j]) * g[j]
            total += own
        return [part.view(s) for part, s in zip(total.split([s.numel() for s in shapes]), shapes, strict=True)]

    return Provider(call, torch.__version__)


def matmul(problem: Gradients, _) -> Provider:
    """torch's matrix products leaf by leaf, and mtml_fast's weights between them."""

    def call() -> list[Tensor]:
        matrices = [leaf.flatten(1) for leaf in problem.leaves]
        weights = problem.weights(sum(g @ g.mT for g in matrices)).to(matrices[0].dtype)
        return [(weights @ g).view(leaf.shape[1:]) for g, leaf in zip(matrices, problem.leaves, strict=True)]

    return Provider(call, torch.__version__)


def torchjd(problem: Gradients, _) -> Provider:
    """TorchJD's way for a list of parameters that hold the tasks' gradients, without a copy of them."""
    try:
        aggregation, autojac, linalg = (
            importlib.import_module(f"torchjd.{name}") for name in ("aggregation", "autojac", "linalg")
        )
        # by default its solvers stop early, with a direction that is off by up to a tenth
        aggregator = {
            "PCGrad": lambda: aggregation.PCGrad(),
            "UPGrad": lambda: aggregation.UPGrad(projector=linalg.QuadprogProjector(reg_eps=1e-11)),
            "MGDA": lambda: aggregation.MGDA(epsilon=1e-7, max_iters=20_000),
        }[problem.method]()
    except ImportError as error:
        raise Unavailable(f"cannot be imported ({error})") from None
    parameters = [torch.empty_like(leaf[0]).requires_grad_() for leaf in problem.leaves]
    orders = problem.orders()

    def call() -> Sequence[Tensor]:
        for parameter, leaf in zip(parameters, problem.leaves, strict=True):
            parameter.grad, parameter.jac = None, leaf
        # its PCGrad draws one permutation a task
        left, randperm = iter(orders), torch.randperm
        torch.randperm = lambda size: torch.tensor(next(left))
        try:
            autojac.jac_to_grad(parameters, aggregator, optimize_gramian_computation=True)
        finally:
            torch.randperm = randperm
        return [parameter.grad for parameter in parameters]

    return Provider(call, importlib.metadata.version("torchjd"))
