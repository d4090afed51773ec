"""Omniglot's files: find or download an archive, decode it once to 28x28, keep the result in a cache folder."""

from __future__ import annotations

import hashlib
import io
import os
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtml_fast.files import load_tensors, save_tensors, write_atomically

__all__ = ["SIDE", "load"]

# side of the images handed out; the originals have 105
SIDE = 28

_URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
_CHARACTERS = {"images_background": 964, "images_evaluation": 659}
_DRAWINGS = 20
_UNREADABLE = "cannot be read by Python's zipfile: unpack it yourself, or get the official archive"

# part of the cache key: to be raised with every change of the decoding
_CACHE_VERSION = 1


def load(root: str | os.PathLike, name: str, download: bool) -> tuple[Tensor, list[str], np.ndarray]:
    """`(images, characters, counts)` of "images_background" or "images_evaluation".

    Images are uint8 `[R, 28, 28]` with ink 255, ordered by character; characters are "ALPHABET/characterNN", sorted;
    counts `[C]` are the drawings of each, summing to R.
    """
    source = _find(Path(root).expanduser(), name, download)
    sizes = _list(source)
    paths = sorted(sizes)
    characters, counts = np.unique([path.rsplit("/", 1)[0] for path in paths], return_counts=True)
    if len(characters) != _CHARACTERS[name] or (counts != _DRAWINGS).any():
        warnings.warn(
            f"{source} holds {len(paths)} drawings of {len(characters)} characters, not the official set's {_DRAWINGS}"
            f" drawings of {_CHARACTERS[name]}: results will not compare with published ones",
            stacklevel=4,
        )
    key = hashlib.sha256(repr((_CACHE_VERSION, SIDE, sorted(sizes.items()))).encode()).hexdigest()[:16]
    cache = _cache_folder() / f"{name}-{key}.safetensors"
    images = _read_cache(cache)
    if images is None:
        images = torch.from_numpy(_decode(source, paths))
        _write_cache(cache, images)
    return images, characters.tolist(), counts


def _find(root: Path, name: str, download: bool) -> Path:
    folders = (root, root / "omniglot")
    for folder in folders:
        if (folder / f"{name}.zip").is_file():
            return folder / f"{name}.zip"
        if (folder / name).is_dir():
            return folder / name
    if download:
        return _download(root, name)
    raise FileNotFoundError(
        f"Omniglot's {name}.zip (or the unpacked folder {name}) is neither in {folders[0]} nor in {folders[1]}: "
        f"get it from {_URL}{name}.zip"
    )


def _list(source: Path) -> dict[str, int]:
    """ "ALPHABET/characterNN/NNNN_NN.png" -> size in bytes."""
    if source.is_dir():
        found = ((path.relative_to(source).parts, path.stat().st_size) for path in source.glob("*/*/*.png"))
    else:
        try:
            with zipfile.ZipFile(source) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{source} is damaged ({error}): delete it and get it again") from None
        except NotImplementedError as error:
            raise ValueError(f"{source} {_UNREADABLE} ({error})") from None
        found = ((tuple(entry.filename.split("/")[-3:]), entry.file_size) for entry in entries)
    # archives made on a Mac carry ._NAME.png beside NAME.png
    pictures = {"/".join(p): size for p, size in found if p[-1].endswith(".png") and not p[-1].startswith(".")}
    if not pictures:
        raise ValueError(f"{source} holds no ALPHABET/CHARACTER/*.png: delete it and get it again")
    return pictures


def _decode(source: Path, paths: list[str]) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("reading Omniglot needs pillow: pip install 'mtml_fast[train]'") from None
    images = np.empty((len(paths), SIDE, SIDE), np.uint8)
    reader = _read(source, paths)
    for i, path in enumerate(_progress(paths, f"decoding {source.name}")):
        try:
            with Image.open(io.BytesIO(next(reader))) as picture:
                # to grey first: pillow resamples 1-bit images by the nearest pixel, whatever filter is asked for
                grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        except (zipfile.BadZipFile, zlib.error, OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"{source} is damaged at {path} ({error}): delete it and get it again") from None
        # encrypted, or a compression that Python does not know (NotImplementedError, which is one)
        except RuntimeError as error:
            raise ValueError(f"{source} {_UNREADABLE} ({error})") from None
        # paper is 255 in the file, ink is 255 here
        images[i] = 255 - np.asarray(grey)
    return images


def _read(source: Path, paths: list[str]) -> Iterator[bytes]:
    if source.is_dir():
        yield from ((source / path).read_bytes() for path in paths)
        return
    with zipfile.ZipFile(source) as archive:
        entries = {"/".join(name.split("/")[-3:]): name for name in archive.namelist()}
        for path in paths:
            yield archive.read(entries[path])


def _progress(items: list[str], text: str):
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    # disable=None: silent where stderr is no terminal
    return tqdm(items, desc=text, unit="image", leave=False, disable=None)


def _cache_folder() -> Path:
    if folder := os.environ.get("MTML_FAST_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mtml_fast"


def _read_cache(path: Path) -> Tensor | None:
    """The images, or None where the file is missing or damaged."""
    try:
        return load_tensors(path)[0]["images"]
    except (OSError, ValueError):
        return None


def _write_cache(path: Path, images: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"images": images})
    except OSError as error:
        warnings.warn(
            f"the cache folder {path.parent} cannot be written ({error.strerror}): Omniglot will be decoded anew each "
            "time; set MTML_FAST_CACHE to a folder that can",
            stacklevel=5,
        )


def _download(root: Path, name: str) -> Path:
    url, path = f"{_URL}{name}.zip", root / f"{name}.zip"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise OSError(f"{url} cannot be downloaded ({error}): get it by other means and put it into {root}") from None
    # only what was downloaded is held against the official checksum: archives zipped anew have others
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != _MD5[name]:
        raise ValueError(f"{url} must have the MD5 checksum {_MD5[name]}, got {digest}: nothing was kept")
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path
