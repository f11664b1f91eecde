"""transformers' Trainer: train an expert, add another, train that, load both."""

import tempfile

import small_model
from transformers import Trainer, TrainingArguments

import moe_rewrite

moe = moe_rewrite.convert(small_model.model(), split=1)
moe.remember(texts=32, length=8)  # what it could do before, as texts that it writes itself
folder = tempfile.mkdtemp()


def train(name):
    arguments = TrainingArguments(
        f"{folder}/{name}", max_steps=3, logging_steps=1, save_steps=3, eval_strategy="steps",
        learning_rate=1e-2, load_best_model_at_end=True, use_cpu=True, report_to=[],
    )  # fmt: skip
    data = small_model.texts()
    trainer = Trainer(moe, arguments, train_dataset=data, eval_dataset=data[:4])
    trainer.add_callback(moe_rewrite.RoutingCallback(trainer))  # logs how rows are routed
    trainer.train()
    return trainer.evaluate()["eval_loss"]


print("first task", train("first"))
moe.expand(name="second")  # the first expert is frozen from here on
print("second task", train("second"))
back = moe_rewrite.load(f"{folder}/second/checkpoint-3", small_model.model())
print(back.names, back.trained)
