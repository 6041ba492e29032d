"""Augmentation: nothing at strength zero, finite at any, inside its song, and decided by the seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from augment import Augmentation, change_windows, cut_windows, dct_basis, mixup

NOTHING = Augmentation(*(0.0 for _ in dataclasses.fields(Augmentation)))
EVERYTHING = Augmentation(noise_chance=1, band_limit_chance=1, low_cut_chance=1, mask_chance=1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_zero_strengths_change_nothing():
    windows = normal(6, 40, 128)
    torch.testing.assert_close(change_windows(windows, NOTHING), windows, rtol=0, atol=1e-6)
    basis = dct_basis(20, 128)
    mfcc = windows @ basis.T
    torch.testing.assert_close(change_windows(mfcc, NOTHING, basis), mfcc, rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Augmentation) if field.name != "tempo"])
def test_each_strength_changes_something_by_itself(field):
    torch.manual_seed(0)
    windows = normal(16, 40, 128)
    strong = dataclasses.replace(NOTHING, **{field: 1.0 if field.endswith("chance") else 0.2})
    assert not torch.allclose(change_windows(windows, strong), windows, atol=1e-3)


def test_pitch_moves_high_bands_alike_and_low_bands_less():
    windows = (torch.arange(128.0) / 10).expand(64, 3, 128).contiguous()
    torch.manual_seed(0)
    moved = 10 * (change_windows(windows, dataclasses.replace(NOTHING, pitch_bands=2.0)) - windows)[:, 0]
    assert 1.5 < moved.abs().max() <= 2.001  # bands, within the strength
    assert moved[:, 60].min() < -1
    torch.testing.assert_close(moved[:, 60], moved[:, 120], rtol=0, atol=1e-3)
    torch.testing.assert_close(moved[:, 19], moved[:, 60] / 2, rtol=0, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.booleans(), st.floats(0.01, 30), st.integers(0, 10**6))
def test_changed_windows_keep_shape_and_stay_finite(count, frames, mfcc, scale, seed):
    basis = dct_basis(20, 128) if mfcc else None
    windows = scale * normal(count, frames, 20 if mfcc else 128, seed=seed)
    torch.manual_seed(seed)
    changed = change_windows(windows, EVERYTHING, basis)
    assert changed.shape == windows.shape
    assert changed.dtype == torch.float32
    assert torch.isfinite(changed).all()


def test_same_seed_same_change():
    windows = normal(8, 40, 128)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(change_windows(windows, Augmentation()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ---------------------------------------------------------------- cutting


def test_tempo_zero_slices():
    songs = normal(3, 100, 5).half()
    song, start = torch.tensor([2, 0, 1]), torch.tensor([0, 17, 60])
    cut = cut_windows(songs, torch.tensor([100, 100, 100]), song, start, 40)
    expected = torch.stack([songs[s, f : f + 40].float() for s, f in zip(song, start, strict=True)])
    assert torch.equal(cut, expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(20, 90), min_size=1, max_size=5), st.floats(0, 0.9), st.integers(0, 10**6), st.data())
def test_padding_and_other_songs_never_reach_a_window(lengths, tempo, seed, data):
    window = 20
    songs = torch.full((len(lengths), 90, 3), 60_000.0, dtype=torch.float16)  # padding shouts
    for index, length in enumerate(lengths):
        songs[index, :length] = index
    song = torch.arange(len(lengths))
    start = torch.tensor([data.draw(st.integers(0, length - window)) for length in lengths])
    torch.manual_seed(seed)
    cut = cut_windows(songs, torch.tensor(lengths), song, start, window, tempo)
    assert cut.shape == (len(lengths), window, 3)
    assert cut.dtype == torch.float32
    assert torch.equal(cut, song[:, None, None].expand_as(cut).float())


def test_tempo_stretches_around_the_centre_within_its_limits():
    ramp = torch.arange(400.0)[None, :, None].half()
    torch.manual_seed(0)
    many = torch.zeros(500, dtype=torch.int64)
    cut = cut_windows(ramp, torch.tensor([400]), many, many + 180, 41, tempo=0.2)[..., 0]
    torch.testing.assert_close(cut[:, 20], torch.full((500,), 200.0), rtol=0, atol=0.1)
    rate = (cut[:, -1] - cut[:, 0]) / 40
    assert 1 / 1.21 < rate.min() < 0.87
    assert 1.15 < rate.max() < 1.21


def test_a_song_shorter_than_a_window_keeps_its_padding():
    songs = torch.zeros(1, 30, 2, dtype=torch.float16)
    songs[0, :12] = 1
    none = torch.zeros(1, dtype=torch.int64)
    for tempo in (0.0, 0.2):
        cut = cut_windows(songs, torch.tensor([12]), none, none, 30, tempo)
        assert cut[0, 0, 0] == 1
        assert cut[0, -1, 0] == 0


# ---------------------------------------------------------------- DCT, mixup


def test_dct_basis_is_orthonormal_and_scipys():
    basis = dct_basis(20, 128)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis @ basis.T, torch.eye(20), rtol=0, atol=1e-5)
    mel = normal(128, 30).numpy()
    np.testing.assert_allclose(basis.numpy() @ mel, dct(mel, norm="ortho", axis=0)[:20], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 2), st.integers(2, 16), st.integers(0, 10**6))
def test_mixup_blends_by_its_share(alpha, count, seed):
    windows = normal(count, 6, 4, seed=seed)
    torch.manual_seed(seed)
    blend, partner, share = mixup(windows, alpha)
    assert 0 <= share <= 1
    assert sorted(partner.tolist()) == list(range(count))
    torch.testing.assert_close(blend, share * windows + (1 - share) * windows[partner], rtol=1e-4, atol=1e-5)


def test_mixup_of_alpha_zero_is_off():
    windows = normal(4, 6, 4)
    blend, _, share = mixup(windows, 0)
    assert share == 1
    assert torch.equal(blend, windows)
