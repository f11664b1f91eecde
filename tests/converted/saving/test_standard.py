"""Checkpoints of transformers' own classes: written, read without this package, and read back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from standard import BASES, IDS, dense, logits, train, trained
from sweeps import some

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, TokenRouter
from moe_rewrite.errors import CheckpointError, ConfigError, ConversionError, EquivalenceError

READER = """
import sys
sys.modules["moe_rewrite"] = None
import torch, transformers
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        made = {n: model.eval()(input_ids=ids[:, :n]).logits for n in (1, 9, 40)}
    made["generated"] = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    torch.save(made, folder + "/logits.pt")
"""
CASES = {
    ("Llama", 0, "softmax"): "mixtral", ("Llama", 1, "softmax"): "qwen2_moe",
    ("Llama", 1, "sigmoid"): "glm4_moe", ("SmolLM", 0, "softmax"): "mixtral",
    ("SmolLM", 1, "softmax"): "qwen2_moe", ("Mistral", 0, "softmax"): "mixtral",
    ("Mistral", 1, "softmax"): "qwen2_moe", ("Qwen2", 1, "softmax"): "qwen2_moe",
    ("Qwen2.5", 1, "softmax"): "qwen2_moe", ("Qwen3", 1, "softmax"): "qwen3_moe",
    ("GLM", 1, "sigmoid"): "glm4_moe", ("Llama3Rope", 0, "softmax"): "mixtral",
    ("LlamaGelu", 1, "softmax"): "qwen2_moe",
}  # fmt: skip
FEW = [("Llama", 1, "softmax"), ("GLM", 1, "sigmoid")]
REST = [case for case in CASES if case not in FEW]
LAYER, LAYERED = {"base": False, "normalize": False}, FFNExperts(num=3, router="layer")


def read_elsewhere(folders):
    """Every folder's logits, from a process in which this package cannot be imported."""
    place = folders[0].parent
    torch.save(IDS, place / "ids.pt")
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", READER, str(place / "ids.pt"), *map(str, folders)]
    subprocess.run(command, check=True, cwd=place, env=keep, capture_output=True, text=True)
    return [torch.load(folder / "logits.pt") for folder in folders]


@pytest.mark.parametrize("cases", [FEW, pytest.param(REST, marks=pytest.mark.sweep)], ids=["few", "rest"])  # fmt: skip
def test_folders_are_read_without_this_package_and_come_back_bitwise(cases, tmp_path):
    folders = [tmp_path / str(i) for i in range(len(cases))]
    for case, folder in zip(cases, folders, strict=True):
        moe = trained(*case)
        assert moe.save_standard(folder) == CASES[case]
        assert {"config.json", "model.safetensors", "generation_config.json"} <= set(os.listdir(folder))  # fmt: skip
    for case, folder, made in zip(cases, folders, read_elsewhere(folders), strict=True):
        moe = trained(*case)
        for length in (1, 9, 40):
            torch.testing.assert_close(made[length], logits(moe, length), rtol=0, atol=1e-5)
        if case == FEW[0]:
            ids = moe.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
            assert torch.equal(made["generated"], ids)
        assert (logits(moe, 40) - logits(dense(case[0]), 40)).abs().max() > 0.05
        back = moe_rewrite.from_standard(folder, dense(case[0]))
        assert torch.equal(logits(back, 40), logits(moe, 40))
        assert back.save_standard(folder.with_suffix(".again")) == CASES[case]
        for name in ("model.safetensors", "config.json"):
            again = folder.with_suffix(".again") / name
            assert (folder / name).read_bytes() == again.read_bytes()


@pytest.mark.parametrize("base", some(BASES, []))
def test_every_layer_dense_but_one(base, tmp_path):
    score = "sigmoid" if base == "GLM" else "softmax"
    experts = FFNExperts(num=2, score=score, sites=["layers.1.mlp"])
    moe = moe_rewrite.convert(
        dense(base, num_hidden_layers=3), mode="upcycle", split=1, experts=experts
    )
    if base in ("GLM", "LlamaBias"):
        with pytest.raises(ConversionError, match="layers|o_proj"):
            moe.save_standard(tmp_path / "it")
        return
    moe.save_standard(tmp_path / "it")
    (read,) = read_elsewhere([tmp_path / "it"])
    torch.testing.assert_close(read[9], logits(moe, 9), rtol=0, atol=1e-5)


