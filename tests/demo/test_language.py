"""The demonstration of language: its texts, and what is kept and learnt."""

import json

import pytest

from moe_rewrite.demo.language import language
from moe_rewrite.demo.texts import KINDS, NUMBERS, Words, readable, task


def test_texts_answer_their_prompts_and_are_kept_apart():
    words = Words()
    for kind in KINDS:
        for seed in range(3):
            made = task(kind, 60, 20, seed)
            assert len(made.train) == 60 and 12 <= len(made.test) <= 20
            assert (
                made.train == task(kind, 60, 20, seed).train != task(kind, 60, 20, seed + 1).train
            )
            seen = {item["prompt"] for item in made.train}
            assert not seen & {item["prompt"] for item in made.test}
            for item in (*made.train, *made.test):
                for text in item.values():
                    ids = words(text)["input_ids"]
                    assert words.unknown not in ids and words.decode(ids) == readable(text)
    item = next(i for i in task("counting", 40, 10, 0).test)
    first, last = item["prompt"].split()[2], item["prompt"].split()[4]
    said = item["answer"].removesuffix(" .").split()
    assert (said[0], said[-1]) == (first, last)
    steps = {NUMBERS.index(b) - NUMBERS.index(a) for a, b in zip(said, said[1:], strict=False)}
    assert steps in ({1}, {-1})
    assert words("dragons")["input_ids"] == [words.bos_token_id, words.unknown]


def test_it_runs_and_shows_what_was_learnt(tmp_path):
    """Few texts: whether it works, not how well."""
    results = language(tmp_path, seed=1, epochs=1, base_texts=64, texts=16)
    assert set(results) == {"pmoe", "replay", "full"}
    assert results["pmoe"].tasks == ["recipes", "counting", "spanish"]
    lines = json.loads((tmp_path / "lines.json").read_text())
    assert set(lines) == {"prompts", "right", "before", *results}
    assert all(len(said) == 4 for said in lines.values())
    assert {"matrices.png", "curves.png", "router-pmoe.png"} <= {f.name for f in tmp_path.iterdir()}


@pytest.mark.sweep
def test_stories_are_kept_and_three_kinds_learnt(tmp_path):
    results = language(tmp_path, seed=2)
    pmoe, full = results["pmoe"], results["full"]
    assert pmoe.base[0] > 0.9 and pmoe.base[-1] > pmoe.base[0] - 0.05
    assert full.base[-1] < pmoe.base[-1] - 0.2
    assert min(pmoe.R[-1]) > 0.6 and not pmoe.keeps_data
