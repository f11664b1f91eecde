"""A training step whose features at the cut are cached, against the step without."""

# python -m benchmarks.speed.features [--quick]: an 8-layer Llama of width 512, split in the middle,
# one LoRA expert, 4 x 128 tokens, 2 threads; medians of steps side by side, losses compared.

from __future__ import annotations

import torch

import moe_rewrite
from moe_rewrite import MoEModel
from moe_rewrite.continual.features import FeatureCache

from ..tools.models import llama, training_step
from ..tools.report import finish, is_quick, save
from ..tools.timing import side_by_side


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    layers, width, rounds = (4, 128, 5) if quick else (8, 512, 15)
    moe = moe_rewrite.convert(llama(layers, width), split=layers // 2)
    assert isinstance(moe, MoEModel)
    moe.train()
    cache = FeatureCache(moe)
    ids = torch.randint(0, 1024, (4, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    losses: dict[str, float] = {}

    def without() -> torch.Tensor:
        loss = moe(**inputs, labels=ids, use_cache=False).loss
        losses["without"] = float(loss)
        return loss

    def cached() -> torch.Tensor:
        with moe.use_features(cache.features(inputs)):
            loss = moe(**inputs, labels=ids, use_cache=False).loss
        losses["with"] = float(loss)
        return loss

    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=0.0)
    runs = {"without": training_step(without, optimizer), "with": training_step(cached, optimizer)}
    times = side_by_side(runs, rounds)
    middle = times.medians()
    figures = {
        "milliseconds": middle, "quartiles": times.quartiles(),
        "ratio": middle["with"] / middle["without"],
        "difference": abs(losses["with"] - losses["without"]),
    }  # fmt: skip
    if not quick:
        save("features", figures)
    rows = [(n, f"{middle[n]:.1f} ms", f"{losses[n]:.6f}") for n in runs]
    rows.append(("ratio", f"{figures['ratio']:.3f}", ""))
    finish("features", ["cached features", "step", "loss"], rows, **figures)


if __name__ == "__main__":
    main()
