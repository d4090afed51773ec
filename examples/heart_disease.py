"""Heart disease: four hospitals as four tasks, and each of them as a new one.

    python examples/heart_disease.py DIR --out runs/heart_disease

DIR holds the files of the UCI data set 45 (see `mtml_fast.data.HeartDisease`). Two tables, of areas under
the ROC curve:

1. Cross-validation, five folds a hospital. The same small network learns one hospital alone; all four, with a trunk
   that they share and a head each; and the latter with the hospitals' losses or gradients balanced. How long it learns
   and how wide it is, is chosen for each of these anew in every fold, by the loss in three folds of the training rows.
2. One hospital left out. The others train a trunk and three heads; for the new one `adapt` learns from a few patients,
   beside a network of its own that sees no more than these.

The figures to compare with are those of a logistic regression: of the hospital's own rows, and of the three others'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from report import save_points, table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import mtml_fast as mf

# logistic regression of the eight columns; five folds of the own hospital, and trained on the three others
OWN_REFERENCE = [0.878, 0.885, 0.722, 0.730]
OTHERS_REFERENCE = [0.869, 0.876, 0.703, 0.748]

METHODS = {"shared trunk": None, "PCGrad": "pcgrad", "uncertainty": "uncertainty"}
# settings that are chosen in every fold
WIDTHS = (4, 8, 16)
EPOCHS = range(5, 101, 5)
# patients of a new hospital; Switzerland has eight healthy ones in all, and half of them must be left to test with
SHOTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Four hospitals as tasks; see the text at the head of this file.")
    parser.add_argument("root", help="folder of the data")
    parser.add_argument("--out", default="runs/heart_disease", type=Path, help="folder of the tables and the picture")
    parser.add_argument("--seeds", default=3, type=int, help="runs, each with folds of its own")
    parser.add_argument("--draws", default=10, type=int, help="of the patients of a new hospital, in each run")
    parser.add_argument("--fast", action="store_true", help="few epochs and one width: to see that it runs")
    options = parser.parse_args()
    widths, epochs = ((4,), range(5, 11, 5)) if options.fast else (WIDTHS, EPOCHS)

    # networks as small as these are fastest on one
    torch.set_num_threads(1)
    begun = time.perf_counter()
    heart = mf.data.HeartDisease(options.root)
    known = cross_validation(heart, options.seeds, widths, epochs)
    new = leave_one_out(heart, options.seeds, options.draws, widths, epochs)
    seconds = time.perf_counter() - begun

    known = {"logistic regression": OWN_REFERENCE, **known}
    new = {"logistic regression": OTHERS_REFERENCE, **new}
    text = "\n\n".join(
        [
            "Area under the ROC curve, five folds of each hospital:",
            table("hospital", known, heart.hospitals),
            f"A hospital left out, of which {SHOTS} patients are known:",
            table("hospital", new, heart.hospitals),
            f"Mean and standard deviation of {options.seeds} runs, {seconds:.0f} s.",
        ]
    )
    print(text)
    save_points(options.out / "heart-disease.png", "area under the ROC curve", known, heart.hospitals)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")


def cross_validation(heart, seeds: int, widths: Sequence[int], epochs: Sequence[int]) -> dict[str, list[list[float]]]:
    """Method -> hospital -> one area a run, the mean of five folds."""
    areas = {name: [[] for _ in heart.hospitals] for name in ("own model", *METHODS)}
    for seed in range(seeds):
        folds = heart.folds(5, seed)
        for t, hospital in enumerate(areas["own model"]):
            hospital.append(statistics.mean(chosen(fold.select([t]), None, seed, widths, epochs)[0] for fold in folds))
        for name, balance in METHODS.items():
            results = [chosen(fold, balance, seed, widths, epochs) for fold in folds]
            for hospital, fold_areas in zip(areas[name], zip(*results, strict=True), strict=True):
                hospital.append(statistics.mean(fold_areas))
    return areas


def chosen(batch: mf.TaskBatch, balance: str | None, seed: int, widths, epochs) -> list[float]:
    """The area of each task on the query rows, with the settings that suit the support rows best."""
    width, place = best_settings(batch.support, balance, seed, widths, epochs)
    *_, trainer = course(batch, width, balance, seed, epochs[: place + 1])
    return areas_of(trainer.learner, batch.query)


def best_settings(rows: mf.TaskRows, balance: str | None, seed: int, widths, epochs) -> tuple[int, int]:
    """Width, and place in `epochs`, of the smallest sum of the tasks' losses in three folds of the rows."""
    losses = {}
    for width in widths:
        for fold in mf.data.folds(rows, 3, seed):
            for place, trainer in enumerate(course(fold, width, balance, seed, epochs)):
                losses[width, place] = losses.get((width, place), 0.0) + float(trainer.task_losses.sum())
    return min(losses, key=losses.get)


