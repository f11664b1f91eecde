"""Caches that store keys and values in their own way: quantised, offloaded, a user's class."""

import copy
import threading

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, QuantizedCache

import moe_rewrite
from moe_rewrite.errors import InputError
from tests.helpers import architectures
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some

EIGHT_BITS = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
LAYERS = 3


class Pages(CacheLayerMixin):
    """A layer that keeps what each call adds in a list, without loss."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.pages = []

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.pages.append((key_states, value_states))
        return tuple(torch.cat(parts, 2) for parts in zip(*self.pages, strict=True))

    def get_seq_length(self):
        return sum(keys.shape[2] for keys, _ in self.pages)

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_max_length(self):
        return -1


def paged():
    return Cache(layers=[Pages() for _ in range(LAYERS)])


def rows(batch, length, padded, seed=0):
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def said(model, given, **options):
    return model.generate(**given, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)


def steps(model, given, cache, sizes):
    """Logits of a text that is given in parts of these sizes."""
    found, start = [], 0
    with torch.no_grad():
        for size in sizes:
            part = {
                "input_ids": given["input_ids"][:, start : start + size],
                "attention_mask": given["attention_mask"][:, : start + size],
            }
            found.append(model(**part, past_key_values=cache).logits)
            start += size
    return torch.cat(found, 1)


@pytest.fixture(scope="module", params=some(["Llama", "Qwen3", "GPTNeoX", "Phi"], {"Llama"}))
def dense(request):
    return architectures.build(request.param)


@pytest.fixture(scope="module")
def moe(dense):
    """With experts that change every output."""
    made = moe_rewrite.convert(dense, split=1, num_experts=2)
    randomize(made, size=0.5)
    return made.eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_quantised_cache_gives_the_dense_models_tokens(dense, options):
    untrained = moe_rewrite.convert(dense, split=1)
    for given in (rows(2, 7, 3), rows(3, 4, 1, seed=1)):
        wanted = said(dense, given, **EIGHT_BITS, **options)
        assert torch.equal(said(untrained, given, **EIGHT_BITS, **options), wanted)


@pytest.mark.parametrize("sizes", [(9,), (5, 1, 1, 2), (1, 8), (4, 4, 1)])
def test_a_users_cache_computes_what_a_plain_one_does(moe, sizes):
    given = rows(2, 9, 2)
    plain, own = DynamicCache(), paged()
    wanted = steps(moe, given, plain, sizes)
    assert torch.equal(steps(moe, given, own, sizes), wanted)
    assert own.get_seq_length() == 9  # a comparison with the dense model left nothing in it
    assert own.layers[0].pages[0][0].shape[2] == sizes[0]


def test_threads_fill_their_own_caches(moe):
    texts = [rows(2, 8, 1, seed=s) for s in range(4)]
    wanted = [steps(moe, given, DynamicCache(), (3, 1, 4)) for given in texts]
    found = [None] * len(texts)

    def run(at):
        found[at] = steps(moe, texts[at], paged(), (3, 1, 4))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Stream:
    def wait_stream(self, other): ...

    def __enter__(self): ...

    def __exit__(self, *error): ...


def test_an_offloaded_cache_has_each_layer_back_when_its_turn_comes(dense, moe, monkeypatch):
    """transformers offloads on GPUs only; here its layers note whether they are on the device."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    away, update = set(), DynamicLayer.update

    def watched(self, *args, **kwargs):
        assert self not in away
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", watched)
    monkeypatch.setattr(DynamicLayer, "offload", lambda self: away.add(self))
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda self: away.discard(self))
    given = rows(2, 6, 2)
    wanted = said(moe, given)
    assert torch.equal(said(moe, given, cache_implementation="offloaded"), wanted)
    assert len(away) == LAYERS - 1  # all but the first, which is needed next


def test_what_such_a_cache_cannot_do_is_refused(moe):
    given = rows(1, 4, 0)
    with pytest.raises(InputError, match=r"with gradients.*torch.no_grad\(\)"):
        moe(**given, past_key_values=paged())
    with torch.no_grad():
        with pytest.raises(InputError, match="StaticCache.*keep every position"):
            moe(**given, past_key_values=StaticCache(moe.config, max_cache_len=8))
        with pytest.raises(InputError, match="with 2 layers.*expected 3"):
            moe(**given, past_key_values=Cache(layers=[Pages(), Pages()]))
        cache = paged()
        moe(**given, past_key_values=cache)
        for call in (moe.route, moe.features):
            with pytest.raises(InputError, match="only a call of the model fills"):
                call(**given, past_key_values=paged())
        forgetful = paged()
        forgetful.layers[1].update = lambda k, v, *_: (k[:, :, 1:], v[:, :, 1:])
        with pytest.raises(InputError, match="layer 1 .*expected all 4"):
            moe(**given, past_key_values=forgetful)


@pytest.mark.sweep
@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_compiled_blocks_fill_it_too(moe, compiled):
    given = rows(2, 9, 2)
    wanted = steps(moe, given, DynamicCache(), (5, 1, 1, 2))
    own = copy.deepcopy(moe)
    if compiled == "blocks":
        own.compile(backend="aot_eager")
    else:
        own = torch.compile(own, backend="aot_eager")
    found = steps(own, given, paged(), (5, 1, 1, 2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_quantised_cache_is_smaller(moe):
    given, cache = rows(1, 40, 0), QuantizedCache("fp8", moe.config)
    steps(moe, given, cache, (39, 1))
    kept = cache.layers[0]._quantized_keys
    leaves = [t for t in torch.utils._pytree.tree_leaves(kept) if isinstance(t, torch.Tensor)]
    whole = 40 * moe.config.hidden_size // moe.config.num_attention_heads
    whole *= getattr(moe.config, "num_key_value_heads", None) or moe.config.num_attention_heads
    assert 0 < sum(t.nbytes for t in leaves) < 4 * whole
