"""mtml-fast train: one subcommand an experiment."""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import mtml_fast as mf
from mtml_fast.cli import report
from mtml_fast.cli.config import Config, check_option
from mtml_fast.cli.presets import PRESETS
from mtml_fast.files import write_atomically
from mtml_fast.trainers.checkpoint import random_state, set_random_state
from mtml_fast.trainers.evaluation import VALIDATION_STEP
from mtml_fast.trainers.trainer import Trainer

app = typer.Typer(
    help="Meta-train a model; without a name: sinusoid.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Example: mtml-fast train --preset maml-omniglot-mlp-5w1s --root data --seed 1",
)

# what `--threads auto` means at most: a meta-step of the sinusoid takes 0.2 ms, which a second thread does not shorten;
# one on Omniglot's 784-256-128-64-64-5 takes 2.6 ms (1 shot) or 14 ms (5 shots), and 1.7 or 7.8 on two
_AUTO_THREADS = {"sinusoid": 1, "digits": 1, "omniglot": 8}

Iterations = Annotated[int, typer.Option(help="Meta-steps in all; a run that was stopped goes on to them.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so many minutes; give again to go on.")]
Out = Annotated[Path, typer.Option(help="Folder of the run: checkpoints, history, curves.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights and of all tasks.")]
Shots = Annotated[int, typer.Option(help="Support rows of a task (of a class, where there are classes).")]
QueryShots = Annotated[int | None, typer.Option(help="Query rows, as many as --shots if not given.")]
Ways = Annotated[int, typer.Option(help="Classes of a task.")]
Steps = Annotated[int, typer.Option(help="Inner steps in training.")]
EvalSteps = Annotated[int, typer.Option(help="Inner steps in validation and test.")]
EvalTasks = Annotated[int, typer.Option(help="Test tasks.")]
Rate = Annotated[float, typer.Option(help="Inner learning rate.")]
MetaRate = Annotated[float, typer.Option(help="Outer learning rate, of Adam.")]
MetaBatch = Annotated[int, typer.Option(help="Tasks a meta-step.")]
FirstOrder = Annotated[bool, typer.Option("--first-order", help="FOMAML: leave the second derivatives out.")]
Threads = Annotated[str, typer.Option(help="Threads of the CPU: a number, or auto for what was measured to be best.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1, ...")]
Norm = Annotated[Literal["batch", "none"], typer.Option(help="Batch norm after every hidden layer, or none.")]


@app.callback()
def preset(
    preset: Annotated[
        str | None,
        typer.Option(help=f"A published experiment: {', '.join(PRESETS)}. All options of its command may follow."),
    ] = None,
) -> None:
    # `main` has put the preset's command and options in its place
    pass


@app.command(epilog="Example: mtml-fast train sinusoid --minutes 2 --out runs/sinusoid")
def sinusoid(
    iterations: Iterations = 70_000,
    minutes: Minutes = None,
    out: Out = Path("runs/sinusoid"),
    shots: Shots = 10,
    query_shots: QueryShots = None,
    steps: Steps = 1,
    lr: Rate = 0.01,
    first_order: FirstOrder = False,
    meta_lr: MetaRate = 1e-3,
    meta_batch: MetaBatch = 25,
    eval_tasks: EvalTasks = 1000,
    seed: Seed = 0,
    threads: Threads = "auto",
    device: Device = "cpu",
) -> None:
    """MAML's regression of sine waves: an MLP 1-40-40-1, a table beside the paper's, a picture, a speed."""
    config = Config(
        "sinusoid",
        seed=seed,
        shots=shots,
        query_shots=shots if query_shots is None else query_shots,
        hidden=[40, 40],
        norm=None,
        steps=steps,
        lr=lr,
        first_order=first_order,
        meta_lr=meta_lr,
        meta_batch=meta_batch,
        eval_steps=steps,
        eval_tasks=eval_tasks,
    )
    _run(config, iterations, minutes, out, threads, device)


@app.command(epilog="Example: mtml-fast train omniglot --root data --ways 5 --shots 1 --out runs/omniglot")
def omniglot(
    root: Annotated[Path, typer.Option(help="Folder of images_background.zip and images_evaluation.zip.")],
    model: Annotated[Literal["mlp"], typer.Option(help="mlp: MAML's no-conv network, 256-128-64-64.")] = "mlp",
    iterations: Iterations = 60_000,
    minutes: Minutes = None,
    out: Out = Path("runs/omniglot"),
    ways: Ways = 5,
    shots: Shots = 1,
    query_shots: QueryShots = None,
    norm: Norm = "batch",
    steps: Steps = 1,
    lr: Rate = 0.4,
    first_order: FirstOrder = False,
    meta_lr: MetaRate = 1e-3,
    meta_batch: MetaBatch = 32,
    eval_steps: EvalSteps = 3,
    eval_tasks: EvalTasks = 1000,
    seed: Seed = 0,
    threads: Threads = "auto",
    device: Device = "cpu",
) -> None:
    """Few-shot classification of handwritten characters, MAML's protocol."""
    config = Config(
        "omniglot",
        root=str(root),
        seed=seed,
        ways=ways,
        shots=shots,
        query_shots=shots if query_shots is None else query_shots,
        hidden=[256, 128, 64, 64],
        norm=None if norm == "none" else norm,
        steps=steps,
        lr=lr,
        first_order=first_order,
        meta_lr=meta_lr,
        meta_batch=meta_batch,
        eval_steps=eval_steps,
        eval_tasks=eval_tasks,
    )
    _run(config, iterations, minutes, out, threads, device)


