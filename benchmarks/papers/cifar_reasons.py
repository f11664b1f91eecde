"""Why pMoE's claim did not show on CIFAR-10: one difference from the official code at a time."""

# python -m benchmarks.papers.cifar_reasons [--quick]: test accuracy of a dense network, of its pMoE
# network, and of the same stage without experts, which tells what routing does apart from the stage's
# form. The first row is the setting of `cifar_patches` at half its width; then one thing is set as the
# official code of arXiv 2306.04073 has it, and together what fits one core: it has widths of 160 to
# 640, 10,000 to 50,000 images and 50 epochs. "Three quarters say nothing": images at half size in one
# quarter, those of other classes in the others. Nothing is chosen by test images; rates are those of
# the two settings. Finished runs are kept in MOE_REWRITE_RUNS, if that is set.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import moe_rewrite
from moe_rewrite import MoEModel, PatchRouter, RegionExperts
from moe_rewrite.models.resnet import ResNet

from ..tools.data import cifar10
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, mean_and_spread, over_seeds, save
from .cifar_patches import augmented
from .streams import runs
from .wide_resnet import WideResNet, gates_first

DENSE, STAGE, PMOE, FIRST = "dense", "stage without experts", "pMoE", "pMoE, gates first"
ROUTING = ("grid", "taken", "experts", "scale")  # what only networks with experts depend on
POINT = "stages.4"  # what experts replace in the official network
HELD = 1000  # of the images at hand, the last ones
EXAMPLE = torch.zeros(2, 3, 32, 32)


@dataclass(frozen=True)
class Setting:
    """wide: the official network instead of `ResNet`. plain: SGD of constant rate and batches of 128
    instead of momentum, decay, a one-cycle rate and batches of 64. quarters: see above."""

    images: int = 1000
    epochs: int = 10
    widen: int = 1
    wide: bool = False
    plain: bool = False
    augment: bool = True
    quarters: bool = False
    grid: int = 8
    taken: int = 16
    experts: int = 4
    scale: Literal["mean-one", "paper"] = "mean-one"

    def build(self, network: str) -> torch.nn.Module:
        if network == FIRST:
            return gates_first(self.widen, self.experts, self.taken)
        if self.wide:
            dense: torch.nn.Module = WideResNet(self.widen, residual=network == DENSE)
        else:
            dense = ResNet(8, self.widen, last_kernel=3 if network == DENSE else 1)
        return self._routed(dense) if network == PMOE else dense

    def _routed(self, dense: torch.nn.Module) -> MoEModel:
        how = {"combine": "concat", "region": POINT} if self.wide else {"width": 1 / self.experts}
        moe = moe_rewrite.convert(
            dense, split=POINT if self.wide else "layer3", num_experts=self.experts,
            router=PatchRouter(self.grid, self.taken, gate="all", scale=self.scale),
            experts=RegionExperts(halo=False, **how), freeze=False, batch_norm="update",
            example_inputs=EXAMPLE, verify=False,
        )  # fmt: skip
        assert isinstance(moe, MoEModel)
        return moe


OURS = Setting()
OFFICIAL = Setting(wide=True, plain=True, augment=False, epochs=20, scale="paper")
SETTINGS = {
    "ours": OURS,
    "without augmentation": replace(OURS, augment=False),
    "plain SGD, batches of 128": replace(OURS, plain=True),
    "20 epochs": replace(OURS, epochs=20),
    "4 patches of 16": replace(OURS, grid=4, taken=4),
    "4 patches of 64": replace(OURS, taken=4),
    "gates not rescaled": replace(OURS, scale="paper"),
    "official network and gates": replace(OURS, wide=True, scale="paper"),
    "official": OFFICIAL,
    "three quarters say nothing": replace(OURS, quarters=True),
}
ONE_SEED = ("4 patches of 16", "20 epochs")  # under one seed


def networks(setting: Setting) -> tuple[str, ...]:
    return (DENSE, STAGE, PMOE, FIRST) if setting.wide else (DENSE, STAGE, PMOE)


def run_of(setting: Setting, network: str) -> dict[str, Any]:
    """What a run depends on: rows that differ in routing only share the others' runs."""
    if network in (DENSE, STAGE):
        usual: dict[str, Any] = {f.name: f.default for f in fields(setting) if f.name in ROUTING}
        setting = replace(setting, **usual)
    return {"network": network, **asdict(setting)}


def job(folder: Path, seed: int, network: str, **given: Any) -> dict[str, Any]:
    setting = Setting(**given)
    train, held, test = drawn(setting, seed)
    torch.manual_seed(seed)
    model = setting.build(network).train()
    late = []
    for epoch in epochs(model, train, setting, seed):
        if epoch >= setting.epochs - 3:
            late.append(accuracy(model.eval(), *held))
            model.train()
    figures: dict[str, Any] = {
        "held": late, "accuracy": accuracy(model.eval(), *test), "macs": macs(setting, model),
    }  # fmt: skip
    return figures | taken_by(model, test[0]) if isinstance(model, MoEModel) else figures


