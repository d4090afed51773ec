"""mlp_adapt on random configurations, held against its reference in float64.

    python -m mtml_fast.testing.random_mlp --count 20000        # 15 minutes; a failure prints its seed
    python -m mtml_fast.testing.random_mlp --seed 123           # that configuration again, alone

A seed is a configuration: sizes, every option, the layout of every tensor, who is differentiated, which results have
cotangents, by which route (kept state, recomputed, the mean loss with its gradient, the registered operator), in which
form of the weights and on how many threads. Inputs are float32 numbers, so that both dtypes get the same ones. Of each:

float64   The error of every result and gradient is at most 1e-11 of the tensor's largest element, or, ill-conditioned,
          2^-24 of the error of eager PyTorch in float32, whose rounding is 2^29 times coarser.
          Where an inner loop runs away, eager's error in float32 is as large as the values and says no more about
          the conditioning. Beyond this limit, the reference in float64 is given inputs and cotangents one rounding of
          float64 off, and the error is at most twice what that changes at most ("chaotic"). Elsewhere this would be
          1e-15 of the largest element: it excuses nothing that is well-conditioned.
float32   The error is at most twice that of eager PyTorch, the reference in float32, plus 8 units in the last place of
          the tensor's largest element. How exact eager was on the inputs at hand is a matter of luck, and so is it of
          the kernels. Beyond this limit, eager is given inputs one rounding off and its largest error counts
          ("rounded"); beyond that, but within four times as much, both are, and their averages count ("averaged").
          Where the activation has a kink, units that lie nearer to it than float32 resolves may come out on the other
          side. Then the float64 reference gets such units, and no others, put on either side at random: the error may
          exceed the above by what that changes at most ("kinks").
          A form of the weights that was forced upon a call, where the plan has another, adds up what it should not:
          there it may be 32 times eager's error, and the call has to pass again as planned ("forced").
          Where one rounding of the inputs to float32 mostly changes a tensor of the float64 reference by more than a
          tenth of its largest element, a float32 result means nothing, and any may be a thousand times worse than the
          next: there the median of the kernels' errors over such inputs is at most twice what these change at most
          ("chaotic"). The kernels' code for float64 is the same, and has to pass as above.
          Where eager overflows, nothing is asked of float32 ("overflown").
bits      Other numbers of threads, a task without the others, and the others of a task with a NaN or an infinity: each
          configuration has one of the three, and must give the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import torch
from torch import Tensor

from mtml_fast.ops import backend, mlp_adapt
from mtml_fast.ops.heads.reference import ACTIVATIONS
from mtml_fast.ops.heads_loss.reference import LOSSES
from mtml_fast.ops.mlp_adapt import mlp_adapt_mean
from mtml_fast.testing.arguments import map_tensors, offset, rounded, tensors_in, transposed

FORMS = ("", "dense", "gram", "gram_cross", "factored")
ROUTES = ("all", "recompute", "mean", "operator")
# activations whose first or second derivative jumps
KINKED = ("relu", "leaky_relu", "elu")
# float64: of the largest element, or of eager's error in float32
EXACT, OF_FLOAT32 = 1e-11, 2.0**-24
# float32: beside twice eager's error; and how many times both by bad luck, or in a form that was forced
SLACK_ULPS, LUCK, FORCED = 8, 4, 16
# draws of inputs one rounding off, and of units on either side of a kink
ROUNDINGS, AVERAGED, SIDES = 8, 24, 16
# what a rounding of the inputs changes where float32 results mean nothing, of the largest element
CHAOTIC = 0.1
# multiplications of the largest configurations
MOST_WORK = 4e8


@dataclass
class Configuration:
    """One call of mlp_adapt, and what is asked of it."""

    seed: int
    call: dict  # keyword arguments, in float32
    route: str
    form: str
    threads: int
    differentiated: list[str]  # among params, lr, support_x, query_x
    answered: list[int]  # which floating results have cotangents

    def __str__(self) -> str:
        options = {
            k: v for k, v in self.call.items() if not tensors_in(v) and v not in (None, False) and k != "adapted"
        }
        shapes = {k: [list(t.shape) for t in tensors_in(v)] for k, v in self.call.items() if tensors_in(v)}
        how = f"route {self.route}, form {self.form or 'planned'}, {self.threads} threads"
        return f"seed {self.seed}: {how}, gradients of {self.differentiated}, {options}, shapes {shapes}"


@dataclass
class Found:
    """What the checks saw, over many configurations."""

    count: int = 0
    counts: Counter = field(default_factory=Counter)
    # result -> (worst, seed): errors as parts of the allowed one, and in float64 of the largest element
    worst: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)

    def note(self, kind: str, name: str, value: float, seed: int) -> None:
        table = self.worst.setdefault(kind, {})
        table[name] = max(table.get(name, (0.0, seed)), (value, seed))

    def __str__(self) -> str:
        lines = [f"{self.count} configurations: " + ", ".join(f"{v} {k}" for k, v in sorted(self.counts.items()))]
        names = sorted({name for table in self.worst.values() for name in table})
        lines.append(f"{'worst':<16}" + "".join(f"{kind:>34}" for kind in self.worst))
        for name in names:
            cells = [f"{v:.3g} (seed {s})" for v, s in (t.get(name, (0.0, 0)) for t in self.worst.values())]
            lines.append(f"{name:<16}" + "".join(f"{cell:>34}" for cell in cells))
        return "\n".join(lines)


# ---- drawing


def draw(seed: int) -> Configuration:
    """The configuration of a seed."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    size = lambda low, high: int(math.exp(r.uniform(math.log(low), math.log(high + 1))))  # noqa: E731

    depth, steps = r.choices(range(6), (3, 4, 4, 2, 2, 1))[0], r.choice((0, 1, 1, 2, 2, 3, 4, 5, 7, 10))
    sizes = dict(tasks=size(1, 64), support=size(1, 80), query=size(1, 80))
    widths = [size(1, 300) for _ in range(depth + 2)]
    _shrink(sizes, widths, steps, most=math.exp(r.uniform(math.log(1e4), math.log(MOST_WORK))))

    call = _options(r, steps)
    bias, norm = call["bias"], call["norm"]
    shapes = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        # the last layer has no norm
        shapes += [(outputs, inputs), *[(outputs,)] * (bias + 2 * (norm and i < depth))]
    own = r.choice(([], [], [], range(len(shapes)), [i for i in range(len(shapes)) if r.random() < 0.5]))
    per_layer = 1 + bias + 2 * norm
    call["params"] = []
    for i, shape in enumerate(shapes):
        values = normal(*((sizes["tasks"],) if i in own else ()), *shape)
        is_gain = norm and i % per_layer == 1 + bias and i < depth * per_layer
        call["params"].append(values / shape[1] ** 0.5 if len(shape) == 2 else values * 0.3 + is_gain)
    call["lr"] = _rates(r, normal, shapes, depth + 1, steps, _gentle_rate(r, call, sizes["support"], widths))
    # mostly all, ANIL, BOIL, or what comes
    moves = [[True] * len(shapes)] * 6
    moves += [[i >= depth * per_layer for i in range(len(shapes))], [i < depth * per_layer for i in range(len(shapes))]]
    moves += [[r.random() < p for _ in shapes] for p in (0.05, 0.3, 0.7)]
    call["adapted"] = r.choice(moves)
    _draw_rows(r, generator, call, sizes, widths)

    route = r.choice(ROUTES)
    if route != "mean":
        call["return_parameters"] = r.random() < 0.2
        if r.random() < 0.05:
            del call["query_y"]
    layouts = (lambda t: t, lambda t: t, lambda t: t, transposed, offset)
    call = map_tensors(call, lambda t: r.choice(layouts)(t))

    able = [name for name in ("params", "lr", "support_x", "query_x") if tensors_in(call[name])]
    differentiated = r.choice((["params"], able, [name for name in able if r.random() < 0.6] or ["query_x"]))
    answered = list(range(3 if route == "mean" else 2 + len(shapes) * call["return_parameters"]))
    if route == "mean":
        answered = r.choice(([2], [2], answered, [0, 2], [1]))
    elif "query_y" in call:
        answered = r.choice(([1], answered, [i for i in answered if r.random() < 0.5] or [0]))
    form = r.choice(FORMS) if r.random() < 0.6 else ""
    return Configuration(seed, call, route, form, r.choice((1, 1, 2, 3)), differentiated, answered)


