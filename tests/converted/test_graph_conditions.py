"""Calls beyond the example: each gets the dense model's result, whatever its capture assumed."""

import math

import architectures
import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter
from moe_rewrite.converted.graphs import graph_cache


class Branching(nn.Module):
    """Embeds, does something that depends on sizes, and goes on through linear layers."""

    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.work = nn.Embedding(50, 8), work
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.cell = nn.GRUCell(8, 8)

    def forward(self, ids, last=0, scale=None):
        x = self.work(self, self.embed(ids))
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = x if scale is None else x * scale[..., None]
        return x[:, -last:]


def recurrent(model, x):
    state, states = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        state = model.cell(x[:, i], state)
        states.append(state)
    return torch.stack(states, 1)


WORK = {
    "long": lambda m, x: x * 2 if x.shape[1] > 12 else x,
    "modulus": lambda m, x: x + 1 if x.shape[1] % 4 == 1 else x,
    "large batch": lambda m, x: x * 3 if x.shape[0] > 8 else x,
    "one sample": lambda m, x: x * 3 if x.shape[0] == 1 else x,
    "root": lambda m, x: x * math.sqrt(x.shape[1]) / len(x),
    "half": lambda m, x: x + int(x.shape[1] * 0.5),
    "loop": recurrent,
}
SIZES = [(2, 5), (9, 6), (1, 13), (12, 1), (3, 16)]


def converted(work, **options):
    model = Branching(work).eval()
    example = torch.zeros(3, 9, dtype=torch.long)
    return model, moe_rewrite.convert(model, split=1, example_inputs=example, **options)


def graphs(moe):
    return [g for kept in moe._graphs._kept.values() for g in kept]


def ids(batch, length, seed=0):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", WORK)
def test_a_branch_on_a_size_is_taken_as_the_dense_model_takes_it(case, verify):
    model, moe = converted(WORK[case], verify=verify)
    with torch.no_grad():
        for size in SIZES:
            torch.testing.assert_close(moe(ids(*size)), model(ids(*size)))
    assert len(graphs(moe)) <= 1 + 2 * len(SIZES)


def test_an_int_that_changes_from_call_to_call_is_an_input():
    model, moe = converted(lambda m, x: x)
    with torch.no_grad():
        for last in (3, 4, 5, 8, 2, 7, 3, 1):
            torch.testing.assert_close(moe(ids(2, 9), last=last), model(ids(2, 9), last=last))
    assert len(graphs(moe)) <= 4  # of the example, for 3, for the others, for 1


def test_one_row_for_all_samples():
    model, moe = converted(lambda m, x: x)
    with torch.no_grad():
        for rows in (2, 1, 2, 1):
            scale = torch.rand(rows, 9)
            torch.testing.assert_close(moe(ids(2, 9), scale=scale), model(ids(2, 9), scale=scale))


def test_position_ids_of_one_row():
    model = architectures.build("Llama", layers=2)
    moe = moe_rewrite.convert(model, split=1)
    for batch, length in ((2, 12), (3, 7)):
        given = architectures.random_call(model, batch)
        given = {k: v[:, :1].expand(-1, length).contiguous() for k, v in given.items()}
        given["position_ids"] = torch.arange(length)[None]
        assert moe_rewrite.verify(model, moe, given).equal


def test_sizes_that_do_not_fit_each_other_are_named():
    _, moe = converted(lambda m, x: x)
    moe(ids(2, 9), scale=torch.rand(2, 9))
    with pytest.raises(MoeRewriteError, match=r"scale.shape\[1\] is 7: expected 9"):
        moe(ids(2, 9), scale=torch.rand(2, 7))


def test_the_configuration_is_part_of_a_graph():
    model = architectures.build("Llama", layers=2)
    moe = moe_rewrite.convert(model, split=1)
    given = architectures.random_call(model, 2)
    assert moe(**given).hidden_states is None
    for shown in (True, False, True):
        moe.config.output_hidden_states = shown
        assert (moe(**given).hidden_states is not None) == shown


