"""Exports of many architectures: each verified on other sizes and experts, saved again, and loaded.

All of them with ``-m sweep``; without, a few.
"""

import architectures
import cnns
import pytest
import torch
from onnx_files import saved_again
from reference import randomize
from sweeps import some

import moe_rewrite
from moe_rewrite import FFNExperts, PatchRouter, RegionExperts
from moe_rewrite.models.patch_cnn import PatchCNN

pytest.importorskip("onnx")

IDS = {"T5": "decoder.block.1", "Bart": "model.decoder.layers.1"}
TEXT = [*architectures.ALL, "Albert", "LlamaClassifier", *IDS]
FEW = {"ResNet", "PatchCNN"}


@pytest.mark.parametrize("name", some(TEXT, FEW))
def test_transformer(name, tmp_path):
    other = name in ("Albert", "LlamaClassifier", *IDS)
    model = (architectures.build_other if other else architectures.build)(name)
    example = architectures.example_inputs(model)
    split = 1
    if name in IDS:
        split = IDS[name]
        ids = torch.ones(3, 9, dtype=torch.long)
        example = {
            "input_ids": ids, "attention_mask": ids,
            "decoder_input_ids": ids[:, :6], "decoder_attention_mask": ids[:, :6],
        }  # fmt: skip
    moe = moe_rewrite.convert(
        model, split=split, num_experts=2, example_inputs=example, verify=False
    )
    randomize(moe, size=0.1)
    saved_again(moe.eval(), example, tmp_path)


def hf_cnn(name):
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    if name == "HfResNet":
        model = tf.ResNetModel(tf.ResNetConfig(**sizes, layer_type="basic"))
    else:
        model = tf.RegNetModel(tf.RegNetConfig(**sizes, groups_width=4, layer_type="x"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", some([*cnns.CNNS, "HfResNet", "HfRegNet", "PatchCNN"], FEW))
def test_cnn(name, tmp_path):
    router = PatchRouter(grid=4, per_expert=5)
    split = 0.5
    if name == "PatchCNN":
        torch.manual_seed(0)
        model, split = PatchCNN(6, 8, 3).eval(), 0
        router = PatchRouter(grid=4, per_expert=5, gate="all")
    else:
        model = cnns.build(name) if name in cnns.CNNS else hf_cnn(name)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    example = {"pixel_values": x} if name.startswith("Hf") else {"x": x}
    moe = moe_rewrite.convert(
        model, split=split, router=router, num_experts=2, example_inputs=example, verify=False
    )
    randomize(moe, size=0.1)
    saved_again(moe.eval(), example, tmp_path)


def test_region_experts_on_their_patches(tmp_path):
    model = cnns.build("ResNet")
    x = torch.randn(3, 3, 32, 32)
    moe = moe_rewrite.convert(
        model, split="layer3", router=PatchRouter(grid=4, per_expert=5), num_experts=2,
        experts=RegionExperts(halo=False), example_inputs=x, verify=False,
    )  # fmt: skip
    with torch.no_grad():  # not the copies' batch statistics, which must stay positive
        for p in moe.trainable_parameters():
            p.add_(0.05 * torch.randn_like(p))
    saved_again(moe.eval(), {"x": x}, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "ViT", "ConvNext", "T5"])
def test_upcycled(name, tmp_path):
    model = (architectures.build_other if name == "T5" else architectures.build)(name)
    example = architectures.example_inputs(model)
    split = 1
    if name == "T5":
        ids = torch.ones(3, 9, dtype=torch.long)
        split, example = "encoder.block.1", {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids[:, :6]}  # fmt: skip
    moe = moe_rewrite.convert(
        model, mode="upcycle", split=split, experts=FFNExperts(num=3), example_inputs=example,
        verify=False,
    )  # fmt: skip
    with torch.no_grad():
        for site in moe.expert_sites():
            for part in site.parameter_lists():
                for p in part:
                    p.add_(torch.randn_like(p) * 0.05)
    saved_again(moe.eval(), example, tmp_path)
