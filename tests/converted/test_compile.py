"""torch.compile and torch.export of a converted model: no graph breaks, no compilation for each length
or expert, and the results of the model that is not compiled."""

import pytest
import torch
from torch._dynamo.utils import counters

import moe_rewrite
from moe_rewrite import FFNExperts, MoeRewriteError, TokenRouter
from tests.helpers import architectures
from tests.helpers.conversions import fresh
from tests.helpers.factories import mlp
from tests.helpers.reference import randomize

ROWS = torch.zeros(4, 16)
# PyTorch hides this warning of its tracer only where warnings are not errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def language_model():
    model = architectures.build("Llama", layers=2)
    made = moe_rewrite.convert(model, split=1, num_experts=2)
    randomize(made, size=0.5)
    return made


@pytest.fixture
def moe(language_model):
    language_model._compiled_call_impl = None
    return language_model.eval()


@pytest.fixture(scope="module")
def small():
    model = mlp().eval()
    return moe_rewrite.convert(model, split=2, num_experts=2, example_inputs=ROWS)


def compiled_graphs():
    """How many graphs were compiled since the last call; there was no graph break."""
    breaks, made = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
    counters.clear()
    assert not breaks
    return made


def uncompiled(model, **given):
    kept, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        return model(**given)
    finally:
        model._compiled_call_impl = kept


def ids_of(length, batch=2):
    torch.manual_seed(length)
    return torch.randint(3, 97, (batch, length))


@torch.no_grad()
def assert_same(model, length, call=None, **options):
    ids = ids_of(length)
    got = (model if call is None else call)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(
        got, uncompiled(model, input_ids=ids, use_cache=False).logits, **options
    )


@pytest.mark.sweep
def test_blocks_compile_once_for_all_lengths(moe):
    moe.compile(backend="eager")
    assert_same(moe, 7)
    assert compiled_graphs() >= 2
    for length in (5, 6, 11):
        assert_same(moe, length)
    assert compiled_graphs() == 0


@pytest.mark.sweep
def test_expert_plans_are_followed_by_compiled_blocks(moe):
    moe.compile(backend="eager")
    with moe.use_expert(1):
        assert_same(moe, 6)
    with moe.disable_experts():
        assert_same(moe, 6)
    with moe.use_experts({0: 0.25, 1: 0.5}):
        assert_same(moe, 6)
    compiled_graphs()


def test_torch_compile_needs_no_break_and_recompiles_sizes_once(small):
    whole = torch.compile(small.eval(), backend="eager", fullgraph=True)

    def run(rows):
        x = torch.randn(rows, 16)
        with torch.no_grad():
            torch.testing.assert_close(whole(x), small(x))
            with small.use_expert(0):
                torch.testing.assert_close(whole(x), small(x))

    run(5)
    run(7)
    assert compiled_graphs() > 0
    run(9)
    assert compiled_graphs() == 0


def gradients(model, call, **given):
    model.zero_grad()
    call(**given).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.sweep
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_training_step_has_the_same_gradients(moe, checkpointing):
    moe.train()
    if checkpointing:
        moe.gradient_checkpointing_enable()
    try:
        given = {"input_ids": ids_of(8), "labels": ids_of(8)}
        want = gradients(moe, moe, **given)
        moe.compile(backend="aot_eager")
        got = gradients(moe, moe, **given)
    finally:
        moe.gradient_checkpointing_disable()
    assert compiled_graphs() > 0
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.sweep
@pytest.mark.parametrize("cache", [None, "static"])
def test_compiled_blocks_generate_the_same(moe, cache):
    ids = ids_of(5, batch=1)
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False,
        "pad_token_id": 0, "cache_implementation": cache,
    }  # fmt: skip
    want = moe.generate(ids, **options)
    moe.compile(backend="eager")
    assert torch.equal(moe.generate(ids, **options), want)
    assert compiled_graphs() > 0


