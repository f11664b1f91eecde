"""The commands that write adapters and serve them."""

import socket

import pytest
import torch
from engines import Engine, running
from standalone import IDS, filled
from typer.testing import CliRunner

import moe_rewrite
from moe_rewrite import MoeRewriteError
from moe_rewrite.cli import main, serve
from moe_rewrite.serve import AdapterRouter

runner = CliRunner()


def run(*arguments):
    return runner.invoke(main.app, [str(a) for a in arguments])


@pytest.mark.sweep
def test_saved_experts_become_adapters_and_a_port_in_use_is_said(tmp_path):
    moe, base = filled("Llama"), tmp_path / "base"
    moe.to_dense().save_pretrained(base)
    moe.save_pretrained(tmp_path / "experts")
    done = run("serve-adapters", base, tmp_path / "served", "--experts", tmp_path / "experts")
    assert done.exit_code == 0 and "adapters and router saved to" in done.output, done.exception
    router, ids = AdapterRouter.load(tmp_path / "served"), IDS[0, :9]
    assert router.base == str(base)
    again = moe_rewrite.load(tmp_path / "experts", moe.to_dense())
    gates = again.route(input_ids=ids[None]).gates[0, -1]
    weights = torch.tensor([*router.weights(ids.tolist()).values()])
    torch.testing.assert_close(weights, gates, rtol=0, atol=1e-5)
    with running(Engine()) as engine, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", tmp_path / "served", "--url", engine.url, "--port", port)
    assert isinstance(done.exception, MoeRewriteError)
    assert f"127.0.0.1:{port} cannot be listened at" in str(done.exception)


def test_a_folder_that_is_none_is_refused(tmp_path):
    done = run("serve", tmp_path)
    assert isinstance(done.exception, MoeRewriteError)
    assert "has no router/router.json: expected a folder that save_adapters" in str(done.exception)


@pytest.mark.parametrize("known", [True, False])
def test_a_missing_tokenizer_is_said(tmp_path, capsys, known):
    model = filled("Llama").to_dense()
    if known:
        (tmp_path / "tokenizer_config.json").write_text("{}")
    serve.say_without_tokenizer(model, tmp_path)
    said = capsys.readouterr().out
    assert said == "" if known else f"Copy its files to {tmp_path}" in said
    serve.say_without_tokenizer(torch.nn.Linear(2, 2), tmp_path)
    assert capsys.readouterr().out == ""
