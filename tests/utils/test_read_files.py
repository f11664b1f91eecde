"""Whatever a file holds, reading ends soon: with its content, or with a CheckpointError."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save

from moe_rewrite.errors import CheckpointError
from moe_rewrite.utils import read_files
from moe_rewrite.utils.read_files import parse_tensors, read_json, require_finite, shown


@pytest.mark.parametrize(("content", "words"), [
    (b"", "as JSON"), (b"{", "as JSON"), (b"\xff\xfe{}", "as JSON"), (b"{}{}", "as JSON"),
    (b"[" * 100_000, "as JSON"), (b"[" * 60 + b"]" * 60, "nest more than 50 deep"),
    (b'{"a": NaN}', "NaN is no number"), (b"[-Infinity]", "-Infinity is no number"),
    (b"[1e999]", "1e999 is no number"), (b"9" * 5000, "as JSON"),
])  # fmt: skip
def test_odd_json_is_refused(tmp_path, content, words):
    (tmp_path / "odd.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"odd\.json: .*{words}"):
        read_json(tmp_path / "odd.json")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a pipe"])
def test_what_is_no_plain_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = type(path)("/dev/zero")
    else:
        os.mkfifo(path)
        (tmp_path / "link").symlink_to(path)
        path = path if kind == "pipe" else tmp_path / "link"
    with pytest.raises(CheckpointError, match="is no plain file"):
        read_json(path)


def test_a_large_json_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(read_files, "LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text('"as long as allowed"')
    with pytest.raises(CheckpointError, match="20 bytes, expected 10 at most"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.complex64])
def test_nan_of_every_dtype_is_found(dtype):
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")]).to(dtype)}
    with pytest.raises(CheckpointError, match="here: b holds NaN or infinity"):
        require_finite(tensors, "here")


def test_infinities_are_allowed_by_name():
    tensors = {"mask": torch.tensor([0.0, float("-inf")])}
    require_finite(tensors, "here", lambda name: name == "mask")
    with pytest.raises(CheckpointError, match="mask"):
        require_finite(tensors, "here", lambda name: name == "other")
    with pytest.raises(CheckpointError, match="mask"):
        require_finite({"mask": tensors["mask"] * 0}, "here", lambda name: name == "mask")


def test_tensors_of_a_dtype_that_pytorch_does_not_have_are_refused():
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    for content in (struct.pack("<Q", len(header)) + header + b"1", save({})[:-1], b""):
        with pytest.raises(CheckpointError, match="here: not a safetensors file"):
            parse_tensors(content, "here")


def test_values_are_shown_in_bounded_length():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**6)), deep, {"a": "y" * 10**6}):
        assert len(shown(value)) < 500
    assert shown("LORA") == "'LORA'" and shown([1, "a"]) == "[1, 'a']"
