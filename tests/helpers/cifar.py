"""CIFAR-10 images of the shared data, and the network trained on them."""

import pickle

import torch
from safetensors.torch import load_file

from moe_rewrite.models.resnet import ResNet

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images_and_labels(data, part):
    """((N, 3, 32, 32) as the network takes them, (N,)) of one of the usual python batches."""
    with open(data / "data" / "cifar-10-batches-py" / part, "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    pixels = torch.tensor(batch[b"data"]).view(-1, 3, 32, 32) / 255.0
    images = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    return images, torch.tensor(batch[b"labels"])


def pretrained(data):
    model = ResNet(20)
    weights = load_file(data / "models/resnet20-cifar10/model.safetensors")
    model.load_state_dict(weights, strict=False)
    return model.eval()
