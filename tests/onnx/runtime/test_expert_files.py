"""Files of experts for a deployed model: every bit of them counts."""

import copy

import pytest
import torch
from networks import Network
from reference import randomize

import moe_rewrite
from moe_rewrite.errors import CheckpointError

onnx = pytest.importorskip("onnx")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_rewrite.onnx.runtime.expert_files import export_adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model, its file, a file of its experts)"""
    torch.manual_seed(0)
    x, folder = torch.randn(2, 6, 5), tmp_path_factory.mktemp("experts")
    moe = moe_rewrite.convert(
        Network(["Mlp", "Mlp"], tokens=False).eval(), split=1, example_inputs=x, num_experts=2
    )
    randomize(moe)
    moe_rewrite.export_onnx(
        moe, folder / "m.onnx", example_inputs=x, open_inputs=True, verify=False
    )
    moe_rewrite.onnx.export_experts(moe, folder / "experts.safetensors", x)
    return moe, folder / "m.onnx", folder / "experts.safetensors"


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()["moe_rewrite"]


def test_every_flipped_bit_is_noticed(files, tmp_path):
    _, path, experts = files
    assert moe_rewrite.onnx.load(path, experts).experts == ["expert0", "expert1"]
    content, changed = experts.read_bytes(), tmp_path / "changed.safetensors"
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(content), (100,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        changed.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            moe_rewrite.onnx.load(path, changed)


@pytest.mark.parametrize(("old", "new", "words"), [
    ('"expert1"', '"expert7"', "its metadata: changed since"), ('"experts"', '"names"', "changed since"),
    ('"sha256": {', '"other": {', "older version wrote it.*export the experts again"),
    ('"format": 1', '"format": 2', "format 2.*upgrade"), ('"format": 1', '"format": 1e999', "JSON"),
    (None, "[" * 100_000, "cannot be read as JSON"), (None, "[]", "not written by export_experts"),
])  # fmt: skip
def test_edited_metadata_is_refused(files, tmp_path, old, new, words):
    _, path, experts = files
    said = metadata(experts)
    assert old is None or old in said
    edited = new if old is None else said.replace(old, new)
    save_file(load_file(experts), tmp_path / "e.safetensors", {"moe_rewrite": edited})
    with pytest.raises(CheckpointError, match=words):
        moe_rewrite.onnx.load(path, tmp_path / "e.safetensors")


def test_experts_that_diverged_are_refused(files, tmp_path):
    moe, path, _ = files
    moe = copy.deepcopy(moe)
    with torch.no_grad():
        moe.expert_sites()[0].b[0].fill_(float("inf"))
    moe_rewrite.onnx.export_experts(moe, tmp_path / "e.safetensors", torch.randn(2, 6, 5))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        moe_rewrite.onnx.load(path, tmp_path / "e.safetensors")


def test_metadata_of_other_tools_is_let_be(files, tmp_path):
    """ONNX Runtime's quantizer writes an entry that is no JSON."""
    model = onnx.load(files[1])
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    onnx.save(model, tmp_path / "m.onnx")
    assert moe_rewrite.onnx.load(tmp_path / "m.onnx").experts == ["expert0", "expert1"]


def test_writing_an_adapter_leaves_nothing_else(files, tmp_path, monkeypatch):
    """Another process may write the same file: each writes to a folder of its own first."""
    other = tmp_path / ".one.onnx_adapter.part"
    other.write_text("another process's")
    export_adapter(files[0], 0, tmp_path / "one.onnx_adapter", torch.randn(2, 6, 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "one.onnx_adapter"]
    assert other.read_text() == "another process's"
