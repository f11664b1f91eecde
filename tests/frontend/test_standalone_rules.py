"""The rules of vLLM's transformers backend, one by one, for the modelling file of a folder.

They are those under "Writing custom models" in vLLM's documentation of supported models.
"""

import ast
import json
from contextlib import ExitStack

import pytest
import torch
from standalone import IDS, filled, opened
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_rewrite import TokenRouter
from moe_rewrite.frontend.standalone import classes, modeling

TOKEN = TokenRouter(top_k=2, gate="all", init=0.5, normalize=False)
PREFIX = TokenRouter(granularity="prefix", top_k=2, init=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules") / "it"
    filled("Llama", TOKEN).save_pretrained(folder, standalone=True)
    return folder


@pytest.fixture
def model(folder):
    with ExitStack() as stack, torch.no_grad():
        yield opened(stack, folder)


def test_the_configuration_names_the_base_model_and_does_not_pass_for_a_dense_one(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_moe_rewrite.RoutedConfig",
        "AutoModel": "modeling_moe_rewrite.RoutedLlamaModel",
        "AutoModelForCausalLM": "modeling_moe_rewrite.RoutedLlamaForCausalLM",
    }
    assert config["model_type"] == "moe_rewrite_llama"  # or it would load as a dense Llama
    assert not {"num_experts", "num_local_experts", "n_routed_experts"} & set(config)


def test_the_file_imports_torch_and_transformers_only(folder):
    tree = ast.parse((folder / classes.FILE).read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in found if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} == {
        "__future__", "inspect", "re", "threading", "torch", "transformers", "typing",
    }  # fmt: skip


def test_the_base_model_has_all_that_was_added(model):
    hidden = model.model(IDS[:, :9]).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(IDS[:, :9]).logits)
    assert type(model.model).is_backend_compatible() and type(model).is_backend_compatible()


def test_arguments_reach_every_attention_through_the_interface(model):
    seen = []

    def attention(module, *args, **kwargs):
        seen.append((module.layer_idx, kwargs.pop("from_the_engine", None)))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("probe", attention)
    want = model(IDS[:, :9]).logits
    model.set_attn_implementation("probe")
    made = model.model(IDS[:, :9], from_the_engine=7, use_cache=False).last_hidden_state
    assert seen == [(0, 7), (1, 7), (2, 7)]
    torch.testing.assert_close(model.lm_head(made), want)


def test_no_child_is_called_experts(model):
    """It would be replaced by the engine's feed-forward experts."""
    assert not [n for n, _ in model.named_modules() if n.split(".")[-1] == "experts"]


class Engine(nn.Module):
    """What an engine puts where a linear map was: another class, with the same weight."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_experts_stay_where_an_engine_replaces_every_linear_map(model):
    want = model(IDS[:, :9]).logits
    replaced = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    for name in replaced:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Engine(model.get_submodule(name)))
    assert len([n for n in replaced if n.endswith("low_rank.up")]) == 14
    assert torch.equal(model(IDS[:, :9]).logits, want)


def test_layers_are_alike_in_names_so_that_no_engine_takes_one_for_another(model):
    """vLLM looks at one layer of a kind and fuses the maps of all."""
    first, last = (model.model.layers[i] for i in (0, 2))
    kinds = [
        {n: type(m) for n, m in la.named_modules() if "low_rank" not in n} for la in (first, last)
    ]
    assert kinds[0] == kinds[1]
    assert first.self_attn.q_proj.low_rank is None and last.self_attn.q_proj.low_rank is not None


def divided(plan, name, linear, ranks):
    """The parts of a linear map by its style in a plan, or the whole map in each rank."""
    style = plan.get(modeling.kind_of(name), "")
    whole = [linear.weight] * ranks
    return {"colwise": linear.weight.chunk(ranks), "rowwise": linear.weight.chunk(ranks, 1)}.get(
        style, whole
    )


def test_the_plan_of_tensor_parallelism_divides_maps_and_their_experts_alike(model):
    plan, x = model.model.tp_plan, torch.randn(2, 5, 32)
    of = {n: m for n, m in model.model.named_modules() if getattr(m, "low_rank", None) is not None}
    assert {modeling.kind_of(n) + ".base" for n in of} <= set(plan) and not model.model._pp_plan
    assert not {modeling.kind_of(n) for n in of} & set(plan)
    for name in ("layers.2.self_attn.q_proj", "layers.2.mlp.down_proj"):
        site = of[name]
        rows = plan[modeling.kind_of(name) + ".base"] == "rowwise"
        given = x if site.base.in_features == 32 else torch.randn(2, 5, site.base.in_features)
        scales = torch.rand(2, 5, site.low_rank.down.out_features)
        want = site.base(given) + site.low_rank(given, scales)
        parts = [
            divided(plan, f"{name}.{p}", site.get_submodule(p), 2)
            for p in ("base", "low_rank.down", "low_rank.up")
        ]
        inputs = given.chunk(2, -1) if rows else [given] * 2
        base = [i @ w.T for i, w in zip(inputs, parts[0], strict=True)]
        low = [i @ w.T for i, w in zip(inputs, parts[1], strict=True)]
        if rows:  # summed over ranks
            made = sum(base) + (sum(low) * scales) @ parts[2][0].T
        else:
            ups = [(lo * scales) @ w.T for lo, w in zip(low, parts[2], strict=True)]
            made = torch.cat([b + u for b, u in zip(base, ups, strict=True)], -1)
        torch.testing.assert_close(made, want)


def test_it_is_made_on_the_meta_device_as_engines_make_it(model):
    with torch.device("meta"):
        made = type(model.model)._from_config(model.config)
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in model.model.named_parameters()
    }


def test_a_gate_over_positions_refuses_an_engine_that_packs_requests(tmp_path):
    filled("Llama", PREFIX).save_pretrained(tmp_path / "it", standalone=True)
    AttentionInterface.register("vllm", sdpa_attention_forward)
    with ExitStack() as stack, torch.no_grad():
        model = opened(stack, tmp_path / "it")
        model.set_attn_implementation("vllm")
        with pytest.raises(ValueError, match="granularity='token'"):
            model(IDS[:, :5])


def test_maps_without_their_gate_say_so(model):
    model.model.layers[1]._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="before the layer at which their gate is"):
        model(IDS[:, :5])


def test_gradient_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match="does not support"):
        model.activation_checkpointing_enable()
