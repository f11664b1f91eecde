"""Standard checkpoints as llama.cpp's own converter and server read them.

They are where MOE_REWRITE_LLAMA_SERVER (the program) and MOE_REWRITE_LLAMA_CPP (the folder of the
converters) say; MOE_REWRITE_CONVERTER_PYTHON: a Python with the converters' packages.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from standard import IDS, dense, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moe_rewrite
from benchmarks.serving.answers import greedy
from benchmarks.serving.llama_cpp import LlamaCpp, greedy_answer
from moe_rewrite import FFNExperts, TokenRouter

PLACES = ("MOE_REWRITE_LLAMA_SERVER", "MOE_REWRITE_LLAMA_CPP")
# what is asked for is ids, so any tokenizer does; the Qwen classes' converter wants one of byte-level
# BPE that it knows by name, and is told that ours is Qwen2's
PIECES = """
import sys
import sentencepiece
with open(sys.argv[1], "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words", "and a few more"]), model_writer=file,
        model_type="bpe", vocab_size=24, minloglevel=2,
    )
"""
AS_QWEN = """
import runpy
import sys
script = {script!r}
sys.path.insert(0, {source!r})
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(script, run_name="__main__")
"""
LAYER = {"top_k": 2, "base": False, "normalize": False, "init": 0.5}
CASES = [
    ("Llama", "selected", "mixtral"), ("SmolLM", "selected", "mixtral"),
    ("Llama3Rope", "selected", "mixtral"), ("Qwen3", "selected", "qwen3_moe"),
    # llama.cpp's code of this class never divides by the sum of the top k
    ("Llama", "all", "qwen2_moe"), ("Qwen2", "all", "qwen2_moe"),
]  # fmt: skip


@pytest.fixture
def engine():
    missing = [name for name in PLACES if name not in os.environ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not set: no llama.cpp to compare with")
    server, source = (Path(os.environ[name]) for name in PLACES)
    python = os.environ.get("MOE_REWRITE_CONVERTER_PYTHON", sys.executable)
    return LlamaCpp(server, source, Path(python))


def converted(engine, folder):
    """The GGUF file of a folder, to which a tokenizer is added."""
    script = "convert_hf_to_gguf.py"
    if "qwen" not in json.loads((folder / "config.json").read_text())["model_type"]:
        command = [engine.python, "-c", PIECES, folder / "tokenizer.model"]
        subprocess.run(command, check=True, capture_output=True)
        return engine.converted(script, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet, '!"'])}
    bpe = Tokenizer(models.BPE(vocabulary, [("!", '"')]))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    wrapper = folder.with_name("convert_as_qwen.py")
    places = {"script": str(engine.source / script), "source": str(engine.source)}
    wrapper.write_text(AS_QWEN.format(**places))
    return engine.converted(str(wrapper), folder)


@pytest.mark.sweep
@pytest.mark.parametrize(("base", "gate", "name"), CASES)
def test_llama_cpp_answers_as_the_converted_model(engine, base, gate, name, tmp_path):
    moe = moe_rewrite.convert(
        dense(base), mode="upcycle", split=0, router=TokenRouter(gate=gate, **LAYER),
        experts=FFNExperts(num=3, router="layer"),
    )  # fmt: skip
    train(moe)
    folder = tmp_path / "moe"
    moe.save_standard(folder, format=name)
    prompts = [row[:length].tolist() for row in IDS for length in (1, 2, 9, 24)]
    assert any(greedy(moe, p) != greedy(dense(base), p) for p in prompts)
    with engine.serving(converted(engine, folder), tmp_path / "server.log") as url:
        for prompt in prompts:
            assert greedy_answer(url, "moe", prompt)[0] == greedy(moe, prompt)
