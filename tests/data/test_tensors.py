import subprocess
import sys

import numpy as np
import pytest
import torch

from mtml_fast.data import TensorClasses, TensorTasks


def numbered(counts):
    """Packed rows whose inputs are their own row number and task; float targets are minus the row number."""
    counts = torch.as_tensor(counts)
    task = torch.arange(len(counts)).repeat_interleave(counts)
    row = torch.arange(len(task))
    x = torch.stack([row, task], 1).double()
    return x, -row.double(), task, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def check_batch(batch, indices, counts):
    """Rows belong to the stated task, targets to their rows, and no row comes twice in a task."""
    for t, task in enumerate(indices.tolist()):
        parts = [rows.task(t) for rows in (batch.support, batch.query)]
        x, y = (torch.cat(values) for values in zip(*parts, strict=True))
        assert (x[:, 1] == task).all()
        assert torch.equal(y, -x[:, :1])
        assert len(x[:, 0].unique()) == len(x)
        assert len(x) <= counts[task]


@pytest.mark.parametrize("by", ["task_id", "offsets", "rectangular"])
def test_three_layouts_of_the_same_tasks_give_the_same_episodes(by):
    x, y, task, offsets = numbered([9] * 5)
    if by == "task_id":
        # unsorted rows; stable sorting keeps the order inside a task, so shuffle whole rounds over the tasks
        shuffle = torch.arange(45).view(5, 9).T.flatten()
        tasks = TensorTasks(x[shuffle], y[shuffle], task[shuffle], shots=2, query_shots=3)
    elif by == "offsets":
        tasks = TensorTasks(x, y, offsets=offsets, shots=2, query_shots=3)
    else:
        tasks = TensorTasks(x.view(5, 9, 2), y.view(5, 9), shots=2, query_shots=3)
    batch = tasks.sample(5, 3)
    expected = TensorTasks(x, y, offsets=offsets, shots=2, query_shots=3).sample(5, 3)
    assert batch.support.x.shape == (5, 2, 2)
    assert batch.query.y.shape == (5, 3, 1)
    assert torch.equal(batch.support.x, expected.support.x)
    assert torch.equal(batch.query.y, expected.query.y)
    check_batch(batch, tasks.task_indices(5, 3), [9] * 5)


@pytest.mark.parametrize(
    ("shots", "query_shots", "support", "query"),
    [
        (1, 1, [1, 1, 1, 1], [1, 1, 1, 1]),
        (2, None, [2, 2, 2, 2], [1, 5, 2, 98]),
        (0.5, None, [1, 3, 2, 50], [2, 4, 2, 50]),
        (0.29, 0.5, [1, 2, 1, 29], [1, 3, 2, 50]),
        (0.1, 2, [1, 1, 1, 10], [2, 2, 2, 2]),
    ],
)
def test_ragged_tasks_and_fractions(shots, query_shots, support, query):
    counts = [3, 7, 4, 100]
    x, y, task, _ = numbered(counts)
    tasks = TensorTasks(x, y, task * 10 - 5, shots=shots, query_shots=query_shots, dtype=torch.float64)
    assert tasks.task_ids == (-5, 5, 15, 25)
    for step in range(5):
        batch, indices = tasks.sample(10, step), tasks.task_indices(10, step)
        assert batch.support.counts.tolist() == [support[t] for t in indices]
        assert batch.query.counts.tolist() == [query[t] for t in indices]
        assert batch.support.is_ragged == (len(set(support)) > 1)
        assert batch.query.is_ragged == (len(set(query)) > 1)
        check_batch(batch, indices, counts)


def test_each_task_comes_once_before_any_comes_again():
    x, y, task, _ = numbered([4] * 6)
    tasks = TensorTasks(x, y, task)
    assert len(tasks) == 6
    for step in range(20):
        order = tasks.task_indices(12, step).view(2, 6)
        assert order.sort(-1).values.tolist() == [list(range(6))] * 2
    orders = {tuple(tasks.task_indices(6, step).tolist()) for step in range(20)}
    assert len(orders) > 15


@pytest.mark.parametrize("shots", [2, 0.4])
def test_slices_equal_the_whole(shots):
    x, y, task, _ = numbered([5, 9, 30, 6, 8])
    tasks = TensorTasks(x, y, task, shots=shots)
    whole = tasks.sample(13, 4)
    for first, count in ((0, 5), (5, 1), (6, 7)):
        part = tasks.sample(count, 4, first_task=first)
        expected = whole.select(torch.arange(first, first + count))
        for rows, wanted in ((part.support, expected.support), (part.query, expected.query)):
            assert torch.equal(rows.x, wanted.x)
            assert torch.equal(rows.y, wanted.y)
            assert torch.equal(rows.counts, wanted.counts)


