"""mtml-fast bench: a user's own size, beside plain PyTorch in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from mtml_fast.cli import meta_step
from mtml_fast.cli.config import check_option
from mtml_fast.cli.meta_step import MetaStep
from mtml_fast.cli.timing import Provider, allowed_error, largest_error, limit_to_isa, measure, peak, quantile
from mtml_fast.ops import OPERATORS
from mtml_fast.ops.heads_loss.reference import LOSSES

_PROVIDERS: dict[str, Callable] = {
    "mf.MAML": meta_step.maml,
    "mlp_adapt": meta_step.operator,
    "torch.func": meta_step.torch_func,
    "bmm": meta_step.bmm,
}


def bench(
    widths: Annotated[str, typer.Option(help="D,H,...,C of the MLP; two widths are a linear head.")] = "784,256,5",
    tasks: Annotated[int, typer.Option(help="T, the tasks of a meta-step.")] = 32,
    support: Annotated[int, typer.Option(help="N, the support rows of a task.")] = 5,
    query: Annotated[int, typer.Option(help="Q, the query rows of a task.")] = 15,
    steps: Annotated[int, typer.Option(help="K, the inner steps.")] = 5,
    loss: Annotated[str, typer.Option(help=f"{', '.join(LOSSES)}.")] = "cross_entropy",
    norm: Annotated[bool, typer.Option("--norm", help="Batch norm after every hidden layer.")] = False,
    first_order: Annotated[bool, typer.Option("--first-order", help="FOMAML in the place of MAML.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of all providers.")] = 1,
    seconds: Annotated[float, typer.Option(help="At least so long for each provider.")] = 1.0,
) -> None:
    """Time a meta-step of your own size, ours and plain PyTorch's taking turns, after a check against float64."""
    sizes = _widths(widths)
    for name, value, least in (
        ("tasks", tasks, 1),
        ("support", support, 1),
        ("query", query, 1),
        ("steps", steps, 0),
        ("threads", threads, 1),
    ):
        check_option(name, value, least)
    if loss not in LOSSES:
        raise ValueError(f"--loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be a finite number above 0, got {seconds}")

    limit_to_isa()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = MetaStep.random(
            sizes, tasks, support, query, loss=loss, norm=norm, lr=0.01, steps=steps, first_order=first_order
        )
        _print_table(step, seconds, threads)
    finally:
        torch.set_num_threads(before)


def _print_table(step: MetaStep, seconds: float, threads: int) -> None:
    providers = {name: Provider(make(step)) for name, make in _PROVIDERS.items()}
    exact = meta_step.exact(step)
    errors = {name: largest_error(provider.results(), exact) for name, provider in providers.items()}
    allowed = allowed_error(errors["torch.func"])
    for name, error in errors.items():
        # a NaN is not below anything
        if not error <= allowed:
            raise RuntimeError(f"{name} is off by {error:.1e} from float64; nothing is timed")
    reached = peak(threads)
    floor = 1e3 * meta_step.operations(step) / reached
    medians = {name: quantile(times, 0.5) for name, times in measure(providers, seconds, threads).items()}

    clock = "thread CPU time" if threads == 1 else "wall time"
    served = OPERATORS["mlp_adapt"].served_by("cpu")
    print(f"{threads} thread(s), {clock}, torch {torch.__version__}, mlp_adapt {served}")
    print(f"floor {floor:.3f} ms: {1e-9 * meta_step.operations(step):.3g} GFLOP at {reached / 1e9:.0f} GFLOP/s")
    print(f"{'':12}{'ms':>10}{'factor':>9}{'of floor':>10}{'error':>10}")
    for name, ms in medians.items():
        factor = ms / medians["mf.MAML"]
        print(f"{name:12}{ms:10.3f}{factor:8.2f}x{100 * floor / ms:8.0f} %{errors[name]:10.1e}")


def _widths(text: str) -> list[int]:
    try:
        sizes = [int(width) for width in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"--widths must be two or more positive integers with commas between, got {text!r}")
    return sizes
