"""Files: tensors and JSON in safetensors bytes that carry their own checksums, written whole or not at all.

A file is what safetensors defines: 8 bytes with the length of the header, the header in JSON, the tensors' bytes. Its
`__metadata__` starts with the format and the SHA-256 of the header (with 64 zeros in the digest's place), then holds
the SHA-256 of every tensor and the caller's metadata as JSON. Any safetensors reader can open it; `load_tensors`
checks every byte before it hands out anything. There is no pickle: nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_tensors", "save_tensors", "write_atomically"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMED_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

# the digest stands at a fixed place, so that the header is checked before any of it is parsed
_HEADER_START = b'{"__metadata__":{"format":"mtml_fast 1","checksum":"'
_DIGEST = slice(len(_HEADER_START), len(_HEADER_START) + 64)


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write named tensors and JSON metadata to one checksummed safetensors file, whole or not at all.

    Args:
        path: the file; it is replaced in one step, so a crash leaves either the old file or the new one.
        tensors: name -> tensor of any shape, on any device, of a float, integer or bool type.
        metadata: what JSON can hold (dicts with str keys, lists, str, int of any size, float, bool, None).

    Raises:
        TypeError: naming the tensor or the metadata entry that a file cannot hold.
        OSError: naming the file, where it cannot be written (no folder, no permission, disk full).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "state.safetensors"
        >>> save_tensors(path, {"w": torch.tensor([1.0, 2.0])}, {"step": 2**70})
        >>> load_tensors(path)
        ({'w': tensor([1., 2.])}, {'step': 1180591620717411303424})
    """
    metadata = {} if metadata is None else metadata
    _check_json(metadata, "metadata")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"tensors must have str names other than '__metadata__', got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors['{name}'] must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise TypeError(f"tensors['{name}'] must be a dense float, integer or bool tensor, got {_kind(tensor)}")

    # the widest types first: every tensor then starts at a multiple of its item size
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    data = {name: _to_bytes(tensors[name]) for name in names}
    checksums = {name: hashlib.sha256(data[name]).hexdigest() for name in names}
    described = {"tensors": json.dumps(checksums), "metadata": json.dumps(metadata)}
    contents = {"__metadata__": {"format": "mtml_fast 1", "checksum": "0" * 64, **described}}
    stop = 0
    for name in names:
        start, stop = stop, stop + len(data[name])
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        contents[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    header = json.dumps(contents, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = header[: _DIGEST.start] + hashlib.sha256(header).hexdigest().encode() + header[_DIGEST.stop :]
    write_atomically(path, struct.pack("<Q", len(header)), header, *data.values())


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`: `(tensors, metadata)`, on the CPU, after every checksum held.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and what is wrong: damaged, cut short, or not written by `save_tensors`.

    Example:
        >>> load_tensors("nowhere.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: nowhere.safetensors does not exist
    """
    path = Path(path)
    try:
        content = bytearray(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read: {error.strerror}") from None
    length = int.from_bytes(content[:8], "little")
    header = bytes(content[8 : 8 + length])
    if not header.startswith(_HEADER_START):
        raise ValueError(f"{path} is not a file of mtml_fast, or the start of it is damaged{_guess(content, header)}")
    if len(header) < length:
        raise ValueError(f"{path} is damaged: cut short inside its header, {len(content)} bytes are left")
    digest, blank = header[_DIGEST], header[: _DIGEST.start] + b"0" * 64 + header[_DIGEST.stop :]
    if hashlib.sha256(blank).hexdigest().encode() != digest:
        raise ValueError(f"{path} is damaged: its header does not have the checksum that it states")

    try:
        entries = json.loads(header)
        described = entries.pop("__metadata__")
        checksums, metadata = json.loads(described["tensors"]), json.loads(described["metadata"])
        body, end = memoryview(content)[8 + length :], 0
        tensors = {}
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            if start != end or stop > len(body):
                raise ValueError(f"tensor '{name}' should be bytes {start}..{stop} of {len(body)}, after byte {end}")
            if hashlib.sha256(body[start:stop]).hexdigest() != checksums[name]:
                raise ValueError(f"tensor '{name}' does not have the checksum that the header states")
            tensors[name] = _from_bytes(body[start:stop], _NAMED_DTYPES[entry["dtype"]], entry["shape"])
            end = stop
        if end != len(body):
            raise ValueError(f"{len(body) - end} bytes follow the last tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return tensors, metadata


def write_atomically(path: str | os.PathLike, *chunks: bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, fsync, rename, fsync of the folder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, b"all of it, ", b"or nothing")
        >>> path.read_text()
        'all of it, or nothing'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # the rename itself is on the disk only after the folder is; Windows cannot open folders
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        # OSError picks its subclass (FileNotFoundError, PermissionError, ...) by the number
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from None


def _to_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _from_bytes(data: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size != len(data):
        raise ValueError(f"a {dtype} tensor of shape {shape} has {size} bytes, got {len(data)}")
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).numpy()[:] = data
    return tensor


def _check_json(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{place} must have str keys, got {key!r}")
            _check_json(item, f"{place}['{key}']")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{place}[{i}]")
    # exact types: a subclass (numpy.float64, an enum) would come back as something else
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{place} must be what JSON can hold, got {type(value).__name__}")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)


def _guess(content: bytes, header: bytes) -> str:
    if content[:4] == b"PK\x03\x04":
        return " (it looks like a zip archive: torch.save or numpy.savez?)"
    if header[:1] == b"{":
        return " (it looks like a plain safetensors file without checksums)"
    return f" (its first bytes are {bytes(content[:8])!r})" if content else " (it is empty)"
