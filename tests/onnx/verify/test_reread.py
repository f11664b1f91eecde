"""Rereading written files: the twin that is verified equals the file on the disk."""

from types import SimpleNamespace

import pytest
import torch

from moe_rewrite.errors import EquivalenceError

onnx = pytest.importorskip("onnx")
from moe_rewrite.onnx.file.protobuf import PAGE
from moe_rewrite.onnx.file.write import write_model
from moe_rewrite.onnx.verify.compare_with_torch import check_file
from moe_rewrite.onnx.verify.reread import weights_match, write_external_view
from moe_rewrite.utils.tensor_bytes import tensor_bytes

WEIGHTS = {
    "large": torch.randn(40, 60), "page": torch.randn(PAGE // 4), "small": torch.randn(3, 2),
    "half": torch.randn(70, 50).bfloat16(), "ids": torch.arange(600), "none": torch.randn(0, 4),
    "one": torch.tensor(2.5), "on": torch.ones(5, dtype=torch.bool),
}  # fmt: skip


def written(folder, external=False):
    """A file that reads every weight."""
    op = onnx.helper.make_node
    nodes = [op("Identity", [name], [f"{name}_out"]) for name in WEIGHTS]
    kinds = {torch.bfloat16: 16, torch.int64: 7, torch.bool: 9, torch.float32: 1}
    outputs = [
        onnx.helper.make_tensor_value_info(f"{name}_out", kinds[w.dtype], w.shape)
        for name, w in WEIGHTS.items()
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [], outputs)
    opset = onnx.helper.make_opsetid("", 20)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    path = folder / "m.onnx"
    write_model(SimpleNamespace(model=model, weights=WEIGHTS), path, external)
    return path


@pytest.mark.parametrize("external", [False, True])
def test_twin_and_file_are_one_model(external, tmp_path):
    path, twin = written(tmp_path, external), tmp_path / "twin.onnx"
    ranges = write_external_view(path, twin)
    assert weights_match(ranges, WEIGHTS, tmp_path)
    check_file(twin)
    seen = []
    for file in (path, twin):
        model = onnx.load(file)
        for tensor in model.graph.initializer:
            tensor.ClearField("data_location")
        seen.append(model)
    assert seen[0] == seen[1]
    assert {t.name: t.raw_data for t in seen[0].graph.initializer} == {
        n: bytes(tensor_bytes(w)) for n, w in WEIGHTS.items()
    }
    left = {t.name for t in onnx.load(twin, load_external_data=False).graph.initializer
            if t.external_data}  # fmt: skip
    assert left == (set(WEIGHTS) if external else {"large", "page", "half", "ids"})


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", ["large", "small", "half", "on"])
def test_one_bit_is_seen(name, external, tmp_path):
    path = written(tmp_path, external)
    (file,) = tmp_path.glob("*.data") if external else [path]
    content = bytearray(file.read_bytes())
    content[content.index(bytes(tensor_bytes(WEIGHTS[name])))] ^= 1
    file.write_bytes(content)
    assert not weights_match(write_external_view(path, tmp_path / "twin.onnx"), WEIGHTS, tmp_path)


def test_names_and_lengths_are_seen(tmp_path):
    path, twin = written(tmp_path), tmp_path / "twin.onnx"
    path.write_bytes(path.read_bytes().replace(b"large", b"other"))
    assert not weights_match(write_external_view(path, twin), WEIGHTS, tmp_path)
    ranges = write_external_view(written(tmp_path), twin)
    assert not weights_match(ranges, WEIGHTS | {"small": torch.randn(3, 1)}, tmp_path)
    assert not weights_match(ranges, {n: w for n, w in WEIGHTS.items() if n != "one"}, tmp_path)


@pytest.mark.parametrize("spoil", [
    lambda content: content[:-3],
    lambda content: content + b"\x3a",  # a field without its length
    lambda content: content + b"\x3a\x05abc",  # shorter than it says
    lambda content: content + b"\x3b\x01a",  # of an unknown wire type
    lambda content: content + b"\xff" * 20,  # a varint without end
])  # fmt: skip
def test_anything_but_a_sequence_of_fields_is_an_error(spoil, tmp_path):
    path = written(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(EquivalenceError, match="m.onnx as written is no ONNX file, at byte"):
        write_external_view(path, tmp_path / "twin.onnx")


def test_a_field_more_is_in_the_twin_too(tmp_path):
    path, twin = written(tmp_path), tmp_path / "twin.onnx"
    graph = onnx.GraphProto(node=[onnx.NodeProto(op_type="Nothing")])
    path.write_bytes(path.read_bytes() + onnx.ModelProto(graph=graph).SerializeToString())
    assert weights_match(write_external_view(path, twin), WEIGHTS, tmp_path)
    with pytest.raises(EquivalenceError, match="no valid ONNX model"):
        check_file(twin)
