"""A tiny language of topics: its tokenizer, an encoder that knows two of them, and a stream of more."""

import json
import random
from functools import cache

import torch

from moe_rewrite.continual.classification import class_stream
from moe_rewrite.continual.tasks import Task

WORDS = {topic: [f"{topic}{i}" for i in range(5)] for topic in "abcdef"}
COMMON = [f"the{i}" for i in range(6)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@cache
def tokenizer(**options):
    """As BERT's: [CLS] text [SEP], or [CLS] text [SEP] other text [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *COMMON, *(word for known in WORDS.values() for word in known)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    names = ("input_ids", "token_type_ids", "attention_mask")
    given = {"pad_token": "[PAD]", "model_input_names": names} | options
    return PreTrainedTokenizerFast(tokenizer_object=made, **given)


def items(topics, count, seed=0, numbers=None):
    """Texts of 4 to 8 words, most of them of the topic; the label is the topic, or its number."""
    draw = random.Random(f"{topics}{seed}")
    made = []
    for i in range(count):
        topic = topics[i % len(topics)]
        words = draw.choices(WORDS[topic], k=draw.randint(3, 5))
        words += draw.choices(COMMON, k=draw.randint(1, 3))
        draw.shuffle(words)
        label = topic if numbers is None else numbers[topic]
        made.append({"text": " ".join(words), "label": label})
    return made


def labelled(folder, name, topics, count, numbers=None):
    """A folder of labelled texts, sorted by label."""
    (folder / name).mkdir(parents=True)
    for part, seed in (("train", 0), ("test", 1)):
        made = sorted(items(topics, count, seed, numbers), key=lambda item: item["label"])
        (folder / name / f"{part}.json").write_text("\n".join(map(json.dumps, made)))
    return folder / name


def saved_bert(folder):
    """The folder of an untrained encoder with its tokenizer."""
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def base_task(train=48, test=24):
    numbers = {"a": 0, "b": 1}
    return Task("a, b", items("ab", train, 0, numbers), items("ab", test, 1, numbers))


def stream(train=32, test=12):
    """Two tasks of two topics each, whose columns come after those of a and b."""
    sets = {name: (items(name, train), items(name, test, 1)) for name in ("cd", "ef")}
    return class_stream(sets, first_column=2)


def bert(labels=2, layers=2):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32, num_labels=labels,
        initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def trained(problem):
    """The encoder, after it has learnt the base task in the usual way."""
    model, task = bert(), base_task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(8):
        for start in range(0, len(task.train), 8):
            problem.loss(model, problem.batch(task.train[start : start + 8])).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
