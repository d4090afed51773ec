"""SnipsSlots: which words of a spoken request fill which slot; one intent is one task with tags of its own."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtml_fast.data._episodes import check_int
from mtml_fast.tasks import TaskRows

__all__ = ["SnipsSlots"]

_URL = "https://github.com/sonos/nlu-benchmark"
_FOLDER = "2017-06-custom-intent-engines"
_INTENTS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)

# a query: its tokens and their tags
_Query = tuple[list[str], list[str]]


class SnipsSlots:
    """The tag of every token of a request: a slot begins (B), goes on (I), or none (O). Coucke et al., 2018.

    Reads INTENT/train_INTENT.json (300 requests), INTENT/train_INTENT_full.json (some 2,000, of which the former hold
    a part) and INTENT/validate_INTENT.json (100, the test) of 2017-06-custom-intent-engines, in `root` or in
    `root/snips`, for seven intents of 5, 14, 9, 9, 7, 2 and 7 slots.

    A token is what white space separates inside a piece of a request (a slot's words, or what is between two slots), so
    that every slot is whole tokens. Where one would be cut in "here?", that tells a tagger a little of the answer; of
    7,000 test tokens this concerns some 70.

    A token is a row of `len(features)` numbers below `vocabulary`, for an nn.Embedding: itself and the two before and
    after it, the first three and the last two and three letters, and the shape of three tokens ("Xx", "9:9"). The words
    of a position share their numbers with those of the others. A value that fewer than two training requests (of all
    intents) hold has the number of rare ones, so that what a tagger learns about rare words serves for unknown ones.

    Attributes:
        intents: names of the seven tasks.
        tags: the tags of each intent, "O" first: what the labels `y` count through.
        features: names of the columns of `x`.
        vocabulary: how many numbers `x` holds.
        train, test: rows of all intents, `x [R, F]` and `y [R]`, int64, request after request.
        train_queries, test_queries: offsets int64 `[Q + 1]` of the requests in these rows.

    Args:
        root: folder of the data.
        full: train on train_INTENT_full.json, else on train_INTENT.json.
        queries: train on so many requests of each intent, drawn by chance; `None`: on all.
        held_out: this share of the training requests stands in the place of the test ones, to choose settings without a
            look at these.
        seed: of what is drawn and held out.

    Raises:
        FileNotFoundError: data that is not there. ValueError: damaged data; else naming the argument.

    Source: Coucke et al., "Snips Voice Platform: an embedded spoken language understanding system for
    private-by-design voice interfaces", arXiv:1805.10190, 2018.

    Example:
        >>> snips = SnipsSlots("data")  # doctest: +SKIP
        >>> snips.tags[5]  # doctest: +SKIP
        ('O', 'B-object_name', 'I-object_name', 'B-object_type', 'I-object_type')
        >>> SnipsSlots("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: SNIPS's AddToPlaylist/train_AddToPlaylist.json is neither in no/such/folder/... nor in ...
    """

    intents = _INTENTS

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        full: bool = False,
        queries: int | None = None,
        held_out: float | None = None,
        seed: int = 0,
    ):
        if held_out is not None and not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {held_out!r}")
        seed = check_int("seed", seed, 0)
        train = [_read(root, intent, f"train_{intent}{'_full' * full}.json") for intent in _INTENTS]
        if held_out is None:
            test = [_read(root, intent, f"validate_{intent}.json") for intent in _INTENTS]
        else:
            shares = [max(1, round(len(each) * held_out)) for each in train]
            test, train = _split(train, shares, seed)
        # of all that is read: which slots an intent has is known before any request is
        slots = [
            sorted({tag[2:] for _, tags in a + b for tag in tags} - {""}) for a, b in zip(train, test, strict=True)
        ]
        if queries is not None:
            train, _ = _split(train, [check_int("queries", queries, 1)] * len(train), seed + 1)
        self.tags = [("O", *(f"{part}-{slot}" for slot in each for part in "BI")) for each in slots]
        self.features = tuple(name for name, _ in _FEATURES)
        numbers = _numbers(tokens for queries in train for tokens, _ in queries)
        self.vocabulary = len(numbers)
        self.train, self.train_queries = self._rows(train, numbers)
        self.test, self.test_queries = self._rows(test, numbers)

    def spans(self, labels: Tensor) -> list[set[tuple[int, int, str]]]:
        """The slots that labels `[R]` of the test rows mean, of each intent: (first row, row after the last, slot).

        Tags that follow no rule are read as they usually are: an I that does not go on with its slot begins one.
        """
        if not isinstance(labels, Tensor) or labels.shape != self.test.y.shape:
            shape = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be [{len(self.test.y)}], one a test row, got {shape}")
        starts = set(self.test_queries.tolist())
        found = []
        for tags, (first, stop) in zip(self.tags, pairwise(self.test.offsets.tolist()), strict=True):
            spans, begun, slot = set(), first, ""
            for row, label in enumerate([*labels[first:stop].tolist(), 0], first):
                tag = tags[label]
                if slot and (tag != f"I-{slot}" or row in starts):
                    spans.add((begun, row, slot))
                    slot = ""
                if tag != "O" and not slot:
                    begun, slot = row, tag[2:]
            found.append(spans)
        return found

    def __repr__(self) -> str:
        return f"SnipsSlots(train={self.train.counts.tolist()}, test={self.test.counts.tolist()})"

    def _rows(self, tasks: Sequence[list[_Query]], numbers: dict[_Key, int]) -> tuple[TaskRows, Tensor]:
        x, y = [], []
        for queries, tags in zip(tasks, self.tags, strict=True):
            label = {tag: i for i, tag in enumerate(tags)}
            x += [numbers.get(key, numbers[key[0], _RARE]) for tokens, _ in queries for key in _keys(tokens)]
            y += [label[tag] for _, tags in queries for tag in tags]
        rows = _offsets(sum(len(tokens) for tokens, _ in queries) for queries in tasks)
        each = _offsets(len(tokens) for queries in tasks for tokens, _ in queries)
        return TaskRows(torch.tensor(x).view(-1, len(_FEATURES)), torch.tensor(y), rows), each


def _shape(token: str) -> str:
    """Runs of capitals, small letters and digits as X, x and 9: "Xx" of "Boston", "9:9" of "10:19"."""
    kinds = ["X" if c.isupper() else "x" if c.isalpha() else "9" if c.isdigit() else c for c in token]
    return "".join(c for c, before in zip(kinds, ["", *kinds], strict=False) if c != before)


# what is said of a token: the place it is looked at relative to its own, and the kind
_FEATURES: list[tuple[str, tuple[int, str]]] = [
    ("word-2", (-2, "word")),
    ("word-1", (-1, "word")),
    ("word", (0, "word")),
    ("word+1", (1, "word")),
    ("word+2", (2, "word")),
    ("first three letters", (0, "prefix")),
    ("last two letters", (0, "suffix2")),
    ("last three letters", (0, "suffix3")),
    ("shape-1", (-1, "shape")),
    ("shape", (0, "shape")),
    ("shape+1", (1, "shape")),
]
_KINDS: dict[str, Callable[[str], str]] = {
    "word": str.lower,
    "prefix": lambda token: token.lower()[:3],
    "suffix2": lambda token: token.lower()[-2:],
    "suffix3": lambda token: token.lower()[-3:],
    "shape": _shape,
}
# kind and value of a feature; no token has the value of rare ones, and none but a place outside has ""
_Key = tuple[str, str]
_RARE, _OUTSIDE, _COMMON = "rare value", "", 2


def _keys(tokens: list[str]) -> list[_Key]:
    """The features of all tokens, token after token."""
    values = {kind: [value(token) for token in tokens] for kind, value in _KINDS.items()}
    count = len(tokens)
    return [
        (kind, values[kind][i + place] if 0 <= i + place < count else _OUTSIDE)
        for i in range(count)
        for _, (place, kind) in _FEATURES
    ]


def _numbers(queries: Iterable[list[str]]) -> dict[_Key, int]:
    """A number for every value that is not rare, for the rare ones of each kind, and for what is outside."""
    held = Counter(key for tokens in queries for key in set(_keys(tokens)))
    keys = {(kind, value) for kind in _KINDS for value in (_RARE, _OUTSIDE)}
    keys |= {key for key, count in held.items() if count >= _COMMON}
    return {key: i for i, key in enumerate(sorted(keys))}


def _offsets(counts: Iterable[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _split(tasks: Sequence[list[_Query]], counts: list[int], seed: int) -> tuple[list, list]:
    """So many requests of each task, drawn by chance, and the others; both in their order."""
    halves = [], []
    for t, (queries, count) in enumerate(zip(tasks, counts, strict=True)):
        order = np.random.default_rng([seed, t]).permutation(len(queries))
        for half, places in zip(halves, (order[:count], order[count:]), strict=True):
            half.append([queries[i] for i in np.sort(places)])
    return halves


def _read(root: str | os.PathLike, intent: str, name: str) -> list[_Query]:
    path = _find(Path(root).expanduser(), f"{intent}/{name}")
    try:
        queries = [_tagged(query["data"]) for query in json.loads(_text(path.read_bytes()))[intent]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): get it again from {_URL}") from None
    return [query for query in queries if query[0]]


def _find(root: Path, name: str) -> Path:
    folders = (root / _FOLDER, root / "snips" / _FOLDER)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"SNIPS's {name} is neither in {folders[0]} nor in {folders[1]}: get {_FOLDER} from {_URL} and put it there"
    )


def _text(content: bytes) -> str:
    """UTF-8; one file holds a character as two surrogates, which strict UTF-8 refuses; Latin-1 takes what is left."""
    try:
        pairs = content.decode("utf-8", "surrogatepass")
        return pairs.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _tagged(pieces: list[dict[str, str]]) -> _Query:
    tokens, tags = [], []
    for piece in pieces:
        words, slot = piece["text"].split(), piece.get("entity")
        tokens += words
        tags += [f"{'I' if i else 'B'}-{slot}" if slot else "O" for i in range(len(words))]
    return tokens, tags
