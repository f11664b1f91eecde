"""``moe-rewrite inspect --html``: pages of models, of saved experts, of a sample and a run."""

import json

import numpy as np
import pytest
from factories import cnn
from pages import read_page
from typer.testing import CliRunner

import moe_rewrite
from moe_rewrite.cli import main
from moe_rewrite.cli.inspect import _of_text

TEXT = 'Lily said "hi" </script>'


def run(*arguments):
    return CliRunner().invoke(main.app, ["inspect", *map(str, arguments)])


def test_a_page_beside_the_table(tmp_path):
    file = tmp_path / "page.html"
    done = run("factories:mlp", "--html", file, "--split", "1")
    assert done.exit_code == 0 and f"page: {file}" in done.output and "parameters" in done.output
    facts = read_page(file).facts
    assert facts["start"] == 1 and facts["routing"] is facts["run"] is None


@pytest.mark.sweep
def test_an_image_by_saved_experts(tmp_path):
    pytest.importorskip("PIL")
    model = cnn().eval()
    router = moe_rewrite.PatchRouter(grid=4, per_expert=3)
    moe_rewrite.convert(model, split="layer2", router=router).save_pretrained(tmp_path / "experts")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32))
    options = ("--experts", tmp_path / "experts", "--image", tmp_path / "x.npy", "--mean", "0.5")
    done = run("factories:cnn", "--html", tmp_path / "p.html", *options)
    assert done.exit_code == 0, done.exception
    facts = read_page(tmp_path / "p.html").facts
    assert facts["routing"]["kind"] == "patches" and facts["splits"][facts["start"]]["label"] == "layer2.0"  # fmt: skip
    done = run("factories:mlp", "--html", tmp_path / "q.html", *options)
    assert done.exit_code == 1 and not (tmp_path / "q.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "hello"], "--text is for the page: add --html FILE"),
        (["--html", "p.html", "--text", "hello"], "add --experts FOLDER"),
        (["--html", "p.html", "--text", "a", "--image", "b.png"], "expected one sample"),
        (["--html", "p.html", "--run", "none"], "none: no such folder"),
        (["--html", "p.html", "--experts", "none"], "none"),
        (["--html", "."], "is a folder: expected the name of a file"),
        (["--base", "known"], "add --tasks FOLDER"),
        (["--tasks", "none"], "none: no such folder"),
        (["--samples", "1"], "samples=1: expected an int >= 2"),
    ],
)
def test_bad_options(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("factories:mlp", *options)
    assert done.exit_code == 1 and isinstance(done.exception, moe_rewrite.MoeRewriteError)
    assert message in str(done.exception) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", [True, False])
def test_tasks_are_told_apart_at_every_split(tmp_path, base):
    """The split that --split auto names is the curve's, in the table, the JSON and the page."""
    pytest.importorskip("transformers")
    import topics

    model = topics.saved_bert(tmp_path / "bert")
    tasks = [topics.labelled(tmp_path, name, name, 24) for name in ("cd", "ef")]
    known = topics.labelled(tmp_path, "ab", "ab", 24, {"a": 0, "b": 1})
    given = [part for task in tasks for part in ("--tasks", task)]
    given += ["--base", known] if base else []
    files = ["--json", tmp_path / "f.json", "--html", tmp_path / "p.html"]
    done = run(model, *given, "--split", "auto", "--samples", "12", *files)
    assert done.exit_code == 0, done.exception
    facts = json.loads((tmp_path / "f.json").read_text())
    curve = facts["curve"]
    assert curve["tasks"] == [[name, 12] for name in (["ab"] * base + ["cd", "ef"])]
    assert len(curve["points"]) == len(facts["blocks"])
    assert facts["split"]["first_deep_block"] == curve["chosen"]
    assert 'split="auto" is' in done.output and "tasks told apart" in done.output
    assert read_page(tmp_path / "p.html").facts["start"] == curve["chosen"]
    alone = run(model, "--tasks", tasks[0])
    assert alone.exit_code == 1 and "two" in str(alone.exception)


def test_the_texts_of_tokens_are_the_text(data):
    given, tokens = _of_text(str(data / "models" / "stories260K"), TEXT)
    assert given["input_ids"].shape == (1, len(tokens))
    assert "".join(tokens) == f"<s> {TEXT}"


@pytest.mark.sweep
def test_a_text_by_the_experts_of_a_run(data, tmp_path):
    """The pretrained Llama learns one task; the page shows its experts, their shares, and a text."""
    model, page = data / "models" / "stories260K", tmp_path / "page.html"
    task = data / "data" / "TRACE" / "FOMC"
    limits = (
        "--max-samples",
        "8",
        "--epochs",
        "1",
        "--max-length",
        "32",
        "--out",
        tmp_path / "run",
    )
    learnt = CliRunner().invoke(main.app, [*map(str, ("learn", "--model", model, "--tasks", task, *limits))])  # fmt: skip
    assert learnt.exit_code == 0, learnt.exception
    done = run(model, "--html", page, "--run", tmp_path / "run", "--text", TEXT)
    assert done.exit_code == 0, done.exception
    facts = read_page(page).facts
    assert facts["run"]["tasks"] == ["FOMC"] and facts["run"]["method"] == "pmoe"
    assert facts["routing"]["outputs"] == facts["run"]["outputs"]
    (shares,) = facts["run"]["over_time"]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