def test_graphs_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(graph_cache, "LIMIT", 3)
    model, moe = converted(WORK["half"])
    with torch.no_grad():
        for length in (5, 6, 7, 8, 9, 9, 5, 6):
            torch.testing.assert_close(moe(ids(2, length)), model(ids(2, length)))
            assert len(graphs(moe)) <= 3


class Flattened(nn.Module):
    """Views memory that is contiguous for channels-last images only after a copy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        first = x.contiguous().view(len(x), -1).mean(1, keepdim=True)
        return self.head(self.layers(x).contiguous().view(len(x), -1)) + first


def test_channels_last_images():
    model = Flattened().eval()
    moe = moe_rewrite.convert(model, split=1, example_inputs=torch.randn(3, 4, 6, 6))
    with torch.no_grad():
        for batch in (2, 1, 5):
            x = torch.randn(batch, 4, 6, 6)
            for given in (x, x.to(memory_format=torch.channels_last)):
                torch.testing.assert_close(moe(given), model(given))


class WithAToken(nn.Module):
    """A token joined before the others and taken off again, around a layer that holds experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Embedding(50, 8), nn.Parameter(torch.ones(1, 1, 8))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        x = torch.relu(self.first(self.embed(ids)))
        return self.last(torch.cat([self.token.expand(len(x), -1, -1), x], 1)[:, 1:])


def test_a_refused_call_says_why():
    moe = moe_rewrite.convert(
        WithAToken(), split="last", router=TokenRouter(), experts=LoRAExperts(sites="all+head"),
        verify=False, example_inputs=torch.zeros(2, 6, dtype=torch.long),
    )  # fmt: skip
    try:
        assert moe(torch.zeros(2, 1, dtype=torch.long)).shape == (2, 1, 3)
    except MoeRewriteError as refused:
        assert "cannot be routed: last" in str(refused)


def test_one_graph_for_every_number_of_logits_that_are_kept():
    model = architectures.build("Llama", layers=2)
    moe = moe_rewrite.convert(model, split=1)
    with torch.no_grad():
        for kept in (1, 4, 2, 7, 3):
            given = architectures.random_call(model, 2) | {"logits_to_keep": kept}
            torch.testing.assert_close(moe(**given).logits, model(**given).logits)
    assert len(graphs(moe)) <= 3  # of the conversion, for 1, for the others


class Kept(nn.Module):
    """Asks for the type of its int, as transformers' models do with logits_to_keep."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.last = nn.Linear(8, 8)

    def forward(self, x, keep=0):
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        return self.last(self.layers(x)[:, kept])


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_an_int_whose_type_is_asked_for(verify, training):
    model = Kept().train(training)
    example = torch.randn(3, 7, 8)
    moe = moe_rewrite.convert(model, split="layers.1", example_inputs=example, verify=verify)
    with torch.no_grad():
        for keep in (3, 4, 1, 5, 0, 2):
            for length in (6, 9):
                x = torch.randn(2, length, 8)
                torch.testing.assert_close(moe(x, keep=keep), model(x, keep=keep))
    # without it, for 3, for the other numbers of last positions, for 0 (all) and 1
    assert len(graphs(moe)) <= (5 if verify else 7)
    assert "isinstance" not in globals()


class Again(nn.Module):
    """A block that runs twice, whose norm writes statistics in training: the second run waits for
    them, so that graph has no cut point between the two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.head(self.block(self.block(self.stem(x))))


def test_a_graph_is_never_cut_elsewhere_than_the_first():
    model, x = Again(), torch.randn(4, 3, 6, 6)
    options = {"split": 2, "experts": LoRAExperts(sites=("head",)), "example_inputs": x}
    moe = moe_rewrite.convert(model, **options, batch_norm="update").train()
    with pytest.raises(moe_rewrite.MoeRewriteError, match="on another side of the cut"):
        moe(x)
    moe = moe_rewrite.convert(model, **options).train()
    moe(x).sum().backward()
    torch.testing.assert_close(moe.eval()(x), model.eval()(x))
