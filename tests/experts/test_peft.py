"""Single experts to and from PEFT's files, compared with PEFT itself."""

import copy
import dataclasses
import json

import architectures
import cnns
import pytest
import torch
from conversions import fresh
from reference import added, randomize
from safetensors.torch import load_file, save_file
from sweeps import some
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter
from moe_rewrite.experts.lora.peft_config import NO_EFFECT, AdapterConfig

peft = pytest.importorskip("peft")


def converted(name, rank=4):
    model = architectures.build(name) if name != "ResNet" else cnns.build(name)
    router = TokenRouter(granularity="sequence") if name == "ResNet" else "token"
    split = "layer3" if name == "ResNet" else 1
    experts = LoRAExperts(rank=rank, alpha=8)
    moe = fresh(model, split=split, router=router, experts=experts, verify=False)
    return model, moe


def inputs(name):
    torch.manual_seed(1)
    if name == "ResNet":
        return {"x": torch.randn(2, 3, 32, 32)}
    return {"input_ids": torch.randint(3, 90, (2, 7))}


def logits(out):
    return getattr(out, "logits", out)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "ResNet"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_peft_computes_what_the_expert_computes(name, tmp_path):
    model, moe = converted(name)
    moe.expand(1, name="second")
    randomize(moe)
    moe.export_peft("second", tmp_path)
    with torch.no_grad(), moe.use_expert("second"):
        want = logits(moe(**inputs(name)))
    config = peft.LoraConfig.from_pretrained(tmp_path)
    theirs = peft.inject_adapter_in_model(config, model, "default").eval()
    saved = {
        k.removeprefix("base_model.model."): v
        for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    peft.set_peft_model_state_dict(theirs, saved, adapter_name="default")
    with torch.no_grad():
        torch.testing.assert_close(logits(theirs(**inputs(name))), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_that_peft_saved_becomes_an_expert(tmp_path):
    model, moe = converted("Llama")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"])  # fmt: skip
    theirs = peft.get_peft_model(architectures.build("Llama"), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.3)
        want = theirs(**inputs("Llama")).logits
    theirs.save_pretrained(tmp_path)
    before = {k: v.clone() for k, v in added(moe).items()}
    moe.add_expert(from_peft=tmp_path, name="theirs")
    assert moe.names == ["expert0", "theirs"]
    assert all(
        torch.equal(added(moe)[k], v)
        for k, v in before.items()
        if "active" not in k and "pending" not in k
    )
    with torch.no_grad():
        plain = model(**inputs("Llama")).logits
        torch.testing.assert_close(moe(**inputs("Llama")).logits, plain)  # off until activated
        with moe.use_expert("theirs"):
            torch.testing.assert_close(moe(**inputs("Llama")).logits, want, rtol=1e-4, atol=1e-5)
    moe.export_peft("theirs", tmp_path / "again")
    twin = converted("Llama")[1]
    twin.add_expert(from_peft=tmp_path / "again")
    for key, value in added(moe).items():
        if ".experts." in key and key.endswith(".1"):
            torch.testing.assert_close(added(twin)[key], value)


CONVOLUTIONS = {
    "line": (lambda: nn.Conv1d(4, 4, 3, 2, padding=2), (4, 19)),
    "map": (lambda: nn.Conv2d(4, 6, 3, 2, 1), (4, 8, 7)),
    "volume": (lambda: nn.Conv3d(4, 4, (1, 3, 2)), (4, 3, 5, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_any_number_of_axes(name, tmp_path):
    build, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.Tanh(), build()) if name != "map" else nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), build())  # fmt: skip
    router = TokenRouter(granularity="sequence")
    experts = LoRAExperts(rank=2, alpha=6, sites="all+head")
    moe = moe_rewrite.convert(
        model.eval(), split=1, router=router, experts=experts, example_inputs=torch.zeros(2, *shape)
    )
    randomize(moe)
    moe.export_peft(0, tmp_path)
    x = torch.randn(3, *shape)
    with torch.no_grad(), moe.use_expert(0):
        want = moe(x)
    twin = moe_rewrite.convert(
        model, split=1, router=router, experts=experts, example_inputs=torch.zeros(2, *shape)
    )
    twin.add_expert(from_peft=tmp_path, name="read")
    with torch.no_grad(), twin.use_expert("read"):
        torch.testing.assert_close(twin(x), want)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(model), "default").eval()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    saved = {k.removeprefix("base_model.model."): v for k, v in saved.items()}
    peft.set_peft_model_state_dict(theirs, saved, adapter_name="default")
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), want, rtol=1e-4, atol=1e-5)


