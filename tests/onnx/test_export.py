"""Exported files: equal to PyTorch, whole or absent, named, with experts that come later."""

import copy
import json
from functools import partial

import architectures
import numpy as np
import pytest
import torch
from reference import randomize
from typer.testing import CliRunner

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.cli import main
from moe_rewrite.errors import CheckpointError, ConfigError, EquivalenceError

onnx = pytest.importorskip("onnx")
from moe_rewrite.onnx import export
from moe_rewrite.onnx.verify import compare_with_torch
from moe_rewrite.utils.tensor_bytes import tensor_bytes


def converted(router="auto", experts=3, name="Llama", off=1):
    model = architectures.build(name, layers=2)
    moe = moe_rewrite.convert(model, split=1, num_experts=experts, router=router, verify=False)
    randomize(moe)
    if off is not None:
        moe.deactivate(off)
    return moe.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(model, path, report): top-2 of two active experts and the base, one more expert off."""
    moe = converted(TokenRouter(top_k=2, granularity="prefix"))
    path = tmp_path_factory.mktemp("onnx") / "llama.onnx"
    report = moe_rewrite.export_onnx(moe, path, open_inputs=True)
    return moe, path, report


def call(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_file_is_the_model_on_other_sizes(llama):
    moe, path, report = llama
    loaded = moe_rewrite.onnx.load(path)
    for batch, length in ((1, 1), (4, 17)):
        given = call(batch, length)
        want = moe(**given, use_cache=False).logits
        torch.testing.assert_close(loaded(**given)["logits"], want, rtol=1e-4, atol=1e-4)
    assert report.max_error < 1e-5 and len(report.checks) == 5
    assert report.experts == ["expert0", "expert2"] and report.left_out == ["expert1"]
    assert "expert1" in str(report) and "left padding" in str(report)


def test_names_and_report_are_in_the_file(llama):
    moe, path, _ = llama
    model = onnx.load(path)
    names = {t.name for t in model.graph.initializer}
    state = moe.state_dict()
    weights = {n for n in names if n.startswith(("model.", "lm_head."))}
    assert len(weights) > 15 and weights <= set(state) | {"model.rotary_emb.inv_freq"}
    assert "moe_rewrite.experts.model.layers.1.mlp.up_proj.a" in names
    assert [o.name for o in model.graph.output] == ["logits"]
    said = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert said["moe_rewrite.recipe"]["split"] == "model.layers.1"
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    onnx.checker.check_model(model, full_check=True)


def test_more_experts_than_exported_come_from_a_file(llama, tmp_path):
    moe, path, _ = llama
    moe_rewrite.onnx.export_experts(moe, tmp_path / "two.safetensors")
    more = converted(TokenRouter(top_k=2, granularity="prefix"), experts=4, off=None)
    moe_rewrite.onnx.export_experts(more, tmp_path / "four.safetensors")
    given = call(2, 9)
    for source, file in ((moe, "two"), (more, "four")):
        loaded = moe_rewrite.onnx.load(path, experts=tmp_path / f"{file}.safetensors")
        want = source(**given, use_cache=False).logits
        torch.testing.assert_close(loaded(**given)["logits"], want, rtol=1e-4, atol=1e-4)
    assert loaded.experts == more.names
    assert (
        more(**given, use_cache=False).logits - moe(**given, use_cache=False).logits
    ).abs().max() > 0.01


def test_one_expert_as_an_adapter_of_onnx_runtime(llama, tmp_path):
    import onnxruntime as ort

    from moe_rewrite.onnx.runtime.expert_files import export_adapter

    moe, path, _ = llama
    export_adapter(moe, "expert1", tmp_path / "one.onnx_adapter")
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "one.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    given = call(2, 5)
    session = moe_rewrite.onnx.load(path).session
    got = session.run(None, {k: v.numpy() for k, v in given.items()}, options)[0]
    with moe.use_expert("expert1"):
        want = moe(**given, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


def tampered_constant(model):
    """A constant inside a node, stored in another folder."""
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../weights.data")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def negative_place(model):
    tensor = model.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "m.data"), ("offset", "-8"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)


def function(model):
    model.functions.add(name="f", domain="d")


def newer(model):
    model.ir_version = 99


def flipped(whole, changed):
    content = bytearray(whole.read_bytes())
    content[-2] ^= 1
    changed.write_bytes(content)


def rewritten(whole, changed, edit):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(whole)
    edit(tensors)
    with safe_open(whole, "pt") as opened:
        save_file(tensors, changed, opened.metadata())


def swapped(whole, changed):
    def edit(tensors):
        by_shape = {}
        for name, tensor in tensors.items():
            by_shape.setdefault(tuple(tensor.shape), []).append(name)
        one, two = next(names for names in by_shape.values() if len(names) > 1)[:2]
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()

    rewritten(whole, changed, edit)


def diverged(whole, changed):
    rewritten(whole, changed, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


def test_wrong_files_are_refused_with_a_reason(llama, tmp_path):
    moe, path, _ = llama
    load = moe_rewrite.onnx.load
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "absent.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not an ONNX file|not written by"):
        load(tmp_path / "noise.onnx")
    (tmp_path / "half.onnx").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        load(tmp_path / "half.onnx")
    for key, value, words in (
        ("moe_rewrite.format", "2", "upgrade"),
        ("moe_rewrite.format", "{", "cannot be read as JSON"),
        ("moe_rewrite.stacks", '{"lm_head.weight": [7, 1]}', "malformed"),
    ):
        model = onnx.load(path)
        next(p for p in model.metadata_props if p.key == key).value = value
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "changed.onnx")
    for place in ("../weights.data", "/etc/passwd", "absent.data"):
        model = onnx.load(path)
        tensor = model.graph.initializer[-1]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
        onnx.save_model(model, tmp_path / "changed.onnx")
        with pytest.raises(CheckpointError, match="same folder|missing"):
            load(tmp_path / "changed.onnx")
    for change, words in ((tampered_constant, "same folder"), (negative_place, "malformed"),
                          (function, "functions"), (newer, "cannot open")):  # fmt: skip
        model = onnx.load(path)
        change(model)
        onnx.save_model(model, tmp_path / "changed.onnx")
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "changed.onnx")
    whole = tmp_path / "own.safetensors"
    moe_rewrite.onnx.export_experts(moe, whole)
    for change in (flipped, swapped, diverged):
        change(whole, tmp_path / "changed.safetensors")
        with pytest.raises(CheckpointError, match="changed since it was written"):
            load(path, experts=tmp_path / "changed.safetensors")
    other = converted(TokenRouter(top_k=2, granularity="token"), name="GPT2")
    moe_rewrite.onnx.export_experts(other, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another base model"):
        load(path, experts=tmp_path / "other.safetensors")


def test_a_difference_leaves_the_old_file_and_nothing_else(llama, tmp_path, monkeypatch):
    moe = llama[0]
    target = tmp_path / "m.onnx"
    target.write_bytes(b"before")
    real = export.translate

    def wrong(*given):
        skeleton = real(*given)
        name = "model.norm.weight"
        skeleton.weights[name] = skeleton.weights[name] * 1.5
        return skeleton

    monkeypatch.setattr(export, "translate", wrong)
    with pytest.raises(EquivalenceError, match="logits"):
        moe_rewrite.export_onnx(moe, target)
    assert target.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    "external,dtype", [(False, "float16"), pytest.param(True, None, marks=pytest.mark.sweep)]
)
def test_weights_are_verified_without_a_copy(
    external, dtype, llama, tmp_path, tmp_path_factory, monkeypatch
):
    """ONNX Runtime reads the model's own memory, and the file is compared with it."""
    taken, real = [], compare_with_torch.open_session
    run = tmp_path_factory.mktemp("run") / "m.onnx"

    def watched(path, replaced, shared, options, **given):
        taken.append(set(shared))
        options.optimized_model_filepath = str(run)
        return real(path, replaced, shared=shared, options=options, **given)

    monkeypatch.setattr(compare_with_torch, "open_session", watched)
    target = tmp_path / "m.onnx"
    moe_rewrite.export_onnx(llama[0], target, external_data=external, dtype=dtype)
    assert len(list(tmp_path.iterdir())) == 1 + external
    assert "model.embed_tokens.weight" in taken[0] and taken[0] == taken[1]
    graph = onnx.load(run, load_external_data=False).graph
    large = {i.data_type for i in graph.initializer if np.prod(i.dims) >= 1024}
    assert large == {onnx.TensorProto.FLOAT16 if dtype else onnx.TensorProto.FLOAT}
    given = call(2, 9)
    want, got = (
        llama[0](**given, use_cache=False).logits,
        moe_rewrite.onnx.load(target)(**given)["logits"],
    )
    tolerance = 1e-4 if dtype is None else 2e-2
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.sweep
def test_a_cast_copy_is_the_cast_model():
    """Names, dtypes, tied weights and all that a file holds; the model stays as it was."""
    moe = moe_rewrite.convert(architectures.build("GPT2"), split=1, num_experts=2, verify=False)
    randomize(moe)
    before = {n: t.clone() for n, t in moe.state_dict(keep_vars=True).items()}
    want, got = copy.deepcopy(moe).half(), export._cast(moe, torch.float16)
    assert got.dtype == torch.float16 and got.router.rows[0].dtype == torch.float32
    for name, tensor in want.state_dict(keep_vars=True).items():
        copied = got.state_dict(keep_vars=True)[name]
        assert type(copied) is type(tensor) and copied.requires_grad == tensor.requires_grad
        assert copied.dtype == tensor.dtype and torch.equal(copied, tensor), name
    assert len({id(p) for p in got.parameters()}) == len({id(p) for p in want.parameters()})
    assert torch.equal(got(**call(2, 6)).logits, want(**call(2, 6)).logits)
    for name, tensor in moe.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


