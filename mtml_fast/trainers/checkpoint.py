"""Checkpoints: a whole training state in one checksummed file, the last two kept, the best weights beside them.

step-00001000.safetensors    the last but one
step-00002000.safetensors    the last: all that a resumed run needs is in this one file
best.safetensors             weights of the best validation so far    (copies of what the checkpoint holds,
history.csv, curves.png      one row a log step, and its picture       renewed after it)
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtml_fast.files import load_tensors, save_tensors

__all__ = ["Checkpoints", "differences", "load_best", "pack", "random_state", "set_random_state", "unpack"]

_KEPT = 2
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_UNFINISHED = re.compile(r"\.(step-\d+|best|history|curves|probe)\..*\.tmp")


class Checkpoints:
    """The checkpoints in one folder; made (with its parents) and tried for writing at once.

    Example:
        >>> import tempfile, torch
        >>> checkpoints = Checkpoints(tempfile.mkdtemp())
        >>> checkpoints.save(5, {"w": torch.ones(2), "betas": (0.9, 0.999)}, run={"meta_batch": 32})
        >>> checkpoints.load()
        ({'w': tensor([1., 1.]), 'betas': (0.9, 0.999)}, {'meta_batch': 32})
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        probe = self.folder / f".probe.file.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            # the probe, and what killed processes left half written
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise OSError(error.errno, f"checkpoint folder {folder} cannot be written: {error.strerror}") from None
        if not self.paths() and (self.folder / "history.csv").exists():
            raise FileExistsError(f"checkpoint folder {folder} holds a history.csv but no checkpoint: choose another")

    def paths(self) -> list[Path]:
        """The checkpoints in the folder, oldest step first."""
        steps = {int(match[1]): path for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        return [steps[step] for step in sorted(steps)]

    def save(self, step: int, state: dict, run: dict) -> None:
        """Write a state (tensors in dicts, lists and tuples, beside plain values) and drop all but the last two."""
        tensors, tree = pack(state)
        save_tensors(self.folder / f"step-{step:08d}.safetensors", tensors, {"run": run, "state": tree})
        for path in self.paths()[:-_KEPT]:
            path.unlink()

    def load(self) -> tuple[dict, dict]:
        """`(state, run)` of the newest checkpoint that is whole; a damaged one is set aside with a warning."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                tensors, metadata = load_tensors(path)
            except ValueError as error:
                reason = str(error)
                continue_with = paths.index(path) - 1
                if continue_with < 0:
                    raise ValueError(f"{self.folder} holds no checkpoint that is whole: {reason}") from None
                path.rename(path.with_name(path.name + ".damaged"))
                warnings.warn(f"{reason}; going on from {paths[continue_with].name}", RuntimeWarning, stacklevel=2)
            else:
                return unpack(tensors, metadata["state"]), metadata["run"]
        raise FileNotFoundError(f"{self.folder} holds no checkpoint")


def load_best(algorithm: nn.Module, folder: str | os.PathLike) -> int:
    """Load the weights of `best.safetensors`, or of the newest checkpoint if there is no best; returns their step."""
    best = Path(folder) / "best.safetensors"
    if best.exists():
        tensors, metadata = load_tensors(best)
        algorithm.load_state_dict(unpack(tensors, metadata["state"]))
        return metadata["step"]
    state, _ = Checkpoints(folder).load()
    algorithm.load_state_dict(state["algorithm"])
    return state["step"]


def differences(saved: dict, here: dict) -> list[str]:
    """What differs between two descriptions of a run, one phrase each."""
    phrases = []
    for key in [*here, *(key for key in saved if key not in here)]:
        a, b = saved.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            phrases += [f"{key} {phrase}" for phrase in differences(a, b)]
        elif a != b:
            phrases.append(f"{key} was {_absent(a)}, is {_absent(b)}")
    return phrases


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a tree into its named tensors and a JSON tree that `unpack` joins with them again, types included."""
    tensors: dict[str, Tensor] = {}

    def walk(value, place):
        if isinstance(value, Tensor):
            tensors[place] = value
            return {"tensor": place}
        if isinstance(value, dict):
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"{place} must have str or int keys, got {key!r}")
            return {"dict": [[key, walk(item, f"{place}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{place}.{i}") for i, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if value is not None and type(value) not in (str, int, float, bool):
            raise TypeError(f"{place} must be a tensor or a plain value to be saved, got {type(value).__name__}")
        return value

    return tensors, walk(tree, "")


def unpack(tensors: dict[str, Tensor], tree: Any) -> Any:
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    if isinstance(tree, dict):
        ((kind, value),) = tree.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "tuple":
            return tuple(unpack(tensors, item) for item in value)
        return {key: unpack(tensors, item) for key, item in value}
    return tree


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's streams of random numbers are, on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    # a run that goes on on another device starts that device's stream where it is
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _absent(value: Any) -> str:
    return "absent" if value is None else str(value)
