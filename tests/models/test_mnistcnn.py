"""The convolutional network on the held-out MNIST digits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn


def test_accuracy_on_held_out_digits(source: Callable[[str], ModuleType], model: Callable[[str], nn.Module]) -> None:
    """At least 97 % of the 1,000 held-out digits must be named right."""
    network = model("mnistcnn")
    with torch.inference_mode():
        assert source("mnistcnn").evaluate(lambda feeds: network(**feeds))["accuracy"] >= 0.97


def test_the_split_is_stratified_and_apart(source: Callable[[str], ModuleType]) -> None:
    """There must be 400 training and 100 held-out scans of each digit, none of them in both parts."""
    train, test, train_labels, test_labels = source("mnistcnn")._split()
    assert train_labels.bincount().tolist() == [400] * 10
    assert test_labels.bincount().tolist() == [100] * 10
    assert not {i.numpy().tobytes() for i in train} & {i.numpy().tobytes() for i in test}


def test_convolutions_are_followed_by_normalization(model: Callable[[str], nn.Module]) -> None:
    """Every convolution must be bias-free and stand before a batch normalization: what fusion is shown on."""
    stages = model("mnistcnn").get_submodule("stages")
    for stage in stages.children():
        convolution, normalization, activation = stage.children()
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is None
        assert isinstance(normalization, nn.BatchNorm2d) and isinstance(activation, nn.ReLU)
