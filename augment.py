"""Random changes of training windows that leave the genre as it is.

All of them act on normalised log-mels, where a change of tempo, pitch or equalisation is a resampling or a
smooth curve, so that they cost next to nothing beside the network. MFCC windows are taken back to the mel
bands that their 20 coefficients describe, changed there, and transformed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MEL_OF_1_KHZ = 38  # the band where Slaney's mel scale turns from linear to logarithmic, of 128 up to 11,025 Hz


@dataclass(frozen=True)
class Augmentation:
    """How strong each change is; 0 switches it off. Levels are in standard deviations of the song's log-mel.

    Masks are those of SpecAugment (Park et al., Interspeech 2019).
    """

    tempo: float = 0.22  # time axis stretched by up to +-22 %
    pitch_bands: float = 2.2  # up to +-2.2 mel bands, +-6 %
    equaliser: float = 0.15  # of each of the slow cosines over the mel axis
    contrast: float = 0.2  # all levels scaled by up to +-20 %, as a compressor does
    noise_chance: float = 0.3  # of a noise floor under which quiet cells drown
    band_limit_chance: float = 0.25  # of losing all above 2-9 kHz, as in old recordings and low bit rates
    low_cut_chance: float = 0.1  # of losing the lowest bands, as on small loudspeakers
    mask_chance: float = 0.5  # of one block of time, and of one block of bands, set to the song's mean


def cut_windows(
    songs: torch.Tensor,
    places: torch.Tensor,
    lengths: torch.Tensor,
    song: torch.Tensor,
    start: torch.Tensor,
    window: int,
    tempo: float = 0.0,
) -> torch.Tensor:
    """Cut windows out of songs held in memory, each at a random tempo.

    Parameters
    ----------
    songs : float16 (frames, bins) of all songs, one after the other, each filled up to a window if it is shorter
    places, lengths : int64 (songs,), where each song begins and its own frames
    song, start : int64 (windows,), which song and its first frame
    window : frames
    tempo : largest relative change

    Returns
    -------
    float32 (windows, window, bins)
    """
    if tempo == 0:
        return songs[(places[song] + start)[:, None] + torch.arange(window, device=songs.device)].float()
    rate = torch.exp((torch.rand(len(song), 1, device=songs.device) * 2 - 1) * math.log1p(tempo))
    centre = (window - 1) / 2
    position = start[:, None] + centre + (torch.arange(window, device=songs.device) - centre) * rate
    last = (lengths[song].clamp(min=window) - 1)[:, None]
    position = torch.minimum(position.clamp(min=0), last.float())
    before = position.floor().long()
    after = torch.minimum(before + 1, last)
    share, place = (position - before)[..., None], places[song][:, None]
    return torch.lerp(songs[place + before].float(), songs[place + after].float(), share)


def change_windows(windows: torch.Tensor, how: Augmentation, basis: torch.Tensor | None = None) -> torch.Tensor:
    """Apply every random change but tempo.

    Parameters
    ----------
    windows : float32 (windows, frames, bins), normalised log-mels, or MFCCs if ``basis`` is given
    basis : float32 (n_mfcc, n_mels) of ``extract_features.dct_basis``

    Returns
    -------
    float32, the same shape
    """
    mel = windows if basis is None else windows @ basis
    count, frames, bands = mel.shape
    device = mel.device
    band = torch.arange(bands, device=device, dtype=torch.float32)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, 1, 1, device=device) * (high - low) + low

    def chance(probability: float) -> torch.Tensor:
        return torch.rand(count, 1, 1, device=device) < probability

    # pitch: linear interpolation along the bands, as a matrix a window
    shift = uniform(-how.pitch_bands, how.pitch_bands)[:, 0] * (band / MEL_OF_1_KHZ).clamp(max=1)
    position = (band + shift).clamp(0, bands - 1)
    mel = torch.bmm(mel, (1 - (position[:, None, :] - band[:, None]).abs()).clamp(min=0))

    cosines = torch.cos(math.pi * (band + 0.5) * torch.arange(1, 6, device=device)[:, None] / bands)
    curve = torch.randn(count, 1, 5, device=device) * how.equaliser @ cosines
    mel = mel * uniform(1 - how.contrast, 1 + how.contrast) + curve

    floor = uniform(-2.5, -0.8)
    noisy = floor + torch.nn.functional.softplus(mel - floor, beta=2)
    noisy = noisy + (mel - noisy).mean(dim=1, keepdim=True)  # the song's mean is removed from what a detector sees
    mel = torch.where(chance(how.noise_chance), noisy, mel)

    lost = chance(how.band_limit_chance) & (band > uniform(0.45, 0.95) * bands)
    lost = lost | (chance(how.low_cut_chance) & (band < uniform(0.02, 0.12) * bands))
    first = uniform(0, 1) * bands
    lost = lost | (chance(how.mask_chance) & (band >= first) & (band < first + uniform(0, 0.12) * bands))
    time = torch.arange(frames, device=device)[:, None]
    first = uniform(0, 1) * frames
    lost = lost | (chance(how.mask_chance) & (time >= first) & (time < first + uniform(0, 0.2) * frames))
    mel = mel.masked_fill(lost, 0.0)
    return mel if basis is None else mel @ basis.T


def mixup(windows: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Blend each of some windows (windows, frames, bins) with another (Zhang et al., mixup, ICLR 2018).

    Returns the blend, shaped alike, the partner's index int64 (windows,) and the share of the first.
    """
    partner = torch.randperm(len(windows), device=windows.device)
    if alpha < 1e-3:  # hardly anything is blended then, and sampling breaks down
        return windows, partner, 1.0
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return windows.lerp(windows[partner], 1 - share), partner, share
