"""Shares of experts over time, read from a run's folder."""

import pytest

from moe_rewrite.continual.expert_shares import expert_shares
from moe_rewrite.continual.results import Result
from moe_rewrite.continual.run_folder import PROGRESS, RunFolder
from moe_rewrite.errors import CheckpointError, ConfigError

FIRST = [[0.2, 0.8], [0.9, 0.1], [1.0, 0.0]]  # of two tasks and the base task, with one expert
SECOND = [[0.1, 0.7, 0.2], [0.3, 0.1, 0.6], [0.9, 0.1, 0.0]]


class NoState:
    def state(self):
        return {}


def write(folder, history, use=None, learnt=2):
    result = Result(["one", "two"], "accuracy", [0.0, 0.0], [0.5], router_use=use, router_history=history)  # fmt: skip
    RunFolder(folder, {}).write(learnt, NoState(), result)


def test_shares_are_means_over_the_tasks_learnt_so_far(tmp_path):
    write(tmp_path / "pmoe", [FIRST, SECOND], SECOND)
    write(tmp_path / "lora", [])
    found = expert_shares(tmp_path)  # the folder of compare: one of its methods has a router
    assert found == expert_shares(tmp_path / "pmoe")
    assert found.experts == tmp_path / "pmoe" / "after-2" and found.experts.is_dir()
    facts = found.facts(["red", "blue"])
    assert facts["outputs"] == ["frozen model", "red", "blue"] and facts["tasks"] == ["one", "two"]
    first, second = facts["over_time"]
    assert first == [0.2, 0.8, 0.0] and second == pytest.approx([0.2, 0.4, 0.4])
    assert [row["task"] for row in facts["by_task"]] == ["one", "two", "the base task"]
    assert [row["shares"] for row in facts["by_task"]] == SECOND


def test_a_folder_of_before_has_the_last_shares_only(tmp_path):
    write(tmp_path, [], SECOND)
    facts = expert_shares(tmp_path).facts([])
    assert facts["tasks"] == ["two"] and facts["over_time"] == [pytest.approx([0.2, 0.4, 0.4])]
    assert facts["outputs"] == ["frozen model", "expert 0", "expert 1"]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        expert_shares(tmp_path / "none")
    with pytest.raises(ConfigError, match="with a router; it has none"):
        expert_shares(tmp_path)
    write(tmp_path / "a", [FIRST, SECOND])
    write(tmp_path / "b", [FIRST, SECOND])
    with pytest.raises(ConfigError, match="the runs a, b: name one"):
        expert_shares(tmp_path)
    write(tmp_path / "odd", [FIRST, [[0.5, 0.5]]])
    with pytest.raises(CheckpointError, match=r"router_history=\[\[0.5, 0.5\]\]"):
        expert_shares(tmp_path / "odd")
    (tmp_path / "a" / PROGRESS).write_text("{}")
    with pytest.raises(CheckpointError, match="no progress of a run"):
        expert_shares(tmp_path / "a")