UNLIKE = {
    "a transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 2, 2),
    "a convolution in groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "a dilated convolution": lambda: nn.Conv2d(4, 4, 3, dilation=2),
    "pads its input in a way of its own": lambda: nn.Conv2d(4, 4, 3, 1, 1, padding_mode="circular"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_convolutions_of_which_peft_computes_something_else_are_refused(name, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), UNLIKE[name]()).eval()
    moe = moe_rewrite.convert(
        model, split=1, router=TokenRouter(granularity="sequence"),
        experts=LoRAExperts(sites="all+head"), example_inputs=torch.zeros(2, 4, 8, 8),
    )  # fmt: skip
    with pytest.raises(MoeRewriteError, match=f"2 is .*{name}.*: convert with LoRAExperts"):
        moe.export_peft(0, tmp_path)
    assert not list(tmp_path.iterdir())


def spoiled(field):
    """A value of a field of LoraConfig that says something."""
    given = {
        "bias": "all", "modules_to_save": ["lm_head"], "rank_pattern": {"q_.*": 2},
        "alpha_pattern": {"q_proj": "four"}, "layer_replication": [[0, 2], [1, 3]],
        "init_lora_weights": "pissa_niter_4", "trainable_token_indices": [3],
        "target_parameters": ["experts.weight"], "peft_type": "IA3", "r": 0, "lora_alpha": None,
        "use_rslora": "false", "a_field_of_tomorrow": 0,
    }  # fmt: skip
    return given.get(field, {"some": "value"} if field.endswith("config") else True)


FIELDS = [f.name for f in dataclasses.fields(peft.LoraConfig)]


@pytest.mark.parametrize("field", [*FIELDS, "a_field_of_tomorrow"])
def test_every_field_of_peft_is_applied_or_without_effect_or_refused(field):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    if field in NO_EFFECT - {"peft_type"}:
        assert AdapterConfig.of("here", config | {field: spoiled(field)}).rank == 4
    else:
        with pytest.raises(MoeRewriteError, match=f"here: .*({field}|type)"):
            AdapterConfig.of("here", config | {field: spoiled(field)})
    if field not in ("peft_type", "r", "lora_alpha"):
        assert AdapterConfig.of("here", config | {field: None}).rank == 4


CHANGED = {"pissa": "path_initial_model_for_weight_conversion", "loftq": "merge_and_unload"}


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of tomorrow", 1]
)
def test_adapters_that_belong_to_changed_weights_are_refused(start):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": start}
    way = CHANGED["loftq" if start in ("loftq", "of tomorrow", 1) else "pissa"]
    with pytest.raises(MoeRewriteError, match=f"init_lora_weights={start!r}.*{way}"):
        AdapterConfig.of("here", config)


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_adapters_that_start_elsewhere_on_the_same_weights_are_read(start):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": start}
    assert AdapterConfig.of("here", config).scale_of("q_proj") == 2


@pytest.mark.filterwarnings("ignore:.*(checkpointing|base weights).*")
@pytest.mark.parametrize("start", some(["pissa", "olora"], ["pissa"]))
def test_an_adapter_of_changed_weights_is_read_once_peft_has_converted_it(start, tmp_path):
    model, moe = converted("Llama")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[1, 2], init_lora_weights=start)  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn_like(p), alpha=0.3)
        want = theirs(**inputs("Llama")).logits
    theirs.save_pretrained(tmp_path / "kept")
    with pytest.raises(MoeRewriteError, match=f"init_lora_weights='{start}'"):
        moe.add_expert(from_peft=tmp_path / "kept")
    assert moe.num_experts == 1
    plain = tmp_path / "plain"
    theirs.save_pretrained(plain, path_initial_model_for_weight_conversion=tmp_path / "start")
    moe.add_expert(from_peft=plain, name="theirs")
    with torch.no_grad(), moe.use_expert("theirs"):
        torch.testing.assert_close(moe(**inputs("Llama")).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("options", [
    {"use_rslora": True}, pytest.param({"rank_pattern": {"up_proj": 3}}, marks=pytest.mark.sweep),
    {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3, "up.proj": 7}},
    pytest.param(
        {"alpha_pattern": {"model.layers.1.self_attn.q_proj": 32}, "rank_pattern": {"q_proj": 1}},
        marks=pytest.mark.sweep,
    ),
    {"rank_pattern": {"layers.2.mlp.up_proj": 4}, "use_rslora": True, "init_lora_weights": "gaussian"},
], ids=str)  # fmt: skip
def test_ranks_and_scales_of_each_module(options, tmp_path):
    _, moe = converted("Llama")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"],
                             layers_to_transform=[1, 2], **options)  # fmt: skip
    theirs = peft.get_peft_model(architectures.build("Llama"), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.3)
        want = theirs(**inputs("Llama")).logits
        theirs.save_pretrained(tmp_path)
        moe.add_expert(from_peft=tmp_path, name="theirs")
        with moe.use_expert("theirs"):
            torch.testing.assert_close(moe(**inputs("Llama")).logits, want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_changes_nothing(tmp_path):
    _, moe = converted("Llama")
    moe.export_peft(0, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    cases = {
        "rank 16": {"r": 16}, "'IA3'": {"peft_type": "IA3"}, "use_dora": {"use_dora": True},
        "r='four': expected an int": {"r": "four"}, "A and B of": {"r": 2}, "rank 8": {"rank_pattern": {"q_proj": 8}},
        "lora_alpha=1000.*below 1e30": {"lora_alpha": 10**400}, "no number of JSON": {"lora_alpha": float("inf")},
    }  # fmt: skip
    for message, change in cases.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(MoeRewriteError, match=message):
            moe.add_expert(from_peft=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    small = moe_rewrite.convert(moe.to_dense(), split=2, experts=LoRAExperts(4), verify=False)
    with pytest.raises(MoeRewriteError, match="no LoRA site"):
        small.add_expert(from_peft=tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    tensors = load_file(weights)
    for message, change in {
        "no tensors": {}, "of torch.int8": {key: tensors[key].to(torch.int8)},
        "there twice": {**tensors, key.removeprefix("base_model.model."): tensors[key].clone()},
        "too large for torch.float32": {**tensors, key: tensors[key].double().add(1e300)},
        f"{key} holds NaN": {**tensors, key: tensors[key] * float("nan")},
    }.items():  # fmt: skip
        save_file(change, weights)
        with pytest.raises(MoeRewriteError, match=message):
            moe.add_expert(from_peft=tmp_path)
    weights.write_bytes(b"cut")
    with pytest.raises(MoeRewriteError, match="not a safetensors file"):
        moe.add_expert(from_peft=tmp_path)
    with pytest.raises(MoeRewriteError, match="cannot be read"):
        moe.add_expert(from_peft=tmp_path / "nowhere")
    assert moe.num_experts == small.num_experts == 1
