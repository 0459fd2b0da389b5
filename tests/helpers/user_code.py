"""A file of a user's own networks, for classes of small images."""

NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes, width=8, drop=0.5):
        super().__init__(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Dropout(drop),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes),
        )


def small(num_classes, width=8, drop=0.5):
    return Net(num_classes, width, drop)


def many(num_classes):
    return Net(num_classes + 1)


def words(num_classes):
    return "a network"


def broken(num_classes):
    raise KeyError("no such block")


NUMBER = 3
"""
