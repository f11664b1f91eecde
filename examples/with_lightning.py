"""Lightning: the converted model inside a LightningModule."""

import tempfile

import lightning
import small_model
import torch

import moe_rewrite


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = moe_rewrite.convert(small_model.model(), split=1)
        self.model.remember(texts=32, length=8)  # what it could do before

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.trainable_parameters(), lr=1e-2)


module = Module()
trainer = lightning.Trainer(
    max_steps=3, accelerator="cpu", default_root_dir=tempfile.mkdtemp(), logger=False
)
trainer.fit(module, torch.utils.data.DataLoader(small_model.texts(), batch_size=4))
module.model.save_pretrained(tempfile.mkdtemp())
