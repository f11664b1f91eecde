"""PEFT's OSF and Arrow, and Any-SSR's routing: each does what its source says."""

import architectures
import pytest
import torch
import words
from sweeps import some
from torch import nn

from moe_rewrite.continual.methods.osf import OSF
from moe_rewrite.continual.registry import Setup, make_method
from moe_rewrite.continual.run import learnt_method, run
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.continual.training import Training
from moe_rewrite.errors import ConfigError

TASKS = words.stream()
SETUP = Setup(split=1, rank=4, replay=0.25, training=Training(epochs=2, lr=2e-2))
PROMPTS = ["abc", "0123456", "WXYZU", "fedcbaf", "98"]


@pytest.fixture(scope="module")
def llama():
    return architectures.sharp_llama()


def problem():
    return TextProblem(words.Letters(), 32, new_tokens=4)


def logits(model, prompts=("abc", "01")):
    made = problem()
    batch = made.inputs(made.batch([{"prompt": p, "answer": "x"} for p in prompts]))
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def test_osf_keeps_more_directions_of_every_task_and_leaves_plain_weights(llama, monkeypatch):
    from peft.tuners.osf import OSFLayer

    kept, outputs = [], []
    merge = OSF.after_task

    def looked_at(self, task, number):
        layers = [m for m in self.model.modules() if isinstance(m, OSFLayer)]
        kept.append([layer.effective_rank[f"task{number}"] for layer in layers])
        outputs.append(logits(self.model))
        merge(self, task, number)

    monkeypatch.setattr(OSF, "after_task", looked_at)
    torch.manual_seed(0)
    method = make_method("osf", llama, problem(), SETUP)
    smaller = [min(method.model.get_submodule(s).weight.shape) for s in method.sites]
    for number, share in enumerate((0.3, 0.5, 0.7)):
        method.learn(TASKS, number)
        assert kept[number] == [int(n * share) for n in smaller] and kept[number]
        torch.testing.assert_close(logits(method.model), outputs[number], rtol=1e-4, atol=1e-4)
    dense, now = llama.state_dict(), method.model.state_dict()
    assert now.keys() == dense.keys() and not hasattr(method.model, "peft_config")
    changed = {k for k in now if not torch.equal(now[k], dense[k])}
    assert changed == {f"{site}.weight" for site in method.sites} == set(method.state())


def test_arrow_mixes_the_adapters_that_look_for_the_input(llama):
    torch.manual_seed(0)
    method = make_method("arrow", llama, problem(), SETUP)
    torch.testing.assert_close(logits(method.model_for(0)), logits(llama))
    for number in range(3):
        method.learn(TASKS, number)
    assert all(
        m.lora_arrow["arrow_router"].top_k == 3
        for m in method.model.modules()
        if hasattr(m, "lora_arrow")
    )
    for number in (1, 2):
        for module in method.model.modules():
            if hasattr(module, "lora_arrow"):
                module.lora_arrow["arrow_router"].top_k = number
        model = method.model_for(None)
        site = model.get_submodule(method.sites[0])
        x = torch.randn(2, 5, site.in_features)
        site(x)  # which makes the prototypes
        deltas = [site.lora_B[n].weight @ site.lora_A[n].weight * 4.0 for n in method.names]
        looks_for = site.lora_arrow["arrow_router"].prototypes
        for delta, direction in zip(deltas, looks_for, strict=True):  # by power iteration
            assert (delta @ direction).norm() > 0.9 * torch.linalg.matrix_norm(delta, 2)
        score = (x @ looks_for.T).abs()
        least = score.topk(number).values[..., -1:]
        gates = score.masked_fill(score < least, -torch.inf).softmax(-1)
        want = site.base_layer(x) + sum(
            gates[..., i : i + 1] * (x @ d.T) for i, d in enumerate(deltas)
        )
        torch.testing.assert_close(site(x), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(method.model_for(0)), logits(method.model_for(2)))  # no task number


@pytest.mark.sweep
def test_any_ssr_answers_by_the_expert_that_the_prompt_names(llama, tmp_path):
    run("anyssr", llama, problem(), TASKS, SETUP, None, "accuracy", tmp_path)
    method = learnt_method("anyssr", llama, problem(), TASKS, SETUP, out=tmp_path)
    moe, made = method.model, problem()
    assert not moe.router.spec.base and moe.router.spec.top_k == 1
    assert not bool(moe.router.moments[0].any())  # nothing is known of what the model could do
    chosen, want = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([made.tokenizer(prompt)["input_ids"]])
        gates = moe.route(input_ids=ids, attention_mask=torch.ones_like(ids)).gates[0, -1]
        assert sorted(gates.tolist()) == [0, 0, 1]
        chosen.append(int(gates.argmax()))
        with moe.use_expert(chosen[-1]):
            want.append(made.answer(moe, prompt, method.device))
    model = method.model_for(None)
    assert [made.answer(model, p, method.device) for p in PROMPTS] == want
    assert made.answers(model, PROMPTS, method.device) == want
    assert len(set(chosen)) > 1 and len(set(want)) > 1


def test_a_finished_run_gives_back_its_method(llama, tmp_path):
    given = ("osf", llama, problem(), TASKS[:2], SETUP)
    with pytest.raises(ConfigError, match="no task was learnt"):
        learnt_method(*given, out=tmp_path / "none")
    scores = run(*given, None, "accuracy", tmp_path).R[-1]
    back = learnt_method(*given, out=tmp_path)
    for number, score in enumerate(scores):
        model = back.model_for(number)
        assert back.problem.score(model, TASKS[number], "accuracy", back.device) == score


@pytest.mark.parametrize("kind", some(["dense", "pmoe"], {"dense"}))
def test_prompts_of_several_lengths_are_answered_as_one_by_one(llama, kind):
    made = problem()
    model: nn.Module = llama
    if kind == "pmoe":
        torch.manual_seed(0)
        method = make_method("pmoe", llama, made, SETUP)
        method.learn(TASKS, 0)
        method.learn(TASKS, 1)
        model = method.model_for(None)
    made.scoring_batch = 3
    device = torch.device("cpu")
    want = [made.answer(model, prompt, device) for prompt in PROMPTS]
    assert made.answers(model, PROMPTS, device) == want
    assert len(set(want)) > 1
