"""A model whose weights are divided by its tensor parallel plan computes what one process does; the
short case is in test_sharded."""

import copy
import functools

import processes
import pytest
import sharded_training as sharded
import tensor_parallel_training as parallel
import torch
import torch.distributed as dist

import moe_rewrite
from moe_rewrite.errors import ConfigError, EquivalenceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    codes, errors = processes.run(parallel.__file__, "every", 2, folder)
    assert not any(codes), errors
    return folder


@pytest.mark.sweep
@pytest.mark.parametrize("name", list(parallel.CASES)[1:])
def test_training_growing_and_generation_are_those_of_one_process(folder, name):
    parallel.assert_alike(name, folder, 2)


@pytest.mark.sweep
def test_heads_that_cannot_be_divided_are_named(folder):
    assert "numbers of heads" in torch.load(folder / "refused.pt")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@functools.cache
def made(mode="pmoe", freeze=None):
    return moe_rewrite.convert(sharded.build(False), mode, split=1, freeze=freeze, verify=False)


REFUSED = {
    "no tensor parallel plan": ({}, {}),
    "by 'packed_colwise'": ({}, {"model.layers.*.mlp.up_proj": "packed_colwise"}),
    "norm is a LlamaRMSNorm": ({}, {"model.norm": "colwise"}),
    "trained .freeze=False.": ({"freeze": False}, None),
    "experts that are not LoRA": ({"mode": "upcycle"}, None),
}


@pytest.mark.parametrize(
    "says",
    [s if REFUSED[s][1] is not None else pytest.param(s, marks=pytest.mark.sweep) for s in REFUSED],
)
def test_what_cannot_be_divided_is_refused(mesh, says):
    options, plan = REFUSED[says]
    moe = copy.deepcopy(made(**options))
    if plan is not None:
        moe.host.module._tp_plan = plan
    before = [id(p) for p in moe.parameters()]
    with pytest.raises(ConfigError, match=says):
        moe.tensor_parallel(mesh)
    assert [id(p) for p in moe.parameters()] == before


def test_a_divided_model_cannot_be_exported(mesh, tmp_path):
    pytest.importorskip("onnx")
    moe = copy.deepcopy(made())
    moe.tensor_parallel(mesh)
    with pytest.raises(ConfigError, match="divided over processes"):
        moe_rewrite.export_onnx(moe, tmp_path / "moe.onnx")


def test_a_mesh_of_other_processes_is_refused(mesh):
    for wrong in (None, dist.init_device_mesh("cpu", (1, 1))):
        with pytest.raises(ConfigError, match="a mesh of one dimension over all"):
            made().tensor_parallel(wrong)


def test_a_model_that_computes_something_else_with_its_parts_is_put_back(mesh, monkeypatch):
    moe = copy.deepcopy(made())
    moe.eval()
    logits = moe(input_ids=sharded.IDS).logits
    before = [id(p) for p in moe.parameters()]
    outputs, runs = moe.reference.outputs, iter((0.0, 1.0))
    monkeypatch.setattr(
        moe.reference, "outputs", lambda *call: [t + next(runs) for t in outputs(*call)[:1]]
    )
    with pytest.raises(EquivalenceError, match="nothing was changed"):
        moe.tensor_parallel(mesh)
    assert [id(p) for p in moe.parameters()] == before
    assert torch.equal(moe(input_ids=sharded.IDS).logits, logits)
    assert all(type(m).__name__[:7] != "Divided" for m in moe.host.module.modules())
