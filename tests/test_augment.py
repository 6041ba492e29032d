"""Augmentation: nothing at strength zero, finite at any, inside its song, and decided by the seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from augment import Augmentation, change_windows, cut_windows, mixup
from extract_features import dct_basis

NOTHING = Augmentation(*(0.0 for _ in dataclasses.fields(Augmentation)))
EVERYTHING = Augmentation(noise_chance=1, band_limit_chance=1, low_cut_chance=1, mask_chance=1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_zero_strengths_change_nothing():
    windows = normal(6, 40, 128)
    torch.testing.assert_close(change_windows(windows, NOTHING), windows, rtol=0, atol=1e-6)
    basis = torch.from_numpy(dct_basis())
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


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 70), st.booleans(), st.floats(0.01, 30), st.integers(0, 10**6))
def test_changed_windows_keep_shape_and_stay_finite(count, frames, mfcc, scale, seed):
    basis = torch.from_numpy(dct_basis()) if mfcc else None
    windows = scale * normal(count, frames, 20 if mfcc else 128, seed=seed)
    torch.manual_seed(seed)
    changed = change_windows(windows, EVERYTHING, basis)
    assert changed.shape == windows.shape
    assert changed.dtype == torch.float32
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize(
    ("field", "lost", "kept"),
    [("band_limit_chance", slice(122, 128), slice(0, 58)), ("low_cut_chance", slice(0, 3), slice(16, 128))],
)
def test_lost_bands_are_the_highest_or_the_lowest(field, lost, kept):
    torch.manual_seed(0)
    gone = (change_windows(normal(200, 9, 128), dataclasses.replace(NOTHING, **{field: 1.0})) == 0).all(dim=1)
    assert gone[:, lost].all()
    assert not gone[:, kept].any()


def test_noise_drowns_quiet_cells_and_leaves_each_bands_mean():
    torch.manual_seed(0)
    windows = normal(16, 40, 128)
    noisy = change_windows(windows, dataclasses.replace(NOTHING, noise_chance=1.0))
    torch.testing.assert_close(noisy.mean(1), windows.mean(1), rtol=0, atol=1e-5)
    assert (noisy.amax(1) - noisy.amin(1) < windows.amax(1) - windows.amin(1)).all()


def test_a_mask_is_a_block_of_time_and_one_of_bands():
    torch.manual_seed(0)
    gone = change_windows(normal(200, 100, 128), dataclasses.replace(NOTHING, mask_chance=1.0)) == 0
    for whole, most in ((gone.all(dim=1), 0.12 * 128 + 1), (gone.all(dim=2), 0.2 * 100 + 1)):
        assert 1 <= whole.sum(dim=1).max() <= most
        assert (whole.int().diff(dim=1) == 1).sum(dim=1).max() <= 1


def test_contrast_goes_both_ways():
    torch.manual_seed(0)
    changed = change_windows(torch.ones(200, 2, 128), dataclasses.replace(NOTHING, contrast=0.2))
    assert 0.8 <= changed.min() < 0.85 < 1.15 < changed.max() <= 1.2


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
    songs = normal(300, 5).half()
    places, lengths = torch.tensor([0, 90, 200]), torch.tensor([90, 110, 100])
    song, start = torch.tensor([2, 0, 1]), torch.tensor([0, 17, 60])
    cut = cut_windows(songs, places, lengths, song, start, 40)
    expected = torch.stack([songs[s + f : s + f + 40].float() for s, f in zip(places[song], start, strict=True)])
    assert torch.equal(cut, expected)


@settings(max_examples=60)
@given(st.lists(st.integers(20, 90), min_size=1, max_size=5), st.floats(0, 0.9), st.integers(0, 10**6), st.data())
def test_padding_and_other_songs_never_reach_a_window(lengths, tempo, seed, data):
    window = 20
    songs = torch.full((90 * len(lengths), 3), 60_000.0, dtype=torch.float16)  # what lies between shouts
    song = torch.arange(len(lengths))
    for index, length in enumerate(lengths):
        songs[90 * index : 90 * index + length] = index
    start = torch.tensor([data.draw(st.integers(0, length - window)) for length in lengths])
    torch.manual_seed(seed)
    cut = cut_windows(songs, 90 * song, torch.tensor(lengths), song, start, window, tempo)
    assert cut.shape == (len(lengths), window, 3)
    assert cut.dtype == torch.float32
    assert torch.equal(cut, song[:, None, None].expand_as(cut).float())


def test_tempo_stretches_around_the_centre_within_its_limits():
    ramp = torch.arange(400.0)[:, None].half()
    torch.manual_seed(0)
    many = torch.zeros(500, dtype=torch.int64)
    cut = cut_windows(ramp, many[:1], torch.tensor([400]), many, many + 180, 41, tempo=0.2)[..., 0]
    torch.testing.assert_close(cut[:, 20], torch.full((500,), 200.0), rtol=0, atol=0.1)
    rate = (cut[:, -1] - cut[:, 0]) / 40
    assert 1 / 1.21 < rate.min() < 0.87
    assert 1.15 < rate.max() < 1.21


def test_a_song_shorter_than_a_window_keeps_its_padding():
    songs = torch.zeros(30, 2, dtype=torch.float16)
    songs[:12] = 1
    none = torch.zeros(1, dtype=torch.int64)
    for tempo in (0.0, 0.2):
        cut = cut_windows(songs, none, torch.tensor([12]), none, none, 30, tempo)
        assert cut[0, 0, 0] == 1
        assert cut[0, -1, 0] == 0


# ---------------------------------------------------------------- DCT, mixup


def test_dct_basis_is_orthonormal_and_scipys():
    basis = torch.from_numpy(dct_basis())
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis @ basis.T, torch.eye(20), rtol=0, atol=1e-5)
    mel = normal(128, 30).numpy()
    np.testing.assert_allclose(basis.numpy() @ mel, dct(mel, norm="ortho", axis=0)[:20], atol=1e-5)


@settings(max_examples=25)
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


def test_mixup_partners_are_other_songs():
    torch.manual_seed(0)
    _, partner, _ = mixup(normal(64, 2, 2), 1.0)
    assert (partner != torch.arange(64)).float().mean() > 0.9
