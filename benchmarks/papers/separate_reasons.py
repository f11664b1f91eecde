"""Why pMoE's separate training found the deciding patch too seldom: one difference at a time."""

# python -m benchmarks.papers.separate_reasons [--quick]: the task of `mnist_patches`, whose training
# sets have classes that are drawn. The official code has exactly as many images of each class, trains
# the router for 100 epochs, gives the two experts output weights of one sign each, and compares with a
# CNN of 4 filters. Each is changed alone, then what helps together; further, labels minus their mean
# where classes are drawn, and 6 patches an expert. Rates are those that `mnist_patches` chose on
# held-out images.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from moe_rewrite import PatchRouter
from moe_rewrite.models.patch_cnn import PatchCNN

from ..tools.data import mnist
from ..tools.plots import bars
from ..tools.report import finish, is_quick, mean_and_spread, over_seeds, read, save
from .mnist_patches import compose
from .patch_digits import GRID, Images, accuracy, patch_gates, pmoe, train, train_router

SIZES = (100, 300)
CNN, SEPARATE = "CNN, 40 filters", "pMoE separate, 2 x 20"  # as mnist_patches calls them


@dataclass(frozen=True)
class Variant:
    """balanced: as many images of each class. centred: labels minus their mean for the router. own:
    output weights +1 for the first expert's filters, -1 for the second's. filters: of a CNN without
    experts, 0 with experts. taken: patches an expert takes. router: its rate and epochs."""

    balanced: bool = False
    centred: bool = False
    own: bool = False
    filters: int = 0
    taken: int = 2
    router: tuple[float, int] = (0.1, 1)

    @property
    def like(self) -> str:
        return CNN if self.filters else SEPARATE

    def build(self, data: Images) -> torch.nn.Module:
        if self.filters:
            return PatchCNN(self.filters)
        dense = PatchCNN(40)
        if self.own:
            dense.output[:20], dense.output[20:] = 1.0, -1.0
        moe = pmoe(2, PatchRouter(GRID, self.taken, gate="hard", init=0.0), dense)
        labels = data.y - data.y.mean() if self.centred else data.y
        train_router(moe, data.x, labels, *self.router)
        return moe


VARIANTS = {
    "CNN of 40 filters": Variant(filters=40),
    "separate": Variant(),
    "separate, router of 100 epochs": Variant(router=(0.2, 100)),
    "separate, a sign an expert": Variant(own=True),
    "separate, 6 patches": Variant(taken=6),
    "separate, labels centred": Variant(centred=True),
    "separate, classes balanced": Variant(balanced=True),
    "separate, balanced, a sign an expert": Variant(balanced=True, own=True),
    "CNN of 40 filters, balanced": Variant(filters=40, balanced=True),
    "CNN of 4 filters, balanced": Variant(filters=4, balanced=True),
}


def measure(sizes: tuple[int, ...], seeds: int, epochs: int, tests: int) -> dict[str, Any]:
    train_digits, test_digits = mnist("train"), mnist("t10k")
    test = compose(test_digits, tests, seed=1000)
    results: dict[str, Any] = {}
    with Progress() as progress:
        total = len(VARIANTS) * len(sizes) * seeds * epochs
        bar = progress.add_task("separate_reasons", total=total)
        tick = partial(progress.advance, bar)
        for name, variant in VARIANTS.items():
            rate = _rate(variant.like)
            by_size = {}
            for size in sizes:
                drawn = partial(compose, train_digits, size, balanced=variant.balanced)
                by_size[size] = _over(variant, drawn, test, rate, epochs, seeds, tick)
            results[name] = {"lr": rate, "by_size": by_size}
    return results


def _over(
    variant: Variant, drawn: Callable[[int], Images], test: Images, rate: float, epochs: int,
    seeds: int, tick: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    models = [train(variant.build, drawn(s), rate, epochs, s, tick) for s in range(seeds)]
    kept = [patch_gates(m, test) for m in models]
    return over_seeds([accuracy(m, test) for m in models]) | {"kept": kept}


def _rate(method: str) -> float:
    found = read("mnist_patches")
    assert found, "run benchmarks.papers.mnist_patches before"
    return found["methods"][method]["lr"]


def _kept(result: dict[str, Any]) -> str:
    shares = [[k for k in r["kept"] if k is not None] for r in result["by_size"].values()]
    return ", ".join(f"{sum(k) / len(k):.2f}" for k in shares if k)


def draw(results: dict[str, Any], sizes: tuple[int, ...]) -> Any:
    titles: dict[Any, str] = {size: f"test accuracy, {size} images" for size in sizes}
    return bars({"": {name: r["by_size"] for name, r in results.items()}}, titles)


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    sizes, seeds, epochs, tests = ((60,), 1, 2, 100) if quick else (SIZES, 3, 150, 2000)
    results = measure(sizes, seeds, epochs, tests)
    rows = [
        (name, *map(mean_and_spread, r["by_size"].values()), _kept(r))
        for name, r in results.items()
    ]
    figures: dict[str, Any] = {
        "seeds": seeds, "epochs": epochs, "test_images": tests, "methods": results,
    }  # fmt: skip
    if not quick:
        save("separate_reasons", figures, draw(results, sizes))
    columns = ["network", *map(str, sizes), "deciding patch kept"]
    finish("separate_reasons", columns, rows, **figures)


if __name__ == "__main__":
    main()
