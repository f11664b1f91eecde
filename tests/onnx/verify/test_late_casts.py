"""16-bit files on the CPU: the same results, with few weights in float32 at a time."""

import json

import architectures
import cnns
import numpy as np
import pytest
import torch
from feedforwards import CHOICE, TOP2, Gated, inputs, made
from reference import randomize
from sweeps import some

import moe_rewrite
from moe_rewrite import PatchRouter, RegionExperts
from moe_rewrite.errors import EquivalenceError

onnx = pytest.importorskip("onnx")
from moe_rewrite.onnx import export
from moe_rewrite.onnx.runtime.session import FRUGAL, frugal_options, open_session
from moe_rewrite.onnx.verify import compare_with_torch
from moe_rewrite.onnx.verify.late_casts import late_casts

KIND = {"LoRA": {}, "upcycled": {"mode": "upcycle"}}


@pytest.fixture(scope="module", params=some(KIND, ["LoRA"]))
def file(request, tmp_path_factory):
    """A float16 file with its weights in a second file."""
    model = architectures.build("Llama", layers=3)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, verify=False, **KIND[request.param])
    randomize(moe)
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    moe_rewrite.export_onnx(moe, path, dtype="float16", external_data=True)
    assert len(list(path.parent.iterdir())) == 2
    return path


def ran(path, options, folder):
    """(outputs, most weights in float32 at once), from a profile of one run."""
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.optimized_model_filepath = str(folder / "run.onnx")
    session = open_session(path, None, options=options, **FRUGAL)
    ids = np.arange(12).reshape(2, 6)
    outputs = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with open(session.end_profiling()) as profile:
        events = [e["name"] for e in json.load(profile) if e.get("cat") == "Node"]
    order = {n.removesuffix("_kernel_time"): i for i, n in enumerate(events)}
    graph = onnx.load(folder / "run.onnx", load_external_data=False).graph
    of_weights = {t.name for t in graph.initializer if np.prod(t.dims) >= 256}
    lives = []
    for node in graph.node:
        if node.input and of_weights.issuperset(node.input):
            of_weights.update(node.output)
            if node.op_type == "Cast":
                users = [order[n.name] for n in graph.node if node.output[0] in n.input]
                lives.append((order[node.name], max(users)))
    assert len(lives) > 20
    return outputs, max(sum(a <= at <= b for a, b in lives) for at, _ in lives)


def test_casts_run_late_and_change_nothing(file, tmp_path):
    want, many = ran(file, frugal_options("ENABLE_EXTENDED"), tmp_path)
    with late_casts(file, torch.float16) as (graph, options):
        got, few = ran(graph, options, tmp_path)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)
    assert few <= 3 < many
    assert len(list(file.parent.iterdir())) == 2


def test_other_files_are_taken_as_they_are(file, tmp_path):
    with late_casts(file, torch.float32) as (graph, _):
        assert graph == file
    broken = tmp_path / "m.onnx"
    model = onnx.load(file, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    broken.write_bytes(model.SerializeToString())
    with late_casts(broken, torch.float16) as (graph, _):
        assert graph == broken
    assert list(tmp_path.iterdir()) == [broken]


def regions():
    return moe_rewrite.convert(
        cnns.build("ResNet"), split="layer3", router=PatchRouter(grid=4, per_expert=5),
        num_experts=2, experts=RegionExperts(halo=False), example_inputs=torch.randn(3, 3, 32, 32),
        verify=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "build,options,x",
    [
        pytest.param(
            lambda: made(TOP2, Gated),
            {"open_experts": True},
            inputs(3, 11, seed=2),
            marks=pytest.mark.sweep,
        ),
        (lambda: made(CHOICE, Gated), {"lowering": "sparse"}, inputs(3, 11, seed=2)),
        pytest.param(
            regions,
            {},
            torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)),
            marks=pytest.mark.sweep,
        ),
    ],
    ids=["open", "choice", "regions"],
)
def test_sums_that_scatter_run_in_16_bits(build, options, x, tmp_path):
    """ONNX Runtime's CPU provider scatters with addition in float32 only."""
    moe, path = build().eval(), tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(
        moe, path, dtype="float16", example_inputs=torch.randn(2, *x.shape[1:]), **options
    )
    assert len(report.checks) > 2 and any(n.startswith("Scatter") for n in report.operators)
    half = export._cast(moe, torch.float16)
    (got,) = moe_rewrite.onnx.load(path)(x=x.half()).values()
    want = half(x.half()).detach()
    assert got.dtype == want.dtype == torch.float16
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-2)


def test_a_file_that_the_cpu_cannot_run_says_so(tmp_path, monkeypatch):
    def failing(session, feeds):
        raise RuntimeError("[ONNXRuntimeError] : no kernel\nmore")

    monkeypatch.setattr(compare_with_torch, "run", failing)
    with pytest.raises(EquivalenceError, match=r"cannot run this file .*no kernel\): export with"):
        moe_rewrite.export_onnx(made(TOP2, Gated), tmp_path / "m.onnx", example_inputs=inputs(2, 6))
    assert not list(tmp_path.iterdir())