def test_a_file_that_lost_a_bit_is_an_error(llama, tmp_path, monkeypatch):
    real = export.write_model

    def spoilt(skeleton, path, external):
        real(skeleton, path, external)
        content = bytearray(path.read_bytes())
        content[
            content.index(bytes(tensor_bytes(skeleton.weights["model.embed_tokens.weight"])))
        ] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(export, "write_model", spoilt)
    with pytest.raises(EquivalenceError, match="does not hold the weights"):
        moe_rewrite.export_onnx(llama[0], tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.sweep
def test_external_weights_are_replaced_with_their_model(tmp_path):
    moe = converted(TokenRouter(granularity="token"))
    given, target = call(3, 6), tmp_path / "m.onnx"
    for change in (0.0, 0.5):
        with torch.no_grad():
            moe.router.rows[0].add_(change)
        moe_rewrite.export_onnx(moe, target, external_data=True, verify=False)
        assert len(list(tmp_path.iterdir())) == 2
        want = moe(**given, use_cache=False).logits
        got = moe_rewrite.onnx.load(target)(**given)["logits"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_wrong_options_are_refused_before_any_work(llama, tmp_path):
    moe = llama[0]
    for path, options, words in (
        ("m.txt", {}, "ends in .onnx"),
        ("m.onnx", {"opset": 12}, "opset"),
        ("m.onnx", {"lowering": "contrib"}, "LoRAExperts are written as 'dense'"),
        ("m.onnx", {"lowering": "fast"}, "lowering='fast'"),
        ("m.onnx", {"dtype": torch.int8}, "dtype"),
    ):
        with pytest.raises(ConfigError, match=words):
            moe_rewrite.export_onnx(moe, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_command_writes_what_the_saved_experts_compute(tmp_path, monkeypatch):
    run = partial(CliRunner().invoke, main.app)
    spec = "factories:mlp"
    moe = converted(TokenRouter(top_k=2, granularity="prefix"), off=None)
    monkeypatch.setattr("factories.mlp", moe.to_dense)
    moe.save_pretrained(tmp_path / "experts")
    saved = ["--experts", str(tmp_path / "experts")]
    path = tmp_path / "m.onnx"
    done = run(["export", spec, *saved, "--out", str(path), "--open-inputs", "--opset", "21"])
    assert done.exit_code == 0, done.output
    assert "left padding" in done.output and onnx.load(path).opset_import[0].version == 21
    given = call(2, 5)
    loaded = moe_rewrite.onnx.load(path)
    want = moe(**given, use_cache=False).logits
    torch.testing.assert_close(loaded(**given)["logits"], want, rtol=1e-4, atol=1e-4)
    small = tmp_path / "experts.safetensors"
    assert run(["export", spec, *saved, "--out", str(small), "--experts-only"]).exit_code == 0
    again = moe_rewrite.onnx.load(path, experts=small)(**given)["logits"]
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)
    one = tmp_path / "one.onnx_adapter"
    assert run(["export", spec, *saved, "--out", str(one), "--adapter", "expert1"]).exit_code == 0
    assert one.stat().st_size > 1000 and small.stat().st_size < path.stat().st_size
    wrong = run(["export", spec, *saved, "--out", str(tmp_path / "m.txt")])
    assert isinstance(wrong.exception, ConfigError) and "ends in .onnx" in str(wrong.exception)
