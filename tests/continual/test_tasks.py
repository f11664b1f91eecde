"""Streams of tasks from their usual files; errors name the file and line."""

import gzip
import json
import pickle

import numpy as np
import pytest
import torch
import words
from hypothesis import given
from hypothesis import strategies as st

from moe_rewrite import MoeRewriteError
from moe_rewrite.continual import class_stream
from moe_rewrite.continual.buffers import Buffer
from moe_rewrite.continual.images import (
    ImageProblem,
    Images,
    fit_images,
    read_images,
    split_classes,
)
from moe_rewrite.continual.tasks import TRACE, Task, read_sets, read_stream
from moe_rewrite.continual.text import IGNORED, TextProblem


def write(folder, parts=("train", "test", "eval"), records=3, lines=False):
    folder.mkdir(parents=True)
    for part in parts:
        made = [{"prompt": f"{part} {i}", "answer": str(i)} for i in range(records)]
        text = "\n".join(map(json.dumps, made)) if lines else json.dumps(made)
        (folder / f"{part}.json").write_text(text)
    return folder


def test_trace_comes_in_its_order_with_its_epochs(data):
    stream = read_stream([data / "data" / "TRACE"], max_samples=5)
    assert [(t.name, t.epochs) for t in stream] == list(TRACE.items())
    assert all(len(t.train) == len(t.test) == len(t.eval) == 5 for t in stream)


def test_folders_in_their_order_lists_or_lines(tmp_path):
    write(tmp_path / "b"), write(tmp_path / "a", ("train", "test"), lines=True)
    write(tmp_path / "more" / "FOMC"), write(tmp_path / "more" / "C-STANCE")
    names = [t.name for t in read_stream([tmp_path / "b", tmp_path / "a", tmp_path / "more"])]
    assert names == ["b", "a", "C-STANCE", "FOMC"]
    stream = read_stream([tmp_path / "b", tmp_path / "a"], epochs=2)
    assert [t.epochs for t in stream] == [2, 2] and list(stream[1].eval) == []
    assert stream[1].train[2] == {"prompt": "train 2", "answer": "2"}
    (tmp_path / "a" / "test.json").write_text('{"prompt": "a\u2028b", "answer": "c"}\n')
    assert read_stream([tmp_path / "a"])[0].test == [{"prompt": "a\u2028b", "answer": "c"}]
    mine = Task("any iterable", (item for item in stream[0].train), iter(stream[0].test))
    assert mine.limited(2).train == stream[0].train[:2] and mine.test == stream[0].test


def test_what_is_wrong_is_named(tmp_path):
    folder = write(tmp_path / "task")
    cases = {
        '[{"prompt": "x",\n "answer": "y"},\n\n{"prompt": "x",\n "answer": 3}]': "line 4: expected",
        '[\n[{"prompt": "x", "answer": "y"}]]': "line 2: expected",
        '[\n{"prompt": "x"\n "answer": "y"}]': "line 3: not JSON",
        '{"prompt": "x", "answer": "y"}\n\n{"prompt": 1}': "line 3: expected",
        '{"prompt": "x", "answer": "y"}\n\n{broken': "line 3: not JSON",
        '{"prompt": "x", "answer": "y"}\n]': "line 2: not JSON",
    }
    for text, message in cases.items():
        (folder / "train.json").write_text(text)
        with pytest.raises(MoeRewriteError, match=f"train.json, {message}"):
            read_stream([folder])
    (folder / "train.json").write_text("[]")
    with pytest.raises(MoeRewriteError, match="no train items"):
        read_stream([folder])
    with pytest.raises(MoeRewriteError, match=r"test\.json is missing"):
        read_stream([write(tmp_path / "half", ("train",))])
    with pytest.raises(MoeRewriteError, match="no such folder"):
        read_stream([tmp_path / "nowhere"])
    with pytest.raises(MoeRewriteError, match="two tasks are named"):
        read_stream([write(tmp_path / "x" / "same"), write(tmp_path / "y" / "same")])


@pytest.mark.parametrize("wrong", [
    {"text": "x"}, {"text": 3, "label": 0}, {"text": "x", "label": 0.5}, {"text": "x", "label": True},
    {"text": "x", "label": None}, {"text": "x", "label": 0, "text_pair": 2}, ["x", 0],
])  # fmt: skip
def test_labelled_texts_are_read_with_their_eval_items(tmp_path, wrong):
    folder, good = tmp_path / "set", [{"text": "x", "text_pair": "y", "label": "one"}]
    folder.mkdir()
    for part in ("train", "test", "eval"):
        (folder / f"{part}.json").write_text(json.dumps(good))
    assert read_sets([folder]) == {"set": (good, good, good)}
    (task,) = class_stream(read_sets([tmp_path]), 3)
    assert task.eval == [{"text": "x", "text_pair": "y", "label": 3}] and task.classes == 1
    (folder / "eval.json").write_text(json.dumps(good[0]) + "\n" + json.dumps(wrong))
    with pytest.raises(MoeRewriteError, match="eval.json, line 2: expected a 'text' string"):
        read_sets([folder])


