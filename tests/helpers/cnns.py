"""The plain CNNs, small, with batch statistics unlike the initial ones."""

import torch
from torch import nn

from moe_rewrite.models.convnext import ConvNeXt
from moe_rewrite.models.densenet import DenseNet
from moe_rewrite.models.mobilenet import MobileNetV2
from moe_rewrite.models.resnet import ResNet
from moe_rewrite.models.vgg import VGG

CNNS = {
    "ResNet": lambda: ResNet(depth=14),
    "WideResNet": lambda: ResNet(depth=8, widen=2),
    "VGG": lambda: VGG(scale=8),
    "DenseNet": lambda: DenseNet(layers=2, growth=4),
    "MobileNetV2": lambda: MobileNetV2(),
    "ConvNeXt": lambda: ConvNeXt(depths=(1, 1, 2), widths=(8, 12, 16)),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    return settled(CNNS[name]())


def settled(model, channels=3, size=32):
    """With statistics of some data, and biases and scales that are not zero and one."""
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
            if norm and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            model(torch.randn(8, channels, size, size))
    return model.eval()
