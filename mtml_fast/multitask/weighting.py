"""Loss weightings: each turns the losses of T tasks into one, and looks at nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtml_fast.multitask.balance import Weighting
from mtml_fast.ops import _check

__all__ = ["DWA", "FAMO", "GLS", "RLW", "STCH", "Equal", "Uncertainty"]

# the same as in FAMO's official code
_SMALL = 1e-8


class Equal(Weighting):
    r"""The plain sum.

    .. math::
        L = \sum_t L_t

    Example:
        >>> Equal()(torch.tensor([1.0, 3.0]))
        tensor(4.)
    """

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        return losses.sum()


class Uncertainty(Weighting):
    r"""Learned variances of the tasks' noise; give `parameters()` to the optimizer.

    .. math::
        L = \sum_t \tfrac{1}{2} e^{-s_t} L_t + \tfrac{1}{2} s_t, \qquad s_t = \log \sigma_t^2

    Source: Kendall et al., "Multi-task learning using uncertainty to weigh losses", CVPR 2018.

    Example:
        >>> weighting = Uncertainty(2)
        >>> optimizer = torch.optim.Adam(weighting.parameters())
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor(2., grad_fn=<SumBackward0>)
    """

    keeps_tasks = True

    def __init__(self, num_tasks: int):
        super().__init__(num_tasks)
        self.log_variances = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        s = self.log_variances[self._tasks(tasks, losses)]
        return (0.5 * (-s).exp() * losses + 0.5 * s).sum()


class DWA(Weighting):
    r"""Dynamic weight average: a task whose loss falls more slowly than the others' counts more.

    .. math::
        L = \sum_t w_t L_t, \qquad w = T \operatorname{softmax}(r / \tau), \qquad
        r_t = \bar L_t^{(k-1)} / \bar L_t^{(k-2)}

    The bars are means over an epoch, `every` calls of `backward`; the first two epochs have weights of one.

    Args:
        num_tasks: T.
        temperature: tau.
        every: calls an epoch.

    Source: Liu et al., "End-to-end multi-task learning with attention", CVPR 2019.

    Example:
        >>> weighting, p = DWA(2), torch.ones(2, requires_grad=True)
        >>> for losses in (p, p * torch.tensor([0.5, 1.0]), p):
        ...     weights = weighting.backward(losses)
        >>> weights
        tensor([0.8756, 1.1244], dtype=torch.float64)
    """

    keeps_tasks = True

    def __init__(self, num_tasks: int, temperature: float = 2.0, every: int = 1):
        super().__init__(num_tasks)
        _check.number("temperature", temperature, low=0, exclusive=True)
        _check.number("every", every, low=1, integer=True)
        self.temperature, self.every = temperature, every
        nothing = torch.full((num_tasks,), math.nan, dtype=torch.float64)
        # means of the last two epochs, older first; sums and counts of the running one
        self.register_buffer("means", torch.stack([nothing, nothing]))
        self.register_buffer("sums", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        older, newer = self.means[:, self._tasks(tasks, losses)]
        rates = torch.where(newer.isnan() | older.isnan(), 1.0, newer / older)
        return (losses.numel() * (rates / self.temperature).softmax(0).to(losses) * losses).sum()

    def _observe(self, losses: Tensor, tasks: Tensor) -> None:
        if int(self.calls) and int(self.calls) % self.every == 0:
            # a task that was absent for the whole epoch stays as it was
            seen = self.counts > 0
            self.means[0, seen] = self.means[1, seen]
            self.means[1, seen] = (self.sums / self.counts)[seen]
            self.sums.zero_()
            self.counts.zero_()
        self.sums[tasks] += losses.to(self.sums.device)
        self.counts[tasks] += 1
        self.calls += 1

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, temperature={self.temperature}, every={self.every}"


class RLW(Weighting):
    r"""Random weights, drawn anew for every step.

    .. math::
        L = \sum_t w_t L_t, \qquad w = \operatorname{softmax}(n), \quad n_t \sim N(0, 1)

    Source: Lin et al., "Reasonable effectiveness of random weighting", TMLR 2022.

    Example:
        >>> p = torch.ones(3, requires_grad=True)
        >>> round(float(RLW().backward(p).sum()), 6)
        1.0
    """

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        return (torch.randn(losses.shape, dtype=losses.dtype).softmax(0).to(losses) * losses).sum()


class GLS(Weighting):
    r"""The geometric mean; each task counts by the share of its loss that a step takes off. Losses must be positive.

    .. math::
        L = \Bigl( \prod_t L_t \Bigr)^{1/T}

    Source: Chennupati et al., "MultiNet++", CVPR workshops 2019.

    Example:
        >>> GLS()(torch.tensor([1.0, 4.0]))
        tensor(2.)
    """

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        _positive(losses, 0.0, tasks)
        return losses.log().mean().exp()


class STCH(Weighting):
    r"""The smooth Tchebycheff scalarisation: near the largest of the weighted losses, and differentiable.

    .. math::
        L = \mu \log \sum_t \exp\bigl(\lambda_t (L_t - z_t) / \mu\bigr)

    Args:
        mu: the smaller, the nearer to the maximum.
        preference: lambda, `[T]`; `None`: 1 / T each.
        ideal: z, `[T]`, the best values that the losses could have; `None`: zero.

    Source: Lin et al., "Smooth Tchebycheff scalarization for multi-objective optimization", ICML 2024.

    Example:
        >>> STCH(mu=0.01)(torch.tensor([1.0, 4.0]))
        tensor(2.)
    """

    def __init__(self, mu: float = 0.1, preference: Tensor | None = None, ideal: Tensor | None = None):
        super().__init__()
        _check.number("mu", mu, low=0, exclusive=True)
        self.mu = mu
        self.register_buffer("preference", preference)
        self.register_buffer("ideal", ideal)

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        for name in ("preference", "ideal"):
            if getattr(self, name) is not None:
                _check.shape(name, getattr(self, name), ("T", losses.numel()))
        shifted = losses if self.ideal is None else losses - self.ideal.to(losses)
        scale = 1 / losses.numel() if self.preference is None else self.preference.to(losses)
        return self.mu * (scale * shifted / self.mu).logsumexp(0)

    def extra_repr(self) -> str:
        return f"mu={self.mu}"


class FAMO(Weighting):
    r"""Fast adaptive multitask optimisation: weights learned so that all losses fall at one rate.

    .. math::
        L = c \sum_t z_t \log(L_t - b_t), \quad z = \operatorname{softmax}(\xi), \quad
        c = \Bigl( \sum_t \frac{z_t}{L_t - b_t} \Bigr)^{-1}, \qquad
        \xi \leftarrow \text{Adam}\Bigl(\xi,\; \nabla_\xi z^\top \log \frac{L^{before} - b}{L^{after} - b}\Bigr)

    The losses after a step are those of the next call of `backward`, which is exact where each step sees the same rows;
    or give them to `update(losses)` after the step. Losses must be above b.

    Args:
        num_tasks: T.
        lr: the rate of xi.
        weight_decay: of xi.
        lower: b, `[T]`; `None`: zero.

    Source: Liu et al., "FAMO: fast adaptive multitask optimization", NeurIPS 2023.

    Example:
        >>> weighting, p = FAMO(2, lr=0.5), torch.ones(2, requires_grad=True)
        >>> weighting.backward(p)
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> weighting.update(torch.tensor([0.5, 1.0]))  # the second did not fall
        >>> weighting.backward(p)
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    keeps_tasks = True

    def __init__(self, num_tasks: int, lr: float = 0.025, weight_decay: float = 1e-3, lower: Tensor | None = None):
        super().__init__(num_tasks)
        _check.number("lr", lr, low=0)
        _check.number("weight_decay", weight_decay, low=0)
        if lower is not None:
            _check.shape("lower", _check.tensor("lower", lower), ("T", num_tasks))
        self.lr, self.weight_decay = lr, weight_decay
        zeros = torch.zeros(num_tasks, dtype=torch.float64)
        self.register_buffer("lower", zeros.clone() if lower is None else lower.detach().double())
        for name in ("logits", "first_moment", "second_moment", "updates"):
            self.register_buffer(name, zeros.clone())
        # the losses of the last step, NaN where nothing is to be learned from
        self.register_buffer("before", torch.full_like(zeros, math.nan))

    def forward(self, losses: Tensor, tasks=None) -> Tensor:
        ids = self._tasks(tasks, losses)
        lower = self.lower[ids].to(losses)
        _positive(losses, lower, tasks)
        shifted = losses - lower + _SMALL
        z = self.logits[ids].softmax(0).to(losses)
        return (z * shifted.log()).sum() / (z / shifted).sum().detach()

    @torch.no_grad()
    def update(self, losses: Tensor, tasks=None) -> None:
        """Learns from the losses `[T]` after the step, on the rows of the step."""
        ids = self._tasks(tasks, losses)
        ids, losses = ids[~self.before[ids].isnan()], losses.detach().to(self.before)[~self.before[ids].isnan()]
        if not len(ids):
            return
        lower = self.lower[ids] - _SMALL
        fallen = (self.before[ids] - lower).log() - (losses - lower).clamp(min=_SMALL).log()
        z = self.logits[ids].softmax(0)
        gradient = z * (fallen - (z * fallen).sum()) + self.weight_decay * self.logits[ids]
        # Adam
        self.updates[ids] += 1
        self.first_moment[ids] = 0.9 * self.first_moment[ids] + 0.1 * gradient
        self.second_moment[ids] = 0.999 * self.second_moment[ids] + 0.001 * gradient.square()
        mean = self.first_moment[ids] / (1 - 0.9 ** self.updates[ids])
        root = (self.second_moment[ids] / (1 - 0.999 ** self.updates[ids])).sqrt()
        self.logits[ids] -= self.lr * mean / (root + 1e-8)
        self.before[ids] = math.nan

    def _observe(self, losses: Tensor, tasks: Tensor) -> None:
        _positive(losses, self.lower[tasks].to(losses), tasks)
        self.update(losses, tasks)
        self.before[tasks] = losses.to(self.before.device)

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, lr={self.lr}, weight_decay={self.weight_decay}"


def _positive(losses: Tensor, lower: Tensor | float, tasks) -> None:
    for i in (losses.detach() <= lower).nonzero().flatten()[:1].tolist():
        bound = "0" if isinstance(lower, float) or lower[i] == 0 else f"its lower bound {lower[i].item():g}"
        task = i if tasks is None else int(tasks[i])
        raise ValueError(f"task_losses must be above {bound}, got {losses[i].item():g} of task {task}")
