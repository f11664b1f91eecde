"""Pipelines, accelerate, TRL, Lightning and the log of routing on converted models."""

import copy

import pytest
import torch

pytest.importorskip("accelerate")
from small_text import WORDS, Texts, arguments, llama, losses, tokenizer
from transformers import BertConfig, BertForSequenceClassification, Trainer, pipeline

import moe_rewrite
from moe_rewrite import MoeRewriteError


def tied():
    return llama(tie_word_embeddings=True)


@pytest.fixture
def moe(fresh):
    return copy.deepcopy(fresh)


def test_pipelines_give_what_they_give_on_the_dense_model(moe):
    given = {"max_new_tokens": 4, "do_sample": False}
    texts = [
        pipeline("text-generation", model=m, tokenizer=tokenizer())("w3 w4 w5", **given)
        for m in (tied(), moe)
    ]
    assert texts[0] == texts[1]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    dense = BertForSequenceClassification(
        BertConfig(**sizes, num_hidden_layers=2, vocab_size=WORDS)
    ).eval()
    converted = moe_rewrite.convert(dense, split=1, verify=False)
    labels = [
        pipeline("text-classification", model=m, tokenizer=tokenizer())(["w3 w4", "w5 w6 w7"])
        for m in (dense, converted)
    ]
    assert labels[0] == labels[1]


def test_pictures_are_classified_by_a_pipeline():
    image = pytest.importorskip("PIL.Image")
    import numpy as np
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4)
    dense = ViTForImageClassification(config).eval()
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    found = [
        pipeline("image-classification", model=m, image_processor=processor)(
            image.fromarray(values)
        )
        for m in (dense, moe_rewrite.convert(dense, split=1, verify=False))
    ]
    assert found[0] == found[1]


def test_the_dense_model_takes_it_as_an_assistant(moe):
    ids = torch.ones(1, 4, dtype=torch.long)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = tied().generate(ids, **given)
    assert torch.equal(tied().generate(ids, assistant_model=moe, **given), alone)


def test_routing_is_logged_where_the_trainer_logs(moe, tmp_path):
    options = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = Trainer(
        moe, arguments(tmp_path, **options), train_dataset=Texts(16), eval_dataset=Texts(4)
    )
    trainer.add_callback(moe_rewrite.RoutingCallback(trainer))
    trainer.train()
    logged = [h for h in trainer.state.log_history if "routing/entropy" in h]
    assert [h["step"] for h in logged] == [1, 2, 3] and not moe.watchers
    shares = [logged[0][f"routing/share/{name}"] for name in ("frozen", "expert0")]
    assert shares == pytest.approx([0.5, 0.5]) and logged[0]["routing/load"] == 1
    assert logged[0]["routing/entropy"] == pytest.approx(torch.tensor(2.0).log().item())
    assert logged[0]["routing/dropped"] == 0 and logged[2]["routing/share/expert0"] != 0.5
    with pytest.raises(MoeRewriteError, match="which was not converted"):
        moe_rewrite.RoutingCallback(Trainer(tied(), arguments(tmp_path)))


def test_accelerate_trains_saves_and_loads(moe, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Texts(4), batch_size=4)
    model, optimizer, loader = accelerator.prepare(moe.train(), optimizer, loader)

    def step():
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        return {k: v.clone() for k, v in moe.state_dict().items()}

    first = step()
    accelerator.save_state(tmp_path)
    second = step()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(v, first[k]) for k, v in moe.state_dict().items())
    assert all(torch.equal(v, second[k]) for k, v in step().items())


@pytest.mark.filterwarnings("ignore")  # TRL and Lightning use what transformers and torch deprecate
def test_trl_fine_tunes_on_packed_texts(moe, tmp_path):
    """The loss of the first step is the dense model's: experts add nothing yet."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_dict({"text": ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12"] * 4})
    found = []
    for model in (tied(), moe):
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False}
        options = trl.SFTConfig(
            str(tmp_path), packing=True, max_length=16, max_steps=1, logging_steps=1,
            save_strategy="no", **quiet,
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, options, train_dataset=texts, processing_class=tokenizer())
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert any(bool(s.b[0].any()) for s in moe.expert_sites())


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_restores(moe, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.trainable_parameters(), lr=1e-2)

    def fit(model, steps, **resumed):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", default_root_dir=tmp_path, **quiet
        )
        loader = torch.utils.data.DataLoader(Texts(8), batch_size=4)
        trainer.fit(Module(model), loader, **resumed)
        return trainer

    before = {k: v.clone() for k, v in moe.state_dict().items()}
    other = copy.deepcopy(moe)
    other.expand(name="another")  # the checkpoint has one expert
    fit(moe, 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(other, 2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.global_step == 2 and other.names == ["expert0"]
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in moe.state_dict().items())
    assert not all(torch.equal(v, before[k]) for k, v in moe.state_dict().items())
