"""Omniglot: N-way K-shot episodes of handwritten characters."""

from __future__ import annotations

import os
import zlib

import numpy as np
import torch

from mtml_fast.data._episodes import ClassEpisodes, check_choice, check_int
from mtml_fast.data._omniglot_files import SIDE, load
from mtml_fast.data._random import Draws

__all__ = ["Omniglot"]

# maml's 1,200 characters for training, of which the authors' code keeps the last 100 for validation; 423 are left
_TRAIN, _VALIDATION = 1100, 100
_SPLITS = ("train", "validation", "test", "background", "evaluation")


class Omniglot(ClassEpisodes):
    """N characters of Omniglot, K drawings of each as support, others as query: Lake et al., Science 350, 2015.

    Reads images_background.zip and images_evaluation.zip, or the folders unpacked from them, in `root` or in
    `root/omniglot`. Decoded once (some seconds), then kept in a cache folder: `$MTML_FAST_CACHE`, or mtml_fast in
    `$XDG_CACHE_HOME`, or in ~/.cache.

    Splits: "train", "validation" and "test" are those of MAML (Finn, Abbeel and Levine, 2017): all 1,623 characters
    in an order drawn from `split_seed`; the first 1,200 are for training, of which the last 100 are "validation" and
    the others "train" (as in the authors' code); the remaining 423 are "test". "background" (964 characters of 30
    alphabets) and "evaluation" (659 of 20) are Lake's own.

    Images: 1-bit 105x105 to grey 28x28 in [0, 1] with ink = 1, by Pillow's bilinear filter, which averages over the
    area of a pixel. Of Pillow's filters it keeps most of what tells characters apart: the nearest neighbour in pixels
    is right in 45.7 % of 5-way 1-shot queries of Lake's evaluation characters, in 43.4 % with Lanczos (the filter that
    MAML's script asks for) and in 36.7 % with nearest (what it gets, since Pillow resamples 1-bit images so).

    Rows are ordered by label, 0 .. ways - 1; which character gets which label is random.

    Args:
        root: folder of the archives.
        split: see above.
        ways, shots, query_shots: characters of an episode; support drawings and query drawings of each.
        rotations: characters turned by 90, 180 and 270 degrees are further classes, in every split (as in MAML's
            code); an episode never holds one character twice.
        flatten: rows `[784]`, else `[1, 28, 28]`.
        seed: of the episodes.
        split_seed: of the order of the characters; the default for comparable runs.
        download: fetch what is missing into `root` from the authors' repository (14 MB), checked against its MD5.
        device, dtype: of the tensors.

    Raises:
        FileNotFoundError: data that is not there. ValueError: damaged data; else naming the argument.

    Example:
        >>> tasks = Omniglot("data", split="train", ways=5, shots=1)  # doctest: +SKIP
        >>> tasks.sample(32, step=0).support.x.shape  # doctest: +SKIP
        torch.Size([32, 5, 784])
        >>> Omniglot("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: Omniglot's images_background.zip ... is neither in no/such/folder nor in ...
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 1,
        rotations: bool = True,
        flatten: bool = True,
        seed: int = 0,
        split_seed: int = 0,
        download: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_choice("split", split, _SPLITS)
        split_seed = check_int("split_seed", split_seed, 0)
        names = [split] if split in ("background", "evaluation") else ["background", "evaluation"]
        loaded = [load(root, f"images_{name}", download) for name in names]
        images = np.concatenate([images for images, _, _ in loaded])  # [R, 28, 28]
        characters = [character for _, characters, _ in loaded for character in characters]
        counts = np.concatenate([counts for _, _, counts in loaded])  # [C]
        if len(names) == 2:
            chosen = _maml_split(split, len(characters), split_seed)
            rows = np.isin(np.repeat(np.arange(len(characters)), counts), chosen)
            images, counts, characters = images[rows], counts[chosen], [characters[c] for c in chosen]
        turns = 4 if rotations else 1
        pool = np.concatenate([np.rot90(images, turn, axes=(1, 2)) for turn in range(turns)])  # [turns * R, 28, 28]
        self.split = split
        super().__init__(
            torch.from_numpy(pool).view(-1, *([SIDE * SIDE] if flatten else [1, SIDE, SIDE])),
            counts,
            characters,
            variants=turns,
            scale=1 / 255,
            ways=ways,
            shots=shots,
            query_shots=query_shots,
            seed=seed,
            device=device,
            dtype=dtype,
            split=split,
            split_seed=split_seed,
            rotations=bool(rotations),
            flatten=bool(flatten),
            images=f"{zlib.crc32(images):08x}",
        )


def _maml_split(split: str, characters: int, seed: int) -> np.ndarray:
    """The characters of the split, as increasing indices."""
    if characters <= _TRAIN + _VALIDATION:
        raise ValueError(f"split {split!r} needs more than {_TRAIN + _VALIDATION} characters, root holds {characters}")
    order = Draws(seed, 0, 0, characters).permuted(characters)
    bounds = {"train": (0, _TRAIN), "validation": (_TRAIN, _TRAIN + _VALIDATION), "test": (_TRAIN + _VALIDATION, None)}
    return np.sort(order[slice(*bounds[split])])