def epochs(model: torch.nn.Module, data: tuple[Any, Any], setting: Setting, seed: int) -> Any:
    """Trains; yields after each epoch."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = 128 if setting.plain else 64
    steps = setting.epochs * len(range(0, len(y), batch))
    if setting.plain:
        optimizer = torch.optim.SGD(trained, 0.1)
        schedule: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    else:
        optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(setting.epochs):
        for index in torch.randperm(len(y), generator=generator).split(batch):
            images = augmented(x[index], generator) if setting.augment else x[index]
            loss = F.cross_entropy(model(images), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((torch.cat([model(b) for b in x.split(250)]).argmax(1) == y).float().mean())


def macs(setting: Setting, model: torch.nn.Module) -> int:
    """Multiply-adds of one image; of `gates first` those that it runs, which is every position."""
    counted = setting.build(STAGE) if isinstance(model, MoEModel) else model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted.eval()(EXAMPLE)
    total = counter.get_total_flops() // (2 * len(EXAMPLE))
    if not isinstance(model, MoEModel):
        return total
    assert model.report.macs is not None
    return total - model.report.macs.dense + model.report.macs.routed


@torch.no_grad()
def taken_by(model: Any, x: torch.Tensor) -> dict[str, Any]:
    """seen: share of an image's patches that some expert takes; same: share of its patches that an
    expert takes of every image, whatever is in it (both 0.25 and more, by chance)."""
    ids = torch.cat([model.route(b).patch_ids for b in x.split(250)])  # (B, E, l)
    taken = torch.zeros(*ids.shape[:2], model.router.grid**2).scatter(2, ids, 1.0)
    seen = taken.amax(1).mean()
    same = taken.mean(0).topk(ids.shape[2]).values.mean()
    return {"seen": float(seen), "same": float(same)}


def drawn(setting: Setting, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels to train on, held out and of the test set."""
    x, y = cifar10("data_batch_1")
    parts = [(x[:-HELD], y[:-HELD]), (x[-HELD:], y[-HELD:]), cifar10("test_batch")]
    if setting.quarters:
        parts = [quartered(*part, seed=i) for i, part in enumerate(parts)]
    # channels last, which convolutions on CPU cores are faster with
    parts = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in parts]
    x, y = parts[0]
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [(x[chosen[: setting.images]], y[chosen[: setting.images]]), *parts[1:]]


def quartered(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes 0 to 4 at half size in one quarter each, images of classes 5 to 9 in the others."""
    generator = torch.Generator().manual_seed(seed)
    small = F.avg_pool2d(x, 2)
    deciding, others = small[y < 5], small[y >= 5]
    picked = torch.randint(len(others), (len(deciding) * 4,), generator=generator)
    cells = others[picked].view(-1, 4, *small.shape[1:])
    where = torch.randint(4, (len(deciding),), generator=generator)
    cells[torch.arange(len(deciding)), where] = deciding
    rows = cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (B, C, 2, 16, 2, 16)
    return rows.reshape(len(deciding), 3, 32, 32), y[y < 5]


def measure(settings: Mapping[str, Setting], seeds: int) -> dict[str, Any]:
    asked = {(name, n): run_of(s, n) for name, s in settings.items() for n in networks(s)}
    variants: dict[str, dict[str, Any]] = {}
    for run in asked.values():
        variants.setdefault("-".join(map(str, run.values())).replace(" ", "_"), run)
    label = {tuple(run.items()): key for key, run in variants.items()}
    found = runs(job, variants, range(seeds), workers=1)
    results: dict[str, Any] = {name: asdict(s) | {"networks": {}} for name, s in settings.items()}
    for (name, network), run in asked.items():
        figures = found[label[tuple(run.items())]]
        results[name]["networks"][network] = over_seeds([f["accuracy"] for f in figures]) | {
            key: [f[key] for f in figures] for key in figures[0] if key != "accuracy"
        }
    return results


def draw(results: Mapping[str, Any]) -> Any:
    """By row, what pMoE has more than the other two, over seeds; of two pMoE networks the one that
    is better on held-out images."""
    figure, axis = subplots(1, 1, (7, 5))
    for shift, against in ((-0.2, DENSE), (0.2, STAGE)):
        gains = [
            [
                100 * (a - b)
                for a, b in zip(best(r), r["networks"][against]["accuracy"], strict=True)
            ]
            for r in results.values()
        ]
        places = [i + shift for i in range(len(gains))]
        axis.barh(places, [mean(g) for g in gains], 0.38, label=f"over {against}")
        for place, gain in zip(places, gains, strict=True):
            axis.plot(gain, [place] * len(gain), "k.", markersize=4)
    axis.set_yticks(range(len(results)), list(results), fontsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="points of test accuracy (dots: seeds)", title="CIFAR-10: pMoE against networks without experts")  # fmt: skip
    axis.legend(fontsize=8)
    return figure


def best(row: dict[str, Any]) -> list[float]:
    """Of the networks with experts, the one that is better on held-out images."""
    routed = [row["networks"][n] for n in (PMOE, FIRST) if n in row["networks"]]
    return max(routed, key=lambda r: mean(mean(late) for late in r["held"]))["accuracy"]


def main() -> None:
    quick = is_quick(__doc__)
    if quick:
        some = ("ours", "official", "three quarters say nothing")
        results = measure({n: replace(SETTINGS[n], images=64, epochs=1) for n in some}, 1)
    else:
        results = measure({n: s for n, s in SETTINGS.items() if n not in ONE_SEED}, 2)
        results |= measure({n: SETTINGS[n] for n in ONE_SEED}, 1)
    columns = (DENSE, STAGE, PMOE, FIRST)
    rows = [
        (name, *(mean_and_spread(r["networks"][c]) if c in r["networks"] else "" for c in columns))
        for name, r in results.items()
    ]
    if not quick:
        save("cifar_reasons", {"settings": results}, draw(results))
    finish("cifar_reasons", ["setting", *columns], rows, settings=results)


if __name__ == "__main__":
    main()
