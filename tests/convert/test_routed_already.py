"""Models that route already: experts beside the weights of the model's own experts, against loops."""

import pytest
import torch
from reference import copied, gates, randomize
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter

tf = pytest.importorskip("transformers")

EXPERTS = LoRAExperts(rank=2, alpha=6.0)
SIZES = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "attention_dropout": 0.0,
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    if name == "Qwen3Moe":
        config = tf.Qwen3MoeConfig(
            **SIZES, intermediate_size=32, moe_intermediate_size=12, head_dim=8, num_experts=4
        )
        model = tf.Qwen3MoeForCausalLM(config)
    else:
        model = tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=3)
        )
    with torch.no_grad():  # so that the model's own choices are not close
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


def ids(batch, length, seed=0):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("granularity", ["token", "prefix"])
@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_experts_beside_a_models_own(name, granularity, tmp_path):
    model = build(name)
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
    from reference import assert_gradients_equal

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


class Own(nn.Module):
    """Experts of its own by one product with all weights, or with each row's weight."""

    def __init__(self, form):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.weights, self.form = nn.Parameter(torch.randn(3, 6, 6)), form

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        flat = x.flatten(0, 1)
        if self.form == "all":
            made = torch.einsum("td,edh->teh", flat, self.weights).sum(1)
        else:
            chosen = self.weights[flat[:, :3].argmax(-1)]
            made = torch.bmm(flat.unsqueeze(1), chosen).squeeze(1)
        return x + made.view(x.shape)


@pytest.mark.parametrize("form", ["all", "each"])
def test_other_forms_are_rejected_with_the_reason(form):
    report = moe_rewrite.convert(
        Own(form).eval(), split="layers.1", router=TokenRouter(), dry_run=True,
        example_inputs=torch.zeros(2, 5, 6),
    )  # fmt: skip
    reasons = [reason for _, reason in report.rejected]
    assert any("with a weight of three dimensions (the model's own experts)" in r for r in reasons)
