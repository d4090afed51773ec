"""Checkpoints: a whole training state in one checksummed file, the last two kept, the best weights beside them.

step-00001000.safetensors    the last but one
step-00002000.safetensors    the last: all that a resumed run needs is in this one file
best.safetensors             weights of the best validation so far    (copies of what the checkpoint holds,
history.csv, curves.png      one row a log step, and its picture       renewed after it)

Reading writes nothing. Whoever writes owns the folder meanwhile, see `Checkpoints.owned`.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtml_fast.files import load_tensors, save_tensors
from mtml_fast.trainers.identity import differences

__all__ = ["Checkpoints", "check_state", "load_best", "pack", "random_state", "set_random_state", "unpack"]

_KEPT = 2
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_UNFINISHED = re.compile(r"\.(step-\d+|best|history|curves|probe)\..*\.tmp")

# what a trainer saves
_STATE = {
    "step": (int,),
    "seconds": (float, int),
    "algorithm": (dict,),
    "optimizer": (dict,),
    "scheduler": (dict, type(None)),
    "random": (dict,),
    "monitor": (str, type(None)),
    "best": (dict, type(None)),
    "without_better": (int,),
    "history": (list,),
    "losses": (list,),
    "accuracies": (list,),
}


class Checkpoints:
    """The checkpoints in one folder, which need not exist yet.

    Example:
        >>> import tempfile, torch
        >>> checkpoints = Checkpoints(tempfile.mkdtemp())
        >>> with checkpoints.owned():
        ...     checkpoints.save(5, {"w": torch.ones(2), "betas": (0.9, 0.999)}, run={"meta_batch": 32})
        >>> checkpoints.load()
        {'w': tensor([1., 1.]), 'betas': (0.9, 0.999)}
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._owned = False

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folder, try that it can be written, and keep other trainers out of it inside the block.

        The lock is the kernel's and on the folder itself: it ends with the process, however that ends, and leaves no
        file behind. Where there are no such locks (Windows, some network file systems) nobody is kept out.

        Raises:
            OSError: naming the folder and what is wrong with it; BlockingIOError where another trainer uses it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        with _locked(self.folder):
            self._prepare()
            self._owned = True
            try:
                yield
            finally:
                self._owned = False

    def paths(self) -> list[Path]:
        """The checkpoints in the folder, oldest step first."""
        if not self.folder.is_dir():
            return []
        steps = {int(match[1]): path for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        return [steps[step] for step in sorted(steps)]

    def save(self, step: int, state: dict, run: dict) -> None:
        """Write a state (tensors in dicts, lists and tuples, beside plain values) and drop all but the last two."""
        tensors, tree = pack(state)
        save_tensors(self.folder / f"step-{step:08d}.safetensors", tensors, {"run": run, "state": tree})
        for path in self.paths()[:-_KEPT]:
            path.unlink()

    def load(self, run: dict | None = None, use: Callable[[dict], None] | None = None) -> dict:
        """The state in the newest checkpoint that can be used, with a warning for each that cannot.

        Args:
            run: refuse checkpoints of a run of another description than this one.
            use: called with the state; where it raises ValueError, the state cannot be used.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: none can be used, naming what is wrong with the newest; or it is another run's, naming what
                differs.
        """
        paths, unusable = self.paths(), []
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        for path in reversed(paths):
            try:
                state, saved_run = _read(path)
                if run is not None:
                    self._require_same(saved_run, run)
                if use is not None:
                    use(state)
            except _AnotherRunError as error:
                raise ValueError(str(error)) from None
            except ValueError as error:
                unusable.append((path, _naming(path, error)))
                continue
            for bad, reason in unusable:
                # out of the way of what comes: only the run's own trainer may
                if self._owned:
                    bad.rename(bad.with_name(bad.name + ".damaged"))
                warnings.warn(f"{reason}; going on from {path.name}", RuntimeWarning, stacklevel=2)
            return state
        raise ValueError(f"{self.folder} holds no checkpoint that is whole: {unusable[0][1]}")

    def _require_same(self, saved: dict, here: dict) -> None:
        if differing := differences(saved, here):
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _AnotherRunError(
                f"checkpoint folder {self.folder} holds another run: {'; '.join(differing[:3])}{more}"
            )

    def _prepare(self) -> None:
        probe = self.folder / f".probe.file.{os.getpid()}.tmp"
        try:
            probe.touch()
            # the probe, and what killed processes left half written
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise self._unwritable(error) from None
        if not self.paths() and (self.folder / "history.csv").exists():
            raise FileExistsError(
                f"checkpoint folder {self.folder} holds a history.csv but no checkpoint: choose another"
            )

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(error.errno, f"checkpoint folder {self.folder} cannot be written: {error.strerror}")


class _AnotherRunError(ValueError):
    """The checkpoint is sound, but not of this run: an older one would not be either."""


def load_best(algorithm: nn.Module, folder: str | os.PathLike) -> int:
    """Load the weights of `best.safetensors`, or of the newest checkpoint if there is no best; returns their step.

    Writes nothing.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: naming the file that is damaged, is something else, or holds weights of another algorithm.
    """
    best = Path(folder) / "best.safetensors"
    if not best.exists():
        state = Checkpoints(folder).load(use=lambda state: check_state(state, algorithm))
        algorithm.load_state_dict(state["algorithm"])
        return state["step"]
    try:
        tensors, metadata = load_tensors(best)
        if not isinstance(metadata, dict) or type(metadata.get("step")) is not int or "state" not in metadata:
            raise ValueError("it does not hold the best weights of a run")
        weights = _unpacked(tensors, metadata["state"])
        _check_weights(algorithm, weights)
    except ValueError as error:
        raise ValueError(_naming(best, error)) from None
    algorithm.load_state_dict(weights)
    return metadata["step"]


def check_state(state: dict, algorithm: nn.Module) -> None:
    """ValueError naming what makes `state` none that a trainer of `algorithm` has saved."""
    for name, kinds in _STATE.items():
        if name not in state:
            raise ValueError(f"it lacks {name!r}")
        if type(state[name]) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"its {name} must be {expected}, got {type(state[name]).__name__}")
    _check_weights(algorithm, state["algorithm"])
    best = state["best"]
    if best is not None:
        if type(best.get("step")) is not int or type(best.get("value")) is not float:
            raise ValueError("its best must have a step and a value")
        _check_weights(algorithm, best.get("weights"))
    stream = state["random"].get("cpu")
    if not isinstance(stream, Tensor) or (stream.shape, stream.dtype) != _like(torch.get_rng_state()):
        raise ValueError("its random holds no state of torch's random numbers")


