"""Small networks whose linear maps are quantised by torchao or bitsandbytes."""

import torch
from torch import nn

WIDTH = 64  # of a block of bitsandbytes' 4-bit values


class Mixer(nn.Module):
    """Blocks over rows, a linear map of three between two residual ones, and a head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(),
                nn.Linear(2 * WIDTH, WIDTH, bias=i != 1),
            )
            for i in range(3)
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, 4)
        self.eval().to(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def rows(batch=2, length=5, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator).to(dtype)


def with_torchao(scheme, model=None, **options):
    """The model (a Mixer) with linear maps but the head quantised."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )  # fmt: skip
    from torchao.quantization.granularity import PerGroup

    config = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "int8 in groups": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int4": lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(options.get("group", 32))),
        "int8 rows too": lambda: Int8DynamicActivationInt8WeightConfig(),
    }[scheme]()
    model = Mixer() if model is None else model
    quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and name != "head")
    return model


def with_bitsandbytes(bits, model=None, **options):
    """The same by bitsandbytes. options: of its Linear4bit or Linear8bitLt."""
    import bitsandbytes as bnb

    model = Mixer() if model is None else model
    for layer in model.layers:
        for i in (1, 3):
            old = layer[i]
            sizes = old.in_features, old.out_features, old.bias is not None
            if bits == 4:
                layer[i] = bnb.nn.Linear4bit(*sizes, **{"quant_type": "nf4"} | options)
                layer[i].support_avx512bf16_for_cpu = False  # it would replace weights when called
            else:
                options = {"threshold": 6.0, "has_fp16_weights": False} | options
                layer[i] = bnb.nn.Linear8bitLt(*sizes, **options)
            layer[i].load_state_dict(old.state_dict())
    return model.to("cpu").eval()
