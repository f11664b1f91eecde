"""A tiny Llama, data for trainers, and a tokenizer, made here."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

WORDS, LENGTH = 64, 10


def llama(layers=2, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    given = {**sizes, "num_hidden_layers": layers, "vocab_size": WORDS, **options}
    return LlamaForCausalLM(LlamaConfig(**given)).eval()


class Texts(torch.utils.data.Dataset):
    """Random texts of one length; columns that no model takes are left to the trainer."""

    def __init__(self, count, seed=0, **columns):
        draw = torch.Generator().manual_seed(seed)
        self.ids, self.columns = torch.randint(1, WORDS, (count, LENGTH), generator=draw), columns

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), **self.columns}


def arguments(folder, **options):
    """Of a short run on the CPU; else transformers' defaults."""
    few = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "learning_rate": 1e-2}
    return TrainingArguments(str(folder), **{**few, **quiet, **options})


def losses(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(WORDS - 1)} | {"[UNK]": WORDS - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="w0", eos_token="w1"
    )
