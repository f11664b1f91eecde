"""Models that route already: experts beside the weights of the model's own experts, against loops."""

from itertools import product

import pytest
import torch
from conversions import assert_grows_and_loads
from own_experts import FORMS, Own, build, ids
from reference import assert_gradients_equal, copied, gates, randomize
from sweeps import some
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter

pytest.importorskip("transformers")

EXPERTS = LoRAExperts(rank=2, alpha=6.0)


def looped(module, name, gate, state):
    """The forward of a model's own experts, one row and one expert after the other."""

    def product(row, weight, x, site, own):
        y = weight[own] @ x
        for e in range(gate.shape[-1]):
            a, b = (state[f"moe_rewrite.experts.{name}.{site}.{part}.{e}"] for part in "ab")
            y = y + gate[row, e] * EXPERTS.scale * (b[..., own] @ (a[..., own] @ x))
        return y

    def forward(hidden, chosen, weights):
        rows = []
        for row, x in enumerate(hidden):
            total = torch.zeros_like(x)
            for own, weight in zip(chosen[row].tolist(), weights[row], strict=True):
                up, right = product(row, module.gate_up_proj, x, "gate_up_proj", own).chunk(2)
                h = module.act_fn(up) * right
                total = total + weight * product(row, module.down_proj, h, "down_proj", own)
            rows.append(total)
        return torch.stack(rows)

    return forward