def test_shards_are_small_and_the_folder_of_before_is_replaced(tmp_path):
    moe, folder = trained("Llama"), tmp_path / "a" / "it"
    moe.save_standard(folder, max_shard_size=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {p.name for p in shards} == set(index["weight_map"].values())
    assert all(len(load_file(p)) == 1 or p.stat().st_size < 25_000 for p in shards)
    back = moe_rewrite.from_standard(folder, dense("Llama"))
    assert torch.equal(logits(back, 9), logits(moe, 9))
    (folder / "notes.txt").write_text("mine")
    moe.save_standard(folder, "qwen2_moe")
    assert sorted(p.name for p in folder.glob("model*")) == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["it"]


@pytest.mark.parametrize("gate", ["selected", "all"])
def test_a_shared_expert_adds_nothing_and_no_gate_of_it_is_zero(gate, tmp_path):
    """llama.cpp computes the gate's sigmoid as silu(x) / x."""
    router = TokenRouter(top_k=2, gate=gate, **LAYER)
    moe = upcycled(dense("Llama"), router=router, experts=LAYERED, num_experts=None)
    moe.save_standard(tmp_path / "it", "qwen2_moe")
    held = load_file(tmp_path / "it" / "model.safetensors")
    gates = [k for k in held if k.endswith("shared_expert_gate.weight")]
    downs = [k for k in held if k.endswith("shared_expert.down_proj.weight")]
    assert len(gates) == len(downs) == 1
    assert held[gates[0]].all() and not held[downs[0]].any()


def refused(moe, folder, format, *said):
    with pytest.raises((ConversionError, ConfigError)) as error:
        moe.save_standard(folder, format)
    for words in said:
        assert words in str(error.value), str(error.value)
    assert not folder.exists() and not list(folder.parent.iterdir())


def test_what_a_class_cannot_hold_is_refused_by_name_with_the_nearest(tmp_path):
    folder, moe = tmp_path / "it", trained("Llama")
    nearest = "Nearest: format='qwen2_moe', which holds this model"
    refused(moe, folder, "mixtral", "here layers [0] are dense", nearest)
    refused(moe, folder, "qwen3_moe", "needs self_attn.q_norm.weight", nearest)
    refused(moe, folder, "glm4_moe", "its routers take a sigmoid", nearest)
    refused(moe, folder, "olmoe", "self_attn.k_norm.weight", nearest)
    refused(moe, folder, "gguf", "format='gguf'", "'auto' or one of mixtral")
    glm = trained("GLM", 1, "sigmoid")
    refused(glm, folder, "qwen2_moe", "partial_rotary_factor=0.5", "take a softmax", "'glm4_moe'")
    refused(glm, folder, "mixtral", "it has no self_attn.q_proj.bias", "Nearest: format='glm4_moe'")


@pytest.mark.parametrize("given, said", [
    ({"experts": FFNExperts(num=2, router="cut"), "mode": "upcycle"}, ("one at the cut", "upcycle")),
    ({"experts": LoRAExperts()}, ("no class has LoRAExperts",)),
])  # fmt: skip
def test_other_routers_and_experts_are_refused(given, said, tmp_path):
    refused(moe_rewrite.convert(dense("Llama"), split=1, **given), tmp_path / "it", "auto", *said)


def upcycled(model, **given):
    given = {"mode": "upcycle", "split": 1, "num_experts": 2} | given
    return moe_rewrite.convert(model, **given)


@pytest.mark.sweep
def test_other_parts_are_refused(tmp_path):
    folder = tmp_path / "it"
    refused(upcycled(dense("LlamaBias")), folder, "auto", "it has no self_attn.o_proj.bias")
    refused(upcycled(dense("Llama", mlp_bias=True)), folder, "auto", "has biases")
    refused(upcycled(dense("Qwen3")), folder, "mixtral", "no self_attn.q_norm", "'qwen3_moe'")
    few = TokenRouter(top_k=2, base=False, normalize=False, gate="all", init=0.5)
    raw = upcycled(dense("Mistral"), router=few, experts=FFNExperts(router="layer"), split=0)
    refused(raw, folder, "mixtral", "gate='all'", "Nearest: format='qwen2_moe', which holds")
    assert raw.save_standard(folder) == "qwen2_moe"
    (read,) = read_elsewhere([folder])
    torch.testing.assert_close(read[40], logits(raw, 40), rtol=0, atol=1e-5)
    import transformers

    torch.manual_seed(0)
    config = transformers.PhiConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    phi = upcycled(transformers.PhiForCausalLM(config).eval())
    with pytest.raises(ConversionError, match="PhiForCausalLM is no language model of llama"):
        phi.save_standard(tmp_path / "phi")
    off = upcycled(dense("Llama"))
    off.deactivate(1)
    with pytest.raises(ConversionError, match="expert1 are off"):
        off.save_standard(tmp_path / "off")


@pytest.mark.sweep
def test_half_precision(tmp_path):
    moe = upcycled(dense("Qwen3").to(torch.bfloat16))
    train(moe)
    moe.save_standard(tmp_path / "it")
    assert {t.dtype for t in load_file(tmp_path / "it" / "model.safetensors").values()} == {torch.bfloat16}  # fmt: skip
    back = moe_rewrite.from_standard(tmp_path / "it", dense("Qwen3").to(torch.bfloat16))
    assert torch.equal(logits(back, 9), logits(moe, 9))


def test_other_folders_are_not_read(tmp_path):
    model = dense("Llama")
    with pytest.raises(CheckpointError, match="no configuration"):
        moe_rewrite.from_standard(tmp_path, model)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="model_type 'llama', expected one of mixtral"):
        moe_rewrite.from_standard(tmp_path / "dense", model)
    trained("Llama").save_standard(tmp_path / "it")
    with pytest.raises(CheckpointError, match="not of this dense model"):
        moe_rewrite.from_standard(tmp_path / "it", dense("Llama", vocab_size=80))
    weights = tmp_path / "it" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        moe_rewrite.from_standard(tmp_path / "it", model)


def test_a_class_that_computes_something_else_is_found_and_nothing_is_written(
    tmp_path, monkeypatch
):
    from moe_rewrite.converted.saving import standard

    monkeypatch.setattr(standard, "interleaved", lambda model: True)
    with pytest.raises(EquivalenceError, match="differs by .*: nothing was written"):
        trained("Llama").save_standard(tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_the_dense_models_own_folder_is_not_replaced(tmp_path):
    from transformers import AutoModelForCausalLM

    dense("Llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    held = (tmp_path / "base" / "model.safetensors").read_bytes()
    moe = moe_rewrite.convert(model, mode="upcycle", num_experts=2, verify=False)
    with pytest.raises(ConfigError, match="the dense model was read from this folder"):
        moe.save_standard(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == held
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
