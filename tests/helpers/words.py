"""A tiny language of letters, with a tokenizer and text tasks."""

import random

from moe_rewrite.continual.tasks import Task


class Letters:
    """One token a letter; the part of a Hugging Face tokenizer that is used."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + (ord(c) - 32) % 94 for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(32 + int(i) - 3) for i in ids if int(i) > 2)


def task(name, letters, answer, train=24, test=8, seed=0):
    """Prompts of a few letters, all with one answer."""
    draw = random.Random(f"{name}{seed}")

    def items(count):
        words = ["".join(draw.choices(letters, k=draw.randint(4, 9))) for _ in range(count)]
        return [{"prompt": word, "answer": answer} for word in words]

    return Task(name, items(train), items(test), items(test))


def stream():
    return [
        task("low", "abcdef", "no"),
        task("digits", "0123456789", "yes"),
        task("high", "UVWXYZ", "so"),
    ]
