"""What a run is: another model, other data, another problem or options are told by content."""

from dataclasses import replace

import architectures
import pytest
import torch
import words

from moe_rewrite import MoeRewriteError
from moe_rewrite.continual.identity import identity_of
from moe_rewrite.continual.registry import METHODS, Setup
from moe_rewrite.continual.results import Result
from moe_rewrite.continual.run import run
from moe_rewrite.continual.run_folder import RunFolder
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.continual.training import Training
from moe_rewrite.errors import ConfigError

SETUP = Setup(split=1, rank=2, training=Training(epochs=1))


class Vocabulary(words.Letters):
    def __init__(self, *known):
        self.known = known

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.known)}


class Shifted(TextProblem):
    """With a transform that no attribute of the problem tells."""

    def batch(self, items):
        made = super().batch(items)
        return made | {"input_ids": made["input_ids"].roll(1)}


Shifted.__name__ = "TextProblem"


def llama(**config):
    model = architectures.build("Llama", layers=2)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def nudged():
    model = llama()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    return model


def stream(**changes):
    first, second = words.stream()[:2]
    return [first, replace(second, **changes)]


def other(items):
    return [*items[:-1], items[0]]  # as many, but one is another


def given(**changes):
    dense, problem = llama(), TextProblem(words.Letters(), 32)
    usual = {"dense": dense, "problem": problem, "tasks": stream(), "setup": SETUP}
    return usual | {"base_task": None, "score": "loss"} | changes


SECOND = words.stream()[1]
CHANGES = {
    "model (weights)": lambda: {"dense": nudged()},
    "model (configuration)": lambda: {"dense": llama(rms_norm_eps=1e-2)},
    "data of task 2 (digits)": lambda: {"tasks": stream(train=other(SECOND.train))},
    "data of task 2 (digits) ": lambda: {"tasks": stream(test=other(SECOND.test))},
    "data of task 2 (digits)  ": lambda: {"tasks": stream(eval=[])},
    "epochs of task 2 (digits)": lambda: {"tasks": stream(epochs=2)},
    "data of the base task": lambda: {"base_task": words.task("own", "klmnop", "ok")},
    "problem (max_length": lambda: {"problem": TextProblem(words.Letters(), 8)},
    "problem (batches)": lambda: {"problem": Shifted(words.Letters(), 32)},
    "problem (vocabulary)": lambda: {"problem": TextProblem(Vocabulary("a", "b"), 32)},
    "options (rank)": lambda: {"setup": replace(SETUP, rank=4)},
    "options (training (lr, seed))": lambda: {
        "setup": replace(SETUP, training=Training(epochs=1, lr=1.0, seed=1))
    },
    "score": lambda: {"score": "accuracy"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_named_whatever_the_method(tmp_path, what):
    changed = given(**CHANGES[what]())
    for method in METHODS:
        folder = RunFolder(tmp_path / method, identity_of(method, **given()))
        folder.begin(Result(["low", "digits"], "loss", [0.0, 0.0], [None]))
        assert folder.read()[0] == 0
        with pytest.raises(ConfigError) as refused:
            run(method, **changed, out=tmp_path / method)
        said = str(refused.value)
        assert f"holds another run, which differs in {what.strip()}" in said, said


def test_a_model_from_another_place_is_the_same():
    moved = llama(_name_or_path="elsewhere", transformers_version="0.0.1")
    assert identity_of("lora", **given(dense=moved)) == identity_of("lora", **given())


def test_a_vocabulary_is_told_in_any_order():
    one, two = (TextProblem(Vocabulary("a", "b"), 32) for _ in range(2))
    two.tokenizer.get_vocab = lambda: {"b": 1, "a": 0}
    assert one.facts() == two.facts()


@pytest.mark.parametrize("change", [
    {"tasks": [replace(SECOND, train=[{"prompt": "a", "answer": "b", "x": object()}])]},
    {"setup": replace(SETUP, learner={"x": object()})},
])  # fmt: skip
def test_what_cannot_be_told_is_refused(tmp_path, change):
    with pytest.raises(MoeRewriteError, match="object of type object.*cannot be told"):
        run("lora", **given(**change), out=tmp_path)
