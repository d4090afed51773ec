"""What a run ends with: tables beside the published figures, adapted curves, the speed beside torch.func."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import mtml_fast as mf
from mtml_fast.cli.config import Config, open_run
from mtml_fast.trainers.evaluation import Evaluation, evaluate
from mtml_fast.trainers.report import new_figure, save_figure, table

__all__ = ["evaluation", "sinusoid_extras"]

# Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017: Table 2, mean squared error of 5-shot regression
# after so many steps, of a model trained with 10 shots and one step
SINUSOID_5_SHOTS = {1: 0.67, 5: 0.38, 10: 0.35}
# the same, Table 1, "MAML, no conv": accuracy by (ways, shots)
OMNIGLOT_MLP = {(5, 1): "0.897 +- 0.011", (5, 5): "0.975 +- 0.006"}

_STEPS = (0, 1, 5, 10)
# a target's mean square is at most 12.5; at a rate of 0.01 about one task in a thousand explodes within ten steps, and
# one of them would be the whole mean
_DIVERGED = 100.0
_SPEED_SECONDS = 4.0


def evaluation(
    folder: Path,
    split: str = "test",
    num_tasks: int | None = None,
    steps: int | None = None,
    root: Path | None = None,
) -> tuple[str, list[dict]]:
    """Measure a run's best weights and print them beside the published figures, where there are some.

    Returns the line of the key figure, and every figure: split, metric, shots, steps, tasks (those left out not
    counted), mean, ci95.
    """
    config, algorithm, step = open_run(folder, root)
    if config.experiment == "sinusoid" and split != "test":
        raise ValueError(f"--split must be test for a sinusoid run, whose tasks are always new ones, got {split}")
    num_tasks = config.eval_tasks if num_tasks is None else num_tasks
    if config.experiment == "sinusoid":
        columns = sorted({*_STEPS, config.steps}) if steps is None else [steps]
        text, line, figures = _sinusoid_table(config, algorithm, step, num_tasks, columns)
        print(text)
        return line, figures
    steps = config.eval_steps if steps is None else steps
    result = replace(evaluate(algorithm, config.tasks(split), num_tasks, steps=steps), split=split)
    rows = [
        [f"this run: {steps} inner steps, weights of iteration {step:,}", f"{result.mean:.3f} +- {result.ci95:.3f}"]
    ]
    if config.experiment == "omniglot" and (config.ways, config.shots) in OMNIGLOT_MLP:
        rows.append(["published: MAML, no conv, 60,000 iterations", OMNIGLOT_MLP[config.ways, config.shots]])
    rows.append(["chance", _without_interval(1 / config.ways, 3)])
    head = [f"{config.experiment}, {config.ways}-way {config.shots}-shot", f"{split} accuracy"]
    print(f"\n{table(head, rows)}")
    return str(result), [_figure(result, config.shots, steps)]


def _figure(result: Evaluation, shots: int, steps: int) -> dict:
    about = {"split": result.split, "metric": result.metric, "shots": shots, "steps": steps}
    return {**about, "tasks": result.n, "mean": result.mean, "ci95": result.ci95}


def sinusoid_extras(folder: Path) -> None:
    """Draw adapted curves of a trained sinusoid run and print its speed."""
    config, algorithm, _ = open_run(folder)
    picture = folder / "adapted.png"
    draw_adapted(config, algorithm, picture)
    ours, theirs = speed(config, algorithm)
    print(
        f"speed: {ours:,.0f} meta-steps a second, {ours / theirs:.2f} times the {theirs:,.0f} of the same loop in "
        f"eager torch.func (same run, interleaved)"
    )
    print(f"pictures: {picture}, {folder / 'curves.png'}")


def _sinusoid_table(
    config: Config, algorithm: nn.Module, step: int, num_tasks: int, steps: Sequence[int]
) -> tuple[str, str, list[dict]]:
    """The table, the line of its key figure (5 shots after as many steps as in training), and all figures."""
    rows, diverged, figures = [], [], []
    key = config.steps if config.steps in steps else steps[0]
    line = ""
    for shots in (5, 10):
        tasks = config.tasks("test", shots=shots, query_shots=100)
        results = [evaluate(algorithm, tasks, num_tasks, steps=k, metric="loss") for k in steps]
        stable = [replace(r.where(r.values < _DIVERGED), metric="MSE", split="test") for r in results]
        rows.append([f"{shots} shots", *(f"{result.mean:.2f} +- {result.ci95:.2f}" for result in stable)])
        for k, kept in zip(steps, stable, strict=True):
            figures.append(_figure(kept, shots, k))
            if kept.n < num_tasks:
                diverged.append(f"{num_tasks - kept.n} of {num_tasks} with {shots} shots after {_steps(k)}")
            if (shots, k) == (5, key):
                line = str(replace(kept, metric=f"MSE of 5 shots after {_steps(k)}"))
        if shots == 5:
            published = [_without_interval(SINUSOID_5_SHOTS[k], 2) if k in SINUSOID_5_SHOTS else "" for k in steps]
            rows.append(["5 shots, published: MAML, 70,000 iterations", *published])
    head = ["sinusoid, test MSE", *map(_steps, steps)]
    note = f"{num_tasks} test tasks, weights of iteration {step:,}, 95 % intervals"
    if diverged:
        note += f"\ndiverged (MSE above {_DIVERGED:g}) and left out: {'; '.join(diverged)}"
    return f"\n{table(head, rows)}\n\n{note}", line, figures


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _without_interval(value: float, digits: int) -> str:
    # in line with the figures that have one
    return f"{value:.{digits}f}" + " " * len(f" +- {0:.{digits}f}")


def draw_adapted(config: Config, algorithm: nn.Module, path: Path, num_tasks: int = 3) -> None:
    """Draw test tasks: the true curve, the support points, the model before and after 1, 5 and 10 steps."""
    tasks = config.tasks("test", shots=5)
    step = 2**40 + 2
    support = tasks.sample(num_tasks, step).support
    amplitude, phase = tasks.parameters(num_tasks, step)
    device = next(algorithm.parameters()).device
    x = torch.linspace(-5, 5, 201)
    rows = mf.TaskRows(x.expand(num_tasks, -1)[..., None].contiguous()).to(device)
    curves = {}
    for steps in _STEPS:
        with torch.no_grad():
            outputs = algorithm.adapt(support.to(device), steps=steps)(rows)
        curves[steps] = outputs[..., 0].detach().cpu()  # [T, 201]

    figure = new_figure(width=3.4 * num_tasks, height=3.3)
    styles = {0: ("#b0b0b0", ":"), 1: ("#9ecae1", "-"), 5: ("#4292c6", "-"), 10: ("#08519c", "-")}
    panels = figure.subplots(1, num_tasks, sharey=True, squeeze=False)[0]
    for t, axes in enumerate(panels):
        axes.plot(x, amplitude[t] * torch.sin(x - phase[t]), color="#d62728", linewidth=1.8, label="true curve")
        for steps, (colour, line) in styles.items():
            label = "before" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
            axes.plot(x, curves[steps][t], color=colour, linestyle=line, linewidth=1.5, label=label)
        axes.plot(*support.task(t), "o", color="black", markersize=5, label="support", zorder=5)
        axes.set_xlabel("x")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    save_figure(figure, path)


def speed(config: Config, algorithm: nn.Module) -> tuple[float, float]:
    """Meta-steps a second of the trained loop and of the same loop in eager torch.func, in alternating blocks."""
    tasks = config.tasks("train")
    ours = copy.deepcopy(algorithm)
    model = copy.deepcopy(algorithm.model)
    loops = [
        _loop(ours, lambda batch: ours(batch).loss, config, tasks),
        _loop(model, lambda batch: _functional_loss(model, batch, config), config, tasks),
    ]
    rates: list[list[float]] = [[], []]
    for loop in loops:
        loop(3)
    stop = time.perf_counter() + _SPEED_SECONDS
    while not rates[0] or time.perf_counter() < stop:
        for loop, measured in zip(loops, rates, strict=True):
            start = time.perf_counter()
            loop(20)
            measured.append(20 / (time.perf_counter() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])


def _loop(module: nn.Module, loss_of: Callable[[Any], Tensor], config: Config, tasks: Any) -> Callable[[int], None]:
    optimizer = torch.optim.Adam(module.parameters(), config.meta_lr)
    device = next(module.parameters()).device

    def run(steps: int) -> None:
        for step in range(steps):
            loss = loss_of(tasks.sample(config.meta_batch, step).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # waits for a device that runs behind
        loss.item()

    return run


def _functional_loss(model: nn.Module, batch: mf.TaskBatch, config: Config) -> Tensor:
    """MAML's loss as it is usually written with torch.func: all tasks by vmap, inner gradients by grad."""
    parameters = dict(model.named_parameters())

    def task_loss(values, x, y):
        return F.mse_loss(functional_call(model, values, (x,)), y)

    def adapted_loss(x, y, query_x, query_y):
        values = parameters
        for _ in range(config.steps):
            gradients = grad(task_loss)(values, x, y)
            if config.first_order:
                gradients = {name: gradient.detach() for name, gradient in gradients.items()}
            values = {name: value - config.lr * gradients[name] for name, value in values.items()}
        return task_loss(values, query_x, query_y)

    return vmap(adapted_loss)(batch.support.x, batch.support.y, batch.query.x, batch.query.y).mean()
