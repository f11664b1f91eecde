"""Sites for LoRA experts: which are found in what form, and why others are rejected."""

import copy
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite import LoRAExperts, PatchRouter, TokenRouter
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.gate_layout import Flat, Line, OverMap, Rows, Samples, Swapped
from moe_rewrite.ir.sites import LoRASite
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.find_lora_sites import FindLoRASites
from moe_rewrite.passes.pipeline import TO_CUT, run

TOKENS, SAMPLES = TokenRouter(), TokenRouter(granularity="sequence")
W = networks.WIDTH


@cache
def network(*layers):
    model = networks.Network(["Mlp", *layers], tokens=False)
    return run(TO_CUT, program_of(model, model.input(2, 6)), Decisions("layers.1"))


def find(program, experts=None, router=TOKENS):
    program = replace(program, graph=copy.deepcopy(program.graph))
    find_sites = FindLoRASites(experts or LoRAExperts())
    return run((find_sites,), program, Decisions("layers.1", router))


def sites(program):
    return {site.name: site for site in program.found.sites}


def rejected(program):
    return {r.name: r.reason for r in program.found.rejected}


def layouts(program):
    return {site.name: [m.layout for m in of] for site, of in program.found.sites.items()}


def test_the_graph_is_only_read():
    program = network("Mlp", "Attention")
    found = find(program)
    assert str(found) == str(program) and found.sites == () and program.found is None
    assert found.numerics[-1] == ("sites", "exact")


def test_linear_maps_after_the_cut_are_sites():
    found = sites(find(network("Mlp", "Attention")))
    assert found == {
        "layers.1.up": LoRASite("layers.1.up", "layers.1.up.weight", W, 2 * W, False),
        "layers.1.down": LoRASite("layers.1.down", "layers.1.down.weight", 2 * W, W, False),
        "layers.2.qkv": LoRASite("layers.2.qkv", "layers.2.qkv.weight", W, 3 * W, False),
        "layers.2.out": LoRASite("layers.2.out", "layers.2.out.weight", W, W, False),
    }
    assert found["layers.1.up"].weights == ("layers.1.up.weight",)


def test_bare_parameters_are_sites_by_their_own_names():
    """Products with the weight stored either way."""
    found = sites(find(network("Bare")))
    forms = {n: (s.weight, s.transposed) for n, s in found.items()}
    assert forms == {f"layers.1.{n}": (f"layers.1.{n}", n == "b") for n in "abc"}


