"""mtml-fast adapt: a trained run on the user's own tasks, from npz files."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Annotated
from zipfile import BadZipFile

import numpy as np
import torch
import typer

import mtml_fast as mf
from mtml_fast.cli.config import Config, check_option, open_run
from mtml_fast.files import write_atomically


def adapt(
    run: Annotated[Path, typer.Argument(help="Folder that mtml-fast train wrote.")],
    support: Annotated[Path, typer.Option(help="npz with x [T, N, ...] and y; or packed x [R, ...] and offsets.")],
    query: Annotated[Path, typer.Option(help="npz with x, like --support; with y its loss is printed as well.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions.npz and adapted.safetensors.")],
    steps: Annotated[int | None, typer.Option(help="Inner steps; as in evaluation if not given.")] = None,
) -> None:
    """Adapt a run's best weights to your own tasks, and predict their query rows."""
    config, algorithm, _ = open_run(run)
    classes = config.loss == "cross_entropy"
    support_rows, query_rows = (_read(path, config, label) for path, label in ((support, True), (query, False)))
    if support_rows.num_tasks != query_rows.num_tasks:
        tasks = f"{support_rows.num_tasks} tasks of --support"
        raise ValueError(f"--query must hold the {tasks}, got {query_rows.num_tasks} in {query}")
    steps = config.eval_steps if steps is None else steps
    check_option("steps", steps, least=0)
    adapted = algorithm.adapt(support_rows, steps=steps)
    with torch.no_grad():
        outputs = adapted(query_rows).detach()  # [T, Q, C] or [R, C]
        loss = None if query_rows.y is None else adapted.loss(query_rows).mean().item()

    predictions = {"outputs": outputs.numpy()}
    if classes:
        predictions["classes"] = outputs.argmax(-1).numpy()
    if query_rows.is_ragged:
        predictions["offsets"] = query_rows.offsets.numpy()
    out.mkdir(parents=True, exist_ok=True)
    _write_npz(out / "predictions.npz", predictions)
    adapted.save(out / "adapted.safetensors")
    print(f"adapted to {support_rows.num_tasks} tasks in {steps} steps: {out / 'predictions.npz'}, adapted.safetensors")
    if loss is not None:
        print(f"mean query loss {loss:.4f}")
        if classes:
            accuracy = (outputs.argmax(-1) == query_rows.y).float().mean().item()
            print(f"query accuracy {accuracy:.4f} over all rows")


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """numpy.savez, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def _read(path: Path, config: Config, labelled: bool) -> mf.TaskRows:
    """The rows in a file, as the run's model takes them."""
    classes = config.loss == "cross_entropy"
    arrays = _arrays(path)
    for name in ("x", "y") if labelled else ("x",):
        if name not in arrays:
            raise ValueError(f"{path} must hold an array {name!r}, got {', '.join(map(repr, arrays)) or 'nothing'}")
    if unknown := sorted(set(arrays) - {"x", "y", "offsets"}):
        raise ValueError(f"{path} must hold x, y and offsets alone, got {unknown[0]!r}")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name} in {path} must hold numbers, got {array.dtype}")
    for name, meaning in (("y", "classes as integers"), ("offsets", "integers")):
        if (classes or name == "offsets") and name in arrays and arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{name} in {path} must hold {meaning}, got {arrays[name].dtype}")
    x = _float32(path, "x", arrays["x"])
    y = arrays.get("y")
    if y is not None:
        y = torch.from_numpy(y.astype(np.int64)) if classes else _float32(path, "y", y)
    offsets = torch.from_numpy(arrays["offsets"].astype(np.int64)) if "offsets" in arrays else None
    try:
        rows = mf.TaskRows(x, y, offsets)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None
    lead = 1 if rows.is_ragged else 2
    for name, values, shape in (("x", x, [config.inputs]), ("y", y, [] if classes else [1])):
        if values is not None and list(values.shape[lead:]) != shape:
            raise ValueError(f"{name} in {path} must have rows of shape {shape}, got {list(values.shape[lead:])}")
    if classes and y is not None and y.numel() and not 0 <= y.min() <= y.max() < config.ways:
        wrong = y.min() if y.min() < 0 else y.max()
        raise ValueError(f"y in {path} must hold classes in 0 .. {config.ways - 1}, got {wrong}")
    return rows


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            # numpy would also open a single array and a pickle
            if file.read(4) != b"PK\x03\x04":
                raise ValueError
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # what a damaged, an encrypted or an unusually compressed archive raises
    except (ValueError, BadZipFile, EOFError, OSError, AttributeError, KeyError, RuntimeError, zlib.error):
        raise ValueError(f"{path} is not an npz file of arrays") from None


def _float32(path: Path, name: str, array: np.ndarray) -> torch.Tensor:
    # what float32 cannot hold becomes infinite, and is named below
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    for place in np.argwhere(~np.isfinite(values))[:1].tolist():
        raise ValueError(f"{name} in {path} must hold finite numbers, got {array[tuple(place)]} at {place}")
    return torch.from_numpy(values)
