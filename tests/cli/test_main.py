"""The command line: what it prints, saves and refuses."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import mlp
from typer.testing import CliRunner

from moe_rewrite import MoeRewriteError
from moe_rewrite.cli import main
from moe_rewrite.cli.loading import load_model, parse_split

runner = CliRunner()
MODEL = "factories:mlp"


def run(*arguments):
    return runner.invoke(main.app, list(arguments))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ("inspect", "convert", "patches", "demo")),
        (["inspect"], ("--split", "--json", "factory")),
        (["convert"], ("--split", "--router", "--top-k", "--sites", "--dry-run", "--out")),
        (["demo"], ("--kind", "--model", "--tasks", "--seed")),
        (["patches"], ("--images", "--experts", "--grid", "--mean", "--out")),
        (["serve-adapters"], ("--experts", "--no-verify")),
        (["serve"], ("--engine", "--url", "--base", "--mixture", "--port")),
    ],
)
def test_help(command, words):
    done = runner.invoke(main.app, [*command, "--help"], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert done.exit_code == 0
    assert [w for w in words if w not in done.output] == []


def test_help_waits_for_no_optional_package():
    code = (
        "import sys; from moe_rewrite.cli.main import main\n"
        "sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'transformers', 'onnx', 'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("set()"), done.stdout[-300:] + done.stderr


def test_inspect_prints_splits_and_writes(tmp_path):
    file = tmp_path / "blocks.json"
    done = run("inspect", MODEL, "--split", "2", "--json", str(file))
    assert done.exit_code == 0, done.exception
    assert "parameters" in done.output
    assert "blocks 0..1 are shallow" in done.output
    facts = json.loads(file.read_text())
    assert facts["split"]["first_deep_block"] == 2
    assert len(facts["blocks"]) == 4


def test_convert_saves_what_load_reads(tmp_path):
    import moe_rewrite

    out = tmp_path / "experts"
    done = run("convert", MODEL, "--split", "2", "--rank", "4", "--out", str(out))
    assert done.exit_code == 0, done.exception
    assert "LoRA experts" in done.output
    moe = moe_rewrite.load(out, mlp().eval())
    x = torch.randn(3, 16)
    assert torch.equal(moe(x), mlp().eval()(x))


def test_dry_run_saves_nothing(tmp_path):
    out = tmp_path / "experts"
    done = run("convert", MODEL, "--split", "2", "--dry-run", "--out", str(out))
    assert done.exit_code == 0, done.exception
    assert "not checked" in done.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "granularity", "top_k"),
    [
        (["--router", "token", "--top-k", "1"], "token", 1),
        (["--granularity", "sequence"], "sequence", None),
        (["--top-k", "2"], "prefix", 2),
    ],
)
def test_router_options_reach_convert(monkeypatch, options, granularity, top_k):
    import moe_rewrite

    given = {}
    monkeypatch.setattr(moe_rewrite, "convert", lambda model, **kw: given.update(kw) or "report")
    done = run("convert", MODEL, "--sites", "up,down", *options)
    assert done.exit_code == 0, done.exception
    assert given["router"] == moe_rewrite.TokenRouter(top_k=top_k, granularity=granularity)
    assert given["experts"].sites == ("up", "down")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--top-k", "3"], {"top_k": 3}),
        (["--top-k", "1", "--gate", "all", "--router", "token"], {"top_k": 1, "gate": "all"}),
    ],
)
def test_router_options_of_upcycling_change_a_layers_router(monkeypatch, options, changed):
    import moe_rewrite

    given = {}
    monkeypatch.setattr(moe_rewrite, "convert", lambda model, **kw: given.update(kw) or "report")
    done = run("convert", MODEL, "--mode", "upcycle", *options)
    assert done.exit_code == 0, done.exception
    plain = moe_rewrite.TokenRouter(top_k=2, base=False, normalize=False, init=0.5)
    assert given["router"] == replace(plain, **changed)


@pytest.mark.parametrize("option", ["--out", "--standard", "--standalone"])
@pytest.mark.parametrize("place", ["a file", "nowhere/made"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    monkeypatch, tmp_path, option, place
):
    import moe_rewrite

    worked = []
    monkeypatch.setattr(moe_rewrite, "convert", lambda *given, **kw: worked.append(given))
    (tmp_path / "a file").write_text("kept")
    if place != "a file":  # permissions do not bind who runs tests as root
        monkeypatch.setattr("tempfile.TemporaryFile", _read_only)
    done = run("convert", MODEL, option, str(tmp_path / place))
    assert isinstance(done.exception, MoeRewriteError)
    words = "is no folder" if place == "a file" else "cannot be written to"
    assert words in str(done.exception)
    assert not worked and (tmp_path / "a file").read_text() == "kept"


def _read_only(**given):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "no.such:thing"], "no.such"),
        (["inspect", "factories:absent"], "absent"),
        (["inspect", "factories:not_a_module"], "gives a int"),
        (["inspect", MODEL, "--split", "99"], "99"),
        (["convert", MODEL, "--split", "99"], "99"),
        (["convert", MODEL, "--mode", "nonsense"], "nonsense"),
        (["convert", MODEL, "--router", "nonsense"], "nonsense"),
        (["convert", MODEL, "--granularity", "nonsense"], "nonsense"),
        (["convert", MODEL, "--rank", "0"], "rank"),
        (["convert", MODEL, "--active", "0.5"], "--active is for experts of the kind carved"),
        (["convert", MODEL, "--mode", "upcycle", "--rank", "4"], "--rank is for experts of the"),
        (["convert", MODEL, "--top-k", "2", "--gate", "hard"], "gate='hard'"),
        (["convert", MODEL, "--sites", "nowhere"], "nowhere"),
        (["demo", "--model", MODEL], "--tasks"),
        (["demo", "--model", MODEL, "--tasks", "no-such-folder"], "no such folder"),
    ],
)
def test_an_error_is_one_message_and_no_traceback(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["moe-rewrite", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(MoeRewriteError, match="expected a Hugging Face folder"):
        load_model(str(tmp_path))


def test_a_folder_with_damaged_weights_is_refused(tmp_path):
    from transformers import LlamaConfig

    tiny = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    tiny.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(MoeRewriteError, match="expected a Hugging Face folder"):
        load_model(str(tmp_path))


def test_a_folder_gives_its_own_architecture(stories):
    model = load_model(stories.config._name_or_path)
    assert type(model) is type(stories)
    assert not model.training


def test_factory_in_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\ndef net(): return nn.Linear(2, 2)\n")
    code = "from moe_rewrite.cli.loading import load_model; print(type(load_model('mine:net')).__name__)"
    import os
    from pathlib import Path

    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "Linear", done.stderr


def test_split_words():
    words = ("3", "-2", "0.5", "auto", "layers.3", "decoder.block.3")
    assert [parse_split(w) for w in words] == [3, -2, 0.5, "auto", "layers.3", "decoder.block.3"]


def write_images(folder):
    from PIL import Image

    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    np.save(folder / "more.npy", np.zeros((2, 3, 32, 32), np.uint8))


def test_patches_draws_what_saved_experts_took(tmp_path):
    from PIL import Image

    write_images(tmp_path)
    options = ["--split", "layer3", "--router", "patch", "--grid", "4", "--per-expert", "2"]
    saved = run(
        "convert", "factories:cnn", *options, "--num-experts", "2", "--out", str(tmp_path / "e")
    )
    assert saved.exit_code == 0, saved.exception
    picture = tmp_path / "seen" / "patches.png"
    done = run(
        "patches", "factories:cnn", "--images", str(tmp_path), "--experts", str(tmp_path / "e"),
        "--mean", "0.4,0.5,0.6", "--std", "0.2", "--out", str(picture),
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    with Image.open(picture) as image:
        assert image.width > 300 and image.height > 5 * 100  # three columns, five rows
    assert [f.name for f in picture.parent.iterdir()] == ["patches.png"]


def test_patches_of_a_fresh_conversion_and_bad_images(tmp_path):
    write_images(tmp_path)
    picture = tmp_path / "p.png"
    one = ["patches", "factories:cnn", "--images", str(tmp_path / "0.png"), "--out", str(picture)]
    assert run(*one, "--grid", "2", "--per-expert", "1", "--split", "layer2").exit_code == 0
    assert picture.exists()
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for path, words in (("bad.png", "no readable image"), ("none", "expected a .png")):
        refused = run("patches", "factories:cnn", "--images", str(tmp_path / path))
        assert isinstance(refused.exception, MoeRewriteError) and words in str(refused.exception)
    text = run("patches", MODEL, "--images", str(tmp_path))
    assert "model of images" in str(text.exception)


def test_convert_takes_regions(tmp_path):
    done = run(
        "convert", "factories:cnn", "--split", "layer3", "--experts", "region", "--no-halo",
        "--grid", "4", "--per-expert", "4", "--out", str(tmp_path / "e"),
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert "multiply-adds" in done.output
    wrong = run("convert", MODEL, "--experts", "x").exception
    assert "expected auto, lora, ffn, carved or region" in str(wrong)


def test_convert_upcycles(tmp_path):
    done = run(
        "convert", "factories:mlp", "--mode", "upcycle", "--split", "0", "--num-experts", "3",
        "--shared", "sigmoid", "--out", str(tmp_path / "e"),
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert "3 copies of the feed-forward, a shared one times a sigmoid gate" in done.output


def test_convert_writes_a_standard_checkpoint(tmp_path):
    from standard import dense

    dense("Llama").save_pretrained(tmp_path / "dense")
    done = run(
        "convert", str(tmp_path / "dense"), "--mode", "upcycle", "--split", "0",
        "--num-experts", "3", "--standard", str(tmp_path / "moe"),
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert "mixtral checkpoint saved to" in done.output and (tmp_path / "moe/config.json").exists()
    wrong = run("convert", str(tmp_path / "dense"), "--standard", str(tmp_path / "no")).exception
    assert "no class has LoRAExperts" in str(wrong) and not (tmp_path / "no").exists()


def test_convert_writes_a_folder_with_its_modelling_file(tmp_path):
    from standard import dense

    dense("Llama").save_pretrained(tmp_path / "dense")
    result = run("convert", str(tmp_path / "dense"), "--standalone", str(tmp_path / "moe"))
    assert "trust_remote_code=True" in result.output
    assert (tmp_path / "moe" / "modeling_moe_rewrite.py").exists()
    wrong = run(
        "convert", str(tmp_path / "dense"), "--mode", "upcycle", "--standalone", str(tmp_path / "no")
    ).exception  # fmt: skip
    assert "save_standard" in str(wrong) and not (tmp_path / "no").exists()
