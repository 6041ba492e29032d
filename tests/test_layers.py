"""Layers: their gradients are autograd's own, and what is faster is for training only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layers import LAGS, Convolution, Tempogram, mean_and_max, set_fast
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


@given(period=st.integers(5, 100), first=st.integers(1, 100), level=st.floats(0.5, 20))
def test_a_tempogram_shows_the_beat_wherever_it_falls(period, first, level):
    x = torch.zeros(1, 128, 260)
    x[..., first::period] = level
    tempogram = Tempogram()(x)[0, 0]
    assert (tempogram.argmax(1) + 1 == period).all()
    assert 0.2 < tempogram[:, period - 1].min() <= tempogram.max() <= 1


@given(frames=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_tempogram_is_the_autocorrelation_of_onsets(frames, seed):
    x = torch.randn(1, 128, frames, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    rise = x[0].view(32, 4, frames).mean(1).diff(prepend=x[0].view(32, 4, frames).mean(1)[:, :1]).clamp(min=0)
    rise -= rise.mean(1, keepdim=True)
    energy = rise.square().sum(1)
    expected = torch.zeros(32, LAGS, dtype=torch.double)
    for lag in range(1, min(LAGS + 1, frames)):
        expected[:, lag - 1] = (rise[:, lag:] * rise[:, :-lag]).sum(1)
    expected /= (energy + 0.1 * energy.mean() + 1e-3)[:, None]
    torch.testing.assert_close(Tempogram()(x)[0, 0], expected)


@pytest.mark.parametrize("build", NETWORKS)
def test_what_a_network_hears_of_the_rhythm_is_learned(build):
    torch.manual_seed(0)
    network = build(3, 0.05, rhythm=1)
    assert build(3, 0.05).rhythm is None
    torch.nn.functional.cross_entropy(network(torch.randn(6, NETWORKS[build], 130))[0], torch.arange(6) % 3).backward()
    assert all(value.grad.abs().max() > 0 for value in network.rhythm.parameters())
    for frames in (1, 5, 700):
        logits, feature = network.eval()(torch.zeros(2, NETWORKS[build], frames))
        assert logits.isfinite().all()
        assert feature.shape == (2, network.feature_size)


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
