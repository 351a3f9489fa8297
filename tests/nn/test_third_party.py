"""A ResNet from transformers: conversion and reversion preserve outputs and state."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import syncbn


def network() -> nn.Module:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1])
    config.num_labels = 5
    model: nn.Module = ResNetForImageClassification(config)
    return model


def test_transformers_resnet_round_trip() -> None:
    model = network()
    x = torch.randn(3, 3, 64, 64)
    model(x)
    model.eval()
    expected, state = model(x).logits, copy.deepcopy(model.state_dict())
    before = [type(module) for module in model.modules()]
    assert before.count(nn.BatchNorm2d) > 10

    syncbn.convert_sync_batchnorm(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(syncbn.SyncBatchNorm2d) == before.count(nn.BatchNorm2d)
    assert nn.BatchNorm2d not in kinds
    assert torch.equal(model(x).logits, expected)

    syncbn.revert_sync_batchnorm(model)
    assert [type(module) for module in model.modules()] == before
    assert torch.equal(model(x).logits, expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_transformers_resnet_trains_as_before() -> None:
    original = network().double()
    converted = syncbn.convert_sync_batchnorm(copy.deepcopy(original))
    x, labels = torch.randn(3, 3, 64, 64).double(), torch.tensor([0, 1, 2])
    for model in (original, converted):
        model(x, labels=labels).loss.backward()
    for actual, expected in zip(converted.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-12)