@app.command(epilog="Example: mtml-fast train digits --ways 3 --shots 1")
def digits(
    iterations: Iterations = 500,
    minutes: Minutes = None,
    out: Out = Path("runs/digits"),
    ways: Ways = 3,
    shots: Shots = 1,
    query_shots: QueryShots = 5,
    norm: Norm = "batch",
    steps: Steps = 1,
    lr: Rate = 0.4,
    first_order: FirstOrder = False,
    meta_lr: MetaRate = 1e-3,
    meta_batch: MetaBatch = 32,
    eval_steps: EvalSteps = 3,
    eval_tasks: EvalTasks = 1000,
    seed: Seed = 0,
    threads: Threads = "auto",
    device: Device = "cpu",
) -> None:
    """The same on scikit-learn's bundled 8x8 digits: small, nothing to download."""
    config = Config(
        "digits",
        seed=seed,
        ways=ways,
        shots=shots,
        query_shots=shots if query_shots is None else query_shots,
        hidden=[64, 64],
        norm=None if norm == "none" else norm,
        steps=steps,
        lr=lr,
        first_order=first_order,
        meta_lr=meta_lr,
        meta_batch=meta_batch,
        eval_steps=eval_steps,
        eval_tasks=eval_tasks,
    )
    _run(config, iterations, minutes, out, threads, device)


def _run(config: Config, iterations: int, minutes: float | None, out: Path, threads: str, device: str) -> None:
    """Train, measure, keep what came out as result.json, and print the key figure last."""
    # beyond lie the steps that evaluation draws from
    check_option("iterations", iterations, least=1, most=VALIDATION_STEP - 1)
    torch.set_num_threads(_threads(threads, config.experiment))
    trainer = _train(config, iterations, minutes, out, device)
    start = time.perf_counter()
    line, figures = report.evaluation(out)
    result = {
        "settings": asdict(config),
        "iterations": trainer.step,
        "figures": figures,
        "training_seconds": round(trainer.seconds, 4),
        "evaluation_seconds": round(time.perf_counter() - start, 2),
        "threads": torch.get_num_threads(),
        "device": device,
        "versions": {"mtml_fast": mf.__version__, "torch": torch.__version__},
    }
    write_atomically(out / "result.json", json.dumps(result, indent=2).encode())
    if config.experiment == "sinusoid":
        report.sinusoid_extras(out)
    print(f"\n{line}")


def _threads(value: str, experiment: str) -> int:
    most = os.cpu_count() or 1
    if value == "auto":
        return min(_AUTO_THREADS[experiment], most)
    if not value.removeprefix("-").isdecimal():
        raise ValueError(f"--threads must be auto or a number, got {value!r}")
    check_option("threads", int(value), least=1, most=most)
    return int(value)


def _train(config: Config, iterations: int, minutes: float | None, out: Path, device: str) -> Trainer:
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {minutes:g}")
    tasks = config.tasks("train")
    validation = None if config.experiment == "sinusoid" else config.tasks("validation")
    algorithm = config.algorithm().to(_device(device))
    config.check_folder(out)
    trainer = Trainer(
        algorithm,
        tasks,
        meta_lr=config.meta_lr,
        meta_batch=config.meta_batch,
        validation=validation,
        validation_steps=config.eval_steps,
        # four digits are learned by heart in no time
        validate_every=50 if config.experiment == "digits" else 1000,
        checkpoint=out,
    )
    config.save(out)
    left = iterations - trainer.step
    if left > 0:
        rate = _steps_per_second(algorithm, tasks, config.meta_batch)
        done = f" from step {trainer.step:,} on" if trainer.step else ""
        cap = f", capped at {minutes:g} min" if minutes is not None else " (--minutes caps it)"
        print(f"{iterations:,} meta-steps{done}, about {_duration(left / rate)} at {rate:,.0f} a second{cap}: {out}")
    trainer.fit(iterations, minutes)
    if trainer.step < iterations:
        print(f"stopped at step {trainer.step:,} of {iterations:,}; the same command goes on")
    return trainer


def _steps_per_second(algorithm: torch.nn.Module, tasks: Any, meta_batch: int, seconds: float = 0.5) -> float:
    """Measured on a copy, after one step that warms up."""
    algorithm = copy.deepcopy(algorithm)
    device = next(algorithm.parameters()).device
    random = random_state(device)
    steps, start = -1, 0.0
    while steps < 1 or time.perf_counter() - start < seconds:
        loss = algorithm(tasks.sample(meta_batch, step=max(steps, 0)).to(device)).loss
        loss.backward()
        loss.item()
        if steps == -1:
            start = time.perf_counter()
        steps += 1
    set_random_state(random, device)
    return steps / (time.perf_counter() - start)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        # reads a number back, which the device "meta" cannot
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device that torch can use here, got {name!r}: {error}") from None
    return device


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