class Forms(nn.Module):
    """One product in several forms, none of them in a module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.w, self.v = nn.Parameter(torch.randn(4, 7)), nn.Parameter(torch.randn(4, 7))
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        flat = x.reshape(-1, 4)
        scaled = torch.addmm(self.bias, flat, self.v, alpha=2.0)
        mixed = torch.einsum("bd,dh->bh", flat, self.v)
        computed = F.linear(flat, self.v.t() * 2.0)
        return torch.addmm(self.bias, flat, self.w) + scaled + computed, mixed


def test_products_in_another_form_are_rejected_with_the_reason():
    program = run(TO_CUT, program_of(Forms(), torch.zeros(2, 3, 4)), Decisions(1))
    found = find(program, LoRAExperts(sites="all+head"))
    assert sites(found)["w"] == LoRASite("w", "w", 4, 7, True)
    assert sites(found)["v"] == LoRASite("v", "v", 4, 7, True)
    assert sites(found)["v.2"] == LoRASite("v.2", "v", 4, 7, False)  # a multiple of it
    assert rejected(found) == {"addmm": "addmm with alpha or beta"}


def test_layouts_say_where_the_plans_rows_lie():
    found = layouts(find(network("Mlp", "Swapped")))
    assert found["layers.1.up"] == [Rows(3)]
    assert found["layers.2.first"] == [Swapped(3)] and found["layers.2.second"] == [Flat(False)]
    each = layouts(find(network("Pooled"), router=SAMPLES))
    assert each == {"layers.1.inside": [Samples(3)], "layers.1.over": [Samples(3)]}


def test_rows_that_are_not_the_plans_are_rejected():
    found = find(network("Pooled", "Convolved"))
    assert "layers.1.inside" in sites(found) and "layers.1.over" not in sites(found)
    reasons = rejected(found)
    assert "has rows that are not the plan's" in reasons["layers.1.over"]
    assert layouts(found)["layers.2.conv"] == [Line()]


def test_the_output_head_is_taken_where_it_is_asked_for():
    program = network("Mlp")
    reason = rejected(find(program))["head"]
    assert reason == "output head: left out by sites='all' (\"all+head\" takes it in)"
    with_head = find(program, LoRAExperts(sites="all+head"))
    assert sites(with_head).keys() == {"layers.1.up", "layers.1.down", "head"}
    assert not rejected(with_head)


@pytest.mark.parametrize(
    ("endings", "taken"),
    [(("up",), {"layers.1.up"}), (("1.down", "head"), {"layers.1.down", "head"}), (("p",), set())],
)
def test_sites_by_their_endings(endings, taken):
    found = find(network("Mlp"), LoRAExperts(sites=endings))
    assert sites(found).keys() == taken
    others = {"layers.1.up", "layers.1.down", "head"} - taken
    assert rejected(found) == dict.fromkeys(others, f"not named in sites={endings}")


def test_a_layer_that_runs_twice_is_one_site_with_two_uses():
    model = networks.Network(["Mlp", "Mlp", "Stacked", 1], tokens=False)
    program = run(TO_CUT, program_of(model, model.input(2, 6)), Decisions(1))
    found = find(program).found.sites
    counts = {site.name: len({m.node for m in of}) for site, of in found.items()}
    assert counts == {
        "layers.1.up": 2, "layers.1.down": 2, "layers.2.first": 1, "layers.2.second": 1,
    }  # fmt: skip


def test_a_tied_weight_goes_by_the_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x)

    program = run(TO_CUT, program_of(Tied(), torch.zeros(2, 6, dtype=torch.long)), Decisions(1))
    found = sites(find(program, LoRAExperts(sites="all+head")))
    assert found["head"] == LoRASite("head", "embed.weight", 4, 9, False)


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 4, 3, padding=1),
                nn.Conv2d(4, 6, (3, 1), 2, groups=2),
                nn.Conv2d(6, 5, 1),
            ]
        )
        self.last, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = x + self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


@cache
def maps():
    return run(TO_CUT, program_of(Maps(), torch.zeros(2, 3, 12, 12)), Decisions(1))


def test_convolutions_are_sites_with_their_kernel_and_options():
    found = find(maps(), router=SAMPLES)
    assert sites(found)["layers.1"] == LoRASite(
        "layers.1", "layers.1.weight", 4, 6, False, (3, 1),
        "a convolution in groups, into which PEFT divides B too",
    )  # fmt: skip
    (match,) = found.found.sites[sites(found)["layers.1"]]
    assert match.options == ([2, 2], [0, 0], [1, 1])
    assert layouts(found) == {
        "layers.1": [OverMap(False, None)], "layers.2": [OverMap(False, None)],
        "last": [Samples(4)],
    }  # fmt: skip
    assert "head" in rejected(found)


def test_patches_lie_over_maps_and_not_over_what_was_pooled():
    found = find(maps(), LoRAExperts(sites="all+head"), PatchRouter(grid=4, per_expert=2))
    assert layouts(found) == {
        "layers.1": [OverMap(False, (5, 6))], "layers.2": [OverMap(False, (5, 6))],
        "last": [OverMap(True, (5, 6))],
    }  # fmt: skip
    assert "has no patches of the map at the cut" in rejected(found)["head"]


class Grid(nn.Module):
    """A convolution over a sequence that is reshaped to a map."""

    def __init__(self):
        super().__init__()
        self.layers, self.conv = (
            nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
            nn.Conv2d(4, 4, 1),
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x + self.conv(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


@pytest.mark.parametrize("router", [TOKENS, SAMPLES, PatchRouter(grid=2)])
def test_a_map_made_of_a_sequence_has_gates_of_samples_alone(router):
    program = run(TO_CUT, program_of(Grid(), torch.zeros(2, 6, 4)), Decisions(1))
    found = find(program, LoRAExperts(sites="all+head"), router)
    if router is SAMPLES:
        assert layouts(found)["conv"] == [OverMap(False, None)]
    else:
        reason = rejected(found)["conv"]
        assert reason.startswith("a convolution whose positions are not the plan's rows: ")
        assert reason.endswith("TokenRouter(granularity='sequence') gives one gate a sample")
