"""A model that FSDP2 shards over processes trains as one process does, and is saved whole."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_training as sharded
import torch

import moe_rewrite


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(sharded.__file__))
    command = [sys.executable, script]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(folder)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=300)[1].decode()[-2000:] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    return torch.load(folder / "found.pt"), folder


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_the_save_are_those_of_one_process(found, tied, warm):
    values, folder = found
    moe = sharded.converted(tied)
    losses = sharded.train(moe, [sharded.IDS[:2], sharded.IDS[2:]])
    torch.testing.assert_close(values[tied, warm], losses, rtol=0, atol=1e-5)
    loaded = moe_rewrite.load(folder / f"{tied}-{warm}", sharded.build(tied))
    for (name, a), (_, b) in zip(loaded.named_parameters(), moe.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)


def test_a_sharded_model_is_not_given_experts_that_are_not(found):
    assert "shard it then" in found[0]["expand"]
