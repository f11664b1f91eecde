"""A run's folder: whose it is, what is in it, and who may use it."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import architectures
import pytest
import torch
import words

from moe_rewrite import MoeRewriteError
from moe_rewrite.continual.compare import compare
from moe_rewrite.continual.registry import Setup
from moe_rewrite.continual.run import run
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.continual.training import Training
from moe_rewrite.errors import CheckpointError, ConfigError
from moe_rewrite.utils.folders import locked

SETUP = Setup(split=1, rank=2, replay=0.25, training=Training(epochs=1, lr=1e-2))
METHODS = ["pmoe", "pmoe-gradient", "lora"]


def llama(seed=0):
    model = architectures.build("Llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(20 + seed)
    return model


def go(out, method="lora", dense=None, length=32, tasks=None, setup=SETUP, base_task=None):
    problem = TextProblem(words.Letters(), length)
    return run(
        method, dense or llama(), problem, tasks or words.stream()[:2], setup, base_task, "loss", out
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    for method in METHODS:
        go(folder / method, method)
    return folder


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def other_items():
    first, second = words.stream()[:2]
    train = [*second.train[:-1], second.train[0]]  # as many, but one other
    return [first, replace(second, train=train)]


CHANGES = {
    "model": {"dense": llama(seed=1)},
    "data of task 2": {"tasks": other_items()},
    "number of tasks": {"tasks": words.stream()},
    "problem": {"length": 16},
    "options": {"setup": replace(SETUP, rank=4)},
    "data of the base task": {"base_task": words.task("own", "klmnop", "ok")},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_run_is_not_another_ones(out, method, what):
    with pytest.raises(ConfigError, match=f"another run, which differs in .*{what}"):
        go(out / method, method, **CHANGES[what])
    assert go(out / method, method).R  # it is still there


def spoil(folder, how):
    state = folder / "after-2"
    progress = folder / "progress.json"
    if how == "score":
        facts = json.loads(progress.read_text())
        facts["result"]["R"][0][0] += 1
        progress.write_text(json.dumps(facts))
    elif how == "older version":
        facts = json.loads(progress.read_text())
        del facts["sha256"]
        progress.write_text(json.dumps(facts))
    elif how == "flipped":
        content = bytearray((state / "state.safetensors").read_bytes())
        content[-1] ^= 1
        (state / "state.safetensors").write_bytes(content)
    else:
        (state / how).unlink()


def half_done(out, method):
    """The run as it is before its third task."""
    shutil.rmtree(out / method)
    tasks = words.stream()

    class Stopped(Exception):
        pass

    problem = TextProblem(words.Letters(), 32)
    batch = problem.batch

    def stop(items):
        if items[0] in tasks[2].train:
            raise Stopped
        return batch(items)

    problem.batch = stop
    with pytest.raises(Stopped):
        run(method, llama(), problem, tasks, SETUP, None, "loss", out / method)
    return out / method


@pytest.mark.parametrize(("how", "words_"), [
    ("score", "changed since it was written"), ("older version", "older version"),
])  # fmt: skip
def test_progress_that_was_changed_is_refused(out, how, words_):
    spoil(out / "lora", how)
    with pytest.raises(CheckpointError, match=words_):
        go(out / "lora")


@pytest.mark.parametrize(("method", "how", "said"), [
    ("lora", "state.safetensors", "cannot be read"), ("lora", "flipped", "changed since"),
    ("pmoe", "moe_rewrite.json", "cannot be read"), ("pmoe", "state.safetensors", "cannot be read"),
    ("pmoe-gradient", "moe_rewrite.json", "cannot be read"),
])  # fmt: skip
def test_a_missing_or_changed_state_is_never_a_fresh_start(out, method, how, said):
    folder = half_done(out, method)
    spoil(folder, how)
    with pytest.raises(CheckpointError, match=said):
        go(folder, method, tasks=words.stream())


def hold(folder, ready, done):
    with locked(folder):
        ready.set()
        done.wait(60)


def test_two_processes_do_not_share_a_folder(out):
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(out / "lora", ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(ConfigError, match="another run is using it"):
        go(out / "lora")
    other.kill()  # a killed run keeps nobody out
    other.join()
    assert go(out / "lora").R


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    steps = []
    monkeypatch.setattr(TextProblem, "batch", lambda *_: steps.append(1))
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=f"{out}: cannot be written to"):
            go(out)
        with pytest.raises(MoeRewriteError, match="cannot be written to"):
            compare(["lora"], llama(), TextProblem(words.Letters(), 32), words.stream(), SETUP,
                    out=out)  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be written to"):
        compare(["lora"], llama(), TextProblem(words.Letters(), 32), words.stream(), SETUP,
                json_file=tmp_path / "file" / "figures.json")  # fmt: skip
    assert not steps
