"""Balance.backward: every method against plain loops over autograd, its state, its errors, and that it trains."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtml_fast import multitask
from mtml_fast.multitask import BALANCES, balance_of, task_gradients
from mtml_fast.multitask.balance import Surgery

TORCHJD = json.loads((Path(__file__).parent / "torchjd_results.json").read_text())
SURGERY = [name for name, kind in BALANCES.items() if issubclass(kind, Surgery)]
WEIGHTING = [name for name in BALANCES if name not in SURGERY]
TASKS = 3


class Model(nn.Module):
    """A trunk, a head a task, and a temperature that acts on the losses beside the trunk."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))
        self.double()

    def losses(self, x, y):
        """[T], and the representation."""
        h = self.trunk(x)
        return torch.stack([F.mse_loss(head(h[t]), y[t]) for t, head in enumerate(self.heads)]), h


@pytest.fixture
def problem():
    x = torch.randn(TASKS, 10, 4, dtype=torch.float64)
    return Model(), x, torch.randn(TASKS, 10, 1, dtype=torch.float64)


def loop_of_gradients(losses, tensors):
    """[T, P], one backward pass a task."""
    rows = [torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True) for loss in losses]
    return [
        torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows]) for i, p in enumerate(tensors)
    ]


def entangled(step):
    """Parameters, and positive losses of three tasks whose gradients are no two orthogonal."""
    generator = torch.Generator().manual_seed(step)
    p = torch.randn(6, generator=generator).requires_grad_()
    return p, (torch.randn(3, 6, generator=generator) @ p).square() * torch.tensor([1.0, 2, 5]) + 0.1


def grads(parameters):
    return [p.grad.clone() for p in parameters]


@pytest.mark.parametrize("chunk", [1, 2, 16])
@pytest.mark.parametrize("name", [*BALANCES])
def test_the_gradient_is_the_weighted_sum(name, chunk, problem):
    """Shared parameters: the combination of the tasks' gradients with the returned weights. Heads: their own loss."""
    model, x, y = problem
    balance = balance_of(name, TASKS)
    losses, _ = model.losses(x, y)
    expected = loop_of_gradients(losses, list(model.trunk.parameters()))
    own = loop_of_gradients(losses, list(model.heads.parameters()))
    weights = balance.backward(losses, shared=model.trunk.parameters(), chunk=chunk)
    assert weights.shape == (TASKS,)
    if name != "graddrop":
        for p, g in zip(model.trunk.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, torch.einsum("t,t...->...", weights, g), rtol=1e-9, atol=1e-12)
    of_heads = torch.ones(TASKS).double() if name in SURGERY and name != "gradnorm" else weights
    for p, g in zip(model.heads.parameters(), own, strict=True):
        torch.testing.assert_close(p.grad, torch.einsum("t,t...->...", of_heads, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SURGERY)
def test_representation_mode(name, problem):
    """The Gram matrix is that of the gradients in h, and the combination goes through the trunk once."""
    model, x, y = problem
    losses, h = model.losses(x, y)
    (of_h,) = loop_of_gradients(losses, [h])
    torch.manual_seed(3)
    weights = balance_of(name, TASKS).backward(losses, representation=h)
    mine = grads(model.parameters())
    if name == "graddrop":
        torch.manual_seed(3)
        combined = multitask.GradDrop()._combined([of_h], losses, torch.arange(TASKS))[0][0]
    else:
        torch.manual_seed(3)
        again = balance_of(name, TASKS)(of_h.flatten(1) @ of_h.flatten(1).T, losses)
        torch.testing.assert_close(weights, again)
        combined = torch.einsum("t,t...->...", weights, of_h)
    model.zero_grad()
    losses, h = model.losses(x, y)
    heads = list(model.heads.parameters())
    of_heads = loop_of_gradients(losses, heads)
    h.backward(combined)
    expected = [*grads(model.trunk.parameters()), *(g.sum(0) for g in of_heads)]
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", [(10, 10, 10), (4, 7, 4)])
@pytest.mark.parametrize("name", [*BALANCES])
def test_task_copies(name, counts, problem):
    """The same gradients, twice added up, as without copies; rows of equal and of different number."""
    model, x, y = problem
    x, y = ([v[t, :n] for t, n in enumerate(counts)] for v in (x, y))

    def losses(h):
        return [F.mse_loss(head(z), t) for head, z, t in zip(model.heads, h, y, strict=True)]

    torch.manual_seed(2)
    balance = balance_of(name, TASKS)
    expected_weights = [
        balance.backward(losses([model.trunk(v) for v in x]), model.trunk.parameters()) for _ in range(2)
    ]
    expected = grads(model.parameters())
    model.zero_grad()
    torch.manual_seed(2)
    balance, copies = balance_of(name, TASKS), multitask.TaskCopies(model.trunk)
    for weights in expected_weights:
        torch.testing.assert_close(balance.backward(losses(copies(x)), copies), weights)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-11)
        assert p.grad.stride() == p.stride()


