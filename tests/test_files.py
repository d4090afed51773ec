"""Files: what goes in comes out bit for bit, and no damaged or foreign file hands out anything."""

import json
import os
import resource
import signal

import pytest
import torch

from mtml_fast.files import load_tensors, save_tensors, write_atomically

METADATA = {
    "step": 3,
    "rng": [2**32 - 1, 2**63, -(2**200)],
    "lr": 0.1 + 0.2,
    "nothing": None,
    "yes": True,
    "text": 'ü "quoted" \u2603 \n\\',
    "tree": {"a": [1, [2.5, {"b": []}]], "": {}},
}


def tensors_of_every_kind():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (6, 8), dtype=torch.uint8, generator=generator)
    return {
        "bool": bits > 127,
        "uint8": bits,
        "int8": bits.view(torch.int8),
        "int16": bits.view(torch.int16),
        "int32": bits.view(torch.int32),
        "int64": bits.view(torch.int64),
        # random bits hold infinities and NaN payloads, which must survive as well
        "float16": bits.view(torch.float16),
        "bfloat16": bits.view(torch.bfloat16),
        "float32": bits.view(torch.float32),
        "float64": bits.view(torch.float64),
        "zero_dim": torch.tensor(1.5, dtype=torch.float64),
        "zero_dim_bool": torch.tensor(True),
        "empty": torch.zeros(3, 0, 2),
        "no_rows": torch.zeros(0, dtype=torch.int64),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "expanded": torch.ones(1, 1).expand(3, 4),
        "with_grad": torch.ones(2, requires_grad=True),
        "odd ünicode.name": torch.ones(1),
    }


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.detach().contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def small_file(path):
    save_tensors(path, {"w": torch.arange(5.0), "mask": torch.tensor([True, False, True])}, {"step": 7})
    return path


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "state.safetensors"
    tensors = tensors_of_every_kind()
    save_tensors(path, tensors, METADATA)
    loaded, metadata = load_tensors(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(tensor, loaded[name]), name
    assert metadata == METADATA
    assert json.dumps(metadata) == json.dumps(METADATA)


@pytest.mark.parametrize("value", [float("inf"), -0.0, 5e-324, 10**300])
def test_extreme_numbers_survive(tmp_path, value):
    save_tensors(tmp_path / "f", {}, {"value": value})
    assert repr(load_tensors(tmp_path / "f")[1]["value"]) == repr(value)


def test_no_tensors_and_no_metadata(tmp_path):
    save_tensors(tmp_path / "f", {})
    assert load_tensors(tmp_path / "f") == ({}, {})


def test_same_content_gives_same_bytes(tmp_path):
    a, b = small_file(tmp_path / "a").read_bytes(), small_file(tmp_path / "b").read_bytes()
    assert a == b


def test_loaded_tensors_own_their_memory(tmp_path):
    loaded, _ = load_tensors(small_file(tmp_path / "f"))
    storages = {tensor.untyped_storage().data_ptr() for tensor in loaded.values()}
    assert len(storages) == len(loaded)
    loaded["w"].add_(1)


def test_safetensors_reads_our_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "state.safetensors"
    tensors = tensors_of_every_kind()
    save_tensors(path, tensors, METADATA)
    read = safetensors.load_file(path)
    for name, tensor in tensors.items():
        assert same_bits(tensor, read[name]), name


def test_every_flipped_byte_is_found(tmp_path):
    good = small_file(tmp_path / "good").read_bytes()
    path = tmp_path / "flipped"
    for place in range(len(good)):
        for flip in (1, 0x20, 0x80, 0xFF):
            path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
            with pytest.raises(ValueError, match="flipped") as error:
                load_tensors(path)
            assert "\n" not in str(error.value)


def test_every_truncation_and_every_extra_byte_is_found(tmp_path):
    good = small_file(tmp_path / "good").read_bytes()
    path = tmp_path / "cut"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"cut.*(damaged|not a file of mtml_fast)"):
            load_tensors(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match="cut is damaged: 1 bytes follow the last tensor"):
        load_tensors(path)


def test_the_damaged_tensor_is_named(tmp_path):
    path = small_file(tmp_path / "f")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="f is damaged: tensor 'mask' does not have the checksum"):
        load_tensors(path)


def test_swapped_tensors_are_found(tmp_path):
    path = tmp_path / "f"
    save_tensors(path, {"a": torch.zeros(2), "b": torch.ones(2)})
    content = path.read_bytes()
    path.write_bytes(content[:-16] + content[-8:] + content[-16:-8])
    with pytest.raises(ValueError, match="tensor 'a'"):
        load_tensors(path)


def test_foreign_files_are_named_for_what_they_are(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "foreign"
    safetensors.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"foreign is not a file of mtml_fast.*plain safetensors"):
        load_tensors(path)
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"foreign is not a file of mtml_fast.*torch\.save"):
        load_tensors(path)
    path.write_text("step,loss\n1,0.5\n")
    with pytest.raises(ValueError, match=r"foreign is not a file of mtml_fast.*step,los"):
        load_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"foreign is not a file of mtml_fast.*empty"):
        load_tensors(path)
    with pytest.raises(OSError, match="cannot be read"):
        load_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {1: 2}}, r"metadata\['a'\] must have str keys, got 1"),
        ({"a": [0, (1, 2)]}, r"metadata\['a'\]\[1\] must be what JSON can hold, got tuple"),
        ({"a": torch.ones(1)}, r"metadata\['a'\] must be what JSON can hold, got Tensor"),
    ],
)
def test_metadata_that_would_change_is_refused(tmp_path, metadata, message):
    with pytest.raises(TypeError, match=message):
        save_tensors(tmp_path / "f", {}, metadata)
    assert os.listdir(tmp_path) == []


def test_tensors_that_a_file_cannot_hold_are_named(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(TypeError, match=r"tensors\['z'\] must be a dense .* got torch.complex64"):
        save_tensors(path, {"z": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(TypeError, match=r"tensors\['z'\] must be a dense .* got torch.sparse_coo"):
        save_tensors(path, {"z": torch.eye(2).to_sparse()})
    with pytest.raises(TypeError, match=r"tensors\['z'\] must be a torch.Tensor, got list"):
        save_tensors(path, {"z": [1]})
    with pytest.raises(TypeError, match="names other than '__metadata__'"):
        save_tensors(path, {"__metadata__": torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone/f cannot be written: No such file"):
        save_tensors(tmp_path / "gone" / "f", {})


def test_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = small_file(tmp_path / "f")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file size limit makes a real write stop in the middle, as a full disk does
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="f cannot be written: File too large"):
            save_tensors(path, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_writing_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_bytes() == b"old"