def _check_weights(algorithm: nn.Module, weights: Any) -> None:
    """ValueError naming what makes `weights` no state of `algorithm`."""
    if not isinstance(weights, dict):
        raise ValueError(f"its weights must be a dict, got {type(weights).__name__}")
    own = algorithm.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            raise ValueError(f"its weights {'lack' if name in own else 'have an unknown'} {name!r}")
        here, there = own[name], weights[name]
        if isinstance(here, Tensor) != isinstance(there, Tensor):
            raise ValueError(f"its {name} must be a {type(here).__name__}, got {type(there).__name__}")
        if isinstance(here, Tensor) and _like(here) != _like(there):
            raise ValueError(
                f"its {name} must be {list(here.shape)} {here.dtype}, got {list(there.shape)} {there.dtype}"
            )


def _like(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OSError(error.errno, f"checkpoint folder {folder} cannot be read: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"checkpoint folder {folder} is in use by another trainer: choose another") from None
        except OSError:
            # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict, dict]:
    """`(state, run)` of one checkpoint, on its surface: what `Checkpoints.save` wrote."""
    tensors, metadata = load_tensors(path)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("run"), dict) or "state" not in metadata:
        raise ValueError("it is not a checkpoint of a run")
    state = _unpacked(tensors, metadata["state"])
    if not isinstance(state, dict):
        raise ValueError("it is not a checkpoint of a run")
    return state, metadata["run"]


def _unpacked(tensors: dict[str, Tensor], tree: Any) -> Any:
    try:
        return unpack(tensors, tree)
    except (KeyError, ValueError, TypeError):
        raise ValueError("its tree of values does not fit its tensors") from None


def _naming(path: Path, error: ValueError) -> str:
    # damage is reported with the file's name, by the reader of files
    text = str(error)
    return text if text.startswith(str(path)) else f"{path} cannot be used: {text}"


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