def test_no_two_parameters_share_a_gradient():
    trunk, a, b = nn.Linear(2, 1), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    copies = multitask.TaskCopies(trunk)
    losses = [(z + (a + b)).sum() for z in copies([torch.ones(1, 2), torch.ones(1, 2)])]
    multitask.MGDA().backward(losses, copies)
    a.grad.mul_(3)
    assert b.grad.item() == 2


def test_task_copies_and_what_they_refuse():
    trunk = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    trunk[0].bias.requires_grad_(False)
    state = copy.deepcopy(trunk.state_dict())
    copies = multitask.TaskCopies(trunk)
    assert len(copies([torch.randn(4, 2), torch.randn(4, 2)])) == 2
    assert sorted(copies.leaves) == ["0.weight", "1.bias", "1.weight"]
    assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())
    with pytest.raises(ValueError, match="shared must be copies for the 3 tasks of task_losses"):
        multitask.MGDA().backward(torch.ones(3, requires_grad=True) * 2, copies)
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got int"):
        multitask.TaskCopies(3)
    with pytest.raises(ValueError, match="module must have parameters that require a gradient, got none"):
        multitask.TaskCopies(nn.Tanh())


def test_a_parameter_beside_the_representation_gets_its_gradient():
    trunk, direct = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    h = trunk(torch.ones(3, 2))
    losses = (h * direct).square().mean(0) + direct * 2
    expected = torch.autograd.grad(losses.sum(), direct, retain_graph=True)[0]
    multitask.PCGrad().backward(losses, representation=h)
    torch.testing.assert_close(direct.grad, expected)
    assert trunk.weight.grad is not None


def test_graddrop_is_the_loop_of_the_paper():
    """Number by number, as in algorithm 1, with the same chance."""
    g = torch.randn(4, 30, dtype=torch.float64)  # so that the loop's order of summation is far below what is asked
    torch.manual_seed(5)
    (mine,), kept = multitask.GradDrop(leak=0.25)._combined([g], torch.ones(4), torch.arange(4))
    torch.manual_seed(5)
    u = torch.rand(30, dtype=torch.float64)
    total, shares = torch.zeros(30).double(), torch.zeros(4).double()
    for p in range(30):
        purity = 0.5 * (1 + g[:, p].sum() / g[:, p].abs().sum())
        for t in range(4):
            mask = float((purity > u[p] and g[t, p] > 0) or (purity < u[p] and g[t, p] < 0))
            total[p] += (0.25 + 0.75 * mask) * g[t, p]
            shares[t] += (0.25 + 0.75 * mask) * g[t, p].abs()
    torch.testing.assert_close(mine, total)
    torch.testing.assert_close(kept, shares / g.abs().sum(1))


