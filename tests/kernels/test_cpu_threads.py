"""Shares of work on the CPU: one core each, in the caller's mode, with errors passed on."""

import os
import sys
import threading

import pytest
import torch

from moe_rewrite.kernels.cpu_threads import spread


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_every_share_is_done_once(shares):
    done = []
    spread(done.append, shares)
    assert sorted(done) == list(range(shares))


def test_shares_have_a_core_each_and_the_caller_keeps_all_of_its_own():
    before, met, seen = torch.get_num_threads(), threading.Barrier(2), set()

    def work(_):
        met.wait(60)  # both run at the same time
        seen.add((threading.get_ident(), torch.get_num_threads()))

    for threads in (2, 3, before):
        torch.set_num_threads(threads)
        spread(work, 2)
        assert torch.get_num_threads() == threads
    assert len({ident for ident, _ in seen}) == 2 and {count for _, count in seen} == {1}
    assert threading.get_ident() not in {ident for ident, _ in seen}
    other = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert other == [before]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes(mode):
    weight = torch.ones(3, requires_grad=True)
    with mode():
        out = torch.empty(2, 3)
        spread(lambda i: torch.mul(weight, i, out=out[i]), 2)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert out.tolist() == [[0, 0, 0], [1, 1, 1]] and not out.requires_grad


def test_an_error_comes_when_all_have_ended():
    ended = []

    def work(i):
        if i == 0:
            raise KeyError("first")
        ended.append(i)

    for _ in range(2):
        with pytest.raises(KeyError, match="first"):
            spread(work, 3)
    assert sorted(ended) == [1, 1, 2, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(sys.platform == "darwin", reason="OpenMP and fork do not go together there")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_starts_its_own():
    spread(lambda i: None, 2)
    child = os.fork()
    if not child:
        done = []
        spread(done.append, 2)
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0
