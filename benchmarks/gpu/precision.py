"""What rounded factors cost in exactness: python -m benchmarks.gpu.precision [--device cuda]

Largest errors, as parts of a tensor's largest element, against float64: in float32, and where the factors of matrix
products are rounded to TF32 or to bfloat16 (docs/maths/precision.md says how to ask). On a CPU, which has no such
products, factors are rounded as a GPU rounds them, and products are float32's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mtml_fast.ops import backend, heads, mlp_adapt
from mtml_fast.ops._route import TorchDispatchMode
from mtml_fast.ops.mlp_adapt import _arguments, factored

# how to ask torch, and ours
ASKED = {"float32": "highest", "TF32": "high", "bfloat16": "medium"}
# bits of a factor behind the leading one
BITS = {"highest": 23, "high": 10, "medium": 7}


class Rounded(TorchDispatchMode):
    """Factors of float32 products rounded to the nearest number of so many bits, in the middle to the even one."""

    def __init__(self, bits: int):
        super().__init__()
        self.drop = 23 - bits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if self.drop and name in ("mm", "bmm", "addmm", "baddbmm"):
            first = 1 if name in ("addmm", "baddbmm") else 0
            args = (*args[:first], *map(self.round, args[first : first + 2]), *args[first + 2 :])
        return function(*args, **(kwargs or {}))

    def round(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        bits = bits + ((1 << self.drop - 1) - 1 + (bits >> self.drop & 1))
        return (bits >> self.drop << self.drop).view(torch.float32)


def table(device: str) -> list[tuple]:
    """Rows: of what, the result, and its errors in the order of ASKED."""
    rows = []
    works = {"heads, 8 tasks of 256 rows, 512-10": _heads}
    for name, steps in (("relu", 1), ("relu", 5), ("relu", 10), ("tanh", 5)):
        works[f"mlp_adapt, 784-1024-1024-10, {name}, N=5, K={steps}"] = functools.partial(_wide, name, steps)
    for name, work in works.items():
        exact = work(device, torch.float64)
        errors = []
        for asked in ASKED.values():
            with _products(device, asked):
                mine = work(device, torch.float32)
            errors.append({key: _error(mine[key], value) for key, value in exact.items()})
        rows += [(name, key, *(e[key] for e in errors)) for key in exact]
    return rows


@contextlib.contextmanager
def products_in(asked: str) -> Iterator[None]:
    """What a user asks of torch's products of float32 numbers, and of ours: "highest", "high" or "medium"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _products(device: str, asked: str) -> Iterator[None]:
    if device == "cpu":
        with Rounded(BITS[asked]):
            yield
        return
    with products_in(asked):
        yield


def _error(mine: Tensor, exact: Tensor) -> float:
    return float((mine.double() - exact).abs().max() / exact.abs().max())


def _drawer(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    # the same float32 numbers everywhere
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def _heads(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = _drawer(device, dtype)
    x, weight, q = draw(8 * 256, 512), draw(8 * 10, 512) / 512**0.5, draw(8 * 256 * 10)
    offsets = torch.arange(9, device=device) * 256
    x.requires_grad_()
    weight.requires_grad_()
    # the kernels of a CPU make no products that could be rounded
    with backend("reference" if device == "cpu" else "auto"):
        z = heads(x, offsets, weight)
        dx, dw = torch.autograd.grad(z, [x, weight], q)
    return {"outputs": z.detach(), "gradient of x": dx, "gradient of the weights": dw}


def _wide(activation: str, steps: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    draw, widths, tasks = _drawer(device, dtype), (784, 1024, 1024, 10), 4
    params = []
    for inputs, outputs in itertools.pairwise(widths):
        params += [draw(outputs, inputs) * (2 / inputs) ** 0.5, draw(outputs) * 0.1]
    params = [p.requires_grad_() for p in params]
    y = torch.arange(5, device=device).expand(tasks, 5)
    call = params, draw(tasks, 5, 784), y, draw(tasks, 5, 784), y
    options = dict(lr=0.02, steps=steps, activation=activation)
    if device == "cpu":
        outputs, losses, _ = factored.adapt(*_arguments(*call, **options)[0])
    else:
        outputs, losses, _ = mlp_adapt(*call, **options)
    gradient = torch.autograd.grad(losses.mean(), params)
    return {"outputs": outputs.detach(), "meta-gradient": torch.cat([g.flatten() for g in gradient])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.precision")
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    print(f"| {'rounded as on a GPU' if device == 'cpu' else device} | | {' | '.join(ASKED)} |")
    print("|---|---|" + "---|" * len(ASKED))
    for name, key, *errors in table(device):
        print(f"| {name} | {key} | {' | '.join(f'{e:.1e}' for e in errors)} |", flush=True)


if __name__ == "__main__":
    main()
