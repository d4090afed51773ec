"""A small run that exercises all that a resume must restore; as a script it trains in a folder until it is stopped.

python runs.py train FOLDER STEPS          one run, interruptible
python runs.py kill FOLDER STEPS N SEED    N times: fork a run, kill -9 it at a random moment; then let it finish
"""

import os
import random
import signal
import sys
import time
from types import SimpleNamespace

import torch
from torch import nn

from mtml_fast import TaskBatch, TaskRows
from mtml_fast.trainers.trainer import Trainer


class Lines:
    """Tasks y = a x + b with (a, b) a function of (seed, step, task)."""

    def __init__(self, seed=0, split=""):
        self.seed, self.split, self.fingerprint = seed, split, f"lines seed={seed}"

    def sample(self, num_tasks, step=0, *, first_task=0):
        x, y = [], []
        for task in range(first_task, first_task + num_tasks):
            generator = torch.Generator().manual_seed(hash((self.seed, step, task)))
            a, b = torch.randn(2, generator=generator)
            x.append(torch.randn(4, 1, generator=generator))
            y.append(a * x[-1] + b)
        x, y = torch.stack(x), torch.stack(y)
        return TaskBatch(TaskRows(x, y), TaskRows(x, y))


class Pooled(nn.Module):
    """Not a meta-learner, but all that a Trainer asks of one: random dropout, running statistics, a metric."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1)
        )

    def forward(self, batch, steps=None):
        x, y = batch.query.x, batch.query.y
        errors = (self.net(x.flatten(0, 1)).view_as(y) - y).square().flatten(1)
        accuracy = (errors.detach() < 0.5).float().mean(1)
        return SimpleNamespace(loss=errors.mean(), task_losses=errors.mean(1), metrics={"accuracy": accuracy})

    def adapt(self, support, steps=None):
        return lambda rows: self.net(rows.x)


def make(folder=None, **changes):
    """A trainer with everything switched on: Adam, schedule, clipping, validation, best, patience."""
    options = {
        "meta_batch": 3,
        "meta_lr": 0.01,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500),
        "clip_grad": 1.0,
        "validation": Lines(seed=1),
        "validate_every": 8,
        "validation_tasks": 5,
        "patience": 1000,
        "checkpoint": folder,
        "checkpoint_every": 5,
        "log_every": 6,
        "progress": False,
    }
    return Trainer(Pooled(), Lines(), **{**options, **changes})


def kill(folder, times, seed):
    random.seed(seed)
    torch.set_num_threads(1)
    # torch imports a second's worth at its first optimizer step: here, not in every child
    make(validate_every=1).fit(1)
    reached = []
    for _ in range(times):
        pid = os.fork()
        if pid == 0:
            make(folder).fit(10**6)
        time.sleep(random.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reached.append(make(folder).step)
    make(folder).fit(reached[-1] + 37)
    print(*reached)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        make(sys.argv[2], progress=True).fit(int(sys.argv[3]))
    else:
        kill(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
