"""Models and the ONNX files of them that the benchmarks of ONNX Runtime run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter
from moe_rewrite.onnx.lowerings.choose import LOWERINGS
from moe_rewrite.onnx.trace.torch_export import quiet

from ...tools.models import llama, llama_with_experts

TOP_K = 2
FORMS = (*LOWERINGS, "open")  # with "auto", by the table of the previous run
SHAPES = {"gated 512x1024": (512, 1024, True), "plain 384x1536": (384, 1536, False)}
LLAMA = ((8, 512, 8), (2, 64, 3))  # layers, width and experts; the latter of a quick run


class Layer(nn.Module):
    """A product that the router reads, and a feed-forward after it."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.first, self.gated = nn.Linear(width, width), gated
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, hidden, bias=not gated)})
        if gated:
            self.mlp["gate"] = nn.Linear(width, hidden, bias=False)
        self.mlp["down"] = nn.Linear(hidden, width, bias=not gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        up = self.mlp["up"](x)
        if self.gated:
            hidden = F.silu(self.mlp["gate"](x)) * up
        else:
            hidden = F.gelu(up, approximate="tanh")
        return x + self.mlp["down"](hidden)


def layer(shape: str, experts: int) -> MoEModel:
    torch.manual_seed(0)
    model = Layer(*SHAPES[shape]).eval()
    router = TokenRouter(top_k=TOP_K, base=False, init=1.0)
    x = torch.randn(2, 3, SHAPES[shape][0])
    moe = moe_rewrite.convert(
        model, mode="upcycle", split=1, router=router, num_experts=experts,
        example_inputs=x, verify=False,
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def written(folder: Path, shape: str, count: int) -> dict[str, Path]:
    """The file of each form; files that the folder has already are reused."""
    width = SHAPES[shape][0]
    paths = {name: folder / f"{name}-{count}-{width}.onnx" for name in FORMS}
    moe = layer(shape, count)
    for name, path in paths.items():
        if not path.exists():
            asked: Any = {"open_experts": True} if name == "open" else {"lowering": name}
            x = torch.randn(2, 3, width)
            report = moe_rewrite.export_onnx(moe, path, verify=False, example_inputs=x, **asked)
            assert name == "auto" or report.lowering.startswith(name)
    return paths


def llama_pair(folder: Path, quick: bool) -> dict[str, Path]:
    """The dense model as torch.onnx.export writes it, and the converted one."""
    layers, width, experts = LLAMA[quick]
    paths = {name: folder / f"{name}-{width}.onnx" for name in ("dense", "converted")}
    if not paths["dense"].exists():
        by_pytorch(llama(layers, width), paths["dense"])
    if not paths["converted"].exists():
        moe = llama_with_experts(layers, width, experts)
        moe_rewrite.export_onnx(moe, paths["converted"], verify=False)
    return paths


def by_pytorch(model: nn.Module, path: Path, opset: int | None = None) -> None:
    """As torch.onnx.export does by itself, batch and length open."""
    ids = torch.ones(2, 9, dtype=torch.long)
    sizes = dict.fromkeys(range(2), torch.export.Dim.AUTO)
    with quiet():
        torch.onnx.export(
            model, (), path, dynamo=True, opset_version=opset, verbose=False, external_data=False,
            kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
        )  # fmt: skip
