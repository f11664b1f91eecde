"""`learn` and `compare` as a user runs them; after a kill they resume, with the same result."""

import json
import os
import subprocess
import sys
import time

import pytest

from moe_rewrite.cli.main import main

pytestmark = pytest.mark.timeout(900)
SAME = ("tasks", "R", "op", "bwt", "base_before", "base_after", "trainable")


def start(data, out, *extra, method="pmoe", command="learn"):
    trace = data / "data" / "TRACE"
    chosen = ["--methods" if command == "compare" else "--method", method]
    arguments = [
        "--model", data / "models" / "stories260K", "--tasks", trace / "C-STANCE", trace / "FOMC",
        *chosen, "--split", "3", "--epochs", "1", "--max-samples", "8", "--max-length", "64",
        "--score", "loss", "--seed", "3", "--out", out, *extra,
    ]  # fmt: skip
    run = "import sys; from moe_rewrite.cli.main import main; sys.argv[0] = 'moe-rewrite'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", run, command, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(process):
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return out


@pytest.mark.sweep  # in every run, tests/continual stops and resumes within one process
@pytest.mark.parametrize("seen", ["after-1", "after-2"])
def test_killed_in_a_task_it_ends_in_the_same_result(data, tmp_path, seen):
    """One method's files; the others' are tested within one process. seen: what is on disk when the
    process is killed."""
    method, cut = "pmoe-gradient", tmp_path / "cut"
    finished(start(data, tmp_path / "whole", "--json", tmp_path / "whole.json", method=method))
    killed = start(data, cut, "--json", tmp_path / "cut.json", method=method)
    while not (cut / method / seen).exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "cut.json").exists()
    for file in cut.rglob("*.json"):
        json.loads(file.read_text())  # never half written
    finished(start(data, cut, "--json", tmp_path / "cut.json", method=method))
    a, b = (json.loads((tmp_path / f"{n}.json").read_text())[method] for n in ("whole", "cut"))
    assert [a[k] for k in SAME] == [b[k] for k in SAME]
    left = [f.name for f in (cut / method).iterdir()]
    assert sorted(n for n in left if not n.startswith(".")) == ["after-2", "progress.json"]


@pytest.mark.sweep
def test_compare_writes_tables_pictures_and_figures(data, tmp_path):
    out = finished(
        start(data, tmp_path / "run", "--json", tmp_path / "f.json", "--cache",
              method="pmoe,lora,oracle", command="compare")
    )  # fmt: skip
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures) == ["pmoe", "lora", "oracle"]
    for name, f in figures.items():
        assert f["tasks"] == ["C-STANCE", "FOMC"] and len(f["R"]) == 2 and len(f["R"][0]) == 2
        assert f["op"] == pytest.approx(sum(f["R"][1]) / 2)
        assert f["bwt"] == pytest.approx(f["R"][1][0] - f["R"][0][0])
        assert f["seconds"] > 0 and f["trainable"] > 0 and name in out
        assert len(f["other"]["accuracy"]) == 3  # two tasks and its own
    assert figures["oracle"]["base_after"] == figures["oracle"]["base_before"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"results.json", "matrices.png", "curves.png", "router-pmoe.png", "features"} <= names
    import moe_rewrite
    from moe_rewrite.cli.loading import load_model

    dense = load_model(str(data / "models" / "stories260K"))
    moe = moe_rewrite.load(tmp_path / "run" / "pmoe" / "after-2", dense)
    assert moe.names == ["expert0", "FOMC"]


@pytest.mark.parametrize(("extra", "message"), [
    (["--method", "dreams"], "expected one of"), (["--epochs", "0"], "epochs"),
    (["--score", "beauty"], "score"), (["--tasks", "nowhere"], "nowhere"),
])  # fmt: skip
def test_bad_options_are_one_line(data, tmp_path, extra, message, monkeypatch, capsys):
    model = data / "models" / "stories260K"
    given = [
        "learn",
        "--model",
        model,
        "--tasks",
        data / "data" / "TRACE" / "FOMC",
        "--out",
        tmp_path,
    ]
    limits = ["--max-samples", "4", "--max-length", "16"]
    monkeypatch.setattr(sys, "argv", ["moe-rewrite", *map(str, given), *limits, *extra])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and message in error and "Traceback" not in error, error


@pytest.mark.sweep
def test_images_of_the_usual_files(data, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from moe_rewrite.models.resnet import ResNet\n\ndef net():\n    return ResNet(8)\n"
    )
    run = "import sys; from moe_rewrite.cli.main import main; sys.argv[0] = 'moe-rewrite'; main()"
    done = subprocess.run(
        [sys.executable, "-c", run, "learn", "--model", "mine:net", "--tasks",
         data.resolve() / "data" / "mnist", "--base", data.resolve() / "data" / "cifar-10-batches-py", "--per-task", "5",
         "--max-samples", "32", "--epochs", "1", "--split", "layer3", "--json", "f.json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())["pmoe"]
    assert figures["tasks"] == ["mnist 0-1-2-3-4", "mnist 5-6-7-8-9"]
    assert len(figures["router_use"]) == 3 and figures["base_before"] is not None


def test_text_classifiers_learn_from_folders(tmp_path, monkeypatch, capsys):
    """Two folders of two classes each, the base task's labels by name; files sorted by label, of which
    `--max-samples` takes as many of each."""
    pytest.importorskip("transformers")
    import topics

    encoder = topics.bert()
    encoder.config.id2label = {0: "a", 1: "b"}
    encoder.config.label2id = {"a": 0, "b": 1}
    encoder.save_pretrained(tmp_path / "bert")
    topics.tokenizer().save_pretrained(tmp_path / "bert")
    folders = [topics.labelled(tmp_path, name, name, 24) for name in ("cd", "ef")]
    base = topics.labelled(tmp_path, "ab", "ab", 24)
    given = [
        "learn", "--model", tmp_path / "bert", "--tasks", *folders, "--base", base, "--split", "1",
        "--epochs", "1", "--max-samples", "16", "--json", tmp_path / "f.json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["moe-rewrite", *map(str, given)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "f.json").read_text())["pmoe"]
    assert figures["tasks"] == ["cd", "ef"] and figures["base_before"] is not None
    assert all(r > 0 for r in figures["R"][-1]), figures["R"]  # of four new classes, from both


def test_labels_of_a_base_task_are_those_that_the_model_has(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    import topics

    topics.bert().save_pretrained(tmp_path / "bert")
    topics.tokenizer().save_pretrained(tmp_path / "bert")
    folder, base = (topics.labelled(tmp_path, name, name, 8) for name in ("cd", "ef"))
    given = ["learn", "--model", tmp_path / "bert", "--tasks", folder, "--base", base]
    monkeypatch.setattr(sys, "argv", ["moe-rewrite", *map(str, given)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "'ef', label 'e': expected one that the model has" in capsys.readouterr().err
