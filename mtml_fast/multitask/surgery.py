"""Gradient surgery: each makes one direction of the T gradients of what the tasks share.

All but GradDrop are arithmetic on the Gram matrix, in `mtml_fast/multitask/gram_weights.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtml_fast.multitask import gram_weights
from mtml_fast.multitask.balance import Surgery, require_finite
from mtml_fast.ops import _check

__all__ = ["IMTLG", "MGDA", "AlignedMTL", "CAGrad", "GradDrop", "GradNorm", "GradVac", "NashMTL", "PCGrad", "UPGrad"]


class PCGrad(Surgery):
    r"""Projecting conflicting gradients: each loses its part along every other that it points against.

    .. math::
        g_i' \leftarrow g_i' - \frac{\min(\langle g_i', g_j \rangle, 0)}{\lVert g_j \rVert^2} g_j
        \ \text{ for all } j \ne i \text{ in random order}, \qquad d = \sum_i g_i'

    Source: Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020.

    Example:
        >>> trunk, heads = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        >>> losses = heads(trunk(torch.ones(5, 3))).square().mean(0)
        >>> weights = PCGrad().backward(losses, shared=trunk.parameters())
        >>> PCGrad()(torch.tensor([[4.0, -2], [-2, 2]]))
        tensor([1.5000, 2.0000], dtype=torch.float64)
    """

    def _weights(self, gram, losses, tasks):
        return gram_weights.pcgrad(gram, _orders(len(gram)))


class GradVac(Surgery):
    r"""Gradient vaccine: turns each pair of gradients to the cosine that it usually has, if that is larger.

    .. math::
        g_i' \leftarrow g_i' + \frac{\lVert g_i' \rVert (\hat\phi_{ij} \sqrt{1 - \phi_{ij}^2} -
        \phi_{ij} \sqrt{1 - \hat\phi_{ij}^2})}{\lVert g_j \rVert \sqrt{1 - \hat\phi_{ij}^2}} g_j
        \ \text{ where } \phi_{ij} < \hat\phi_{ij}, \qquad
        \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi_{ij}

    Args:
        num_tasks: T.
        beta: how fast the usual cosines move, in [0, 1).

    Source: Wang et al., "Gradient vaccine", ICLR 2021.

    Example:
        >>> GradVac(2)(torch.tensor([[4.0, -2], [-2, 2]]))  # the first time as PCGrad
        tensor([1.5000, 2.0000], dtype=torch.float64)
    """

    keeps_tasks = True

    def __init__(self, num_tasks: int, beta: float = 0.5):
        super().__init__(num_tasks)
        _check.number("beta", beta, low=0, below=1)
        self.beta = beta
        self.register_buffer("targets", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    def _weights(self, gram, losses, tasks):
        place = np.ix_(tasks.numpy(), tasks.numpy())
        targets = self.targets.cpu().numpy()
        weights, moved = gram_weights.gradvac(gram, targets[place], _orders(len(gram)), self.beta)
        targets[place] = moved
        self.targets.copy_(torch.as_tensor(targets))
        return weights

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, beta={self.beta}"


class MGDA(Surgery):
    r"""The multiple gradient descent algorithm: the shortest mixture of the gradients, which serves every task.

    .. math::
        d = \sum_t w_t g_t, \qquad w = \arg\min_{w \ge 0,\ \sum w = 1} \Bigl\lVert \sum_t w_t g_t \Bigr\rVert

    Source: Desideri, "Multiple-gradient descent algorithm", 2012; Sener and Koltun, "Multi-task learning as
    multi-objective optimization", NeurIPS 2018.

    Example:
        >>> MGDA()(torch.tensor([[1.0, 0], [0, 3]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    def _weights(self, gram, losses, tasks):
        return gram_weights.mgda(gram)


class CAGrad(Surgery):
    r"""Conflict-averse: of all directions near the mean gradient the one that serves the worst served task best.

    .. math::
        \max_d \min_t \langle g_t, d \rangle \quad \text{with } \lVert d - g_0 \rVert \le c \lVert g_0 \rVert,
        \qquad g_0 = \tfrac{1}{T} \sum_t g_t

    Args:
        c: how far from the mean, in [0, 1); 0 is the mean itself.

    Source: Liu et al., "Conflict-averse gradient descent for multi-task learning", NeurIPS 2021.

    Example:
        >>> CAGrad(c=0.5)(torch.tensor([[1.0, 0], [0, 1]]))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    def __init__(self, c: float = 0.5):
        super().__init__()
        _check.number("c", c, low=0, below=1)
        self.c = c

    def _weights(self, gram, losses, tasks):
        return gram_weights.cagrad(gram, self.c)

    def extra_repr(self) -> str:
        return f"c={self.c}"


class IMTLG(Surgery):
    r"""Impartial multi-task learning (IMTL-G): the direction has as long a part along each task's gradient.

    .. math::
        d = \sum_t w_t g_t, \quad \sum_t w_t = 1, \qquad
        \frac{\langle d, g_i \rangle}{\lVert g_i \rVert} = \frac{\langle d, g_j \rangle}{\lVert g_j \rVert}

    Source: Liu et al., "Towards impartial multi-task learning", ICLR 2021.

    Example:
        >>> IMTLG()(torch.tensor([[1.0, 0], [0, 9]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    def _weights(self, gram, losses, tasks):
        return gram_weights.imtl_g(gram)


class NashMTL(Surgery):
    r"""The Nash bargain of the tasks over the direction.

    .. math::
        d = \sum_t w_t g_t, \qquad M w = 1 / w, \quad w > 0

    Args:
        max_norm: the norm that d is cut to (it would be the root of T); `None` leaves it.

    Source: Navon et al., "Multi-task learning as a bargaining game", ICML 2022. The equation is solved as a convex
    problem to the last digits, not by a few linearised ones.

    Example:
        >>> NashMTL(max_norm=None)(torch.tensor([[4.0, 0], [0, 1]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, max_norm: float | None = 1.0):
        super().__init__()
        if max_norm is not None:
            _check.number("max_norm", max_norm, low=0, exclusive=True)
        self.max_norm = max_norm

    def _weights(self, gram, losses, tasks):
        return gram_weights.nash_mtl(gram, self.max_norm)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}"


class AlignedMTL(Surgery):
    r"""Independent component alignment: the gradients, made orthogonal and of one length, and their mean.

    .. math::
        d = G B \tfrac{1}{T} \mathbf{1}, \qquad B = \sqrt{\lambda}\, V \Lambda^{-1/2} V^\top, \qquad
        M = G^\top G = V \Lambda V^\top

    Args:
        scale: lambda: "min", "median" or "rmse" (the mean) of the eigenvalues above zero.

    Source: Senushkin et al., "Independent component alignment for multi-task learning", CVPR 2023.

    Example:
        >>> AlignedMTL()(torch.tensor([[4.0, 0], [0, 1]]))
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    def __init__(self, scale: str = "min"):
        super().__init__()
        _check.choice("scale", scale, ("min", "median", "rmse"))
        self.scale = scale

    def _weights(self, gram, losses, tasks):
        return gram_weights.aligned_mtl(gram, self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"


class UPGrad(Surgery):
    r"""Each gradient is projected onto the dual cone, the directions that no gradient points against; their mean.

    .. math::
        d = \tfrac{1}{T} \sum_t \pi(g_t), \qquad
        \pi(g) = \arg\min_v \lVert v - g \rVert \ \text{ with } \langle v, g_s \rangle \ge 0 \ \text{ for all } s

    Source: Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024.

    Example:
        >>> UPGrad()(torch.tensor([[4.0, -2], [-2, 2]]))
        tensor([0.7500, 1.0000], dtype=torch.float64)
    """

    def _weights(self, gram, losses, tasks):
        return gram_weights.upgrad(gram)


class GradNorm(Surgery):
    r"""Learned weights under which the tasks' gradients have norms that suit how far each task still has to go.

    .. math::
        \min_w \sum_t \bigl| w_t \lVert g_t \rVert - \bar G\, r_t^\alpha \bigr|, \qquad
        \bar G = \operatorname{mean}_t w_t \lVert g_t \rVert, \quad
        r_t = \frac{L_t / L_t^{(0)}}{\operatorname{mean}_s L_s / L_s^{(0)}}, \qquad \sum_t w_t = T

    One gradient step on w, the target held constant, after each step of the model; parameters of one task get the
    gradient of the weighted loss, too. The initial losses are those of a task's first call.

    Args:
        num_tasks: T.
        alpha: how strongly a task that lags behind is helped.
        lr: the rate of w.

    Source: Chen et al., "GradNorm: gradient normalization for adaptive loss balancing", ICML 2018.

    Example:
        >>> surgery, losses = GradNorm(2, lr=0.1), torch.ones(2)
        >>> surgery(torch.tensor([[4.0, 0], [0, 1]]), losses), surgery(torch.tensor([[4.0, 0], [0, 1]]), losses)
        (tensor([1., 1.], dtype=torch.float64), tensor([0.8421, 1.1579], dtype=torch.float64))
    """

    keeps_tasks = True

    def __init__(self, num_tasks: int, alpha: float = 1.5, lr: float = 0.025):
        super().__init__(num_tasks)
        _check.number("alpha", alpha, low=0)
        _check.number("lr", lr, low=0)
        self.alpha, self.lr = alpha, lr
        self.register_buffer("task_weights", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("initial", torch.full((num_tasks,), math.nan, dtype=torch.float64))

    def _weights(self, gram, losses, tasks):
        if losses is None:
            raise TypeError("losses must be the tasks' losses [T], got None")
        weights, initial = self.task_weights[tasks].cpu().numpy(), self.initial[tasks].cpu().numpy()
        initial = np.where(np.isnan(initial), losses, initial)
        norms = np.sqrt(np.diag(gram).clip(0))
        ratio = losses / np.where(initial == 0, 1, initial)
        target = (weights * norms).mean() * (ratio / (ratio.mean() or 1)).clip(0) ** self.alpha
        moved = weights - self.lr * np.sign(weights * norms - target) * norms
        # a weight that turned negative would climb
        moved = moved.clip(1e-3)
        self.task_weights[tasks] = torch.as_tensor(moved * (weights.sum() / moved.sum())).to(self.task_weights)
        self.initial[tasks] = torch.as_tensor(initial).to(self.initial)
        return weights

    def _specific(self, weights: Tensor) -> Tensor:
        return weights

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, alpha={self.alpha}, lr={self.lr}"


class GradDrop(Surgery):
    r"""Gradient sign dropout: of each number's gradients only those of one sign are kept, drawn by their weight.

    .. math::
        P = \tfrac{1}{2} \Bigl( 1 + \frac{\sum_t g_t}{\sum_t |g_t|} \Bigr), \quad u \sim U(0, 1), \qquad
        d = \sum_t \bigl( [P > u][g_t > 0] + [P < u][g_t < 0] \bigr)\, g_t

    The weights that `backward` returns are the shares of the tasks' gradients (in their absolute values) that were
    kept.

    Args:
        leak: the share of every gradient that is kept in any case, in [0, 1).

    Source: Chen et al., "Just pick a sign: optimizing deep multitask models with gradient sign dropout", NeurIPS 2020.

    Example:
        >>> trunk, heads = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        >>> weights = GradDrop().backward(heads(trunk(torch.ones(5, 3))).square().mean(0), trunk.parameters())
        >>> list(weights.shape)
        [2]
    """

    def __init__(self, leak: float = 0.0):
        super().__init__()
        _check.number("leak", leak, low=0, below=1)
        self.leak = leak

    def forward(self, gram, losses=None, tasks=None) -> Tensor:
        raise TypeError("GradDrop looks at each number of the gradients, not at their Gram matrix: call backward")

    def _combined(self, gradients: list[Tensor], losses: Tensor, tasks: Tensor) -> tuple[list[Tensor], Tensor]:
        combined, kept, whole = [], 0.0, 0.0
        for gradient in gradients:
            size = gradient.abs()
            positive = gradient.clamp(min=0).sum(0) / size.sum(0)
            up = torch.rand(positive.shape, dtype=positive.dtype).to(positive) < positive
            chosen = torch.where(up, gradient.clamp(min=0), gradient.clamp(max=0))
            chosen = self.leak * gradient + (1 - self.leak) * chosen
            combined.append(chosen.sum(0))
            kept = kept + chosen.abs().double().unsqueeze(-1).flatten(1).sum(1)
            whole = whole + size.double().unsqueeze(-1).flatten(1).sum(1)
        require_finite(whole, tasks)
        return combined, torch.where(whole > 0, kept / whole, 1.0)

    def extra_repr(self) -> str:
        return f"leak={self.leak}"


def _orders(size: int) -> np.ndarray:
    """A random order of all tasks for each task, from torch's generator."""
    return torch.rand(size, size).argsort(1).numpy()
