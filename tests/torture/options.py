"""Random options of convert(), and some that are wrong on purpose."""

from moe_rewrite import FFNExperts, LoRAExperts, PatchRouter, RegionExperts, TokenRouter

from .blocks import Ffn

WRONG = (
    {"mode": "moe"}, {"split": 99}, {"split": 1.5}, {"split": "nothing.here"}, {"split": True},
    {"router": "tokens"}, {"experts": 3}, {"num_experts": 0}, {"num_experts": 1.5},
    {"backend": "cuda"}, {"batch_norm": "on"}, {"freeze": "yes"},
    {"mode": "upcycle", "experts": LoRAExperts()},
    {"router": TokenRouter(), "experts": RegionExperts()},
    {"experts": LoRAExperts(sites=("nothing",))},
    {"experts": RegionExperts(region="nothing")},
    {"router": PatchRouter(grid=50)}, {"router": TokenRouter(top_k=1)},
    {"experts": FFNExperts(sites=("nothing",))},
)  # fmt: skip


def feed_forwards(made):
    """The blocks that hold one."""
    blocks = enumerate(made.model.blocks)
    return [i for i, block in blocks if any(isinstance(m, Ffn) for m in block.modules())]


def router(draw, made):
    """None leaves it to convert()."""
    lot = draw.random()
    if lot < 0.2:
        return None
    if made.start in ("image", "patches") and lot < 0.6:
        return PatchRouter(
            grid=draw.choice((None, 2, 3, 4)), per_expert=draw.choice((None, 1, 3)),
            gate=draw.choice(("selected", "all", "hard")), scale=draw.choice(("mean-one", "paper")),
            features=draw.choice(("flat", "pooled")), normalize=draw.random() < 0.7,
        )  # fmt: skip
    if lot < 0.25 and made.start in ("ids", "floats", "patches"):
        return TokenRouter(base=False, policy="expert", init=0.5, capacity=draw.choice((1.0, 2.0)))
    tokens = ("token", "token", "prefix", "sequence")
    if len(made.model.bridges):
        tokens = ("sequence", "sequence", "token")
    granularity = draw.choice(tokens if made.start not in ("image", "volume") else ("sequence",))
    if lot < 0.35:
        return TokenRouter(granularity=granularity, fit="analytic", projection=32)
    k, gate = draw.choice((None, None, 1, 2)), draw.choice(("selected", "selected", "all"))
    return TokenRouter(
        top_k=k, granularity=granularity, base=draw.random() < 0.6, normalize=draw.random() < 0.7,
        gate="all" if k == 1 else gate, init=0.5 if k == 1 else draw.choice((0.0, 0.5)),
        pool=draw.choice((2, 4)),
    )  # fmt: skip


def experts(draw, made, given):
    """given: the router."""
    sites = draw.choice(("all", "all", "all+head", ("first", "ffn.up", "conv", "qkv", "down")))
    lora = LoRAExperts(rank=draw.choice((1, 2, 3)), alpha=draw.choice((1, 4, 16.0)), sites=sites)
    if isinstance(given, PatchRouter) and made.start == "image" and draw.random() < 0.4:
        region = draw.choice((None, f"blocks.{len(made.model.blocks) - 1}"))
        width = draw.choice((1.0, 1.0, 0.5))
        return RegionExperts(
            region=region, halo=draw.random() < 0.7, width=width,
            combine=draw.choice(("sum", "sum", "concat")),
        )  # fmt: skip
    if draw.random() < (0.35 if feed_forwards(made) else 0.03):
        return FFNExperts(num=draw.choice((None, 1, 2, 3)), every=draw.choice((1, 1, 2)))
    return draw.choice((None, lora, lora, lora))


def split(draw, made, experts):
    """Mostly a place with something after it that these experts replace."""
    blocks, order = made.model.blocks, made.model.order
    last = max(len(order) - 1, 1)
    if found := feed_forwards(made):
        last = max(1, *(step for step, index in enumerate(order) if index in found))
    if isinstance(experts, FFNExperts) and draw.random() < 0.9:
        return draw.choice((draw.randint(0, max(last, 0)), 1 if last else 0))
    kinds = (
        "auto", draw.uniform(0.2, 0.7), draw.randrange(last), draw.choice((-1, -2)),
        f"blocks.{draw.randrange(len(blocks))}", 1, 1, 1,
    )  # fmt: skip
    return draw.choice(kinds)


def options(made):
    """(options of convert, whether they are wrong on purpose)."""
    draw = made.draw
    upcycle = draw.random() < (0.25 if feed_forwards(made) else 0.03)
    chosen = router(draw, made)
    of = {
        "mode": "upcycle" if upcycle else "pmoe",
        "router": chosen if chosen is not None else draw.choice(("auto", "auto", "token")),
        "num_experts": draw.choice((None, 1, 2, 3)),
        "verify": draw.random() < 0.7,
        "batch_norm": draw.choice(("frozen", "update")),
        "backend": draw.choice(("auto", "auto", "reference", "dense", "grouped")),
        "freeze": draw.choice((None, None, None, True, False)),
        "experts": experts(draw, made, chosen),
    }
    if upcycle:
        sigmoid = FFNExperts(num=3, router="layer", score="sigmoid")
        of["experts"] = draw.choice((None, FFNExperts(num=2), sigmoid))
    of["split"] = split(draw, made, FFNExperts() if upcycle else of["experts"])
    wrong = draw.random() < 0.05
    return of | (draw.choice(WRONG) if wrong else {}), wrong
