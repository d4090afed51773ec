"""Slots of spoken requests: seven intents as seven tasks, each with tags of its own.

    python examples/snips_slots.py DIR --out runs/snips_slots

DIR holds 2017-06-custom-intent-engines (see `mtml_fast.data.SnipsSlots`). One network tags the tokens of a request:
numbers of the words around a token, its letters and its shape go through an embedding and a hidden layer, the trunk;
a linear head for each intent has as many outputs as the intent has tags, 5 to 29. It learns one intent alone; all
seven, with a trunk that they share; and the latter with the intents' losses or gradients balanced.

Settings were chosen by a fifth of the 300 training requests of each intent (`--choose` tests with these), for one
intent alone as for all; the test requests are looked at once, at the end. With `--queries 30` only so many requests of
each intent are trained on, with `--full` some 2,000.

The figures to compare with are the share of right tags of a logistic regression trained on the 300.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from report import save_points, table
from torch import Tensor, nn

import mtml_fast as mf

# logistic regression, 300 requests an intent
REFERENCE = [0.903, 0.909, 0.892, 0.857, 0.982, 0.969, 0.960]

METHODS = {"shared trunk": None, "PCGrad": "pcgrad", "uncertainty": "uncertainty"}
EMBEDDING, HIDDEN = 32, 128
# tokens of each intent in a step
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Seven intents as tasks; see the text at the head of this file.")
    parser.add_argument("root", help="folder of the data")
    parser.add_argument("--out", default="runs/snips_slots", type=Path, help="folder of the tables and the picture")
    parser.add_argument("--seeds", default=3, type=int, help="runs")
    parser.add_argument("--full", action="store_true", help="train on some 2,000 requests of each intent")
    parser.add_argument("--queries", type=int, help="train on so many requests of each intent")
    parser.add_argument("--choose", action="store_true", help="test on a fifth of the training requests")
    parser.add_argument("--steps", default=2000, type=int, help="of the optimizer")
    options = parser.parse_args()

    # networks as small as these are fastest on one
    torch.set_num_threads(1)
    begun = time.perf_counter()
    runs = [run(options, seed) for seed in range(options.seeds)]
    seconds = time.perf_counter() - begun

    intents = mf.data.SnipsSlots.intents
    texts, pictures = [], {}
    for place, measure in enumerate(("share of right tags", "F1 of whole slots")):
        columns = {name: [[r[name][place][t] for r in runs] for t in range(len(intents))] for name in runs[0]}
        if place == 0:
            columns = {"logistic regression, 300": REFERENCE, **columns}
        texts += [f"{measure[0].upper()}{measure[1:]}:", table("intent", columns, intents)]
        pictures[measure] = columns
    texts += [f"Mean and standard deviation of {options.seeds} runs, {seconds:.0f} s."]
    text = "\n\n".join(texts)
    print(text)
    save_points(options.out / "snips-slots.png", "share of right tags", pictures["share of right tags"], intents)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")


def run(options: argparse.Namespace, seed: int) -> dict[str, tuple[list[float], list[float]]]:
    """Method -> the share of right tags and the F1 of each intent."""
    snips = mf.data.SnipsSlots(
        options.root,
        full=options.full,
        queries=options.queries,
        held_out=0.2 if options.choose else None,
        seed=seed,
    )
    every = range(len(snips.intents))
    alone = torch.cat([tagged(snips, [t], None, options.steps, seed) for t in every])
    together = {name: tagged(snips, every, balance, options.steps, seed) for name, balance in METHODS.items()}
    return {name: measures(snips, labels) for name, labels in {"own model": alone, **together}.items()}


def tagged(snips, intents: Sequence[int], balance: str | None, steps: int, seed: int) -> Tensor:
    """Trains one network on the given intents; its labels for their test rows."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(
        nn.Embedding(snips.vocabulary, EMBEDDING),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(len(snips.features) * EMBEDDING, HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.3),
    )
    outputs = [len(snips.tags[t]) for t in intents]
    learner = mf.MetaLearner(len(intents), HIDDEN, outputs, hidden=None, trunk=trunk)
    trainer = mf.MetaLearnerTrainer(learner, len(intents), lr=1e-2, balance=balance)
    schedule = torch.optim.lr_scheduler.LinearLR(trainer.optimizer, 1.0, 0.0, total_iters=steps)

    tasks, rows = range(len(intents)), [snips.train.task(t) for t in intents]
    orders = [endless(len(y)) for _, y in rows]
    for _ in range(steps):
        batch = [(x[place], y[place]) for (x, y), place in zip(rows, map(next, orders), strict=True)]
        trainer.train([x for x, _ in batch], tasks, [y for _, y in batch])
        schedule.step()
    with torch.no_grad():
        outputs = learner.eval()([snips.test.task(t)[0] for t in intents], tasks)
    return torch.cat([z.argmax(1) for z in outputs])


def endless(count: int) -> Iterator[Tensor]:
    """Batches of places below `count`: all of them in an order of chance, then in another one, and so on."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < BATCH:
            waiting = torch.cat([waiting, torch.randperm(count)])
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


def measures(snips, labels: Tensor) -> tuple[list[float], list[float]]:
    """Of each intent: the share of right tags, and F1 of slots, right where type, begin and end are."""
    right = (labels == snips.test.y).double().split(snips.test.counts.tolist())
    pairs = zip(snips.spans(labels), snips.spans(snips.test.y), strict=True)
    f1 = [2 * len(found & true) / (len(found) + len(true)) for found, true in pairs]
    return [float(intent.mean()) for intent in right], f1


if __name__ == "__main__":
    main()
