"""A model that is divided over processes trains as one process does, and is saved whole."""

import copy
import functools
import os
import time

import processes
import pytest
import sharded_training as sharded
import tensor_parallel_training as parallel
import torch
import torch.distributed as dist
from filelock import FileLock
from torch.distributed.fsdp import MixedPrecisionPolicy

import moe_rewrite
from moe_rewrite.errors import ConfigError, InputError

pytest.importorskip("accelerate")


@functools.cache
def made(tied):
    return sharded.warmed(sharded.converted(tied))


def run(what, world, folder):
    return processes.run(sharded.__file__, what, world, folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Once for all processes of pytest-xdist, which share the folder above their own."""
    own = tmp_path_factory.getbasetemp()
    place = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def of(world):
        folder = place / f"sharded-{world}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "found.pt").exists():
                folder.mkdir(exist_ok=True)
                codes, errors = run("cases", world, folder)
                assert not any(codes), errors
        return torch.load(folder / "found.pt"), folder, world

    return of


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.sweep)])
def found(request, ran):
    return ran(request.param)


@functools.cache
def one_process(tied, world, steps, expand_at):
    moe = copy.deepcopy(made(tied))
    return *sharded.train(moe, sharded.IDS.chunk(world), steps, expand_at), moe


def expected(name, world):
    tied, _, _, steps, expand_at = sharded.CASES[name]
    return one_process(tied, world, steps, expand_at)


def assert_same(model, moe):
    for (of, a), (_, b) in zip(model.named_parameters(), moe.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=of)


@pytest.mark.parametrize("name", sharded.CASES)
def test_losses_gradients_and_the_save_are_those_of_one_process(found, name):
    values, folder, world = found
    losses, gradients, moe = expected(name, world)
    torch.testing.assert_close(values[name][0], losses, rtol=0, atol=1e-5)
    assert values[name][1].keys() == gradients.keys()
    for of, gradient in gradients.items():
        torch.testing.assert_close(values[name][1][of], gradient, rtol=0, atol=1e-5, msg=of)
    assert_same(moe_rewrite.load(folder / name, sharded.build(sharded.CASES[name][0])), moe)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_loaded_by_fewer_processes(found):
    _, folder, world = found
    moe = expected("by block", world)[-1]
    alone = copy.deepcopy(made(False))
    for _ in range(2):
        alone.expand()
    sharded.checkpoint("load", alone, folder)
    assert_same(alone, moe)
    if world > 2:
        assert run("load", 2, folder)[0] == [0, 0]
        assert_same(moe_rewrite.load(folder / "loaded by 2", sharded.build(False)), moe)


def test_what_a_sharded_model_cannot_do_is_refused(found):
    assert "before it is sharded" in found[0]["remove"]
    assert "Convert the model before it is sharded" in found[0]["convert"]
    assert "divided by a tensor parallel plan" in found[0]["tensor parallel"]
    assert "wrap the model again" in found[0]["ddp expand"]


def test_an_engine_that_casts_weights_is_refused(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh, moe = dist.init_device_mesh("cpu", (1,)), copy.deepcopy(made(False))
        sharded.by_block(moe, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(
            ConfigError, match="captured in torch.float32 are run in torch.bfloat16"
        ):
            moe(input_ids=sharded.IDS, labels=sharded.IDS)
    finally:
        dist.destroy_process_group()


def test_a_model_whose_weights_zero_stage_3_has_taken_is_not_converted():
    """DeepSpeed is not installed: its mark is put on a weight, as it does."""
    dense = sharded.build(False)
    next(dense.parameters()).ds_id = 0
    with pytest.raises(InputError, match="Convert the model before it is sharded"):
        moe_rewrite.convert(dense)


def test_the_halves_are_stages_of_a_pipeline(ran):
    _, folder, _ = ran(2)
    losses, gradients, _ = one_process(False, 2, 3, ())
    piped = torch.load(folder / "piped.pt")
    torch.testing.assert_close(piped[0], losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(piped[1], gradients, rtol=0, atol=1e-5)


def test_weights_divided_by_the_plan_compute_what_one_process_does(found):
    _, folder, world = found
    parallel.assert_alike("analytic router", folder, world)


@pytest.mark.sweep
def test_a_killed_process_ends_the_others_and_the_run_resumes(tmp_path):
    start = time.monotonic()
    codes, errors = run("killed", 2, tmp_path)
    assert codes[1] == -9 and codes[0] not in (0, -9) and time.monotonic() - start < 240, errors
    assert torch.load(tmp_path / "step.pt")["steps"] == 2
    assert run("resumed", 2, tmp_path)[0] == [0, 0]
    losses, _, moe = one_process(False, 2, 5, ())
    saved = torch.load(tmp_path / "step.pt")
    assert saved["steps"] == 5 and abs(saved["loss"] - losses[-1]) < 1e-5
    assert_same(moe_rewrite.load(tmp_path / "run", sharded.build(False)), moe)


def test_bytes_are_those_that_the_documentation_says(found):
    counted, says = found[0]["bytes"]
    assert counted == says
