"""Choices as the requests that engines take."""

from pathlib import Path

import pytest

from moe_rewrite.errors import ConfigError
from moe_rewrite.serve.requests import lora_request, requested

BODY = {"model": "moe", "prompt": "Once", "max_tokens": 4}
NAMES = ["law", "tales"]
WEIGHTS = {"base": 0.1, "law": 0.2, "tales": 0.7}


@pytest.mark.parametrize(
    ("engine", "model"), [("vllm", "tales"), ("sglang", "llama:tales")], ids=["vllm", "sglang"]
)
def test_one_adapter_a_request_is_the_largest(engine, model):
    assert requested(BODY, WEIGHTS, engine, "llama", NAMES) == BODY | {"model": model}
    dense = requested(BODY, WEIGHTS | {"base": 0.9}, engine, "llama", NAMES)
    assert dense == BODY | {"model": "llama"}
    assert BODY["model"] == "moe"


def test_a_mixture_is_a_scale_for_every_adapter():
    made = requested(BODY, WEIGHTS, "llama.cpp", "llama", NAMES)
    assert made.pop("lora") == [{"id": 0, "scale": 0.2}, {"id": 1, "scale": 0.7}]
    assert made == BODY | {"model": "llama"}
    alone = requested(BODY, {"base": 1.0}, "llama.cpp", "llama", NAMES)
    assert alone["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]


def test_vllm_is_asked_in_python():
    made = lora_request("tales", NAMES, Path("served"))
    assert made == {
        "lora_name": "tales",
        "lora_int_id": 2,
        "lora_path": str(Path("served") / "tales"),
    }
    assert lora_request("base", NAMES, Path("served")) is None


def test_what_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="expected one of vllm, sglang, llama.cpp"):
        requested(BODY, WEIGHTS, "tgi", "llama", NAMES)
    with pytest.raises(ConfigError, match="adapter 'chess': expected base or one of"):
        requested(BODY, {"chess": 1.0}, "vllm", "llama", NAMES)
    with pytest.raises(ConfigError, match="adapter 'chess'"):
        lora_request("chess", NAMES, Path("served"))
