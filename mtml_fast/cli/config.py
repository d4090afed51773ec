"""Config: the options that make a run, kept as config.json in its folder, and what they build."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import mtml_fast as mf
from mtml_fast.files import write_atomically
from mtml_fast.trainers.checkpoint import load_best
from mtml_fast.trainers.identity import differences

__all__ = ["Config", "check_option", "open_run"]

_LEAST = {
    "seed": 0,
    "shots": 1,
    "query_shots": 1,
    "steps": 1,
    "meta_batch": 1,
    "eval_steps": 0,
    "eval_tasks": 2,
    "ways": 2,
}
_INPUTS = {"sinusoid": 1, "digits": 64, "omniglot": 784}
_KINDS = {
    **{name: (int,) for name in _LEAST if name != "ways"},
    "ways": (int, type(None)),
    "hidden": (list,),
    "lr": (float, int),
    "meta_lr": (float, int),
    "first_order": (bool,),
    "root": (str, type(None)),
}

# what may change between two uses of a run without changing the run
_FREE = ("root", "eval_tasks")


@dataclass(frozen=True)
class Config:
    """One experiment: data, model, algorithm and the outer loop; `ways` and `root` only where the data have them."""

    experiment: str
    seed: int
    shots: int
    query_shots: int
    hidden: list[int]
    norm: str | None
    steps: int
    lr: float
    first_order: bool
    meta_lr: float
    meta_batch: int
    eval_steps: int
    eval_tasks: int
    ways: int | None = None
    root: str | None = None

    def __post_init__(self):
        if self.experiment not in _INPUTS:
            raise ValueError(f"experiment must be one of {', '.join(_INPUTS)}, got {self.experiment!r}")
        for name, kinds in _KINDS.items():
            # bool is an int in Python
            value = getattr(self, name)
            if type(value) not in kinds:
                expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        if not self.hidden or not all(type(width) is int and width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be a list of widths, got {self.hidden!r}")
        if self.norm not in ("batch", None):
            raise ValueError(f"norm must be 'batch' or null, got {self.norm!r}")
        if (self.ways is None) != (self.experiment == "sinusoid"):
            raise ValueError(f"ways must be given but for sinusoid, got {self.ways} for {self.experiment}")
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_option(name, getattr(self, name), least)
        for name in ("lr", "meta_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_option(name)} must be a finite number above 0, got {getattr(self, name)}")

    def tasks(self, split: str, **changes: int) -> Any:
        """The data set of one split; `changes`: other shots or query_shots."""
        episodes = {"shots": self.shots, "query_shots": self.query_shots, "seed": self.seed, **changes}
        if self.experiment == "sinusoid":
            return mf.data.Sinusoid(**episodes)
        if self.experiment == "digits":
            return mf.data.Digits(split, ways=self.ways, **episodes)
        return mf.data.Omniglot(self.root, split, ways=self.ways, **episodes)

    @property
    def inputs(self) -> int:
        return _INPUTS[self.experiment]

    @property
    def loss(self) -> str:
        return "mse" if self.experiment == "sinusoid" else "cross_entropy"

    def algorithm(self) -> torch.nn.Module:
        """The untrained algorithm; needs no data, and the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = mf.nn.mlp(self.inputs, self.hidden, self.ways or 1, norm=self.norm)
        return mf.MAML(model, lr=self.lr, steps=self.steps, loss=self.loss, first_order=self.first_order)

    def check_folder(self, folder: Path) -> None:
        """Refuse a folder whose config.json is of another run."""
        path = folder / "config.json"
        if not path.exists():
            return
        saved, here = asdict(_load(path)), asdict(self)
        for name in _FREE:
            del saved[name], here[name]
        if differing := differences(saved, here):
            raise ValueError(f"--out {folder} holds another run: {'; '.join(differing)}")

    def save(self, folder: Path) -> None:
        """Write config.json."""
        write_atomically(folder / "config.json", json.dumps(asdict(self), indent=2).encode())


def open_run(folder: Path, root: Path | None = None) -> tuple[Config, torch.nn.Module, int]:
    """A run's config, its algorithm with the best weights, and the meta-step that they are from."""
    config = _load(folder / "config.json")
    if root is not None:
        config = replace(config, root=str(root))
    algorithm = config.algorithm()
    return config, algorithm, load_best(algorithm, folder)


def check_option(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least:
        raise ValueError(f"{_option(name)} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{_option(name)} must be at most {most}, got {value}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _load(path: Path) -> Config:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is not a run of mtml-fast train: it holds no config.json")
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"it must hold an object, got {type(values).__name__}")
        known = {field.name for field in fields(Config)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown entry {unknown[0]!r}")
        return Config(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
