"""TRACE's task scores on texts whose scores are known."""

import pytest
import words

from moe_rewrite.continual.scores import (
    edit_similarity,
    exact_match,
    first_letter,
    rouge_l,
    sari,
    task_score,
)


def test_choices_and_exact_answers():
    assert exact_match(" 42\n", {"answer": "42"}) == 1 and exact_match("4", {"answer": "42"}) == 0
    assert (
        first_letter("B. because", {"answer": "B"}) == 1 and first_letter("", {"answer": "B"}) == 0
    )


def test_rouge_l_and_edit_similarity():
    # "police killed the gunman" against "police kill the gunman" (Lin 2004, section 3): 3 of 4
    assert rouge_l(
        "police kill the gunman", {"answer": "police killed the gunman"}
    ) == pytest.approx(0.75)
    assert rouge_l("", {"answer": "a b"}) == 0
    assert edit_similarity("abcd", {"answer": "abed"}) == pytest.approx(1 - 2 / 8)
    assert edit_similarity("x = 1", {"answer": "x = 1"}) == 1


def test_sari_of_the_authors_examples():
    """The three outputs of the authors' reference script, as they publish their scores."""
    source = "About 95 species are currently accepted ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    outputs = {
        "About 95 you now get in .": 0.2683,
        "About 95 species are now agreed .": 0.5889,
        "About 95 species are currently agreed .": 0.5071,
    }
    for said, score in outputs.items():
        assert sari(source, said, references) == pytest.approx(score, abs=1e-4)
    assert sari(source, references[0], references[:1]) == 1


def test_each_task_has_its_score():
    items = [{"prompt": "x", "answer": "C"}] * 2
    assert task_score("FOMC", ["C", "A"], items) == 0.5
    assert task_score("of my own", ["c", "C because"], items) == 0.5
    assert task_score("Py150", ["C", "C"], items) == 1
    text = [{"prompt": "Simplify.\n\nParagraph:\nthe big dog", "answer": "the dog"}]
    assert (
        task_score("20Minuten", ["the dog"], text) == 1 > task_score("20Minuten", ["a cat"], text)
    )


def test_a_generated_answer_is_scored(stories, data):
    from transformers import AutoTokenizer

    from moe_rewrite.continual.tasks import Task
    from moe_rewrite.continual.text import TextProblem

    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    problem = TextProblem(tokenizer, 128, new_tokens=12)
    said = problem.answer(stories, "Once upon a time, there was a little", stories.device)
    task = Task("mine", words.stream()[0].train, [
        {"prompt": "Once upon a time, there was a little", "answer": said},
        {"prompt": "Once upon a time, there was a little", "answer": said + "!"},
    ])  # fmt: skip
    assert len(said) > 5 and problem.score(stories, task, "task", stories.device) == 0.5
