"""HeartDisease: the patients of four hospitals, as four binary tasks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._episodes import check_choice, check_dtype, check_int
from mtml_fast.data.folds import folds, selected
from mtml_fast.tasks import TaskBatch, TaskRows

__all__ = ["HeartDisease"]

_URL = "https://archive.ics.uci.edu/dataset/45/heart+disease"
_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
# place in the file of the columns that every hospital has; of the others (chol, fbs, slope, ca, thal) some have none
_COLUMNS = {"age": 0, "sex": 1, "cp": 2, "trestbps": 3, "restecg": 6, "thalach": 7, "exang": 8, "oldpeak": 9}
_FIELDS, _DIAGNOSIS = 14, 13
# columns whose numbers are names, and these numbers
_CODES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)}
# columns with missing values
_GAPS = ("trestbps", "restecg", "thalach", "exang", "oldpeak")


class HeartDisease:
    """Whether a patient has heart disease, by eight findings: one hospital is one task. Detrano et al., 1989.

    Reads processed.cleveland.data, processed.hungarian.data, processed.switzerland.data and processed.va.data of the
    UCI Machine Learning Repository (data set 45) in `root` or in `root/heart_disease`: 303, 294, 123 and 200 patients,
    of whom 46, 36, 93 and 75 % are ill, so that the area under the ROC curve says more than the accuracy.

    The findings are age, sex, cp (chest pain), trestbps (blood pressure at rest), restecg (electrocardiogram at rest),
    thalach (maximum heart rate), exang (angina by exercise) and oldpeak (ST depression by exercise); the other columns
    are missing in whole hospitals. A blood pressure of 0 counts as missing.

    `folds` and `new_hospital` give inputs for a network, `[R, 18]`, named by `columns`: cp and restecg one column a
    code; all standardised by the mean and deviation of the training rows of all hospitals in it; a missing value is 0,
    the mean, and 1 in a column of its own that says so.

    Attributes:
        hospitals: names of the four tasks.
        columns: names of the inputs.
        rows: everything as it is in the files: `x [R, 8]` with NaN where a value is missing, `y [R]` 0 or 1.

    Args:
        root: folder of the files.
        dtype: of the inputs.

    Raises:
        FileNotFoundError: data that is not there. ValueError: damaged data; else naming the argument.

    Source: Detrano et al., "International application of a new probability algorithm for the diagnosis of coronary
    artery disease", American Journal of Cardiology 64, 1989.

    Example:
        >>> heart = HeartDisease("data")  # doctest: +SKIP
        >>> fold = heart.folds(5)[0]  # doctest: +SKIP
        >>> [len(fold.support.task(t)[1]) for t in range(4)]  # doctest: +SKIP
        [242, 235, 98, 160]
        >>> HeartDisease("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: Heart Disease's processed.cleveland.data is neither in no/such/folder nor in ...
    """

    hospitals = _HOSPITALS

    def __init__(self, root: str | os.PathLike, *, dtype: torch.dtype = torch.float32):
        check_dtype(dtype)
        values = [_read(_find(Path(root).expanduser(), f"processed.{name}.data")) for name in _HOSPITALS]
        counts = torch.tensor([0, *map(len, values)])
        table = torch.from_numpy(np.concatenate(values))  # [R, 14]
        x = table[:, list(_COLUMNS.values())]  # [R, 8]
        pressure = x[:, [*_COLUMNS].index("trestbps")]
        pressure[pressure == 0] = torch.nan
        self.rows = TaskRows(x.to(dtype), (table[:, _DIAGNOSIS] > 0).long(), counts.cumsum(0))
        self.columns = (*(name for name, _ in _coded()), *(f"{name} missing" for name in _GAPS))

    def folds(self, count: int = 5, seed: int = 0) -> list[TaskBatch]:
        """Cross-validation: all hospitals `count` times, the rows to learn from as support, the others as query.

        As `mtml_fast.data.folds`, which splits the support once more where settings are to be chosen.
        """
        splits = folds(self.rows, count, seed)
        return [TaskBatch(*_prepared(split.support, split.query, given=split.support)) for split in splits]

    def new_hospital(self, hospital: str, shots: int, seed: int = 0) -> tuple[TaskRows, TaskBatch]:
        """Three hospitals to learn from, and the fourth as a new task: some rows as support, the others as query.

        Args:
            hospital: the name of the new one.
            shots: its support rows, as many ill as healthy ones (if `shots` is odd, one more ill).
            seed: of their choice.

        Returns:
            The rows of the three others, in the order of `hospitals`, and the new one's.
        """
        place = _HOSPITALS.index(check_choice("hospital", hospital, _HOSPITALS))
        check_int("shots", shots, 2)
        order = torch.from_numpy(
            np.random.default_rng([check_int("seed", seed, 0), place]).permutation(len(self.rows.y))
        )
        start, stop = self.rows.offsets[place : place + 2].tolist()
        order = order[(order >= start) & (order < stop)]
        support = torch.zeros(len(self.rows.y), dtype=torch.bool)
        for label, wanted in ((0, shots // 2), (1, shots - shots // 2)):
            found = order[self.rows.y[order] == label]
            if len(found) <= wanted:
                kind = "ill" if label else "healthy"
                raise ValueError(
                    f"shots must leave query rows: {hospital} has {len(found)} {kind} patients, got {shots}"
                )
            support[found[:wanted]] = True
        owned = torch.zeros_like(support)
        owned[start:stop] = True
        others = selected(self.rows, ~owned)
        parts = others, selected(self.rows, support), selected(self.rows, owned & ~support)
        others, *new = _prepared(*parts, given=others)
        return others, TaskBatch(*new)

    def __repr__(self) -> str:
        return f"HeartDisease(rows={self.rows.counts.tolist()})"


def _prepared(*parts: TaskRows, given: TaskRows) -> list[TaskRows]:
    """The parts as inputs for a network, standardised by what the rows of `given` show."""
    known = _one_column_a_code(given.x.double())
    mean = known.nanmean(0)
    deviation = (known - mean).square().nanmean(0).sqrt()
    # a code that nobody has
    deviation[deviation == 0] = 1
    prepared = []
    for rows in parts:
        x = ((_one_column_a_code(rows.x.double()) - mean) / deviation).nan_to_num(0.0)
        missing = rows.x[:, [[*_COLUMNS].index(name) for name in _GAPS]].isnan()
        prepared.append(TaskRows(torch.cat([x, missing], 1).to(rows.x.dtype), rows.y, rows.offsets))
    return prepared


def _coded() -> list[tuple[str, int | None]]:
    """Name and code of every column but those of missing values; None where the number is a quantity."""
    names = []
    for name in _COLUMNS:
        names += [(f"{name}={code}", code) for code in _CODES[name]] if name in _CODES else [(name, None)]
    return names


def _one_column_a_code(x: Tensor) -> Tensor:
    """`[R, 8]` to `[R, 13]`; NaN stays NaN, in all columns that it leads to."""
    columns = []
    for name, code in _coded():
        column = x[:, [*_COLUMNS].index(name.partition("=")[0])]
        columns.append(column if code is None else torch.where(column.isnan(), column, (column == code).to(x.dtype)))
    return torch.stack(columns, 1)


def _find(root: Path, name: str) -> Path:
    folders = (root, root / "heart_disease")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"Heart Disease's {name} is neither in {folders[0]} nor in {folders[1]}: get it from {_URL} and put it there"
    )


def _read(path: Path) -> np.ndarray:
    """`[R, 14]`, NaN for what is missing."""
    # Latin-1 takes any byte: one that is no number is named below
    lines = [line.split(",") for line in path.read_text(encoding="latin-1").split()]
    for i, fields in enumerate(lines):
        if len(fields) != _FIELDS:
            raise ValueError(f"{path} is damaged: row {i + 1} must have {_FIELDS} values, got {len(fields)}")
    try:
        table = np.array([[np.nan if field == "?" else float(field) for field in fields] for fields in lines])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not len(lines) or np.isnan(table[:, _DIAGNOSIS]).any():
        raise ValueError(f"{path} is damaged: every row must end with a diagnosis, and there must be rows")
    return table
