"""The sums of an analytic router: a packed matrix for each expert, or one for all; what is left when
an expert is removed; saves of older versions."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter
from moe_rewrite.converted.saving import checkpoint
from moe_rewrite.routing.packed_sums import last_column, packed, unpacked

WIDTH, M = 8, 16
EXAMPLE = torch.zeros(4, WIDTH)


def network():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def made():
    def convert(sums):
        router = TokenRouter(fit="analytic", projection=M, sums=sums)
        options = {"split": 1, "router": router, "experts": LoRAExperts(2), "verify": False}
        moe = moe_rewrite.convert(network(), example_inputs=EXAMPLE, **options).train()
        moe(EXAMPLE).sum().backward()  # the graph of training
        moe.expand(1, name="t0")
        moe.remove(0)
        moe.activate(0)
        return moe.eval()

    return {"each": convert("each"), "shared": convert("shared")}


def task(number, count=5):
    """Batches around a point of their own, more of some tasks than of others."""
    draw = torch.Generator().manual_seed(number)
    centre = 3 * torch.randn(WIDTH, generator=draw)
    return [centre + torch.randn(3 + number % 3, WIDTH, generator=draw) for _ in range(count)]


def learn(moe, number):
    """A task in a plain loop, its rows counted on the way."""
    if f"t{number}" not in moe.names:
        moe.expand(1, name=f"t{number}")
    moe.train()
    for x in task(number):
        moe(x).sum().backward()
    moe.eval()


def stream(moe, numbers=(0, 1, 2, 3)):
    moe = copy.deepcopy(moe)
    moe.remember(task(99))
    for number in numbers:
        learn(moe, number)
    return moe


def rows(moe):
    return torch.stack([moe.router.frozen, *moe.router.rows]).detach()


def sums(moe):
    return {k: v for k, v in moe.state_dict().items() if ".moments." in k}


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_half_of_a_symmetric_matrix_is_all_of_it(size):
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix + matrix.T
    assert len(packed(matrix)) == size * (size + 1) // 2
    assert torch.equal(unpacked(packed(matrix)), matrix)
    assert torch.equal(last_column(packed(matrix)), matrix[:, -1])


@pytest.mark.parametrize("index", [0, 1, 3])
def test_removal_leaves_what_would_be_had_the_expert_never_been_added(made, index):
    moe, others = stream(made["each"]), [n for n in range(4) if n != index]
    moe.remove(f"t{index}")
    without = copy.deepcopy(made["each"])
    if others[0]:
        without.rename(0, f"t{others[0]}")
    without = stream(without, others)
    assert torch.equal(rows(moe), rows(without))
    assert all(map(torch.equal, sums(moe).values(), sums(without).values()))


def test_shared_sums_give_the_same_router_in_memory_that_does_not_grow(made):
    each, shared = stream(made["each"]), stream(made["shared"])
    torch.testing.assert_close(rows(shared), rows(each), rtol=0, atol=1e-6)
    x = torch.cat(task(2))
    torch.testing.assert_close(shared.route(x).gates, each.route(x).gates, rtol=0, atol=1e-5)

    def size(moe):
        return sum(t.numel() for t in sums(moe).values())

    matrix = (M + 1) * (M + 2) // 2
    assert size(each) == 5 * matrix
    assert size(shared) == 3 * matrix + (5 + 1) * (M + 1) + 1


def by_hand(each, targets):
    """The ridge regression with these targets of the classes of `each`, from its sums."""
    means = [m / m[-1, -1] for m in each.router.moments]
    gram = sum(means)
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(M + 1, dtype=torch.float64)
    sides = torch.stack([m[:, -1] for m in means], 1) @ targets
    return torch.linalg.solve(gram, sides).T.float()


@pytest.mark.parametrize("removed", [(0,), (1, 2), (3, 0)])
def test_rows_of_a_removed_expert_become_the_frozen_models(made, removed):
    each, shared = stream(made["each"]), stream(made["shared"])
    learn(each, 4)
    learn(shared, 4)
    for number in removed:
        shared.remove(f"t{number}")
    left = [n for n in range(5) if n not in removed]
    targets = torch.zeros(6, 1 + len(left), dtype=torch.float64)
    targets[0, 0] = 1
    for number in range(5):
        targets[number + 1, left.index(number) + 1 if number in left else 0] = 1
    torch.testing.assert_close(rows(shared), by_hand(each, targets), rtol=0, atol=1e-5)
    for number in removed:
        assert (shared.route(torch.cat(task(number))).selected == 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["each", "shared"])
def test_the_newest_expert_goes_as_if_it_had_never_been_added(made, kind):
    moe = stream(made[kind])
    before = rows(moe)
    learn(moe, 4)
    assert not torch.equal(rows(moe)[:-1], before)
    moe.remove_last()
    torch.testing.assert_close(rows(moe), before, rtol=0, atol=1e-6)
    assert kind == "shared" or torch.equal(rows(moe), before)


def test_an_expert_takes_no_more_rows_after_those_of_another(made):
    moe = stream(made["shared"], (0, 1))
    moe.expand(1, name="t2")
    moe.fit_router("t1", task(1))  # its rows are still apart: they replace what training added
    moe.remember(task(98))  # and so are the frozen model's
    moe.fit_router("t2", task(2))
    before, settled = {k: v.clone() for k, v in sums(moe).items()}, rows(moe)
    with pytest.raises(MoeRewriteError, match="sums='each'"):
        moe.fit_router("t1", task(1))
    assert torch.equal(rows(moe), settled)
    assert all(torch.equal(before[k], v) for k, v in sums(moe).items())
    want = copy.deepcopy(made["each"])
    want.remember(task(99))
    want.remember(task(98))
    for number in range(3):
        want.router.told and number and want.expand(1)
        want.fit_router(number, task(number))
    torch.testing.assert_close(rows(moe), rows(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["each", "shared"])
def test_copies_and_saves_in_the_middle_of_training_go_on(made, kind, tmp_path):
    moe = stream(made[kind], (0, 1))
    moe.expand(1, name="t2")
    moe.train()
    for x in task(2)[:3]:
        moe(x).sum().backward()
    copied = copy.deepcopy(moe)
    state = copy.deepcopy(made[kind]).train()
    state.load_state_dict(moe.state_dict())
    moe.save_pretrained(tmp_path)
    loaded = moe_rewrite.load(tmp_path, network().train(), EXAMPLE, verify=False)
    found = []
    for model in (moe, copied, state, loaded):
        for x in task(2)[3:]:
            model(x).sum().backward()
        found.append(rows(model.eval()))
    assert all(torch.equal(found[0], other) for other in found[1:])
    x = torch.cat(task(2))
    assert (loaded.route(x).selected == 3).float().mean() > 0.9


def test_sums_of_one_kind_are_not_loaded_into_the_other(made):
    with pytest.raises(RuntimeError, match="moments"):
        copy.deepcopy(made["each"]).load_state_dict(made["shared"].state_dict())


def as_before(state, moe, prefix="moe_rewrite.router."):
    """Tensors as version 2 of the format has them: whole matrices, and rows before each expert."""
    old = dict(state)
    for c, matrix in enumerate(moe.router.moments):
        old[f"{prefix}moments.{c}"] = matrix
    for e in range(moe.num_experts):
        flags = state[f"{prefix}before.{e}"]
        old[f"{prefix}before.{e}"] = torch.cat([torch.ones(e, M + 1), flags], 1)
    return old


def test_saves_of_the_version_before_are_read(made, tmp_path):
    moe = stream(made["each"])
    moe.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file(as_before(load_file(file), moe), tmp_path / "old")
    content = (tmp_path / "old").read_bytes()
    digest = checkpoint.hashlib.sha256(content).hexdigest()
    (tmp_path / f"moe_rewrite-{digest[:16]}.safetensors").write_bytes(content)
    facts = json.loads((tmp_path / checkpoint.META).read_text()) | {"format": 2, "sha256": digest}
    del facts["meta_sha256"], facts["recipe"]["router"]["sums"]
    (tmp_path / checkpoint.META).write_text(json.dumps(facts))
    other = copy.deepcopy(made["each"])
    other.load_state_dict(as_before(moe.state_dict(), moe))
    for again in (moe_rewrite.load(tmp_path, network(), EXAMPLE, verify=False), other):
        again.router.solve()
        assert torch.equal(rows(again), rows(moe))
        assert all(map(torch.equal, sums(again).values(), sums(moe).values()))
        again.remove_last()
        assert again.names == moe.names[:-1]
