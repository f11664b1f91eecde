"""Hugging Face models that are quantised as they are loaded."""

import pytest
import torch
from small_text import Texts, arguments, llama
from transformers import AutoModelForCausalLM, Trainer

import moe_rewrite
from moe_rewrite.utils.quantized import is_quantized


def config_of(library):
    if library == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes: no part of the dev extra")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes")
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_a_folder_is_loaded_quantised_converted_and_trained_by_the_trainer(library, tmp_path):
    config = config_of(library)
    llama(intermediate_size=64).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    moe = moe_rewrite.convert(model, split=1)
    assert moe.report.equivalence.exact and sum(map(is_quantized, moe.parameters())) == 14
    before = [p.dequantize() for p in moe.parameters() if is_quantized(p)]
    trainer = Trainer(moe, arguments(tmp_path / "run"), train_dataset=Texts(8))
    trainer.train()
    after = [p.dequantize() for p in moe.parameters() if is_quantized(p)]
    assert all(map(torch.equal, before, after))
    assert (tmp_path / "run" / "checkpoint-2" / "moe_rewrite.json").exists()
    assert any(p.any() for site in moe.expert_sites() for p in site.b)  # zero at the start
