import json

import pytest

from moe_rewrite import MoeRewriteError
from moe_rewrite.cli.loading import load_model, parse_split, read_tasks
from moe_rewrite.demo.digits import digits
from moe_rewrite.demo.language import language


def test_digits_forget_less_than_plain_fine_tuning(tmp_path):
    report = digits(tmp_path, seed=1, epochs=8)
    assert json.loads((tmp_path / "digits.json").read_text()) == report
    assert (tmp_path / "digits.png").stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.json", "digits.png"]
    methods = report["methods"]
    assert methods["PMoE (10% replay)"]["forgot"] < methods["fine-tuning"]["forgot"]
    assert len(methods["fine-tuning"]["R"]) == 3


def test_a_language_model_keeps_more_of_its_own_text_than_by_fine_tuning(data, tmp_path):
    """The pretrained Llama and a real task of TRACE."""
    folder = str(data / "models" / "stories260K")
    tasks = {
        part: {"FOMC": read_tasks(data / "data" / "TRACE", part)["FOMC"]}
        for part in ("train", "test")
    }
    report = language(folder, load_model(folder), tasks, tmp_path, "auto", 1, 24, seed=0)
    assert report["tasks"] == ["its own text", "FOMC"]
    methods = report["methods"]
    assert methods["PMoE (10% replay)"]["forgot"] < methods["fine-tuning"]["forgot"]
    before, after = methods["PMoE (10% replay)"]["R"]
    assert before[0] == 1.0 and after[1] > before[1]
    assert (tmp_path / "language.png").exists()


def test_task_files_are_checked(tmp_path):
    with pytest.raises(MoeRewriteError, match="no task folder"):
        read_tasks(tmp_path, "train")
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "train.json"
    file.write_text('[{"prompt": "x", "answer": "y"}, {"prompt": 1}]')
    with pytest.raises(MoeRewriteError, match="record 1"):
        read_tasks(tmp_path, "train")
    file.write_text("[")
    with pytest.raises(MoeRewriteError, match="not JSON"):
        read_tasks(tmp_path, "train")
    assert [parse_split(t) for t in ("3", "-2", "0.5", "auto")] == [3, -2, 0.5, "auto"]