def by_loops(model, moe, given, state, granularity):
    """The dense model with experts by plain hooks and loops."""
    cut, handles, forwards = model.model.layers[1], [], []
    seen = []

    def look(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = cut.register_forward_pre_hook(look, with_kwargs=True)
    model(given, use_cache=False)
    handle.remove()
    made = gates(seen[0].detach(), None, state, granularity, None)
    made = made.expand(*given.shape, -1)
    flat = made.flatten(0, 1)

    def hook(name):
        def add(module, args, output):
            x = args[0]
            own = flat if x.ndim == 2 else made
            extra = 0
            for e in range(moe.num_experts):
                a, b = (state[f"moe_rewrite.experts.{name}.{part}.{e}"] for part in "ab")
                extra = extra + own[..., e : e + 1] * EXPERTS.scale * (x @ a.T @ b.T)
            return output + extra

        return add

    for name, _, _ in moe.report.sites:
        if name.endswith((".gate_up_proj", ".down_proj")):
            continue
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(hook(name)))
    for at in (1, 2):
        name = f"model.layers.{at}.mlp.experts"
        module = model.get_submodule(name)
        forwards.append(module)
        module.forward = looped(module, name, flat, state)
    try:
        return model(given, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
        for module in forwards:
            del module.forward


def sites(moe):
    return [n for n, _, _ in moe.report.sites]


@pytest.mark.parametrize(
    ("name", "form", "granularity"),
    some(
        [
            *product(("Qwen3Moe", "Mixtral"), (None,), ("token", "prefix")),
            *product(("Qwen3Moe",), ("batched_mm",), ("token", "prefix")),
        ],
        [("Qwen3Moe", "batched_mm", "token")],
    ),
)
def test_experts_beside_a_models_own(name, form, granularity, tmp_path):
    model = build(name)
    if form is not None:
        model.set_experts_implementation(form)
    wanted = LoRAExperts(
        rank=2, alpha=6.0, sites=("q_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")
    )
    router = TokenRouter(granularity=granularity)
    moe = moe_rewrite.convert(model, split=1, router=router, experts=wanted, num_experts=2)
    assert moe.report.equivalence.exact
    assert [n for n in sites(moe) if "experts" in n] == [
        f"model.layers.{at}.mlp.experts.{part}_proj" for at in (1, 2) for part in ("gate_up", "down")
    ]  # fmt: skip
    randomize(moe, size=0.1)
    state = copied(moe)
    for given in (ids(2, 5), ids(1, 8, 1), ids(3, 1, 2)):
        want = by_loops(model, moe, given, state, granularity)
        got = moe(given, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert (got - model(given).logits).abs().max() > 1e-2
    moe.train()
    given = ids(2, 6, 3)
    weights = torch.randn(2, 6, 96)
    (moe(given, use_cache=False).logits * weights).sum().backward()
    (by_loops(model, moe, given, state, granularity) * weights).sum().backward()
    assert_gradients_equal(moe, state)
    moe.eval()
    before = moe(given).logits
    moe.expand(1, name="third")
    assert torch.equal(moe(given).logits, before)
    moe.save_pretrained(tmp_path)
    again = moe_rewrite.load(tmp_path, model)
    assert torch.equal(again(given).logits, before)
    got = moe.generate(given, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(given, max_new_tokens=4, do_sample=False), got)
    with pytest.raises(moe_rewrite.MoeRewriteError, match="experts of a model that routes already"):
        moe.export_peft(0, tmp_path / "peft")


CHOSEN = {"each": 1, "two": 2, "repeated": 2}


def own_by_loops(model, state, x, granularity):
    """The same with experts, one row after the other."""

    def beside(weight, row, name, own, gate):
        y = row @ weight[own]
        for e in range(len(gate)):
            a, b = (state[f"moe_rewrite.experts.{name}.{part}.{e}"] for part in "ab")
            y = y + gate[e] * EXPERTS.scale * (b[..., own] @ (a[..., own] @ row))
        return y

    features = torch.tanh(model.layers[0](x)).detach()
    made = gates(features, None, state, granularity, None).expand(*x.shape[:2], -1)
    x = torch.tanh(model.layers[1](torch.tanh(model.layers[0](x))))
    rows = []
    for row, gate in zip(x.flatten(0, 1), made.flatten(0, 1), strict=True):
        count = CHOSEN.get(model.form, 3)
        own = row[:3].topk(count).indices if model.form in CHOSEN else range(3)
        total = 0
        for e in own:
            given = row * 0.5 if model.form == "tiled" else row
            hidden = beside(model.up, given, "up", e, gate).tanh()
            total = total + beside(model.down, hidden, "down", e, gate)
        rows.append(total)
    return model.last(x + torch.stack(rows).view(x.shape))


FEW = [(form, "token") for form in FORMS] + [("tiled", "prefix")]
CASES = some(list(product(FORMS, ("token", "prefix"))), FEW)


@pytest.mark.parametrize(("form", "granularity"), CASES)
def test_stacked_weights_in_every_form(form, granularity, tmp_path):
    model = Own(form).eval()
    wanted = LoRAExperts(rank=2, alpha=6.0, sites=("up", "down"))
    moe = moe_rewrite.convert(
        model, split="layers.1", router=TokenRouter(granularity=granularity), experts=wanted,
        num_experts=2, example_inputs=torch.randn(2, 5, 6),
    )  # fmt: skip
    assert moe.report.equivalence.exact and sites(moe) == ["up", "down"]
    randomize(moe, size=0.3)
    state = copied(moe)
    for shape in ((3, 4, 6), (1, 9, 6), (2, 1, 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
        want, got = own_by_loops(model, state, x, granularity), moe(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        assert (got - model(x)).abs().max() > 1e-2
    moe.train()
    weights = torch.randn(shape)
    (moe(x) * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)
    moe.eval()
    assert_grows_and_loads(moe, model, x, tmp_path)
    with moe.disable_experts():
        assert torch.equal(moe(x), model(x))


def mixed_rows(m, x):
    hidden = torch.einsum("td,edh->teh", x.flatten(0, 1).cumsum(0), m.up)
    return torch.einsum("teh,ehd->td", hidden, m.down)


def three(m, x):
    flat = x.flatten(0, 1)
    return torch.einsum("td,edh,ehf->tf", flat, m.up, m.down)


@pytest.mark.parametrize("work", [mixed_rows, three])
def test_other_forms_are_rejected_with_the_reason(work, monkeypatch):
    monkeypatch.setitem(FORMS, "other", work)
    report = moe_rewrite.convert(
        Own("other").eval(), split="layers.1", router=TokenRouter(), dry_run=True,
        example_inputs=torch.zeros(2, 5, 6),
    )  # fmt: skip
    reasons = [reason for _, reason in report.rejected]
    assert any("the model's own experts" in r for r in reasons)
