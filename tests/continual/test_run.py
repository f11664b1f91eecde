"""A run's folder: what is in it, whether it is whole, and who may use it."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace

import architectures
import pytest
import torch
import words

from moe_rewrite.continual.compare import compare
from moe_rewrite.continual.registry import Setup
from moe_rewrite.continual.run import run
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.continual.training import Training
from moe_rewrite.errors import CheckpointError, ConfigError
from moe_rewrite.utils.folders import locked

SETUP = Setup(split=1, rank=2, replay=0.25, training=Training(epochs=1, lr=1e-2))
METHODS = ["pmoe", "pmoe-gradient", "lora"]
TASKS = words.stream()


class Stopped(Exception):
    """Stands for a kill, within one process."""


class StopsAt(TextProblem):
    """A problem that stops when a task's items are trained on."""

    def __init__(self, task):
        super().__init__(words.Letters(), 32)
        self.task = [] if task is None else task.train

    def facts(self):
        return TextProblem(words.Letters(), 32).facts()

    def batch(self, items):
        if items[0] in self.task and len(items) > 2:  # two are an example
            raise Stopped
        return super().batch(items)


def go(out, method="lora", setup=SETUP, stops_at=None):
    llama = architectures.build("Llama", layers=2)
    with torch.no_grad():
        llama.lm_head.weight.mul_(20)
    return run(method, llama, StopsAt(stops_at), TASKS, setup, None, "loss", out)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """Runs that have learnt two tasks of three."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        with pytest.raises(Stopped):
            go(folder / method, method, stops_at=TASKS[2])
    return folder


@pytest.fixture
def out(half_done, tmp_path):
    shutil.copytree(half_done, tmp_path / "runs")
    return tmp_path / "runs"


def edit(file, change):
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize(("change", "said"), [
    (lambda facts: facts["result"]["R"][0].__setitem__(0, 0.5), "changed since it was saved"),
    (lambda facts: facts.update(learnt=1), "changed since it was saved"),
    (lambda facts: facts.pop("meta_sha256"), "older version"),
])  # fmt: skip
def test_progress_that_was_changed_is_refused(out, change, said):
    edit(out / "lora" / "progress.json", change)
    with pytest.raises(CheckpointError, match=f"progress.json.*{said}"):
        go(out / "lora")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"[1]", b"{", b""])
def test_progress_that_is_no_progress_is_refused(out, content):
    (out / "lora" / "progress.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"progress\.json"):
        go(out / "lora")


def test_states_without_progress_are_no_fresh_start(out):
    (out / "lora" / "progress.json").unlink()
    with pytest.raises(CheckpointError, match=r"progress\.json: missing, beside after-2"):
        go(out / "lora")
    assert (out / "lora" / "after-2" / "state.safetensors").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_or_changed_file_is_named(out, method):
    files = sorted((out / method / "after-2").iterdir())
    assert len(files) == 1 if method == "lora" else 3
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{file.name}: missing"):
            go(out / method, method)
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{file.name}: changed since"):
            go(out / method, method)
        file.write_bytes(whole)


def test_another_runs_experts_are_a_change(out):
    for file in (out / "pmoe-gradient" / "after-2").glob("moe_rewrite*"):
        shutil.copy(file, out / "pmoe" / "after-2")
    with pytest.raises(CheckpointError, match=r"moe_rewrite\.json: changed since"):
        go(out / "pmoe", "pmoe")


def test_a_finished_run_is_checked_too(out):
    done = go(out / "lora")
    assert go(out / "lora") == done
    shutil.rmtree(out / "lora" / "after-3")
    with pytest.raises(CheckpointError, match=r"after-3.*missing"):
        go(out / "lora")


def test_a_run_that_was_killed_in_its_first_task_starts_there(tmp_path):
    want = go(tmp_path / "whole")
    with pytest.raises(Stopped):
        go(tmp_path / "cut", stops_at=TASKS[0])
    (tmp_path / "cut" / "after-1").mkdir()  # half written
    got = go(tmp_path / "cut")
    assert (got.R, got.before) == (want.R, want.before)


def test_a_run_that_diverged_is_handed_back(tmp_path):
    setup = replace(SETUP, training=Training(epochs=1, lr=1e30, clip=1e30))
    first, again = (go(tmp_path / "out", setup=setup) for _ in range(2))
    assert str(first.R) == str(again.R) and "nan" in str(first.R)


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
    with pytest.raises(ConfigError, match="lora: another run is using it"):
        go(out / "lora")
    other.kill()  # a killed run keeps nobody out
    other.join()
    assert go(out / "lora").R


def test_nor_does_a_comparison_share_its_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match=f"{tmp_path}: another run is using it"):
        compare_into(out=tmp_path)
    assert not (tmp_path / "lora").exists()


def compare_into(**where):
    llama = architectures.build("Llama", layers=2)
    return compare(["lora"], llama, TextProblem(words.Letters(), 32), TASKS, SETUP, **where)


def test_a_drive_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("moe_rewrite.utils.folders.fcntl.flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        pass


@pytest.fixture
def no_batch(monkeypatch):
    def fail(*_):
        raise AssertionError("a batch was made")

    monkeypatch.setattr(TextProblem, "batch", fail)


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path, no_batch):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "inside"):
        with pytest.raises(ConfigError, match=f"{out}: cannot be written to"):
            go(out)
        with pytest.raises(ConfigError, match=f"{out}: cannot be written to"):
            compare_into(out=out)
    with pytest.raises(ConfigError, match=f"{file}: cannot be written to"):
        compare_into(json_file=file / "figures.json")
    with pytest.raises(ConfigError, match=f"{tmp_path}: is a folder"):
        compare_into(json_file=tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write anywhere")
def test_a_read_only_folder_too(tmp_path, no_batch):
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be written to"):
        go(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_place_of_the_lock_does_not_hang(tmp_path, no_batch):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ConfigError, match=r"\.lock: is no plain file"):
        go(tmp_path)