@pytest.mark.parametrize("query_shots", [2, 0.5])
def test_every_row_is_equally_often_support_and_query(query_shots):
    x, y, task, _ = numbered([4, 8])
    tasks = TensorTasks(x, y, task, shots=2 if query_shots == 2 else 0.5, query_shots=query_shots)
    counts = torch.zeros(2, 12)
    for step in range(3000):
        batch = tasks.sample(2, step)
        for role, rows in enumerate((batch.support, batch.query)):
            counts[role] += torch.bincount(rows.x.reshape(-1, 2)[:, 0].long(), minlength=12)
    share = torch.tensor([0.5] * 4 + [0.25 if query_shots == 2 else 0.5] * 8)
    deviation = (counts / 3000 - share) / (share * (1 - share) / 3000).sqrt()
    assert deviation.abs().max() < 4


def test_other_processes_draw_the_same_bits():
    code = (
        "import hashlib, torch; from mtml_fast.data import TensorTasks\n"
        "x = torch.arange(60.).view(30, 2); t = TensorTasks(x, x.sum(-1), torch.arange(30) % 4, seed=7)\n"
        "b = t.sample(6, 2); print(t.fingerprint)\n"
        "print(hashlib.sha256(b.support.x.numpy().tobytes() + b.query.y.numpy().tobytes()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0].startswith(b"TensorTasks(shots=0.5, query_shots=None, rows=")


def test_losses_and_outputs_follow_the_targets():
    x = np.zeros((4, 6, 3), np.float64)
    labels = TensorTasks(x, np.arange(24).reshape(4, 6) % 5)
    assert (labels.loss, labels.outputs, labels.input_shape) == ("cross_entropy", 5, (3,))
    batch = labels.sample(2)
    assert batch.support.y.dtype == torch.int64
    assert batch.support.x.dtype == torch.float32
    assert batch.query.y.shape == (2, 3)
    targets = TensorTasks(x, np.zeros((4, 6, 2), np.float32), dtype=torch.float64)
    assert (targets.loss, targets.outputs) == ("mse", 2)
    assert targets.sample(1).query.y.dtype == torch.float64
    boolean = TensorTasks(x, np.arange(24).reshape(4, 6) % 2 == 0)
    assert (boolean.loss, boolean.outputs) == ("cross_entropy", 2)
    tokens = TensorTasks(np.arange(24).reshape(4, 6), np.zeros((4, 6)))
    assert tokens.sample(1).support.x.dtype == torch.int64


def test_read_only_and_strided_arrays_are_taken():
    x = np.arange(48.0).reshape(4, 6, 2)[:, ::-1]
    x.flags.writeable = False
    assert TensorTasks(x, np.zeros((4, 6))).sample(4).support.x.max() <= 47


def test_fingerprint_follows_the_rows():
    x, y, task, _ = numbered([5, 5])
    same, other = TensorTasks(x.clone(), y, task), x.clone()
    other[3, 0] += 1
    assert TensorTasks(x, y, task).fingerprint == same.fingerprint
    others = [TensorTasks(other, y, task), TensorTasks(x, y + 1, task), TensorTasks(x, y, task, seed=1)]
    others += [TensorTasks(x, y, offsets=torch.tensor([0, 4, 10])), TensorTasks(x, y, task, shots=0.4)]
    assert len({tasks.fingerprint for tasks in [same, *others]}) == 6


X, Y, ID = torch.zeros(6, 2), torch.zeros(6), torch.tensor([0, 0, 0, 7, 7, 7])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TensorTasks(X, Y, ID, shots=2, query_shots=2),
            ValueError,
            r"task_id 0 must have at least 2 \+ 2 rows",
        ),
        (lambda: TensorTasks(X[1:], Y[1:], ID[1:], shots=2), ValueError, r"task_id 0 .* at least 2 \+ 1 rows .* got 2"),
        (
            lambda: TensorTasks(X, Y, offsets=torch.tensor([0, 5, 6])),
            ValueError,
            r"task 1 must have at least 1 \+ 1 rows for shots=0\.5 and query_shots=None, got 1",
        ),
        (lambda: TensorTasks(X, Y, ID, shots=0.9, query_shots=0.9), ValueError, r"task_id 0 .* at least 2 \+ 2 rows"),
        (lambda: TensorTasks(X, Y), ValueError, r"y must have the rows of x \[6, 2\], got shape \[6\]"),
        (lambda: TensorTasks(X[:, 0], Y), ValueError, r"x must be \[T, N, \.\.\.\] without task_id and offsets"),
        (lambda: TensorTasks(X, Y[:4], ID), ValueError, r"y must have the rows of x \[6\], got shape \[4\]"),
        (lambda: TensorTasks(X, Y, ID[:4]), ValueError, r"task_id must be \[R=6\], one for each row of x"),
        (lambda: TensorTasks(X, Y, ID.float()), TypeError, r"task_id must hold integers, got torch\.float32"),
        (
            lambda: TensorTasks(X, Y, ID, torch.tensor([0, 6])),
            ValueError,
            "offsets must be None where task_id is given",
        ),
        (
            lambda: TensorTasks(X, Y, offsets=torch.tensor([0, 5])),
            ValueError,
            "offsets must run from 0 to .* 6, got 0 to 5",
        ),
        (lambda: TensorTasks(X, Y, offsets=torch.tensor([0, 0, 6])), ValueError, "offsets must increase"),
        (lambda: TensorTasks(X, Y / 0, ID), ValueError, r"y must be finite, got nan at \[0\]"),
        (lambda: TensorTasks(X.log(), Y, ID), ValueError, r"x must be finite, got -inf at \[0, 0\]"),
        (lambda: TensorTasks(X, Y.long() - 1, ID), ValueError, "y must hold labels from 0 on, got -1"),
        (lambda: TensorTasks(X, X.long(), ID), ValueError, r"y must be \[6\] where it holds integer labels"),
        (lambda: TensorTasks(X.tolist(), Y, ID), TypeError, "x must be a torch.Tensor or a NumPy array .* got list"),
        (lambda: TensorTasks(np.array(["a"]), Y, ID), TypeError, "x must be .* NumPy array of numbers, got dtype <U1"),
        (
            lambda: TensorTasks(X, Y, ID, shots=1.0),
            ValueError,
            r"shots must be an int or a fraction in \(0, 1\), got 1\.0",
        ),
        (
            lambda: TensorTasks(X, Y, ID, shots="2"),
            TypeError,
            r"shots must be an int or a fraction in \(0, 1\), got '2'",
        ),
        (lambda: TensorTasks(X, Y, ID, shots=0), ValueError, "shots must be at least 1, got 0"),
        (lambda: TensorTasks(X, Y, ID, query_shots=-1), ValueError, "query_shots must be at least 1, got -1"),
        (lambda: TensorTasks(X[:0], Y[:0], ID[:0]), ValueError, "x must hold at least one row, got none"),
        (lambda: TensorTasks(X, Y, ID).sample("3"), TypeError, "num_tasks must be an int, got '3'"),
        (lambda: TensorClasses(X, Y), TypeError, r"y must hold integers, got torch\.float32"),
        (lambda: TensorClasses(X, ID, ways=3), ValueError, "ways must be at most the number of classes, 2, got 3"),
        (
            lambda: TensorClasses(X, torch.tensor([1, 1, 1, 1, 5, 5]), ways=2, shots=2),
            ValueError,
            r"every class, 2 in class 5, got 2 \+ 1",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# -- classes -----------------------------------------------------------------------------------------------------------


def test_class_episodes_hold_distinct_rows_of_distinct_classes():
    counts = [6, 9, 5, 20, 7, 5]
    x, _, owner, _ = numbered(counts)
    shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    tasks = TensorClasses(x[shuffle], (owner * 3 - 4)[shuffle], ways=4, shots=2, query_shots=3, dtype=torch.float64)
    assert tasks.classes == (-4, -1, 2, 5, 8, 11)
    assert (tasks.loss, tasks.outputs, tasks.input_shape) == ("cross_entropy", 4, (2,))
    batch = tasks.sample(2000)
    assert torch.equal(batch.support.y, torch.arange(4).repeat_interleave(2).expand(2000, 8))
    assert torch.equal(batch.query.y, torch.arange(4).repeat_interleave(3).expand(2000, 12))
    x = torch.cat([batch.support.x.unflatten(1, (4, 2)), batch.query.x.unflatten(1, (4, 3))], 2)  # [T, C, 5, 2]
    owners = x[..., 1]
    assert (owners == owners[..., :1]).all()
    assert (owners[..., 0].sort(-1).values.diff(dim=-1) > 0).all()
    assert (x[..., 0].sort(-1).values.diff(dim=-1) > 0).all()
    # each class is equally often behind each label, and each row of a class equally often drawn
    behind = torch.stack([torch.bincount(owners[:, label, 0].long(), minlength=6) for label in range(4)])
    assert ((behind - 2000 / 6).abs() < 4 * (2000 * 5 / 36) ** 0.5).all()
    drawn = torch.bincount(x[..., 0].flatten().long(), minlength=sum(counts)).double()
    share = torch.tensor([4 / 6 * 5 / count for count in counts]).repeat_interleave(torch.tensor(counts))
    assert ((drawn - 2000 * share).abs() < 4 * (2000 * share * (1 - share)).sqrt() + 1).all()


def test_class_slices_equal_the_whole_and_the_seed_matters():
    x, _, owner, _ = numbered([6] * 8)
    tasks = TensorClasses(x, owner, ways=3, query_shots=2)
    whole, part = tasks.sample(9, 1), tasks.sample(2, 1, first_task=5)
    assert torch.equal(whole.query.x[5:7], part.query.x)
    assert not torch.equal(
        whole.support.x, TensorClasses(x, owner, ways=3, query_shots=2, seed=1).sample(9, 1).support.x
    )


def test_class_episodes_of_tokens_keep_their_dtype():
    tokens = torch.arange(40).view(20, 2)
    assert TensorClasses(tokens, torch.arange(20) % 5, ways=2).sample(1).query.x.dtype == torch.int64


def test_device_is_an_option():
    x, _, owner, _ = numbered([6] * 8)
    for tasks in (TensorClasses(x, owner, device="meta"), TensorTasks(x, -x[:, :1], owner, shots=2, device="meta")):
        batch = tasks.sample(2)
        assert {t.device.type for rows in (batch.support, batch.query) for t in (rows.x, rows.y)} == {"meta"}
