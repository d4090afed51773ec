import json
import os
from pathlib import Path

import pytest
import torch

from mtml_fast.data import SnipsSlots

FOLDER = "2017-06-custom-intent-engines"


def piece(text, slot=None):
    return {"text": text} if slot is None else {"text": text, "entity": slot}


def query(i, name="Berlin"):
    return {
        "data": [
            piece("weather in "),
            piece(f"{name} West", "city"),
            piece(" at "),
            piece(f"{i}:30", "time"),
            piece("?"),
        ]
    }


def write(root, queries=10, encoding="utf-8"):
    for intent in SnipsSlots.intents:
        folder = root / FOLDER / intent
        folder.mkdir(parents=True, exist_ok=True)
        full = [query(i, "Köln") for i in range(2 * queries)]
        for name, content in (
            (f"train_{intent}", [query(i) for i in range(queries)]),
            (f"train_{intent}_full", full),
            (
                f"validate_{intent}",
                [query(7, "Atlantis"), {"data": [piece("a "), piece("x  y", "city"), piece("z", "city")]}],
            ),
        ):
            text = json.dumps({intent: content}, ensure_ascii=False)
            (folder / f"{name}.json").write_bytes(text.encode(encoding))
    return root


def test_tokens_and_tags(tmp_path):
    snips = SnipsSlots(write(tmp_path))
    assert snips.tags == [("O", "B-city", "I-city", "B-time", "I-time")] * 7
    assert snips.train.counts.tolist() == [70] * 7
    assert snips.test.counts.tolist() == [11] * 7
    assert snips.train_queries.diff().tolist() == [7] * 70
    assert snips.test_queries.diff().tolist() == [7, 4] * 7
    x, y = snips.train.task(4)
    assert y[:7].tolist() == [0, 0, 1, 2, 0, 3, 0]
    assert x.shape == (70, len(snips.features))
    assert int(x.max()) < snips.vocabulary
    assert snips.test.task(2)[1].tolist() == [0, 0, 1, 2, 0, 3, 0, 0, 1, 2, 1]


def test_a_word_has_one_number_at_every_place_and_unknown_ones_share_that_of_rare_ones(tmp_path):
    snips = SnipsSlots(write(tmp_path))
    column = {name: i for i, name in enumerate(snips.features)}
    first, second = snips.train.x[:7], snips.test.x[:7]
    for shift in (-2, -1, 1, 2):
        seen = first[:, column[f"word{shift:+d}"]].tolist()
        words = first[:, column["word"]].tolist()
        for i in range(7):
            if 0 <= i + shift < 7:
                assert seen[i] == words[i + shift]
            else:
                # nothing there, which no word's number says
                assert seen[i] not in words
    # "atlantis" is in no training request; "berlin" is in all of them
    rare = second[2, column["word"]]
    assert rare not in snips.train.x
    assert second[2, column["word"]] == second[1, column["word+1"]] == second[4, column["word-2"]]
    # "0:30" to "9:30" of the training are in seven requests, one of each intent; 7:30 is known
    assert second[5, column["word"]] == snips.train.x[7 * 7 + 5, column["word"]]
    assert (second[:2] == first[:2])[:, column["word"]].all()
    # "Atlantis" looks like "Berlin", "West" and no other
    shapes = second[:, column["shape"]].tolist()
    assert shapes[2] == shapes[3]
    assert len(set(shapes)) == 4


def test_spans(tmp_path):
    snips = SnipsSlots(write(tmp_path))
    true = snips.spans(snips.test.y)
    assert true[1] == {(13, 15, "city"), (16, 17, "time"), (19, 21, "city"), (21, 22, "city")}
    assert snips.spans(torch.zeros_like(snips.test.y)) == [set()] * 7
    # O B-city I-time I-time O O I-city | I-city O B-time B-time: an I without its B begins, a request ends every slot
    labels = torch.tensor([0, 1, 4, 4, 0, 0, 2, 2, 0, 3, 3] * 7)
    expected = {(1, 2, "city"), (2, 4, "time"), (6, 7, "city"), (7, 8, "city"), (9, 10, "time"), (10, 11, "time")}
    assert snips.spans(labels)[0] == expected
    assert snips.spans(labels)[6] == {(66 + a, 66 + b, slot) for a, b, slot in expected}
    with pytest.raises(ValueError, match=r"labels must be \[77\], one a test row, got \[3\]"):
        snips.spans(torch.zeros(3))


