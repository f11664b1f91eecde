"""transformers' Trainer on a converted model, with its default arguments."""

import copy

import pytest
import torch

pytest.importorskip("accelerate")
from small_text import Texts, arguments, llama, losses
from transformers import EarlyStoppingCallback, Trainer, set_seed

import moe_rewrite


def converted():
    set_seed(1)
    """With the options of `fresh`."""
    router = moe_rewrite.TokenRouter(granularity="prefix")
    dense = llama(tie_word_embeddings=True)
    return moe_rewrite.convert(dense, split=1, router=router, verify=False)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_training_evaluation_and_the_best_model_with_default_arguments(fresh, tmp_path):
    """Other columns are left out, the loss of evaluation is there, the best checkpoint is loaded,
    and training stops early."""
    moe = copy.deepcopy(fresh)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "greater_is_better": True}
    trainer = Trainer(
        moe,
        arguments(tmp_path, **options),
        train_dataset=Texts(16, unused=1), eval_dataset=Texts(4, seed=9, unused=1),
        callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=100.0)],
    )  # fmt: skip
    assert trainer.label_names == ["labels"] and trainer.model_accepts_loss_kwargs
    trainer.train()
    evaluated = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert len(evaluated) == trainer.state.global_step == 2
    assert trainer.state.best_metric == max(evaluated) != min(evaluated)
    assert trainer.evaluate()["eval_loss"] == max(evaluated)
    best = moe_rewrite.load(
        trainer.state.best_model_checkpoint, llama(tie_word_embeddings=True), verify=False
    )
    assert same(best, moe)


def test_accumulated_gradients_are_those_of_the_whole_batch(fresh, tmp_path):
    made = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = Trainer(
            copy.deepcopy(fresh),
            arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                save_strategy="no", seed=3,
            ),
            train_dataset=Texts(8),
        )  # fmt: skip
        trainer.train()
        made.append([(h["loss"], h["grad_norm"]) for h in trainer.state.log_history if "loss" in h])
    assert torch.allclose(*map(torch.tensor, made), rtol=1e-4)


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["only added", "whole"]
)
def test_a_stopped_run_goes_on_bitwise_also_after_expand(fresh, tmp_path, whole):
    """The second expert is trained; the run goes on in a model that was only converted."""

    def trainer(moe, **options):
        return Trainer(
            moe, arguments(tmp_path, max_steps=4, save_steps=2, **options), train_dataset=Texts(32)
        )

    moe = copy.deepcopy(fresh)
    moe.expand(name="second")
    moe.save_only_added = not whole
    first = trainer(moe)
    first.train()
    saved = {f.name.split("-")[0] for f in (tmp_path / "checkpoint-2").iterdir()}
    assert {"moe_rewrite", "moe_rewrite.json", "model.safetensors"} <= saved
    assert not {"config.json", "pytorch_model.bin"} & saved
    size = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
    dense = sum(p.numel() * p.element_size() for p in llama(tie_word_embeddings=True).parameters())
    assert (size > dense) == whole
    again = converted()
    second = trainer(again, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.names == ["expert0", "second"] and same(again, moe)
    assert losses(second) == losses(first)
    flags = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (moe, again)]
    assert flags[0] == flags[1]
    if whole:  # on a model with other weights
        other = llama(tie_word_embeddings=True)
        with torch.no_grad():
            other.model.norm.weight.fill_(3.0)
        assert same(moe_rewrite.load(tmp_path / "checkpoint-4", other, verify=False), moe)


def test_a_checkpoint_of_another_base_is_refused(fresh, tmp_path):
    moe = copy.deepcopy(fresh)
    moe.save_pretrained(tmp_path, is_main_process=True)
    from safetensors.torch import load_file

    other = moe_rewrite.convert(llama(rope_theta=1e4, hidden_size=32), split=1, verify=False)
    with pytest.raises(moe_rewrite.MoeRewriteError, match="another base model"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_label_smoothing_shifts_labels_as_for_the_dense_model(fresh, tmp_path):
    values = []
    for model in (llama(tie_word_embeddings=True), copy.deepcopy(fresh)):
        options = {"label_smoothing_factor": 0.1, "save_strategy": "no"}
        trainer = Trainer(model, arguments(tmp_path, **options), eval_dataset=Texts(4))
        values.append(trainer.evaluate()["eval_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_bf16_and_gradient_checkpointing(fresh, tmp_path):
    runs = {}
    for name, options in {
        "plain": {}, "bf16": {"bf16": True}, "checkpointed": {"activation_checkpointing": True},
    }.items():  # fmt: skip
        moe = copy.deepcopy(fresh)
        options = {**options, "save_strategy": "no", "seed": 1}
        trainer = Trainer(moe, arguments(tmp_path, **options), train_dataset=Texts(16))
        trainer.train()
        runs[name] = losses(trainer)
        assert {p.dtype for p in moe.trainable_parameters()} == {torch.float32}
        assert moe.is_gradient_checkpointing == (name == "checkpointed")
    assert runs["checkpointed"] == runs["plain"] != runs["bf16"]
    assert runs["bf16"] == pytest.approx(runs["plain"], rel=1e-2)


def test_an_analytic_router_needs_no_calls_of_its_own(tmp_path):
    """Accumulation, evaluation in between, epochs, checkpointing, and a stop within an epoch."""
    router = moe_rewrite.TokenRouter(fit="analytic", granularity="prefix", projection=16)
    moe, data = moe_rewrite.convert(llama(), split=1, router=router, verify=False), Texts(8)
    moe.remember([{"input_ids": Texts(8, seed=5).ids}])
    told, again = copy.deepcopy(moe), copy.deepcopy(moe)

    def train(moe, **more):
        options = arguments(
            tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            eval_strategy="steps", eval_steps=1, save_steps=3, activation_checkpointing=True, **more,
        )  # fmt: skip
        return Trainer(moe, options, train_dataset=data, eval_dataset=Texts(4, seed=9))

    train(moe).train()
    told.fit_router(0, [{"input_ids": data.ids}])
    moe.eval()
    for row, want in zip(moe.router.rows, told.router.rows, strict=True):
        torch.testing.assert_close(row, want, rtol=0, atol=1e-6)
    train(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(again.eval(), moe)
