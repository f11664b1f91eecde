"""Models as the command line names them: ``factories:mlp``."""

import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers)


def cnn():
    from moe_rewrite.models.resnet import ResNet

    torch.manual_seed(0)
    return ResNet(depth=8)


def not_a_module():
    return 3
