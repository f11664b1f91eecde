"""Where a program is cut: the recorded depth map and cut, and what is on each side."""

import copy
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
from torch import fx, nn

from moe_rewrite.errors import SplitError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean
from moe_rewrite.passes.pipeline import run
from moe_rewrite.passes.split import FindDepth, Split, segments, shallow_modules, silent_modules

TO_CUT = (FindDepth(), Split())


@cache
def network():
    return networks.Network(["Mlp", "Attention", "Mlp"], tokens=False).eval()


@cache
def captured():
    return run((Clean(),), program_of(network(), network().input(2, 6)), Decisions("auto"))


def cut(split):
    program = replace(captured(), graph=copy.deepcopy(captured().graph))
    return run(TO_CUT, program, Decisions(split))


def text(graph):
    return [(n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes]


def test_finding_the_depth_reads_the_graph_alone():
    program = replace(captured(), graph=copy.deepcopy(captured().graph))
    before = text(program.graph)
    found = run((FindDepth(),), program, Decisions("auto"))
    assert [b.name for b in found.depth.blocks] == [f"layers.{i}" for i in range(3)]
    assert text(found.graph) == before and found.cut is None
    assert found.numerics[-1] == ("depth", "exact")


@pytest.mark.parametrize(
    ("split", "index", "label", "reader"),
    [
        (1, 1, "layers.1", "layers.1.qkv"),
        (-1, 2, "layers.2", "layers.2.norm"),
        (0, 0, "layers.0", "layers.0.norm"),
        ("layers.1", 1, "layers.1", "layers.1.qkv"),
        ("layers.2.up", 2, "layers.2.up", "layers.2.norm"),
        (0.9, 2, "layers.2", "layers.2.norm"),
    ],
)
def test_the_cut_is_the_last_node_before_the_deep_segment(split, index, label, reader):
    program = cut(split)
    assert (program.cut.index, program.cut.label) == (index, label)
    assert (program.cut.rows, program.cut.mask) == ("x", None)
    shallow, deep = segments(program)
    assert shallow[-1].name == program.cut.node
    first = next(n for n in deep if n.all_input_nodes and program.node(program.cut.node) in n.args)
    weights = [program.inputs[s.name].name for s in first.all_input_nodes if s.op == "placeholder"]
    assert any(name.startswith(reader) for name in weights)
    assert text(program.graph) == text(captured().graph), "nothing was added"
    assert program.numerics[-2:] == (("depth", "exact"), ("split", "exact"))


def test_both_segments_together_are_what_the_graph_computes():
    program = cut(1)
    shallow, deep = segments(program)
    computing = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    assert shallow + deep == computing and shallow and deep


@pytest.mark.parametrize(("split", "count"), [(1, 1), (2, 2), (0, 0)])
def test_shallow_modules_run_before_the_cut_only(split, count):
    found = shallow_modules(cut(split))
    assert {"embed", *(f"layers.{i}" for i in range(count))} <= found
    assert not any(name.startswith(f"layers.{count}") for name in found)
    assert not {"layers", "head"} & found


def test_a_module_that_runs_again_after_the_cut_is_not_shallow():
    model = networks.Network(["Mlp", "Mlp", 0], tokens=False).eval()
    program = run((Clean(), *TO_CUT), program_of(model, model.input(2, 6)), Decisions(1))
    found = shallow_modules(program)
    assert "embed" in found and not any(name.startswith("layers.0") for name in found)


class Dropouts(nn.Module):
    """Which leave no node in evaluation; one of them runs on both sides of every cut."""

    def __init__(self):
        super().__init__()
        self.before, self.shared, self.after = (nn.Dropout(0.1) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        x = self.shared(self.layers[0](self.before(x)))
        return self.shared(self.layers[1](x) + self.after(x))


def test_modules_without_a_node_are_on_the_side_where_they_ran():
    program = program_of(Dropouts().eval(), torch.zeros(2, 6))
    nodes = list(program.graph.nodes)
    program = run((Clean(), *TO_CUT), program, Decisions(1))
    found = silent_modules(program, nodes)
    assert "before" in found and not {"shared", "after", "layers", "layers.1"} & found
    assert shallow_modules(program) <= found | {"layers.0", "layers.0.0", "layers.0.1"}
    assert "before" not in shallow_modules(program), "of what is left of the graph"


@pytest.mark.parametrize("split", [3, -4, 1.5, "layers.7", "head"])
def test_a_split_outside_of_the_model_is_refused(split):
    with pytest.raises(SplitError, match=r"(?s)split=.*expected.*layers\.2"):
        cut(split)


def test_before_the_first_block_the_input_gets_a_node_of_its_own():
    """Which gives what the input is, so that the router has something to follow."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    program = program_of(model, torch.zeros(2, 3, 8, 8))
    program = run((Clean(), *TO_CUT), program, Decisions(0))
    node, (leaf,) = program.node(program.cut.node), program.leaves()
    assert node.op == "call_function" and node.args == (leaf,) and set(leaf.users) == {node}
    shallow, deep = segments(program)
    assert shallow == [node] and len(deep) == 3 and not shallow_modules(program)
    state, x = model.state_dict(), torch.randn(5, 3, 8, 8)
    names = [program.inputs[n.name].name for n in program.graph.find_nodes(op="placeholder")]
    given = [state.get(name, x) for name in names]
    (y,) = fx.Interpreter(nn.Module(), graph=program.graph).run(*given)
    assert torch.equal(y, model(x))


class Masked(nn.Module):
    """Named as Hugging Face names its arguments."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids, attention_mask=None, scale=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = x if attention_mask is None else x * attention_mask[..., None]
        return x if scale is None else x * scale


@pytest.mark.parametrize("names", [("attention_mask",), ("scale",), ()])
def test_the_rows_of_the_cut_and_their_mask_are_arguments_of_the_call(names):
    given = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
    given |= {name: torch.zeros((2, 6) if "mask" in name else (2, 6, 4)) for name in names}
    program = run((Clean(), *TO_CUT), program_of(Masked(), given), Decisions(1))
    assert program.cut.rows == "input_ids"
    assert program.cut.mask == ("attention_mask" if "attention_mask" in names else None)


def test_samples_without_positions_have_no_rows_in_the_call():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    program = run((Clean(), *TO_CUT), program_of(model, torch.zeros(2, 4)), Decisions(1))
    assert (program.cut.rows, program.cut.mask) == (None, None)
