"""What a graph takes for granted about a call: read off a trace, checked, and put in words."""

import pytest
import torch
from torch import nn

from moe_rewrite.ir.conditions import conditions_of, relations_of

AUTO = torch.export.Dim.AUTO


class Work(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.work = work

    def forward(self, x, y, k=0):
        return self.work(x, y, k)


def conditions(work, x=(3, 9, 4), y=(3, 5), k=2):
    given = {"x": torch.zeros(x), "y": torch.zeros(y), "k": k}
    shapes = {"x": {0: AUTO, 1: AUTO}, "y": {0: AUTO, 1: AUTO}, "k": AUTO}
    exported = torch.export.export(Work(work), (), given, dynamic_shapes=shapes, strict=False)
    return conditions_of(list(exported.graph.find_nodes(op="placeholder")), relations_of(exported))


def leaves(x=(3, 9, 4), y=(3, 5), k=2):
    return [torch.zeros(x), torch.zeros(y), k]


CASES = {  # work -> calls that meet its conditions, calls that do not with the reason
    "free": (lambda x, y, k: (x + 1, y * 2), [{"x": (8, 40, 4), "y": (2, 3), "k": 7}],
             [({"x": (3, 9, 5)}, r"x.shape\[2\] is 5: expected 4")]),
    "tied": (lambda x, y, k: x.sum(1)[:, :1] + y, [{"x": (7, 2, 4), "y": (7, 6)}],
             [({"x": (7, 9, 4)}, r"y.shape\[0\] is 3: expected x.shape\[0\]")]),
    "at most": (lambda x, y, k: x * 2 if x.shape[1] <= 16 else x, [{"x": (3, 16, 4)}],
                [({"x": (3, 17, 4)}, r"x.shape\[1\] <= 16 does not hold")]),
    "more than": (lambda x, y, k: x * 2 if x.shape[0] > 2 else x, [{"x": (9, 9, 4)}],
                  [({"x": (2, 9, 4)}, r"x.shape\[0\] >= 3 does not hold")]),
    "modulus": (lambda x, y, k: x + 1 if x.shape[1] % 4 == 1 else x, [{"x": (3, 13, 4)}],
                [({"x": (3, 12, 4)}, r"x.shape\[1\] % 4")]),
    "loop": (lambda x, y, k: sum(x[:, i] for i in range(x.shape[1])), [{"y": (8, 8)}],
             [({"x": (3, 8, 4)}, r"x.shape\[1\] is 8: expected 9")]),
    "two lengths": (lambda x, y, k: x if x.shape[1] > y.shape[1] else y, [{"x": (3, 40, 4)}],
                    [({"y": (3, 12)}, "does not hold")]),
    "an int": (lambda x, y, k: x[:, -k:], [{"k": 5}, {"x": (2, 30, 4), "k": 20}],
               [({"k": 11}, "does not hold"), ({"k": -1}, "does not hold")]),
    "an int that counts": (lambda x, y, k: sum(x * i for i in range(k)), [{"x": (5, 5, 4)}],
                           [({"k": 3}, "k is 3: expected 2")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_calls_on_both_sides(case):
    work, met, unmet = CASES[case]
    found = conditions(work)
    for given in ({}, *met):
        assert found.pattern(leaves(**given)) is not None and not found.violated(leaves(**given))
    for given, words in unmet:
        assert found.pattern(leaves(**given)) is None
        with pytest.raises(ValueError, match=words):
            raise ValueError(found.violated(leaves(**given)))


def test_the_pattern_names_open_sizes_of_0_and_1():
    found = conditions(CASES["free"][0])
    assert found.pattern(leaves()) == (2, 2, 2, 2)
    assert found.pattern(leaves(x=(1, 9, 4))) == (1, 2, 2, 2)
    assert found.pattern(leaves(x=(0, 1, 4), y=(5, 1))) == (0, 1, 2, 1)


def test_what_restricts_a_call_is_said():
    assert conditions(CASES["free"][0]).texts == ["k >= 0"]
    assert conditions(CASES["at most"][0]).texts == ["x.shape[1] <= 16", "k >= 0"]
    assert conditions(CASES["tied"][0]).texts == ["y.shape[0] == x.shape[0]", "k >= 0"]
