"""Fewer garbage collections while a graph is made, and the user's own settings afterwards."""

import gc
import threading

import pytest

from moe_rewrite.utils.rare_collections import YOUNG, rare_collections


@pytest.fixture
def thresholds():
    """Sets the process's thresholds for a test."""
    before = gc.get_threshold()
    yield gc.set_threshold
    gc.set_threshold(*before)


@pytest.mark.parametrize("usual", [700, 2000])
def test_they_are_rare_inside_and_as_before_afterwards(thresholds, usual):
    thresholds(usual, 10, 10)
    with rare_collections():
        assert gc.get_threshold() == (YOUNG, 10, 10)
    assert gc.get_threshold() == (usual, 10, 10)
    with pytest.raises(ValueError, match="inside"), rare_collections():
        raise ValueError("inside")
    assert gc.get_threshold() == (usual, 10, 10)


@pytest.mark.parametrize("own", [0, 200, 3 * YOUNG])
def test_settings_of_the_users_stay(thresholds, own):
    thresholds(own, 10, 10)
    with rare_collections():
        assert gc.get_threshold() == (own, 10, 10)
    assert gc.get_threshold() == (own, 10, 10)


def test_the_last_thread_that_leaves_restores_them(thresholds):
    thresholds(700, 10, 10)
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def other():
        with rare_collections():
            entered.set()
            leave.wait(10)
        left.set()

    thread = threading.Thread(target=other)
    with rare_collections():
        thread.start()
        assert entered.wait(10)
    assert gc.get_threshold()[0] == YOUNG
    leave.set()
    thread.join(10)
    assert left.is_set() and gc.get_threshold() == (700, 10, 10)
