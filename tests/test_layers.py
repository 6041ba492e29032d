"""Layers: their gradients are autograd's own, and what is faster is for training only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    layer, x = Convolution(8, 16, 3), torch.randn(2, 8, 10, 10)
    exact = layer(x)
    layer.fast = "bfloat16"
    near = layer(x)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(layer.eval()(x), exact, rtol=0, atol=0)


@settings(max_examples=60)
@given(
    channels=st.tuples(st.integers(8, 17), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9)),
    input_learns=st.booleans(),
)
def test_gradients_by_products_are_autograds(channels, kernel, stride, padding, size, input_learns):
    torch.manual_seed(0)
    layer = Convolution(*channels, kernel, stride, padding).double().to(memory_format=torch.channels_last)
    x = torch.randn(size[0], channels[0], *size[1:], dtype=torch.double).to(memory_format=torch.channels_last)
    x.requires_grad_(input_learns)
    results = []
    for fast in ("", "products"):
        layer.fast = fast
        out = layer(x)
        assert ("Products" in type(out.grad_fn).__name__) == bool(fast)
        learned = [layer.weight, *([x] if input_learns else [])]
        results.append([out, *torch.autograd.grad(out.square().sum(), learned)])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("fast", "alike"), [("bfloat16", 0.98), ("products", 0.999999)])
@pytest.mark.parametrize("build", NETWORKS)
def test_gradients_of_fast_training_point_the_same_way(build, fast, alike):
    torch.manual_seed(0)
    network = build(10, 0.2).train()
    convolutions = [layer for layer in network.modules() if isinstance(layer, Convolution)]
    assert len(convolutions) >= 4
    batch, labels = torch.randn(8, NETWORKS[build], 130), torch.arange(8)
    gradients = []
    for way in ("", fast):
        for layer in convolutions:
            layer.fast = way
        torch.manual_seed(1)  # of dropout
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(batch)[0], labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > alike
    assert not torch.equal(*gradients)  # each way is taken


@pytest.mark.parametrize(
    ("able", "way"),
    [
        ({"avx2", "avx512_f", "avx512_bf16"}, "bfloat16"),
        ({"amx_bf16"}, "bfloat16"),
        ({"avx2"}, "products"),
        ({"avx2", "avx512_f"}, ""),
        (set(), ""),
    ],
)
def test_each_processor_trains_in_its_fastest_way(monkeypatch, able, way):
    network = ECASCNN(3, 0.1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able, True))
    set_fast(network, torch.device("cpu"))
    assert {layer.fast for layer in network.modules() if isinstance(layer, Convolution)} == {way}
