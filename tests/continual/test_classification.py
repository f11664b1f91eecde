"""Text classifiers: how texts and pairs become batches, what is refused, scores, and streams of tasks
whose classes grow."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sweeps import some

pytest.importorskip("transformers")
import topics

from moe_rewrite import MoeRewriteError
from moe_rewrite.continual import ClassificationProblem, Task, class_stream
from moe_rewrite.continual.identity import identity_of
from moe_rewrite.continual.registry import METHODS, Setup
from moe_rewrite.continual.run import run
from moe_rewrite.continual.training import Training

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
SETUP = Setup(split=1, rank=4, replay=0.25, training=Training(epochs=20, lr=3e-3))
QUICK = {"pmoe", "replay", "ranpac"}
SINGLE = {"text": "a1 the2 a3", "label": 1}
PAIR = {"text": "b1 b2 b3 b4", "text_pair": "c1 c2 c3", "label": 0}


def problem(tokenizer=None, **options):
    return ClassificationProblem(tokenizer or topics.tokenizer(), 16, 8, **options)


@pytest.fixture(scope="module")
def bert():
    return topics.trained(problem())


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_and_pairs_are_what_the_tokenizer_says_padded_on_the_right(side):
    """Whatever side the tokenizer would pad on."""
    told = topics.tokenizer(padding_side=side)
    batch = ClassificationProblem(told, 16).batch([SINGLE, PAIR])
    assert batch["labels"].tolist() == [1, 0]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    for row, texts in enumerate((["a1 the2 a3"], ["b1 b2 b3 b4", "c1 c2 c3"])):
        alone = told(*texts)
        length = len(alone["input_ids"])
        for name in alone:
            assert batch[name][row, :length].tolist() == alone[name]
        assert not batch["attention_mask"][row, length:].any()
        assert (batch["input_ids"][row, length:] == told.pad_token_id).all()
    assert batch["input_ids"].shape == (2, 10) and batch["token_type_ids"][1].sum() == 4


@pytest.mark.parametrize(("longest", "counts"), [(16, [5, 10]), (7, [5, 7]), (5, [5, 5])])
def test_what_is_too_long_loses_its_end_and_of_a_pair_the_longer_text(longest, counts):
    batch = ClassificationProblem(topics.tokenizer(), longest).batch([SINGLE, PAIR])
    assert batch["attention_mask"].sum(1).tolist() == counts
    assert (batch["input_ids"] == 3).sum(1).tolist() == [1, 2]  # both texts keep their [SEP]
    assert batch["token_type_ids"][1].sum() == {10: 4, 7: 3, 5: 2}[counts[1]]


def test_a_tokenizer_without_a_token_for_padding_pads_with_masked_zeros():
    batch = ClassificationProblem(topics.tokenizer(pad_token=None), 16).batch([SINGLE, PAIR])
    assert batch["input_ids"][0, 5:].tolist() == [0] * 5
    assert batch["attention_mask"][0].tolist() == [1] * 5 + [0] * 5


def test_columns_have_the_names_that_a_data_set_gives_them():
    named = {"sentence1": "a1 a2", "sentence2": "b1", "target": np.int64(3), "idx": 7}
    other = problem(text="sentence1", text_pair="sentence2", label="target")
    same = {"text": "a1 a2", "text_pair": "b1", "label": 3}
    want = problem().batch([same])
    for item in (named, MappingProxyType(named), named | {"target": torch.tensor(3)}):
        got = other.batch([item])
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    alone = problem().batch([same | {"text_pair": None}])
    assert alone["attention_mask"].sum() == 4


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "said"), [
    ({"label": -1}, r"label -1 of 'a1 the2 a3'.*without labels \(-1\)"),
    ({"label": "sport"}, "label 'sport'.*class_stream"),
    ({"label": 1.0}, "label 1.0"),
    ({"label": None}, "label None"),
    ({"text": None}, "'text' of an item is None: expected a string"),
    ({"text": ["a1"]}, r"'text' of an item is \['a1'\]"),
    ({"text_pair": 5}, "'text_pair' of an item is 5"),
])  # fmt: skip
def test_an_item_that_is_none_is_refused_by_its_value(change, said):
    with pytest.raises(MoeRewriteError, match=said):
        problem().batch([PAIR, SINGLE | change])


def test_names_of_columns_that_are_not_there_are_told():
    with pytest.raises(MoeRewriteError, match=r"no 'text' but sentence, label.*\(text="):
        problem().batch([{"sentence": "a1", "label": 0}])
    with pytest.raises(MoeRewriteError, match=r"no 'label' but text, idx.*\(label="):
        problem().batch([{"text": "a1", "idx": 0}])
    with pytest.raises(MoeRewriteError, match="max_length=0"):
        ClassificationProblem(topics.tokenizer(), 0)


@pytest.mark.parametrize("label", [2, 7])
def test_a_label_outside_the_classes_is_refused_in_training_by_its_value(bert, label):
    batch = problem().batch([SINGLE, SINGLE | {"label": label}])
    with pytest.raises(MoeRewriteError, match=f"label {label}: the head has 2 columns, 0 to 1"):
        problem().loss(bert, batch)


@pytest.mark.parametrize("method", some(["full", "lora", "lwf", "pmoe"], []))
def test_so_is_one_beyond_the_classes_that_its_task_adds_by_every_method(bert, method):
    second = [SINGLE | {"label": 2}, SINGLE | {"label": 3}]
    with pytest.raises(MoeRewriteError, match="label 3: the head has 3 columns, 0 to 2"):
        run(method, bert, problem(), [Task("two", second, second, classes=1)], SETUP)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 32])
def test_scores_are_those_of_every_item_alone_and_unpadded(bert, size):
    """Labels beyond the head count as wrong: a stream is scored before its classes are there."""
    asked = problem()
    asked.scoring_batch = size
    items = topics.items("abc", 21, 5, {"a": 0, "b": 1, "c": 2})
    right, loss, inside = 0, 0.0, [i for i in items if i["label"] < 2]
    with torch.no_grad():
        for item in items:
            logits = bert(torch.tensor([topics.tokenizer()(item["text"])["input_ids"]])).logits
            right += int(logits.argmax()) == item["label"]
            if item in inside:
                loss += float(F.cross_entropy(logits, torch.tensor([item["label"]])))
    score = asked.score(bert, Task("all", items, items), "accuracy", CPU)
    assert score == right / 21 and 0.5 < score < 0.7  # of a third the head has no column
    want = -loss / len(inside)
    got = asked.score(bert, Task("known", inside, inside), "loss", CPU)
    assert got == pytest.approx(want, rel=1e-4)


# -- streams --------------------------------------------------------------------------------------


def test_tasks_have_classes_of_their_own_after_those_before_them():
    train = topics.items("cdef", 16)
    sets = {"letters": (train, train[:8]), "more": (topics.items("ab", 4), topics.items("ab", 2))}
    whole = class_stream(sets, first_column=3)
    assert [(t.name, t.classes) for t in whole] == [("letters", 4), ("more", 2)]
    assert {i["label"] for i in whole[1].train} == {7, 8}
    assert [i["label"] for i in whole[0].train[:5]] == [3, 4, 5, 6, 3]
    assert train[0]["label"] == "c"  # what was given is left as it was
    split = class_stream({"letters": sets["letters"]}, 3, per_task=2)
    assert [t.name for t in split] == ["letters c, d", "letters e, f"]
    assert [sorted({i["label"] for i in t.test}) for t in split] == [[3, 4], [5, 6]]
    assert sum(len(t.train) for t in split) == 16


def test_labels_that_make_no_stream_are_told():
    train = topics.items("cde", 9)
    with pytest.raises(MoeRewriteError, match="3 classes do not divide into per_task=2"):
        class_stream({"x": (train, train)}, 2, per_task=2)
    with pytest.raises(MoeRewriteError, match="'x': no training item has the label 'f'"):
        class_stream({"x": (train, topics.items("f", 1))}, 2)
    with pytest.raises(MoeRewriteError, match="labels .*'c'.*0.*expected every item"):
        class_stream({"x": ([*train, {"text": "a1", "label": 0}], train)}, 2)
    with pytest.raises(MoeRewriteError, match="labels .*None.*'kind'"):
        class_stream({"x": (train, train)}, 2, label="kind")


class Stopped(Exception):
    """Stands for a kill, within one process."""


class StopsIn(ClassificationProblem):
    """A problem that stops when a task's items are trained on."""

    def __init__(self, items):
        super().__init__(topics.tokenizer(), 16, 8)
        self._items = items

    def facts(self):
        return problem().facts()

    def batch(self, items):
        if items[0] in self._items and len(items) > 2:  # two are an example
            raise Stopped
        return super().batch(items)