def test_full_queries_and_held_out(tmp_path):
    write(tmp_path / "snips")
    assert len(SnipsSlots(tmp_path, full=True).train_queries) == 1 + 20 * 7
    few = SnipsSlots(tmp_path, queries=3)
    assert few.train.counts.tolist() == [21] * 7
    assert few.test.counts.tolist() == [11] * 7
    times = SnipsSlots(tmp_path).features.index("word")
    whole = SnipsSlots(tmp_path, seed=5).train
    held = SnipsSlots(tmp_path, held_out=0.2, seed=5)
    assert held.train.counts.tolist() == [56] * 7
    assert held.test.counts.tolist() == [14] * 7
    assert len(whole.x) == len(held.train.x) + len(held.test.x)
    other = SnipsSlots(tmp_path, held_out=0.2, seed=6)
    assert not torch.equal(other.test.x[:, times], held.test.x[:, times])


def test_encodings(tmp_path):
    words = []
    for name, encoding in (("utf-8", "utf-8"), ("latin-1", "latin-1")):
        root = write(tmp_path / name, encoding=encoding)
        words.append(SnipsSlots(root, full=True).train.x)
    assert torch.equal(*words)
    # a character beyond the basic plane as two surrogates of three bytes, as in train_PlayMusic_full.json
    root = write(tmp_path / "surrogates")
    for path in (root / FOLDER).glob("*/train_*_full.json"):
        path.write_bytes(path.read_bytes().replace("Köln".encode(), "Kö".encode() + b"\xed\xa0\xbc\xed\xbd\x95"))
    x = SnipsSlots(root, full=True).train.x
    assert x.shape == words[0].shape
    # one letter, and one character that is none
    shape = SnipsSlots(root, full=True).features.index("shape")
    assert x[2, shape] != x[3, shape]


def test_bad_files_and_arguments(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        SnipsSlots(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("train_AddToPlaylist.json", str(tmp_path / FOLDER), str(tmp_path / "snips"), "https://"):
        assert part in message
    write(tmp_path)
    for options, text in (
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
        ({"queries": 0}, "queries must be .*got 0"),
        ({"seed": -1}, "seed must be .*got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            SnipsSlots(tmp_path, **options)
    path = tmp_path / FOLDER / "GetWeather/train_GetWeather.json"
    for content in ("{", "[]", '{"GetWeather": [{"data": [{"entity": "city"}]}]}', '{"Other": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"train_GetWeather\.json is damaged") as caught:
            SnipsSlots(tmp_path)
        assert "\n" not in str(caught.value)


def test_real_data():
    root = Path(os.environ.get("MTML_FAST_DATA", "/nowhere")) / "semantic_parsing"
    if not root.is_dir():
        pytest.skip("needs the real SNIPS data: set MTML_FAST_DATA to the folder that holds semantic_parsing/")
    snips = SnipsSlots(root)
    assert len(snips.train_queries) == 1 + 7 * 300
    assert len(snips.test_queries) == 1 + 7 * 100
    assert [(len(tags) - 1) // 2 for tags in snips.tags] == [5, 14, 9, 9, 7, 2, 7]
    # what "always outside" has right, as others count it
    outside = [round(float((snips.test.task(t)[1] == 0).double().mean()), 3) for t in range(7)]
    assert outside == [0.440, 0.589, 0.600, 0.549, 0.380, 0.540, 0.476]
    full = SnipsSlots(root, full=True)
    assert full.train_queries.numel() - 1 == 1942 + 1973 + 2000 + 2000 + 1956 + 1954 + 1959
    assert torch.equal(full.test.y, snips.test.y)
