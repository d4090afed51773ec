"""Writes torchjd_results.json: what TorchJD 0.18 makes of seeded matrices, for the tests to compare with.

TorchJD is no dependency of the tests, because its solvers ask for cvxpy, ecos, quadprog and qpsolvers. To write the
file anew: `pip install "torchjd[full]==0.18.0"` and `python tests/multitask/make_torchjd_results.py`.
"""

import itertools
import json
from pathlib import Path

import torch


def main() -> None:
    from torchjd import aggregation, scalarization
    from torchjd._linalg._dual_cone import QuadprogProjector

    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(2026)
    matrices, runs = [], []
    for tasks, numbers in ((2, 3), (3, 5), (4, 4), (6, 9), (9, 12)):
        g = torch.randn(tasks, numbers, generator=generator)
        # so that they conflict
        g = ((g - 0.7 * g.mean(0)) * torch.rand(tasks, 1, generator=generator).add(0.2)).mul(1e4).round().div(1e4)
        gram = g @ g.T
        orders = torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])
        exact = aggregation.UPGrad(projector=QuadprogProjector(reg_eps=1e-11))
        results = {
            "mgda": aggregation.MGDA(epsilon=1e-15, max_iters=20_000),
            "imtl_g": aggregation.IMTLG(),
            "upgrad": exact,
            **{f"cagrad {c}": aggregation.CAGrad(c=c) for c in (0.2, 0.5, 0.9)},
            **{f"aligned_mtl {s}": aggregation.AlignedMTL(scale_mode=s) for s in ("min", "median", "rmse")},
        }
        weights = {name: method.gramian_weighting(gram).tolist() for name, method in results.items()}
        weights["pcgrad"] = with_orders(orders.tolist(), lambda gram=gram: aggregation.PCGrad().gramian_weighting(gram))
        vaccine = aggregation.GradVac()
        # TorchJD leaves a task out of its own order
        others = [[j if j < i else j - 1 for j in order if j != i] for i, order in enumerate(orders.tolist())]
        for name in ("gradvac", "gradvac again"):
            weights[name] = with_orders(others, lambda v=vaccine, gram=gram: v.gramian_weighting(gram))
        matrices.append({"gradients": g.tolist(), "orders": orders.tolist(), "weights": weights})
    for tasks in (2, 4):
        losses = torch.rand(6, tasks, generator=generator).add(0.1).mul(1e4).round().div(1e4)
        methods = {
            "dwa": scalarization.DWA(),
            "famo": scalarization.FAMO(tasks),
            "gls": scalarization.GeometricMean(),
            "stch": scalarization.STCH(mu=0.3),
            "uncertainty": scalarization.UW(tasks),
        }
        weights = {name: [] for name in methods}
        for row, after in itertools.pairwise(losses):
            for name, method in methods.items():
                leaf = row.clone().requires_grad_()
                method(leaf).backward()
                weights[name].append(leaf.grad.tolist())
                if name == "dwa":
                    method.step()
                if name == "famo":
                    method.update(after)
        runs.append({"losses": losses.tolist(), "weights": weights})
    made_by = "TorchJD 0.18.0, tests/multitask/make_torchjd_results.py"
    results = {"made_by": made_by, "matrices": matrices, "runs": runs}
    (Path(__file__).parent / "torchjd_results.json").write_text(json.dumps(results, indent=1) + "\n")


def with_orders(orders: list[list[int]], function) -> list[float]:
    """The function's result where torch.randperm gives these permutations, one after the other."""
    left, randperm = iter(orders), torch.randperm
    torch.randperm = lambda size: torch.tensor(next(left))
    try:
        return function().tolist()
    finally:
        torch.randperm = randperm


if __name__ == "__main__":
    main()