def test_experts_that_come_compile_a_stack_once():
    made = fresh(mlp().eval(), split=2, num_experts=2, example_inputs=ROWS)
    made.compile(backend="eager")

    def run(rows):
        x = torch.randn(rows, 16)
        with torch.no_grad():
            torch.testing.assert_close(made(x), type(made).forward(made, x))

    run(5)
    for name in ("a", "b", "c"):
        made.expand(name=name)
        randomize(made, size=0.5)
        made.activate(name)
        run(6)
        assert compiled_graphs() > 0 or name != "a"
    run(9)
    assert compiled_graphs() == 0


@pytest.mark.parametrize("odd", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_feed_forward_experts_compile_without_a_break(odd):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x):
            hidden = self.up(x)
            hidden = hidden * torch.sigmoid(1.7 * hidden) if odd else torch.relu(hidden)
            return x + self.down(hidden)

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Net() for _ in range(2))).eval()
    made = moe_rewrite.convert(
        model, mode="upcycle", split=1, experts=FFNExperts(num=3), example_inputs=ROWS,
        router=TokenRouter(top_k=2, base=False),
    )  # fmt: skip
    randomize(made, size=0.5)
    made.compile(backend="aot_eager")
    for rows in (6, 9):
        x = torch.randn(rows, 16)
        with torch.no_grad():
            torch.testing.assert_close(made(x), type(made).forward(made, x))
    assert compiled_graphs() > 0


def test_export_has_the_experts_that_are_on(small):
    small.eval()
    randomize(small, size=0.5)
    small.deactivate(1)
    x = torch.randn(9, 16)
    given = (torch.randn(5, 16),)
    exported = torch.export.export(small, given, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), small(x))
        small.activate(1)
        assert not torch.equal(exported.module()(x), small(x))


def test_export_in_training_mode_turns_the_newest_expert_on(small):
    small.expand()
    small.train()
    small(torch.randn(3, 16))
    small.expand()
    exported = torch.export.export(small, (torch.randn(5, 16),))
    assert small.router.active_indices() == tuple(range(small.num_experts))
    x = torch.randn(5, 16)
    torch.testing.assert_close(exported.module()(x), small(x))
    small.eval()


def test_export_asks_for_a_call_where_there_is_no_graph(small):
    with pytest.raises(MoeRewriteError, match="call the model once on such inputs"):
        torch.export.export(small.eval(), (torch.randn(2, 5, 16),))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_have_the_same_gradients_in_compiled_blocks(small, checkpointing):
    x = torch.randn(6, 16)

    def gradients_of():
        small.zero_grad()
        small(x).square().sum().backward()
        return [p.grad.clone() for p in small.parameters() if p.grad is not None]

    small.train()
    try:
        if checkpointing:
            small.gradient_checkpointing_enable()
        want = gradients_of()
        small.compile(backend="aot_eager")
        got = gradients_of()
    finally:
        small._compiled_call_impl = None
        small.gradient_checkpointing_disable()
        small.eval()
    assert compiled_graphs() > 0
    torch.testing.assert_close(got, want)


def test_the_default_router_takes_its_sums_in_compiled_training():
    """Once for a forward, and compiled without a break."""
    made = fresh(mlp().eval(), split=2, example_inputs=ROWS).train()
    x = torch.randn(6, 16)
    made(x).sum().backward()
    sums = made.router.moments[1].clone()
    made.compile(backend="aot_eager")
    made(x).sum().backward()
    assert compiled_graphs() > 0
    torch.testing.assert_close(made.router.moments[1], 2 * sums)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own modules
def test_inductor_computes_the_same(moe):
    moe.compile()
    assert_same(moe, 7, rtol=1e-4, atol=1e-5)
    assert_same(moe, 5, rtol=1e-4, atol=1e-5)
    moe.train()
    given = {"input_ids": ids_of(8), "labels": ids_of(8)}
    got = gradients(moe, moe, **given)
    moe._compiled_call_impl = None
    for name, gradient in gradients(moe, moe, **given).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)
