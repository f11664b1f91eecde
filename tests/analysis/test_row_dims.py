"""Rows by their symbolic sizes: their input, their mask, and where merged rows came from."""

import pytest
import torch
from torch import nn

from moe_rewrite.analysis.row_dims import (
    flattened_from,
    mask_of_rows,
    same_sizes,
    source_of_rows,
)
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import op_name

W = 4


class Net(nn.Module):
    """Takes what Hugging Face's models take, and does what a test says."""

    def __init__(self, work):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, W), nn.Linear(W, W), nn.Linear(W, W)
        self.work = work

    def forward(self, input_ids=None, inputs_embeds=None, decoder_input_ids=None,
                attention_mask=None, decoder_attention_mask=None):  # fmt: skip
        given = (inputs_embeds, decoder_input_ids, attention_mask, decoder_attention_mask)
        x = self.embed(input_ids) if input_ids is not None else inputs_embeds
        return self.work(self, x, *(g for g in given if g is not None and g is not x))


IDS = torch.zeros(2, 6, dtype=torch.long)


def program(work, **given):
    return program_of(Net(work), given or {"input_ids": IDS})


def named(program, name, last=True):
    return [n for n in program.graph.nodes if n.op == "call_function" and op_name(n) == name][
        -1 if last else 0
    ]


def test_sizes_are_the_same_where_their_expressions_are():
    made = program(lambda m, x: m.a(x).reshape(-1, W) + m.b(x.reshape(x.shape[0] * x.shape[1], W)))
    batch, length, _ = value(named(made, "embedding")).shape
    assert same_sizes((batch, length), (batch, length)) and same_sizes((3, batch), (3, batch))
    assert not same_sizes((batch, length), (length, batch))
    assert not same_sizes((batch,), (batch, length)) and not same_sizes((batch,), (3,))
    for node in (named(made, "reshape"), named(made, "linear")):
        assert same_sizes(value(node).shape, (batch * length, W))
    assert not same_sizes(value(named(made, "add")).shape, (batch * batch, W))


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ({"input_ids": IDS}, "input_ids"),
        ({"inputs_embeds": torch.zeros(2, 6, W)}, "inputs_embeds"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 6)}, "input_ids"),
    ],
)
def test_rows_come_from_the_argument_with_their_sizes(given, source):
    """Whose dimensions are the first two, however many follow; no mask is one."""
    made = program(lambda m, x, mask=None: m.a(x if mask is None else x * mask[..., None]), **given)
    assert source_of_rows(made, named(made, "linear")) == source


def test_rows_of_another_argument_are_distinguished():
    """Also where it is as long in the example."""
    made = program(
        lambda m, x, ids: m.a(x).mean() + m.b(m.embed(ids)), input_ids=IDS, decoder_input_ids=IDS
    )
    first, last = (named(made, "linear", last) for last in (False, True))
    assert source_of_rows(made, first) == "input_ids"
    assert source_of_rows(made, last) == "decoder_input_ids"


def test_rows_that_no_argument_has_come_from_nowhere():
    made = program(lambda m, x: m.a(x[:, 1:]) + m.b(x.transpose(0, 1)).mean())
    first, last = (named(made, "linear", last) for last in (False, True))
    assert source_of_rows(made, first) is None and source_of_rows(made, last) is None
    pooled = program(lambda m, x: m.a(x.mean(1)))
    assert source_of_rows(pooled, named(pooled, "linear")) is None


@pytest.mark.parametrize(
    ("source", "mask"),
    [("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"),
     (None, None)],
)  # fmt: skip
def test_the_mask_of_rows_goes_by_its_name(source, mask):
    masks = {n: torch.ones(2, 6) for n in ("attention_mask", "decoder_attention_mask")}
    given = {"input_ids": IDS, "decoder_input_ids": IDS, **masks}
    made = program(lambda m, x, ids, *masks: m.a(x) + m.embed(ids) + sum(masks)[..., None], **given)
    assert mask_of_rows(made, source) == mask
    assert mask_of_rows(program(lambda m, x: m.a(x)), source) is None


MERGED = {
    "reshaped": lambda m, x: m.a(x.reshape(-1, W)),
    "flattened": lambda m, x: m.a(x.flatten(0, 1)),
    "after pointwise work": lambda m, x: m.a(
        torch.tanh(x.reshape(-1, W).to(torch.float64).float())
    ),
    "after products and norms": lambda m, x: m.a(
        torch.nn.functional.layer_norm(m.b(x.reshape(-1, W)), [W]).softmax(-1)
    ),
    "after a sum with another value": lambda m, x: m.a(m.b(x.reshape(-1, W)) + x.reshape(-1, W)),
    "twice": lambda m, x: m.a(x.reshape(-1, 2, W).reshape(-1, W)),
    "in place": lambda m, x: m.a(m.b(x.reshape(-1, W)).mul_(2.0)),
}


@pytest.mark.parametrize("case", MERGED)
def test_merged_rows_are_followed_back(case):
    made = program(MERGED[case])
    rows, *_ = named(made, "linear").args
    source = flattened_from(rows)
    assert value(source).ndim == 3 and value(source).shape[-1] == W


def test_merged_rows_of_a_transposed_value_are_those_of_the_transposed_value():
    made = program(lambda m, x: m.a(x.transpose(0, 1).reshape(-1, W)))
    rows, *_ = named(made, "linear").args
    assert flattened_from(rows) is named(made, "transpose")


OTHERS = {
    "not merged": lambda m, x: m.a(x),
    "of one dimension less": lambda m, x: m.a(x.mean(1)),
    "mixed": lambda m, x: m.a(x.reshape(-1, W).cumsum(0)),
    "turned": lambda m, x: m.a(x.reshape(-1, W).flip(0)),
    "parts of them": lambda m, x: m.a(x.reshape(-1, W)[1:]),
    "put together": lambda m, x: m.a(torch.cat([x.reshape(-1, W)] * 2)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_rows_come_from_nothing(case):
    made = program(OTHERS[case])
    rows, *_ = named(made, "linear").args
    assert flattened_from(rows) is None