def test_answers_are_learnt_and_prompts_are_not():
    problem = TextProblem(words.Letters(), max_length=10)
    items = [{"prompt": "abc", "answer": "yes"}, {"prompt": "a" * 30, "answer": "b" * 30}]
    batch = problem.batch(items)
    assert batch["input_ids"].shape == (2, 10)
    learnt = batch["labels"] != IGNORED
    assert learnt.sum(1).tolist() == [4, 5]  # an answer and its end; an answer cut to half
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert batch["attention_mask"].sum(1).tolist() == [8, 10]
    assert batch["labels"][0, 7] == 2 and batch["input_ids"][1, 0] != 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 1), st.booleans())
def test_a_buffer_keeps_its_share(sizes, ratio, balanced):
    buffer = Buffer(ratio, balanced, seed=0)
    for number, size in enumerate(sizes):
        buffer.add(number, Task("t", [{}] * size, [{}]))
    total = sum(sizes)
    assert len(buffer.kept) == len(set(buffer.kept))
    assert all(0 <= i < sizes[n] for n, i in buffer.kept)
    if balanced and ratio:
        assert len(buffer.kept) <= max(1, round(ratio * total))
        counts = [sum(n == number for n, _ in buffer.kept) for number in range(len(sizes))]
        if len(set(sizes)) == 1:
            assert max(counts) - min(counts) <= 1
    again = Buffer(ratio, balanced, seed=0)
    for number, size in enumerate(sizes):
        again.add(number, Task("t", [{}] * size, [{}]))
    assert again.kept == buffer.kept


def test_a_reservoir_keeps_every_item_with_the_same_chance():
    counts = [0, 0]
    for seed in range(200):
        buffer = Buffer(0.1, False, seed)
        for number, size in enumerate((80, 20)):
            buffer.add(number, Task("t", [{}] * size, [{}]))
        for number, _ in buffer.kept:
            counts[number] += 1
    assert 0.15 < counts[1] / sum(counts) < 0.25


def idx(folder, part, images, labels):
    folder.mkdir(exist_ok=True)
    for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
        sizes = b"".join(s.to_bytes(4, "big") for s in array.shape)
        raw = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(raw))


def cifar(folder, name, count, extra=None):
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    batch = {
        b"data": draw.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"labels": [i % 10 for i in range(count)],
    } | (extra or {})  # fmt: skip
    (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return batch


def test_idx_files_are_split_by_class(tmp_path):
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 5, 4))
        idx(tmp_path / "digits", part, images, np.arange(count) % 10)
    train, test = read_images(tmp_path / "digits")
    assert train.pixels.shape == (40, 1, 5, 4) and test.labels.tolist() == [*range(10)] * 2
    fitted = fit_images(train, (3, 8, 8), torch.tensor([0.5]), torch.tensor([2.0]))
    few = train.limited(2)
    assert torch.equal(few.labels.bincount(), torch.full((10,), 2))
    assert torch.equal(few.pixels, train.pixels[:20])
    assert fitted.pixels.shape == (40, 3, 8, 8) and fitted.pixels.min() >= -0.25
    stream = split_classes(train, test, 2, first_column=7, name="digits", limit=6)
    assert [t.name for t in stream][:2] == ["digits 0-1", "digits 2-3"]
    assert {item["label"] for item in stream[1].train} == {9, 10}
    assert all(t.classes == 2 and len(t.train) == 6 and len(t.test) == 4 for t in stream)
    problem = ImageProblem(argument="pixel_values")
    batch = problem.batch(stream[0].test)
    assert batch["pixel_values"].shape == (4, 1, 5, 4) and batch["labels"].tolist() == [7, 8, 7, 8]
    with pytest.raises(MoeRewriteError, match="per_task=3"):
        split_classes(train, test, 3, 0)
    (tmp_path / "digits" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(MoeRewriteError, match="t10k-labels"):
        read_images(tmp_path / "digits")
    with pytest.raises(MoeRewriteError, match="expected train-images"):
        read_images(tmp_path)


def test_cifar_batches_are_read_and_run_nothing(tmp_path):
    for i in (1, 2):
        cifar(tmp_path / "cifar", f"data_batch_{i}", 20)
    batch = cifar(tmp_path / "cifar", "test_batch", 10)
    train, test = read_images(tmp_path / "cifar")
    assert train.pixels.shape == (40, 3, 32, 32)
    want = torch.tensor(batch[b"data"]).view(-1, 3, 32, 32) / 255
    assert torch.equal(test.pixels, want)

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    cifar(tmp_path / "cifar", "test_batch", 10, {b"x": Malicious()})
    with pytest.raises(MoeRewriteError, match=r"test_batch.*io\.open|test_batch.*open"):
        read_images(tmp_path / "cifar")
    assert not (tmp_path / "written").exists()


def test_real_images_of_the_usual_files(data):
    train, test = read_images(data / "data" / "mnist")
    assert (len(train.labels), len(test.labels)) == (60000, 10000)
    assert sorted(set(test.labels.tolist())) == list(range(10))
    train, test = read_images(data / "data" / "cifar-10-batches-py")
    assert (len(train.labels), len(test.labels)) == (5000, 2000)


def test_images_and_labels_must_fit():
    with pytest.raises(MoeRewriteError, match="expected"):
        Images(torch.zeros(3, 1, 4, 4), torch.zeros(2))
    with pytest.raises(MoeRewriteError, match="2 channels"):
        fit_images(Images(torch.zeros(3, 2, 4, 4), torch.zeros(3)), (3, 4, 4), *torch.ones(2, 1))
