import os
from pathlib import Path

import pytest
import torch

from mtml_fast.data import HeartDisease

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


def write(root, rows=24):
    """Four files in the layout of the official ones. Patient i of hospital t is 30 + i years old, ill if i is odd."""
    root.mkdir(parents=True, exist_ok=True)
    for t, name in enumerate(HOSPITALS):
        lines = []
        for i in range(rows + t):
            cp, pressure = 1 + i % 4, "?" if i % 6 == 0 else 0 if i % 6 == 1 else 120 + i
            lines.append(f"{30 + i}.0,1,{cp},{pressure},0,?,{i % 3},{150 - i},0,.5,?,?,?,{(i % 2) * (1 + i % 4)}")
        (root / f"processed.{name}.data").write_text("\n".join(lines) + "\n")
    return root


def test_rows_are_those_of_the_files(tmp_path):
    heart = HeartDisease(write(tmp_path))
    assert heart.hospitals == HOSPITALS
    assert heart.rows.counts.tolist() == [24, 25, 26, 27]
    x, y = heart.rows.task(3)
    assert y.tolist() == [i % 2 for i in range(27)]
    # age, sex, cp, trestbps (0 is missing as "?" is), restecg, thalach, exang, oldpeak
    assert torch.equal(x[2], torch.tensor([32, 1, 3, 122, 2, 148, 0, 0.5]))
    assert x[:, 3].isnan().tolist() == [i % 6 < 2 for i in range(27)]
    assert not x[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()
    assert repr(heart) == "HeartDisease(rows=[24, 25, 26, 27])"


def test_folder_below_root_and_other_bytes(tmp_path):
    write(tmp_path / "heart_disease")
    assert HeartDisease(str(tmp_path), dtype=torch.float64).rows.x.dtype == torch.float64
    path = tmp_path / "heart_disease/processed.va.data"
    path.write_bytes(path.read_bytes().replace(b"30.0,", b"\xe930,"))
    with pytest.raises(ValueError, match=r"processed\.va\.data is damaged: could not convert .*'\xe930'"):
        HeartDisease(tmp_path)


def test_inputs_are_standardised_by_the_training_rows_alone(tmp_path):
    heart = HeartDisease(write(tmp_path), dtype=torch.float64)
    assert len(heart.columns) == 18
    column = {name: i for i, name in enumerate(heart.columns)}
    raw = {"age": heart.rows.x[:, 0], "cp=3": (heart.rows.x[:, 2] == 3).double(), "thalach": heart.rows.x[:, 5]}
    for fold in heart.folds(4, seed=1):
        query, support = fold.query.x, fold.support.x
        ages = support[:, column["age"]]
        assert float(ages.mean()) == pytest.approx(0, abs=1e-12)
        assert float(ages.std(unbiased=False)) == pytest.approx(1)
        # one straight line leads from the values of the files to all inputs, support and query
        for name, values in raw.items():
            both = torch.cat([support[:, column[name]], query[:, column[name]]])
            slope = (both.max() - both.min()) / (values.max() - values.min())
            back = (both - both.min()) / slope + values.min()
            assert torch.allclose(back.sort().values, values.sort().values)
        for rows in (support, query):
            missing = rows[:, column["trestbps missing"]]
            assert set(missing.tolist()) == {0.0, 1.0}
            assert (rows[missing == 1][:, column["trestbps"]] == 0).all()
        # a column in which all are alike
        assert (support[:, column["sex"]] == 0).all()


def test_a_new_hospital_stays_apart(tmp_path):
    heart = HeartDisease(write(tmp_path), dtype=torch.float64)
    others, new = heart.new_hospital("hungarian", 5, seed=3)
    assert others.counts.tolist() == [24, 26, 27]
    assert new.support.y.tolist().count(1) == 3
    assert (new.support.counts.tolist(), new.query.counts.tolist()) == ([5], [20])
    assert float(others.x[:, 0].mean()) == pytest.approx(0, abs=1e-12)
    ages = torch.cat([new.support.x, new.query.x])[:, 0].sort().values
    assert torch.allclose(ages.diff(), ages.diff()[0])
    again, other = heart.new_hospital("hungarian", 5, seed=3)[1], heart.new_hospital("hungarian", 5, seed=4)[1]
    assert torch.equal(again.support.x, new.support.x)
    assert not torch.equal(other.support.x, new.support.x)


def test_bad_files_and_arguments(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        HeartDisease(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("processed.cleveland.data", str(tmp_path), str(tmp_path / "heart_disease"), "https://"):
        assert part in message
    heart = HeartDisease(write(tmp_path))
    for call, text in (
        (lambda: heart.new_hospital("geneva", 4), "hospital must be one of cleveland, .*, got 'geneva'"),
        (lambda: heart.new_hospital("va", 30), "shots must leave query rows: va has 14 healthy patients, got 30"),
        (lambda: heart.new_hospital("va", 1), "shots must be .*got 1"),
        (lambda: heart.folds(1), "count must be .*got 1"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    path = tmp_path / "processed.va.data"
    for content, text in (
        ("1,2,3\n", "row 1 must have 14 values, got 3"),
        ("", "there must be rows"),
        (",".join("?" * 14), "must end with a diagnosis"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"processed\.va\.data is damaged: .*{text}"):
            HeartDisease(tmp_path)


def test_real_data():
    root = Path(os.environ.get("MTML_FAST_DATA", "/nowhere")) / "medical"
    if not root.is_dir():
        pytest.skip("needs the real Heart Disease data: set MTML_FAST_DATA to the folder that holds medical/")
    heart = HeartDisease(root)
    assert heart.rows.counts.tolist() == [303, 294, 123, 200]
    assert [int(heart.rows.task(t)[1].sum()) for t in range(4)] == [139, 106, 115, 149]
    assert heart.rows.x.isnan().sum(0).tolist() == [0, 0, 0, 60, 2, 55, 55, 62]
    for fold in heart.folds(5):
        assert fold.support.x.isfinite().all()
        assert fold.query.x.isfinite().all()
        assert 1 <= int((fold.query.task(2)[1] == 0).sum()) <= 2
