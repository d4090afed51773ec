"""Digits: N-way K-shot episodes of the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from mtml_fast.data._episodes import ClassEpisodes, check_choice

__all__ = ["Digits"]

_CLASSES = {"train": (0, 1, 2, 3), "validation": (4, 5, 6), "test": (7, 8, 9)}


class Digits(ClassEpisodes):
    """N digits, K pictures of each as support, others as query: 8x8 grey pictures in [0, 1] with ink = 1, no download.

    Splits: the digits 0 to 3 are "train", 4 to 6 "validation", 7 to 9 "test"; each has 174 to 183 pictures
    (scikit-learn's `load_digits`: the test set of Alpaydin and Kaynak, "Optical recognition of handwritten digits",
    UCI Machine Learning Repository, 1998). Four digits are few to meta-learn from: this is for trying things out.

    Rows are ordered by label, 0 .. ways - 1; which digit gets which label is random.

    Args:
        split: see above.
        ways, shots, query_shots: digits of an episode; support pictures and query pictures of each.
        flatten: rows `[64]`, else `[1, 8, 8]`.
        seed: of the episodes.
        device, dtype: of the tensors.

    Raises:
        ImportError: without scikit-learn. TypeError, ValueError: naming the argument.

    Example:
        >>> tasks = Digits("test", ways=3, shots=5)
        >>> tasks.sample(16, step=0).support.x.shape
        torch.Size([16, 15, 64])
    """

    def __init__(
        self,
        split: str = "train",
        *,
        ways: int = 3,
        shots: int = 1,
        query_shots: int = 1,
        flatten: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        classes = _CLASSES[check_choice("split", split, tuple(_CLASSES))]
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError("Digits needs scikit-learn: pip install 'mtml_fast[train]'") from None
        digits = load_digits()
        images = np.concatenate([digits.images[digits.target == digit] for digit in classes])  # [R, 8, 8]
        self.split = split
        super().__init__(
            torch.from_numpy(images.astype(np.uint8)).view(-1, *([64] if flatten else [1, 8, 8])),
            np.bincount(digits.target)[list(classes)],
            classes,
            scale=1 / 16,
            ways=ways,
            shots=shots,
            query_shots=query_shots,
            seed=seed,
            device=device,
            dtype=dtype,
            split=split,
            flatten=bool(flatten),
        )
