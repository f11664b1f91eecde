"""Standard checkpoints as llama.cpp's own converter and server read them.

They are where MOE_REWRITE_LLAMA_SERVER (the program) and MOE_REWRITE_LLAMA_CPP (the folder of the
converters) say; MOE_REWRITE_CONVERTER_PYTHON: a Python with the converters' packages.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from standard import IDS, dense, train

import moe_rewrite
from benchmarks.serving.answers import greedy
from benchmarks.serving.llama_cpp import LlamaCpp, greedy_answer
from moe_rewrite import FFNExperts, TokenRouter

PLACES = ("MOE_REWRITE_LLAMA_SERVER", "MOE_REWRITE_LLAMA_CPP")
# the converters of these classes read a tokenizer of sentencepiece; what is asked for is ids
TOKENIZER = """
import sys
import sentencepiece
with open(sys.argv[1], "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words", "and a few more"]), model_writer=file,
        model_type="bpe", vocab_size=24, minloglevel=2,
    )
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
    command = [engine.python, "-c", TOKENIZER, folder / "tokenizer.model"]
    subprocess.run(command, check=True, capture_output=True)
    prompts = [row[:length].tolist() for row in IDS for length in (1, 2, 9, 24)]
    assert any(greedy(moe, p) != greedy(dense(base), p) for p in prompts)
    with engine.serving(engine.model(folder), tmp_path / "server.log") as url:
        for prompt in prompts:
            assert greedy_answer(url, "moe", prompt)[0] == greedy(moe, prompt)