def course(batch: mf.TaskBatch, width: int, balance: str | None, seed: int, epochs: Sequence[int]):
    """Trains on the support rows; after each of `epochs` yields the trainer, with the losses on the query rows."""
    torch.manual_seed(seed)
    (x, y), (x_new, y_new) = lists(batch.support), lists(batch.query)
    tasks = range(len(x))
    trunk = nn.Sequential(nn.Linear(x[0].shape[1], width), nn.Tanh())
    learner = mf.MetaLearner(len(x), width, 2, hidden=None, trunk=trunk)
    # from one and the same head: what a hospital's few rows do not say is then what the others say
    learner.heads.load_heads([learner.heads.head(0)] * len(x))
    # weight decay as strong as this is what a few hundred patients need
    optimizer = partial(torch.optim.AdamW, weight_decay=1.0, fused=True)
    trainer = mf.MetaLearnerTrainer(learner, len(x), lr=1e-2, optimizer=optimizer, balance=balance)
    done = 0
    for epoch in epochs:
        trainer.train(x, tasks, y, epochs=epoch - done)
        done = epoch
        trainer.test(x_new, tasks, y_new)
        yield trainer


def leave_one_out(heart, seeds: int, draws: int, widths, epochs) -> dict[str, list[list[float]]]:
    """Method -> hospital -> one area a run, the mean over the draws of its few patients."""
    names = ("heads of the others", "new head", "new head and trunk", "own model")
    areas = {name: [[] for _ in heart.hospitals] for name in names}
    for t, hospital in enumerate(heart.hospitals):
        for seed in range(seeds):
            others, _ = heart.new_hospital(hospital, SHOTS)
            width, place = best_settings(others, None, seed, widths, epochs)
            both = mf.TaskBatch(others, others)
            *_, trainer = course(both, width, None, seed, epochs[: place + 1])
            found = {name: [] for name in names}
            for draw in range(draws):
                new = heart.new_hospital(hospital, SHOTS, seed * draws + draw)[1]
                for name, area in adapted(trainer, new, width, epochs[: place + 1], seed).items():
                    found[name].append(area)
            for name in names:
                areas[name][t].append(statistics.mean(found[name]))
    return areas


def adapted(trainer, new: mf.TaskBatch, width: int, epochs: Sequence[int], seed: int) -> dict[str, float]:
    """The area on the new hospital's query rows, by each way to use its support rows."""
    x, y = lists(new.support)
    with torch.no_grad():
        # all heads on the same rows; the mean of what they say
        scores = [score(z) for z in trainer.learner.eval()(new.query.x)]
    head = trainer.adapt(x, y, layers="head", steps=20, lr=0.1)
    whole = trainer.adapt(x, y, layers="all", steps=20, lr=0.1)
    # too few patients to choose by: width and epochs are those of the network that saw hundreds
    *_, own = course(new, width, None, seed, epochs[-1:])
    return {
        "heads of the others": roc_auc_score(new.query.y, torch.stack(scores).mean(0)),
        "new head": areas_of(head, new.query)[0],
        "new head and trunk": areas_of(whole, new.query)[0],
        "own model": areas_of(own.learner, new.query)[0],
    }


@torch.no_grad()
def areas_of(learner: mf.MetaLearner, rows: mf.TaskRows) -> list[float]:
    x, y = lists(rows)
    outputs = learner.eval()(x, range(len(x)))
    return [float(roc_auc_score(labels, score(z))) for z, labels in zip(outputs, y, strict=True)]


def score(outputs: Tensor) -> Tensor:
    """How ill a patient is said to be: the difference of the logits."""
    return outputs[:, 1] - outputs[:, 0]


def lists(rows: mf.TaskRows) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and targets as MetaLearnerTrainer takes them: one tensor a task."""
    x, y = zip(*(rows.task(t) for t in range(rows.num_tasks)), strict=True)
    return list(x), list(y)


if __name__ == "__main__":
    main()
