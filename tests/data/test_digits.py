import sys

import numpy as np
import pytest
import torch

from mtml_fast.data import Digits

datasets = pytest.importorskip("sklearn.datasets")


def test_splits_hold_different_digits():
    classes = [Digits(split).classes for split in ("train", "validation", "test")]
    assert classes == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_are_pictures_of_the_digit_behind_the_label(split):
    digits = datasets.load_digits()
    target_of = {
        (image / 16).astype(np.float32).tobytes(): t for image, t in zip(digits.images, digits.target, strict=True)
    }
    tasks = Digits(split, ways=3, shots=2, query_shots=4, flatten=False)
    batch = tasks.sample(100, step=1)
    assert batch.support.x.shape == (100, 6, 1, 8, 8)
    assert batch.query.y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 100
    x, y = torch.cat([batch.support.x, batch.query.x], 1), torch.cat([batch.support.y, batch.query.y], 1)
    assert x.min() == 0
    assert x.max() == 1
    seen = set()
    for task in range(100):
        targets = np.array([target_of[image.tobytes()] for image in x[task].numpy()])
        owners = [np.unique(targets[y[task] == label]).tolist() for label in range(3)]
        assert [len(owner) for owner in owners] == [1, 1, 1]
        assert len({owner[0] for owner in owners}) == 3
        assert len(np.unique(x[task].reshape(18, 64), axis=0)) == 18
        seen.add(tuple(owner[0] for owner in owners))
    # every order of the digits comes up
    assert len(seen) == (24 if split == "train" else 6)
    assert set(np.ravel(list(seen))) == set(tasks.classes)


def test_attributes_and_fingerprint():
    tasks = Digits(ways=2, seed=3)
    assert (tasks.loss, tasks.outputs, tasks.input_shape, tasks.seed) == ("cross_entropy", 2, (64,), 3)
    changes = ({}, {"split": "test"}, {"ways": 2}, {"shots": 2}, {"query_shots": 2}, {"flatten": False}, {"seed": 1})
    assert len({Digits(**change).fingerprint for change in changes}) == len(changes)
    assert repr(tasks) == ("Digits(split='train', flatten=True, ways=2, shots=1, query_shots=1, seed=3, classes=4)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "all"}, "split must be one of train, validation, test, got 'all'"),
        ({"ways": 5}, "ways must be at most the number of classes, 4, got 5"),
        ({"shots": 170, "query_shots": 20}, r"rows of every class, 177 in class 2, got 170 \+ 20"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"Digits needs scikit-learn: pip install 'mtml_fast\[train\]'"):
        Digits()