class Square(torch.autograd.Function):
    """An operator that torch cannot batch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        # reads a value, which no batched tensor has
        return 2 * x * grad * (1.0 if grad.sum().item() > -math.inf else 0.0)


def test_an_operator_that_cannot_be_batched_runs_task_by_task():
    p = torch.randn(5, requires_grad=True)
    losses = Square.apply(p)[:3] * torch.tensor([1.0, 2, 3])
    (gradients,) = task_gradients(losses, [p])
    expected = torch.zeros(3, 5)
    expected[range(3), range(3)] = 2 * p.detach()[:3] * torch.tensor([1.0, 2, 3])
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", ["equal", "pcgrad", "mgda"])
def test_gradients_add_up_as_with_backward(name, problem):
    model, x, y = problem
    for _ in range(2):
        torch.manual_seed(1)
        balance_of(name, TASKS).backward(model.losses(x, y)[0], model.trunk.parameters())
    twice = grads(model.parameters())
    model.zero_grad()
    torch.manual_seed(1)
    balance_of(name, TASKS).backward(model.losses(x, y)[0], model.trunk.parameters())
    for p, g in zip(model.parameters(), twice, strict=True):
        torch.testing.assert_close(2 * p.grad, g)


def test_without_shared_all_parameters_are_shared_and_lists_are_taken(problem):
    model, x, y = problem
    losses, _ = model.losses(x, y)
    expected = loop_of_gradients(losses, list(model.parameters()))
    weights = multitask.MGDA().backward(list(losses))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, torch.einsum("t,t...->...", weights, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*BALANCES])
def test_every_method_trains(name):
    """Adam on three related regressions: each method brings every loss down."""
    torch.manual_seed(11)
    model = Model()
    x = torch.randn(TASKS, 40, 4, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(4, 1, dtype=torch.float64)) * torch.tensor([1.0, 1.5, 0.7])[:, None, None]
    balance = balance_of(name, TASKS)
    optimizer = torch.optim.Adam([*model.parameters(), *balance.parameters()], lr=1e-2)
    first = model.losses(x, y)[0].detach()
    for _ in range(200):
        optimizer.zero_grad()
        balance.backward(model.losses(x, y)[0], shared=model.trunk.parameters())
        optimizer.step()
    last = model.losses(x, y)[0].detach()
    assert (last < first / 4).all(), (first, last)


@pytest.mark.parametrize("name", [*BALANCES])
def test_state_goes_on_where_it_was(name):
    """Four steps, saved and loaded into a new object, and four more: the weights of eight."""

    def weights(balance, steps, start):
        rows = []
        for step in range(start, start + steps):
            p, losses = entangled(step)
            torch.manual_seed(step)
            rows.append(balance.backward(losses, [p]))
            with torch.no_grad():
                for own in balance.parameters():
                    own -= 0.1 * own.grad
                    own.grad = None
        return torch.stack(rows)

    balance = balance_of(name, TASKS)
    weights(balance, 4, 0)
    state = copy.deepcopy(balance.state_dict())
    assert state or not balance.keeps_tasks
    expected = weights(balance, 4, 4)
    other = balance_of(name, TASKS)
    other.load_state_dict(state)
    assert torch.equal(weights(other, 4, 4), expected)
    if balance.keeps_tasks:
        assert not torch.equal(weights(balance_of(name, TASKS), 4, 4), expected)


@pytest.mark.parametrize("name", [name for name, kind in BALANCES.items() if kind.keeps_tasks])
def test_some_of_the_tasks(name):
    """Losses of tasks 2 and 0 alone: what is kept of task 1 stays, and that of the others is found by their name."""
    balance = balance_of(name, 3)
    for step, tasks in enumerate(([0, 1, 2], [1, 2, 0], [0, 1, 2], [2, 0], [0, 2])):
        p, losses = entangled(step)
        before = copy.deepcopy(balance.state_dict())
        balance.backward(losses[tasks], [p], tasks=tasks)
    # the last two steps were without task 1
    for key, value in balance.state_dict().items():
        if value.dim() and value.shape[-1] == 3:
            torch.testing.assert_close(value[..., 1], before[key][..., 1], rtol=0, atol=0, equal_nan=True, msg=key)
            assert not torch.equal(value, before[key]) or key in ("initial", "lower", "log_variances", "counts")
    with pytest.raises(ValueError, match="tasks must name each task once, got \\[1, 1\\]"):
        balance.backward(torch.ones(2, requires_grad=True), tasks=[1, 1])
    with pytest.raises(ValueError, match=r"tasks must be in 0..2, got 3"):
        balance.backward(torch.ones(2, requires_grad=True), tasks=[1, 3])
    with pytest.raises(ValueError, match="task_losses must be those of all 3 tasks, or tasks must name theirs, got 2"):
        balance.backward(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize("run", TORCHJD["runs"], ids=lambda run: f"T{len(run['losses'][0])}")
@pytest.mark.parametrize("name", ["dwa", "famo", "gls", "stch", "uncertainty"])
def test_torchjd(name, run):
    """The same weights as TorchJD's, step after step."""
    losses = torch.tensor(run["losses"], dtype=torch.float64)
    tasks = losses.shape[1]
    balance = multitask.STCH(mu=0.3) if name == "stch" else balance_of(name, tasks)
    for step, expected in enumerate(run["weights"][name]):
        weights = balance.backward(losses[step].clone().requires_grad_())
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_famo_learns_from_what_it_is_told():
    """`update` after each step is the same as the losses of the next call, where these are the same."""
    losses = torch.rand(5, 3).double() + 0.1
    told, waiting = multitask.FAMO(3), multitask.FAMO(3)
    for before, after in itertools.pairwise(losses):
        a, b = (balance.backward(before.clone().requires_grad_()) for balance in (told, waiting))
        assert torch.equal(a, b)
        told.update(after)
    assert told.logits.abs().max() > 0


def test_gradnorm_is_a_step_on_its_objective():
    """The weights move down the gradient of the paper's loss, and add up to T again."""
    balance, losses = multitask.GradNorm(3, alpha=1.5, lr=0.01), torch.tensor([1.0, 2, 4]).double()
    g = torch.randn(3, 5).double()
    balance(g @ g.T, losses)
    start = balance.task_weights.clone()
    later = losses * torch.tensor([0.5, 0.9, 0.2])
    used = balance(g @ g.T, later)
    assert torch.equal(used, start)
    w = start.clone().requires_grad_()
    norms = (w[:, None] * g).norm(dim=1)
    rate = later / losses
    target = (norms.mean() * (rate / rate.mean()) ** 1.5).detach()
    (slope,) = torch.autograd.grad((norms - target).abs().sum(), w)
    expected = start - 0.01 * slope
    torch.testing.assert_close(balance.task_weights, 3 * expected / expected.sum())