def _options(r: random.Random, steps: int) -> dict:
    """Numbers that float32 holds exactly, so that both dtypes get the same."""
    chance = lambda p: r.random() < p  # noqa: E731
    call = dict(loss=r.choice(LOSSES), activation=r.choice(tuple(ACTIVATIONS)))
    call |= dict(bias=chance(0.8), norm=chance(0.3), steps=steps)
    if call["norm"]:
        call["norm_eps"] = r.choice((2.0**-17, 2.0**-10, 2.0**-7))
    if chance(0.2):
        call["momentum"] = r.choice((0.25, 0.5, 0.875))
    if chance(0.2):
        call["weight_decay"] = r.choice((2.0**-10, 0.0625))
    if chance(0.2):
        call["clip"] = 2.0 ** r.randint(-6, 4)
    return call | dict(first_order=chance(0.2), every_step=chance(0.2))


def _draw_rows(r: random.Random, generator: torch.Generator, call: dict, sizes: dict, widths: list[int]) -> None:
    """Support and query rows, rectangular or packed, with labels of the classes that their tasks have."""
    tasks, outputs, loss = sizes["tasks"], widths[-1], call["loss"]
    classes = torch.full((tasks,), outputs)
    if r.random() < 0.2:
        mask = torch.rand(tasks, outputs, generator=generator) < r.random()
        mask[:, r.randrange(outputs)] = True
        call["class_mask"] = mask
        classes = mask.sum(1)
    for name in ("support", "query"):
        rows = sizes[name]
        counts, lead = torch.full((tasks,), rows), (tasks, rows)
        if r.random() < 0.25:
            counts = torch.randint(1, rows + 1, (tasks,), generator=generator)
            call[f"{name}_offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            lead = (int(counts.sum()),)
        call[f"{name}_x"] = torch.randn(*lead, widths[0], generator=generator)
        if loss == "cross_entropy":
            # the n-th of the classes that a row's task has
            task = torch.arange(tasks).repeat_interleave(counts)
            y = (torch.rand(task.shape, generator=generator) * classes[task]).long()
            if "class_mask" in call:
                y = call["class_mask"].int().sort(dim=1, descending=True, stable=True).indices[task, y]
            call[f"{name}_y"] = y.view(lead)
        else:
            number = torch.rand if loss == "bce" else torch.randn
            call[f"{name}_y"] = number(*lead, outputs, generator=generator)


def _shrink(sizes: dict[str, int], widths: list[int], steps: int, most: float) -> None:
    """Halve what is largest until the work fits."""
    while True:
        weights = sum(i * o for i, o in itertools.pairwise(widths))
        if sizes["tasks"] * (11 * steps * sizes["support"] + 3 * sizes["query"]) * weights <= most:
            return
        name, largest = max(sizes.items(), key=lambda item: item[1])
        if largest >= max(widths):
            sizes[name] = (largest + 1) // 2
        else:
            widths[widths.index(max(widths))] = (max(widths) + 1) // 2


def _gentle_rate(r: random.Random, call: dict, shots: int, widths: list[int]) -> float:
    """A rate at which the inner loop moves far, but does not run away: what then comes out is no kernel's doing."""
    rate = math.exp(r.uniform(math.log(0.01), math.log(0.5))) / (1 + max(widths) / (8 * shots**0.5))
    return rate * (0.3 if call["loss"] == "mse" else 1.0) * (0.3 if call["norm"] else 1.0)


def _rates(r: random.Random, normal, shapes: list[tuple], layers: int, steps: int, base: float):
    """In one of the forms that lr may have."""
    rate = lambda *shape: base * (0.2 + normal(*shape).abs())  # noqa: E731
    rows = r.choice((1, max(steps, 1), max(steps, 1) + 2))
    kind = r.choice(("number", "scalar", "step", "layer", "parameter", "element", "mixed"))
    if kind == "number":
        return rate().item()
    if kind in ("scalar", "step"):
        return rate() if kind == "scalar" else rate(rows)
    if kind in ("layer", "parameter"):
        return rate(rows, layers if kind == "layer" else len(shapes))
    lead = [(rows,) if kind == "element" else r.choice(((), (1,), (max(steps, 1),))) for _ in shapes]
    return [rate(*own, *shape) for own, shape in zip(lead, shapes, strict=True)]


# ---- checking


def check(seed: int, found: Found | None = None) -> Found:
    """Check the configuration of a seed; an AssertionError names it."""
    found = Found() if found is None else found
    c = draw(seed)
    failures: list[str] = []
    same_bits = random.Random(seed + 1).choice((_check_threads, _check_poison, _check_alone))
    with _environment(c):
        exact_call = map_tensors(c.call, lambda t: t.double() if t.is_floating_point() else t)
        with backend("reference"):
            exact = _run(c, exact_call)
            eager = _errors(_run(c, c.call), exact)
        _check_float64(c, exact_call, exact, eager, found, failures)
        mine = _check_float32(c, exact_call, exact, eager, found, failures)
        same_bits(c, mine, failures)
    found.count += 1
    assert not failures, "\n".join([str(c), *failures])
    return found


def _check_float64(c: Configuration, call: dict, exact: dict, eager: dict, found: Found, failures: list[str]) -> None:
    errors = _errors(_run(c, call), exact)
    scales = {name: _largest(value) for name, value in exact.items()}
    for name, error in errors.items():
        if error <= EXACT * scales[name]:
            found.note("float64 error", _kind(name), error / scales[name] if error else 0.0, c.seed)
    beyond = [name for name in errors if not errors[name] <= EXACT * scales[name]]
    if beyond:
        found.counts["ill-conditioned"] += 1
        for name in beyond:
            found.note("float64 error / eager float32's", _kind(name), errors[name] / (eager[name] or math.inf), c.seed)
        noise = 64 * torch.finfo(torch.float64).eps * _largest_gradient(exact)
        coarse = {name: error if error < math.inf else 0.0 for name, error in eager.items()}
        beyond = [name for name in beyond if not errors[name] <= max(OF_FLOAT32 * coarse[name], noise)]
    if beyond:
        found.counts["chaotic"] += 1
        moved = _moved(c, call, exact, torch.finfo(torch.float64).eps)
        beyond = [name for name in beyond if not errors[name] <= 2 * max(moved[name])]
    for name in beyond:
        failures.append(
            f"float64 {name}: error {errors[name]:.2e}, eager's in float32 {eager[name]:.2e}, largest element "
            f"{scales[name]:.2e}"
        )


def _check_float32(c: Configuration, exact_call: dict, exact: dict, eager: dict, found: Found, failures: list[str]):
    mine = _run(c, c.call)
    errors, scales = _errors(mine, exact), _scales(exact, eager)
    ulp, eagers = torch.finfo(torch.float32).eps, [eager]

    def allowed(name: str) -> float:
        return 2 * max(e[name] for e in eagers) + SLACK_ULPS * ulp * scales[name]

    if math.inf in eager.values():
        found.counts["overflown"] += 1
        return mine

    for name, error in errors.items():
        if error <= allowed(name):
            found.note("float32 error / allowed", _kind(name), error / allowed(name) if error else 0.0, c.seed)
    beyond = [name for name in errors if not errors[name] <= allowed(name)]
    if beyond:
        found.counts["rounded"] += 1
        with backend("reference"):
            eagers += [_errors(_run(c, c.call, off=ulp), exact) for _ in range(ROUNDINGS)]
        beyond = [name for name in beyond if not errors[name] <= allowed(name)]
    if beyond and c.call["activation"] in KINKED:
        found.counts["kinks"] += 1
        for i in range(SIDES):
            with backend("reference"), _either_side(c.call["activation"], 2.0 ** (5 + i // 4) * ulp, c.seed + i):
                moved = _errors(_run(c, exact_call), exact)
            beyond = [name for name in beyond if not errors[name] <= allowed(name) + moved[name]]
    if beyond:
        found.counts["averaged"] += 1
        mine_off, eager_off = _errors_off(c)
        beyond = [
            name
            for name in beyond
            if not fmean(mine_off[name]) <= 2 * fmean(eager_off[name]) + SLACK_ULPS * ulp * scales[name]
            or not errors[name] <= LUCK * allowed(name)
        ]
    if beyond:
        moved = _moved(c, exact_call, exact, ulp)
        chaotic = [name for name in beyond if median(moved[name]) > CHAOTIC * _largest(exact[name])]
        found.counts["chaotic"] += bool(chaotic)
        passed = [name for name in chaotic if median(mine_off[name]) <= 2 * max(moved[name])]
        beyond = [name for name in beyond if name not in passed]
    if beyond and c.form:
        found.counts["forced"] += 1
        beyond = [name for name in beyond if not errors[name] <= FORCED * allowed(name)]
        with _environment(planned := replace(c, form="")):
            _check_float32(planned, exact_call, exact, eager, found, failures)
    for name in beyond:
        failures.append(
            f"float32 {name}: error {errors[name]:.3e}, eager's {max(e[name] for e in eagers):.3e}, allowed "
            f"{allowed(name):.3e}, largest element {scales[name]:.3e}"
        )
    return mine


def _errors_off(c: Configuration) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The kernels' and eager's errors over inputs one rounding off, each against the exact results of these inputs."""
    mine, eager = [], []
    for _ in range(AVERAGED):
        call = rounded(c.call, torch.finfo(torch.float32).eps)
        with backend("reference"):
            exact = _run(c, map_tensors(call, lambda t: t.double() if t.is_floating_point() else t))
            eager.append(_errors(_run(c, call), exact))
        mine.append(_errors(_run(c, call), exact))
    return tuple({name: [e[name] for e in errors] for name in errors[0]} for errors in (mine, eager))


def _moved(c: Configuration, call: dict, exact: dict, off: float) -> dict[str, list[float]]:
    """How far the reference in float64 moves where its inputs are that much off: several draws."""
    with backend("reference"):
        draws = [_errors(_run(c, call, off=off), exact) for _ in range(AVERAGED)]
    # an overflow is no measure
    return {name: [d[name] if d[name] < math.inf else 0.0 for d in draws] for name in exact}


def _check_threads(c: Configuration, mine: dict, failures: list[str]) -> None:
    torch.set_num_threads(c.threads % 3 + 1)
    for name, value in _run(c, c.call).items():
        _same_bits(name, [(value, mine[name])], f"{c.threads % 3 + 1} threads", failures)


def _check_poison(c: Configuration, mine: dict, failures: list[str]) -> None:
    """A NaN or an infinity somewhere in one task's own inputs."""
    tasks = _tasks(c.call)
    r = random.Random(c.seed)
    bad, value = r.randrange(tasks), r.choice((math.nan, math.inf, -math.inf))
    call = dict(c.call)
    owned = [n for n in ("support_x", "query_x", "support_y", "query_y") if n in call and call[n].is_floating_point()]
    name = r.choice(owned)
    spoilt = call[name].clone(memory_format=torch.contiguous_format)
    part = _parts(spoilt, call.get(f"{name.split('_')[0]}_offsets"))[bad]
    part.view(-1)[r.randrange(part.numel())] = value
    call[name] = spoilt
    together, spoilt = _by_task(c, c.call, mine), _by_task(c, call, _run(c, call))
    for name, parts in together.items():
        others = [(a, b) for t, (a, b) in enumerate(zip(spoilt[name], parts, strict=True)) if t != bad]
        _same_bits(name, others, f"{value} in task {bad}", failures)


def _check_alone(c: Configuration, mine: dict, failures: list[str]) -> None:
    """The task's own results do not depend on the others'; the gradients here are those of its own inputs."""
    tasks = _tasks(c.call)
    t = random.Random(c.seed).randrange(tasks)
    call = dict(c.call)
    if c.route == "mean" and 2 in c.answered:
        # the mean's cotangent is shared out among the tasks
        return
    for name in ("support", "query"):
        offsets = call.get(f"{name}_offsets")
        for key in (f"{name}_x", f"{name}_y"):
            if key in call:
                part = _parts(call[key], offsets)[t]
                call[key] = part if offsets is not None else part[None]
        if offsets is not None:
            call[f"{name}_offsets"] = torch.tensor([0, int(offsets[t + 1] - offsets[t])])
    if "class_mask" in call:
        call["class_mask"] = call["class_mask"][t : t + 1]
    per_task = _has_task_axis(c)
    call["params"] = [p[t : t + 1] if own else p for p, own in zip(call["params"], per_task, strict=True)]
    together = _by_task(c, c.call, mine)
    for name, (part,) in _by_task(c, call, _run(c, call, of_task=t)).items():
        _same_bits(name, [(part, together[name][t])], f"task {t} alone", failures)


# ---- running


def _run(c: Configuration, call: dict, of_task: int | None = None, off: float = 0.0) -> dict[str, Tensor]:
    """All results and gradients by their names.

    of_task: with this task's share of the cotangents; off: inputs and cotangents that much off, at random.
    """
    # as they lie in memory: only what must be is another tensor
    call = map_tensors(rounded(call, off) if off else call, lambda t: t.detach())
    leaves = {}
    for name in c.differentiated:
        if isinstance(call[name], list):
            call[name] = [t.detach().requires_grad_() for t in call[name]]
            leaves |= {f"d {name}[{i}]": t for i, t in enumerate(call[name])}
        else:
            call[name] = call[name].detach().requires_grad_()
            leaves[f"d {name}"] = call[name]
    if c.route == "mean":
        result = mlp_adapt_mean(**{k: v for k, v in call.items() if k != "return_parameters"})
        results = dict(zip(("outputs", "losses", "mean_loss"), result, strict=True))
    else:
        result = mlp_adapt(**call, store="recompute" if c.route == "recompute" else "all")
        results = dict(outputs=result.outputs, losses=result.losses)
        results |= {f"parameters[{i}]": p for i, p in enumerate(result.parameters or ())}

    generator = torch.Generator().manual_seed(c.seed)
    pairs = []
    for i, (name, value) in enumerate(results.items()):
        cotangent = _cotangent(c, name, value, generator, of_task)
        if i in c.answered and value.requires_grad:
            if name == "outputs":
                # classes that a task has not come out as -inf
                cotangent = torch.where(value.detach().isneginf(), 0.0, cotangent)
            cotangent = cotangent.to(value.dtype)
            pairs.append((value, rounded(cotangent, off) if off else cotangent))
    named = {name: value.detach() for name, value in results.items()}
    if not pairs:
        return named | {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    values, cotangents = zip(*pairs, strict=True)
    inputs = list(leaves.values())
    gradients = torch.autograd.grad(values, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return named | dict(zip(leaves, gradients, strict=True))


def _cotangent(c: Configuration, name: str, value: Tensor, generator: torch.Generator, of_task: int | None) -> Tensor:
    """Random; the mean loss is mostly differentiated alone, by 1."""
    if name == "mean_loss" and c.seed % 2:
        return torch.ones(())
    if of_task is None or name == "mean_loss":
        return torch.randn(value.shape, generator=generator)
    # drawn for all tasks, as if they were here
    axis = int(c.call["every_step"]) if name in ("outputs", "losses") else 0
    offsets = c.call.get("query_offsets") if name == "outputs" else None
    shape = list(value.shape)
    shape[axis] = _tasks(c.call) if offsets is None else int(offsets[-1])
    drawn = torch.randn(shape, generator=generator)
    begin, end = (of_task, of_task + 1) if offsets is None else offsets[of_task : of_task + 2].tolist()
    return drawn.narrow(axis, begin, end - begin)


@contextlib.contextmanager
def _environment(c: Configuration) -> Iterator[None]:
    threads, form = torch.get_num_threads(), os.environ.get("MTML_FAST_FORM")
    os.environ["MTML_FAST_FORM"] = c.form
    torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    try:
        with backend("operator" if c.route == "operator" else "auto"):
            yield
    finally:
        torch.set_num_threads(threads)
        del os.environ["MTML_FAST_FORM"]
        if form is not None:
            os.environ["MTML_FAST_FORM"] = form


@contextlib.contextmanager
def _either_side(name: str, near: float, seed: int) -> Iterator[None]:
    """Units of the reference that are nearer to the kink than that part of the largest: on either side, at random."""
    plain, generator = ACTIVATIONS[name], torch.Generator().manual_seed(seed)

    def either(z: Tensor) -> Tensor:
        value = z.detach()
        flip = (value.abs() < near * value.abs().amax()) & (torch.rand(z.shape, generator=generator) < 0.5)
        return plain(z + torch.where(flip, -2 * value, 0.0))

    ACTIVATIONS[name] = either
    try:
        yield
    finally:
        ACTIVATIONS[name] = plain


# ---- comparing


def _errors(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each; infinite where it is finite in other places, or of another shape."""
    assert mine.keys() == exact.keys()
    errors = {}
    for name, right in exact.items():
        value = mine[name].double()
        finite = right.isfinite()
        if value.shape != right.shape or not torch.equal(value.isfinite(), finite):
            errors[name] = math.inf
            continue
        errors[name] = _largest((value - right)[finite])
    return errors


def _scales(exact: dict[str, Tensor], eager: dict[str, float]) -> dict[str, float]:
    """The largest element of each. Where that is but eager's rounding (the gradient of a bias in front of a norm is a
    sum that cancels), the terms were larger: that of all gradients.
    """
    scales = {name: _largest(value) for name, value in exact.items()}
    largest = _largest_gradient(exact)
    return {name: largest if name.startswith("d ") and 4 * eager[name] >= s else s for name, s in scales.items()}


def _largest_gradient(exact: dict[str, Tensor]) -> float:
    return max((_largest(value) for name, value in exact.items() if name.startswith("d ")), default=0.0)


def _largest(x: Tensor) -> float:
    """Of the finite ones."""
    x = x[x.isfinite()]
    return x.abs().max().item() if x.numel() else 0.0


def _same_bits(name: str, pairs: list[tuple[Tensor, Tensor]], what: str, failures: list[str]) -> None:
    for a, b in pairs:
        if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)):
            failures.append(f"float32 {name}: other bits with {what}, by {_largest(a - b):.1e}")
            return


def _by_task(c: Configuration, call: dict, named: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Of each result or gradient that has tasks, one tensor a task."""
    own, step_axis = _has_task_axis(c), int(c.call["every_step"])
    parts = {}
    for name, value in named.items():
        if name == "outputs":
            parts[name] = _parts(value, call.get("query_offsets"), step_axis)
        elif name == "losses":
            parts[name] = _parts(value, None, step_axis)
        elif name in ("d support_x", "d query_x"):
            parts[name] = _parts(value, call.get(name[2:-2] + "_offsets"))
        elif name.startswith("parameters") or (name.startswith("d params") and own[int(name[9:-1])]):
            parts[name] = _parts(value, None)
    return parts


def _parts(rows: Tensor, offsets: Tensor | None, axis: int = 0) -> list[Tensor]:
    """Views of each task's part."""
    return list(rows.unbind(axis) if offsets is None else rows.split(offsets.diff().tolist(), axis))


def _has_task_axis(c: Configuration) -> list[bool]:
    per_layer = 1 + c.call["bias"] + 2 * c.call["norm"]
    return [p.dim() > (1 if i % per_layer else 2) for i, p in enumerate(c.call["params"])]


def _tasks(call: dict) -> int:
    offsets = call.get("support_offsets")
    return call["support_x"].shape[0] if offsets is None else offsets.numel() - 1


def _kind(name: str) -> str:
    return name.split("[")[0]


# ---- the command


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mtml_fast.testing.random_mlp", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, help="configurations (1 with --seed, else 1000)")
    parser.add_argument("--seed", type=int, help="of the first; fresh by default")
    parser.add_argument("--isa", help="baseline, avx2, avx512 or neon: the instruction set to check")
    options = parser.parse_args()
    if options.isa and os.environ.get("MTML_FAST_ISA") != options.isa:
        # it is chosen when the library is loaded, which is behind us
        os.environ["MTML_FAST_ISA"] = options.isa
        return subprocess.call([sys.executable, "-m", "mtml_fast.testing.random_mlp", *sys.argv[1:]])
    first = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    count = options.count or (1000 if options.seed is None else 1)
    if count == 1:
        print(draw(first))
    found, failures, start = Found(), 0, time.monotonic()
    for seed in range(first, first + count):
        try:
            check(seed, found)
        except Exception as error:
            failures += 1
            print(f"\rFAILED {type(error).__name__} {error}\n  again: --seed {seed}", flush=True)
        done = seed - first + 1
        if sys.stderr.isatty() or done % 1000 == 0:
            seconds = time.monotonic() - start
            print(f"\r{done}/{count}, {seconds:.0f} s, failures {failures}", end="", file=sys.stderr, flush=True)
    print(f"\rseeds {first}..{first + count - 1}, {time.monotonic() - start:.0f} s\n{found}\nfailures = {failures}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