@pytest.mark.parametrize("method", some([m for m in METHODS if m != "anyssr"], QUICK))
def test_every_method_learns_a_stream_stopped_or_not(bert, method, tmp_path):
    tasks, known = topics.stream(), topics.base_task()
    faster = replace(SETUP, training=replace(SETUP.training, lr=3e-2))  # osf takes a tenth
    given = (tasks, faster if method == "osf" else SETUP, known, "accuracy")
    before = {k: v.clone() for k, v in bert.state_dict().items()}
    with pytest.raises(Stopped):
        run(method, bert, StopsIn([*tasks[1].train]), *given, tmp_path)
    result = run(method, bert, problem(), *given, tmp_path)
    if method in ("replay", "lora"):  # images: tests/continual/test_methods.py
        assert run(method, bert, problem(), *given).R == result.R
    assert result.before == [0.0, 0.0] and result.base[0] > 0.9
    assert max(row[number] for number, row in enumerate(result.R)) > 0.6
    if method == "pmoe":
        assert min(result.R[1]) > 0.7 and result.base[-1] > result.base[0] - 0.05
    if method == "full":
        assert result.R[1][0] < 0.3 and result.base[-1] < 0.7
    assert all(torch.equal(v, before[k]) for k, v in bert.state_dict().items())


@pytest.mark.sweep  # in every run, tests/passes/test_widen_head.py does what the head needs for it
def test_a_decoder_with_a_classification_head_learns_too():
    import architectures

    torch.manual_seed(0)
    llama = architectures.build_other("LlamaClassifier")
    names = topics.tokenizer(model_input_names=("input_ids", "attention_mask"))
    result = run("pmoe", llama, problem(names), topics.stream()[:1], SETUP)
    assert result.R[0][0] > 0.8


# -- data sets of Hugging Face --------------------------------------------------------------------


def test_a_dataset_is_taken_as_it_is(bert, tmp_path):
    """Its rows are the items, its names of classes stay names: columns are numbers."""
    datasets = pytest.importorskip("datasets")
    rows = topics.items("cd", 32)
    features = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["c", "d"]),
    }
    made = [
        datasets.Dataset.from_list(
            [i | {"label": "cd".index(i["label"])} for i in part], datasets.Features(features)
        )
        for part in (rows, topics.items("cd", 12, 1))
    ]
    asked, lists = problem(), topics.stream()[:1]
    tasks = class_stream({"cd": tuple(made)}, first_column=2)
    assert tasks == lists
    straight = Task("cd", made[0], made[1])
    want = asked.batch([i | {"label": i["label"] - 2} for i in lists[0].train[:5]])
    got = asked.batch(straight.train[:5])
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    identity_of("lora", bert, asked, [straight], SETUP, None, "accuracy")  # a run can be resumed
    assert asked.score(bert, straight, "accuracy", CPU) <= 1.0