def test_uncertainty_learns_the_variances():
    """With fixed losses the optimum is s = log L."""
    balance = multitask.Uncertainty(2)
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    losses = torch.tensor([0.1, 3.0])
    for _ in range(800):
        optimizer.zero_grad()
        balance.backward(losses.clone().requires_grad_())
        optimizer.step()
    torch.testing.assert_close(balance.log_variances.detach(), losses.log(), atol=1e-2, rtol=0)


def test_dwa_counts_calls_as_epochs():
    """Every two calls an epoch: the ratio of the means of the last two."""
    balance, losses = multitask.DWA(2, every=2), torch.rand(5, 2).double() + 0.1
    for row in losses:
        weights = balance.backward(row.clone().requires_grad_())
    ratio = losses[2:4].mean(0) / losses[:2].mean(0)
    torch.testing.assert_close(weights, 2 * (ratio / 2).softmax(0))


def test_pcgrad_depends_on_torchs_generator():
    gram = torch.tensor([[4.0, -2, -1], [-2, 2, -1], [-1, -1, 3]])

    def draw(seed):
        torch.manual_seed(seed)
        return multitask.PCGrad()(gram)

    assert torch.equal(draw(0), draw(0))
    assert any(not torch.equal(draw(0), draw(seed)) for seed in range(1, 20))


@pytest.mark.parametrize("name", [*BALANCES])
def test_a_loss_that_is_not_finite(name, problem):
    model, x, y = problem
    y[1, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss of task 1 is nan"):
        balance_of(name, TASKS).backward(model.losses(x, y)[0], model.trunk.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", SURGERY)
def test_a_gradient_that_is_not_finite(name):
    """The root's slope at zero; the other task's gradient is zero times that, which is NaN, and no fault of its own."""
    p = torch.tensor([1.0, 0.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="the gradient of task 1 is not finite"):
        balance_of(name, 2).backward(torch.stack([p.sum(), p.sqrt().sum()]), [p])
    assert p.grad is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b, p: b.backward(3), TypeError, "task_losses must be a torch.Tensor, got int"),
        (lambda b, p: b.backward([p, p]), ValueError, "task_losses[0] must be [], got shape [2]"),
        (lambda b, p: b.backward(p.sum()), ValueError, "task_losses must be [T] for one task or more, got shape []"),
        (lambda b, p: b.backward(p.detach()), ValueError, "task_losses must require a gradient"),
        (lambda b, p: b.backward(p * 1, []), ValueError, "shared must hold parameters that require a gradient"),
        (lambda b, p: b.backward(p * 1, chunk=0), ValueError, "chunk must be finite, at least 1, got 0"),
        (lambda b, p: b.backward(p * 1, tasks=[1]), ValueError, "tasks must be 2 ids, one a loss, got [1]"),
        (lambda b, p: b.backward(p * 1, representation=3), TypeError, "representation must be a torch.Tensor, got int"),
        (
            lambda b, p: b.backward(p * 1, representation=p.detach()),
            ValueError,
            "representation must require a gradient, got a tensor without one",
        ),
        (lambda b, p: b(torch.ones(2, 3)), ValueError, "gram must be [T=2, T=2], got shape [2, 3]"),
        (lambda b, p: multitask.CAGrad(c=1.0), ValueError, "c must be finite, at least 0 and below 1, got 1.0"),
        (
            lambda b, p: multitask.AlignedMTL("max"),
            ValueError,
            "scale must be one of 'min', 'median', 'rmse', got 'max'",
        ),
        (lambda b, p: multitask.DWA(0), ValueError, "num_tasks must be finite, at least 1, got 0"),
        (lambda b, p: multitask.STCH(mu=0), ValueError, "mu must be finite, above 0, got 0"),
        (lambda b, p: multitask.GLS().backward(p - 1), ValueError, "task_losses must be above 0, got 0 of task 0"),
        (
            lambda b, p: multitask.FAMO(2, lower=torch.tensor([0.0, 3])).backward(p * 1),
            ValueError,
            "task_losses must be above its lower bound 3, got 1 of task 1",
        ),
        (lambda b, p: multitask.GradDrop()(torch.eye(2)), TypeError, "GradDrop looks at each number"),
        (lambda b, p: balance_of("pc", 2), ValueError, "balance must be one of 'equal', 'uncertainty'"),
        (lambda b, p: balance_of(3, 2), TypeError, "balance must be a name or a mtml_fast.multitask.Balance, got int"),
        (lambda b, p: balance_of(multitask.DWA(3), 2), ValueError, "balance must be one of 2 tasks, got num_tasks=3"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call(multitask.PCGrad(), torch.ones(2, requires_grad=True))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
