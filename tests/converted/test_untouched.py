"""The user's model is as it was after a conversion, calls and training; what the dense model writes
is written to the converted model's own tensors."""

import copy

import pytest
import torch
from torch import nn
from writers import WRITERS, Chain, given, state_in_an_attribute

import moe_rewrite
from moe_rewrite.errors import CaptureError, ConversionError, InputError


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def attributes(model):
    plain = (int, float, str, bool, type(None))
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain)
    }


def dense_part(moe, model):
    return {name: tensor for name, tensor in state(moe).items() if name in model.state_dict()}


def differing(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def convert(name, model, **options):
    """With a router that is trained, which writes no sums."""
    options = {"router": "token", "example_inputs": given(name)} | options
    return moe_rewrite.convert(model, split=2, **options)


@pytest.mark.parametrize("batch_norm", ["frozen", "update"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_of_the_original_is_written(name, batch_norm):
    make, _, _ = WRITERS[name]
    model = make().train()
    before, known = state(model), attributes(model)
    moe = convert(name, model, batch_norm=batch_norm)
    for mode in (False, True):
        moe.train(mode)(given(name, batch=4)).sum().backward()
        assert moe_rewrite.verify(model, moe, given(name, batch=3)) is not None
    assert not differing(before, state(model)) and known == attributes(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", WRITERS)
def test_in_evaluation_it_writes_what_the_dense_model_writes(name):
    make, writes, _ = WRITERS[name]
    dense = make().eval()
    moe = convert(name, copy.deepcopy(dense)).eval()
    start = state(dense)
    assert not differing(start, dense_part(moe, dense))  # verifying left nothing behind
    for seed in (1, 2):
        x = given(name, batch=3 + seed, seed=seed)
        assert torch.equal(moe(x), dense(x))
    assert not differing(dense_part(moe, dense), state(dense))
    assert bool(differing(start, state(dense))) == writes


@pytest.mark.parametrize("name", WRITERS)
def test_frozen_statistics_stay_in_training(name):
    make, _, written = WRITERS[name]
    moe = convert(name, make()).train()
    moe(given(name))  # captured and compared here
    before = state(moe)
    moe(given(name, batch=4, seed=2)).sum().backward()
    assert differing(before, state(moe)) == written


@pytest.mark.parametrize("name", ["functional batch norm", "EvoNorm", "spectral norm", "no_grad"])
def test_statistics_that_are_updated_become_the_dense_models(name):
    make, _, _ = WRITERS[name]
    dense = make()
    moe = convert(name, copy.deepcopy(dense), batch_norm="update")
    for seed in (1, 2):
        x = given(name, seed=seed)
        assert torch.equal(moe.train()(x), dense.train()(x))
    assert not differing(dense_part(moe, dense), state(dense))


def test_no_gradient_passes_a_no_grad_region_in_evaluation():
    def target(m, x):
        with torch.no_grad():
            ahead = m.layers[3](x)
        return x * ahead

    dense = Chain(target)
    moe = moe_rewrite.convert(dense, split=1, example_inputs=given(""), router="token").eval()
    for p in moe.trainable_parameters():
        nn.init.normal_(p, std=0.1)
    grads = []
    for mode in (False, True):
        grads.append(torch.autograd.grad(
            moe.train(mode)(given("")).sum(), moe.trainable_parameters(), allow_unused=True
        ))  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_forward_replaces_and_reads_again_is_refused():
    model = Chain(state_in_an_attribute)
    model.last = torch.ones(())
    with pytest.raises(CaptureError, match="forward.. reads the tensors last and replaces"):
        convert("", model)
    assert torch.equal(model.last, torch.ones(()))


# -- hooks and layers without a shape ---------------------------------------------------------------


def test_a_hook_is_refused_by_its_module_and_never_fires():
    model, seen = Chain(lambda m, x: x), []
    for module in (model.layers[1], model):
        module.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ConversionError, match=r"the model itself: forward hook .*; layers\.1: for"):
        convert("", model)
    moe_rewrite.inspect(model, given(""))
    assert not seen


def test_a_hook_that_was_removed_or_put_back_does_no_harm():
    model, seen = Chain(lambda m, x: x), []
    model.layers[1].register_forward_pre_hook(lambda *_: seen.append(1)).remove()
    moe = convert("", model)
    model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    moe(given("", batch=2))
    moe.train()(given("", batch=2))
    assert not seen


def test_hooks_by_which_pytorch_makes_weights_are_part_of_the_model():
    model = Chain(lambda m, x: x)
    nn.utils.spectral_norm(model.layers[3])
    moe = convert("", model.eval())
    assert torch.equal(moe(given("", batch=2)), model(given("", batch=2)))


def test_a_lazy_layer_without_a_shape_is_named():
    model = Chain(lambda m, x: x)
    model.layers[2] = nn.LazyLinear(8)
    with pytest.raises(InputError, match=r"layers\.2\.weight.*run the model once"):
        convert("", model)
