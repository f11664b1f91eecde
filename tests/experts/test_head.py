"""A classification head grows by an expert's own columns; the others stay as they are."""

import architectures
import cnns
import pytest
import torch
import torch.nn.functional as F
from reference import added, randomize

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, PatchRouter, RegionExperts, TokenRouter

pytestmark = pytest.mark.filterwarnings("ignore:the experts take")


def image(batch=4):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def learn(moe, x, y, steps=80):
    optimizer = torch.optim.Adam(moe.trainable_parameters(), lr=3e-3)
    moe.train()
    for _ in range(steps):
        loss = F.cross_entropy(moe(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moe.eval()
    return loss.item()


@pytest.mark.parametrize("options", [
    {}, {"experts": LoRAExperts(sites="all+head")},
    {"experts": RegionExperts(halo=False), "router": PatchRouter(4, 8)},
])  # fmt: skip
def test_new_columns_are_the_experts_and_old_ones_stay(options, tmp_path):
    model = cnns.build("ResNet")
    moe = moe_rewrite.convert(model, split="layer3", **options)
    x = image()
    with torch.no_grad():
        before = moe(x)
        new = moe.expand(1, name="more", classes=3)
        assert [tuple(p.shape) for p in new[-2:]] == [(3, 64), (3,)]
        assert torch.equal(moe(x), before)  # off: neither values nor shape change
        moe.activate("more")
        wide = moe(x)
    assert wide.shape == (4, 13)
    weight, bias = new[-2:]
    seen = []
    handle = model.linear.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(x)
    handle.remove()
    if not options:  # zero LoRA: the head reads what the dense head reads
        assert torch.equal(wide[:, :10], before)
        torch.testing.assert_close(wide[:, 10:], F.linear(seen[0], weight, bias))
    older = {k: v.clone() for k, v in added(moe).items() if k.endswith(".0") and "rows" not in k}
    assert learn(moe, x, torch.tensor([10, 11, 12, 10])) < 0.5
    assert all(torch.equal(added(moe)[k], v) for k, v in older.items())
    assert torch.equal(moe.state_dict()["linear.weight"], model.linear.weight)

    moe.expand(1, classes=2)
    moe.activate("expert2")
    with torch.no_grad():
        trained = moe(x)
        assert trained.shape == (4, 15)
        moe.deactivate("more")  # its classes keep their places and are never the answer
        assert moe(x).shape == (4, 15) and (moe(x)[:, 10:13] == float("-inf")).all()
        moe.activate("more")
        moe.save_pretrained(tmp_path)
        again = moe_rewrite.load(tmp_path, model, verify=False)
        assert torch.equal(again(x), trained)
        moe.remove_last()
        assert moe(x).shape == (4, 13)
        with moe.disable_experts():
            assert torch.equal(moe(x), model(x))


def test_hugging_face_classifiers_grow_too():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**architectures.PLAIN, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    moe = moe_rewrite.convert(model, split=1)
    ids = torch.randint(3, 90, (2, 7))
    moe.expand(1, classes=2)
    moe.activate(1)
    with torch.no_grad():
        want, got = model(input_ids=ids).logits, moe(input_ids=ids).logits
    assert got.shape == (2, want.shape[1] + 2)
    # a router of tokens weighs the experts' classes: here gates of one third, one being off
    gates = moe.route(input_ids=ids).gates[:, 0]
    torch.testing.assert_close(got[:, : want.shape[1]], want.log_softmax(-1) + gates[:, :1].log())
    torch.testing.assert_close(got.exp().sum(-1), gates[:, [0, 2]].sum(-1))


def test_classes_are_the_experts_to_which_a_sample_is_routed():
    """log p(c) = log g_e + log softmax over the expert's own columns, gradients included."""
    model = cnns.build("ResNet")
    moe = moe_rewrite.convert(model, split="layer3", router=TokenRouter(granularity="sequence"))
    for classes in (2, 3):
        moe.expand(1, classes=classes)
    moe.activate(1), moe.activate(2)
    randomize(moe)
    x = image()
    seen = []
    handle = model.linear.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(x)
    handle.remove()
    gates = moe.route(x).gates
    got = moe(x)
    state = added(moe)
    assert got.shape == (4, 15) and gates.shape == (4, 4)
    torch.testing.assert_close(got[:, :10].exp().sum(-1), gates[:, 0])
    torch.testing.assert_close(got[:, 10:12].exp().sum(-1), gates[:, 2])
    torch.testing.assert_close(got[:, 12:].exp().sum(-1), gates[:, 3])
    got[:, 12].sum().backward()
    assert state["moe_rewrite.router.rows.2"].grad.abs().sum() > 0
    with torch.no_grad(), moe.use_expert(2):  # as if its task were known
        alone = moe(x)
    assert (alone[:, 12:].exp().sum(-1) - 1).abs().max() < 1e-5
    assert alone.argmax(-1).min() >= 12


def test_what_cannot_grow_is_said():
    llama = moe_rewrite.convert(architectures.build("Llama"), split=1, verify=False)
    with pytest.raises(MoeRewriteError, match="no classification head"):
        llama.expand(1, classes=2)
    moe = moe_rewrite.convert(cnns.build("ResNet"), split="layer3", verify=False)
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(MoeRewriteError, match="classes="):
            moe.expand(1, classes=wrong)
    assert moe.num_experts == 1
