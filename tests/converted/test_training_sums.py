"""An analytic router in loops that know nothing of it: rows are counted in training, and the router
is solved on the way to evaluation."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter

WIDTH, TASKS = 8, 3
OPTIONS = {
    "split": 1, "router": TokenRouter(fit="analytic", projection=16),
    "experts": LoRAExperts(2), "example_inputs": torch.zeros(4, WIDTH),
}  # fmt: skip


def network():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4)).eval()


@pytest.fixture(scope="module")
def converted():
    """With its graphs for evaluation and training."""
    moe = moe_rewrite.convert(network(), **OPTIONS).train()
    moe(OPTIONS["example_inputs"]).sum().backward()
    return moe


def blank(converted):
    """A copy that has learnt nothing."""
    moe = copy.deepcopy(converted)
    moe.expand(1, name="blank")
    moe.remove(0)
    moe.activate("blank")
    return moe.eval()


@pytest.fixture
def moe(converted):
    return blank(converted)


def task(number, count=6):
    """Batches around a point of their own."""
    draw = torch.Generator().manual_seed(number)
    centre = 3 * torch.randn(WIDTH, generator=draw)
    return [centre + torch.randn(4, WIDTH, generator=draw) for _ in range(count)]


def train(moe, batches, epochs=1, every=1):
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
    moe.train()
    for epoch in range(epochs):
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch))
        for step, i in enumerate(order.tolist(), 1):
            moe(batches[i]).square().mean().backward()
            if step % every == 0:
                optimizer.step()
                optimizer.zero_grad()


def rows(moe):
    return torch.stack([moe.router.frozen, *moe.router.rows]).detach()


def explicit(moe):
    """The rows of a router that was told everything by calls of its own."""
    moe.fit_router(None, task(99))
    for number in range(TASKS):
        if number:
            moe.expand(1)
        moe.fit_router(number, task(number))
    return rows(moe)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_loop_gives_the_router_that_calls_would(moe, checkpointing):
    """Epochs, accumulated gradients, evaluation in between, and forwards without gradients change
    nothing; nor does it matter when the model was told what it could do before."""
    want, x = explicit(copy.deepcopy(moe)), task(5)[0]
    if checkpointing:
        moe.gradient_checkpointing_enable()
    for number in range(TASKS):
        if number:
            moe.expand(1)
        if number == 1:
            moe.remember(task(99))
        batches = task(number)
        with pytest.warns(UserWarning, match="remember") if number == 0 else nothing():
            train(moe, batches[:2], 2, every=2)
            plan = moe.route(x)
            moe.features(x)
            with torch.no_grad():
                moe(x)
                moe.eval()(x)
        assert plan.active == (number,) and (plan.weights == 1).all() and (plan.base == 0).all()
        train(moe, batches[2:], 2)
        with moe.use_expert(number):
            moe(x).sum().backward()
    moe.eval()
    torch.testing.assert_close(rows(moe), want, rtol=0, atol=1e-6)
    for number in (*range(TASKS), 99):
        chosen = moe.route(torch.cat(task(number))).selected
        assert (chosen == (number + 1) % 100).float().mean() > 0.9


def nothing():
    return torch.enable_grad()


def products(moe, x):
    """By hand: the sum of f f^T."""
    features = moe.features(x)
    scaled = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + 1e-6)
    f = torch.cat([(scaled @ moe.router.lift).relu(), torch.ones(len(x), 1)], 1).double()
    return f.T @ f


ACTIONS = ("train", "train", "look", "other", "evaluate", "expand", "remove", "load", "copy", "fit")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=12))
@pytest.mark.filterwarnings("ignore:the router knows no rows of what the model did")
def test_sums_are_those_of_the_rows_that_were_trained_whatever_happens(converted, actions):
    moe, batches = blank(converted).train(), iter(task(7, 40))
    none = torch.zeros_like(moe.router.moments[0])
    want, told = [none], [False]
    for action in actions:
        x = next(batches)
        if action == "train":
            moe(x).sum().backward()
            if not told[-1]:
                want[-1] = want[-1] + products(moe, x)
        elif action == "look":
            moe.route(x)
            with torch.no_grad():
                moe(x)
        elif action == "other":
            with moe.use_expert(0):
                moe(x).sum().backward()
        elif action == "evaluate":
            moe.eval()
            moe.train()
        elif action == "expand":
            moe.expand(1)
            want, told = [*want, none], [*told, False]
        elif action == "remove" and len(want) > 1:
            moe.remove_last()
            want, told = want[:-1], told[:-1]
        elif action == "load":
            other = copy.deepcopy(converted).train()
            other.load_state_dict(moe.state_dict())
            moe = other
        elif action == "copy":
            moe = copy.deepcopy(moe)
        elif action == "fit":
            moe.fit_router(len(want) - 1, [x])
            want[-1] = products(moe, x) + (want[-1] if told[-1] else none)
            told[-1] = True
    for e, sums in enumerate(want):
        torch.testing.assert_close(moe.router.moments[e + 1], sums, rtol=1e-6, atol=1e-6)
    assert moe.router.told == told
    settled = rows(moe.eval())
    moe.router.solve()
    assert torch.equal(settled, rows(moe))


def test_calls_replace_what_training_added_and_training_adds_nothing_to_them(moe):
    want = copy.deepcopy(moe)
    want.fit_router(0, task(0))
    train(moe, task(1))
    moe.fit_router(0, iter(task(0)))
    before = moe.router.moments[1].clone()
    train(moe, task(1))
    assert torch.equal(moe.router.moments[1], before)
    torch.testing.assert_close(before, want.router.moments[1])
    with pytest.raises(MoeRewriteError, match="one batch"):
        moe.fit_router(0, task(0)[0])


def test_a_save_in_the_middle_of_training_is_whole(moe, tmp_path):
    moe.remember(task(99))
    train(moe, task(0))
    assert not moe.router.solved
    moe.save_pretrained(tmp_path)
    loaded = moe_rewrite.load(tmp_path, network(), OPTIONS["example_inputs"], verify=False)
    assert torch.equal(rows(loaded), rows(moe.eval()))
    model = network().train()
    on = moe_rewrite.load(tmp_path, model, OPTIONS["example_inputs"], verify=False)
    assert on.training and not on.router.solved
    for other in (on, moe):
        train(other, task(0)[:3])
    assert torch.equal(on.router.moments[1], moe.router.moments[1])


def test_threads_lose_no_row(moe):
    moe.train()
    x = task(0)[0]
    workers = [
        threading.Thread(target=lambda: [moe(x).sum().backward() for _ in range(20)])
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert moe.router.moments.counts() == [0.0, 2 * 20 * 4]


def test_what_would_be_routed_by_chance_is_refused(moe):
    x = task(0)[0]
    moe.expand(2, name="pair")
    moe.train()
    with pytest.raises(MoeRewriteError, match="trained at once"):
        moe(x)
    assert moe.trained == [False] * 3 and moe.router.pending.any()
    moe.freeze("pair.0")
    moe(x).sum().backward()
    assert moe.router.moments.counts() == [0.0, 0.0, 0.0, 4.0]
    moe.remove_last()
    moe.remove_last()
    with moe.use_expert("blank"):
        moe(x).sum().backward()
    moe.eval()
    with pytest.raises(MoeRewriteError, match="fit_router"):
        moe(x)
    moe.deactivate("blank")
    moe(x)


def test_features_that_are_not_finite_are_refused(moe):
    x = task(0)[0]
    with pytest.raises(MoeRewriteError, match="infinities"):
        moe.fit_router(0, [x * torch.inf])
    moe.train()
    moe(x * torch.inf).sum().backward()
    with pytest.raises(MoeRewriteError, match="fit_router"):
        moe.eval()
    moe.fit_router(0, [x])
    assert rows(moe.eval()).isfinite().all()


def test_features_that_training_changes_are_refused():
    free = moe_rewrite.convert(network(), freeze=False, verify=False, **OPTIONS).train()
    with pytest.raises(MoeRewriteError, match="freeze=True"):
        free(task(0)[0])
    free.fit_router(0, task(0))
    free(task(0)[0]).sum().backward()


def test_only_analytic_routers_remember_and_only_language_models_write(moe):
    with pytest.raises(MoeRewriteError, match="pass batches"):
        moe.remember()
    trained = moe_rewrite.convert(network(), verify=False, **OPTIONS | {"router": TokenRouter()})
    with pytest.raises(MoeRewriteError, match="fit='analytic'"):
        trained.remember(task(0))


def test_digits_are_learnt_in_a_plain_loop_without_forgetting():
    """A network that knows 0 to 5 learns 6-7, then 8-9: no replay, no task identity."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
    x = x.float() / 8 - 1
    cut = 1300
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 6)
    )
    digits_loop(dense, dense.parameters(), x[:cut][y[:cut] < 6], y[:cut][y[:cut] < 6])
    router = TokenRouter(fit="analytic", projection=256)
    options = {"router": router, "example_inputs": x[:2], "verify": False}
    moe = moe_rewrite.convert(dense.eval(), split=1, **options)
    moe.remember([x[:cut][y[:cut] < 6]])
    shares, alone = [], []
    for first in (6, 8):
        new = (y == first) | (y == first + 1)
        moe.expand(classes=2)
        moe.train()
        digits_loop(moe, moe.trainable_parameters(), x[:cut][new[:cut]], y[:cut][new[:cut]])
        moe.eval()
        with torch.no_grad():
            right = (moe(x[cut:]).argmax(1) == y[cut:]).float()
            with moe.use_expert(1):
                alone.append(moe(x[cut:])[:, :8])
        shares.append([right[(y[cut:] // 2) == pair].mean().item() for pair in range(5)])
    assert torch.equal(*alone)  # nothing of what the first expert knows is lost
    (*_, before, _), (*known, after, new) = shares
    assert after > before - 0.02 and new > 0.8 and min(known) > 0.8, shares


def digits_loop(model, parameters, x, y):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(5):
        for part in torch.randperm(len(x)).split(32):
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
