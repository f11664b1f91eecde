"""The demonstration as a new user runs it: on digits, and on a language model of one's own."""

import json

import pytest
from typer.testing import CliRunner

from moe_rewrite.cli.main import app
from moe_rewrite.demo.digits import digits
from moe_rewrite.errors import ConfigError

METHODS = {"pmoe", "replay", "full"}


def test_digits_forget_less_than_by_fine_tuning(tmp_path):
    results = digits(tmp_path, seed=1, epochs=10)
    assert set(json.loads((tmp_path / "results.json").read_text())) == set(results) == METHODS
    assert (tmp_path / "matrices.png").stat().st_size > 5000
    pmoe, full = results["pmoe"], results["full"]
    assert pmoe.matrix.forgetting < full.matrix.forgetting and not pmoe.keeps_data
    assert pmoe.base[0] > 0.8 and pmoe.base[-1] > full.base[-1] + 0.2
    assert all(row[task] > 0.4 for task, row in enumerate(pmoe.R))


@pytest.mark.sweep
def test_a_language_model_keeps_more_of_its_own_text_than_by_fine_tuning(data, tmp_path):
    """The pretrained Llama and a real task of TRACE."""
    options = ("--max-samples", "24", "--out", str(tmp_path))
    folders = ("--model", str(data / "models" / "stories260K"), "--tasks", str(data / "data" / "TRACE" / "FOMC"))  # fmt: skip
    done = CliRunner().invoke(app, ["demo", *folders, *options])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "results.json").read_text())
    assert set(figures) == METHODS
    pmoe, full = figures["pmoe"], figures["full"]
    assert pmoe["tasks"] == ["FOMC"] and pmoe["op"] > pmoe["before"][0]
    assert pmoe["base_after"] > full["base_after"]


def test_a_model_without_tasks_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["demo", "--model", "mine", "--out", str(tmp_path / "none")])
    assert isinstance(done.exception, ConfigError) and "go together" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["demo", "--kind", "music", "--out", str(tmp_path / "none")])
    assert isinstance(done.exception, ConfigError) and "digits, language" in str(done.exception)
