"""Layers: their gradients are autograd's own, and bfloat16 is for training only."""

from __future__ import annotations

import pytest
import torch

from layers import Convolution, mean_and_max, set_fast
from train_bigru_cnn import CNNBiGRU
from train_dpa_cnn import DPACNN
from train_ecas_cnn import ECASCNN

NETWORKS = {DPACNN: 128, ECASCNN: 20, CNNBiGRU: 128}


@pytest.mark.parametrize("dims", [(1,), (2, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mean_and_maximum_and_their_gradients(dims, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6, dtype=torch.double).relu().to(memory_format=layout).requires_grad_()  # with ties
    ours, theirs = mean_and_max(x, *dims), (x.mean(dims, keepdim=True), x.amax(dims, keepdim=True))
    weights = [torch.randn_like(part) for part in theirs]
    gradients = [
        torch.autograd.grad(sum((part * w).sum() for part, w in zip(parts, weights, strict=True)), x)[0]
        for parts in (ours, theirs)
    ]
    for part, expected in [*zip(ours, theirs, strict=True), gradients]:
        torch.testing.assert_close(part, expected)


def test_bfloat16_is_near_in_training_and_absent_in_use():
    torch.manual_seed(0)
    layer, x = Convolution(8, 16, 3, bias=False), torch.randn(2, 8, 10, 10)
    exact = layer(x)
    layer.fast = True
    near = layer(x)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(layer.eval()(x), exact, rtol=0, atol=0)


@pytest.mark.parametrize("build", NETWORKS)
def test_gradients_of_fast_training_point_the_same_way(build):
    torch.manual_seed(0)
    network = build(10, 0.2).train()
    convolutions = [layer for layer in network.modules() if isinstance(layer, Convolution)]
    assert len(convolutions) >= 4
    batch, labels = torch.randn(8, NETWORKS[build], 130), torch.arange(8)
    gradients = []
    for fast in (False, True):
        for layer in convolutions:
            layer.fast = fast
        torch.manual_seed(1)  # of dropout
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(batch)[0], labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_only_processors_with_instructions_for_it_train_in_bfloat16(monkeypatch):
    network = ECASCNN(3, 0.1)
    for able, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        set_fast(network, torch.device("cpu"))
        assert {layer.fast for layer in network.modules() if isinstance(layer, Convolution)} == {expected}
