"""Turn every usable song into a normalised log-mel spectrogram and MFCCs, one .npy file each.

Reads   data/metadata.json and the songs it names
Writes  data/processed/melspectrogram_normalized/<track>.npy  float16 (128, frames)
        data/processed/mfcc/<track>.npy                       float16 (20, frames)
        data/processed/features.json                          the settings, and which song each file came from
Next    train_dpa_cnn.py, train_ecas_cnn.py, train_bigru_cnn.py

Example
    python extract_features.py --workers 2
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from catalogue import Catalogue, read_catalogue
from common import (
    UserError,
    argument_parser,
    command,
    complain,
    format_table,
    positive_int,
    progress,
    workers_end_with_us,
)
from decoding import SAMPLE_RATE, SoundReader
from files import file_sha256, locked, read_array, read_json, write_array, write_json
from sound_faults import no_file

# The one home of the features: training, evaluation and detection all call timed_features below.
N_FFT = 2048  # samples
HOP_LENGTH = 512  # samples between frames: 43.07 frames a second
N_MELS = 128
N_MFCC = 20
TOP_DB = 80.0  # dB below the song's loudest mel cell where the log-mel is cut off
FRAMES_PER_SECOND = SAMPLE_RATE / HOP_LENGTH
SILENCE_DB = 50.0  # below the song's loudest mel cell, a frame with nothing above that is silent
SILENCE_FRAMES = round(FRAMES_PER_SECOND)  # in a row, 1 s, from which on silence is no pause of the music,
EDGE_FRAMES = SILENCE_FRAMES // 4  # and before and after it
GROWTH = 1 << 13  # frames for which a song in progress gets room at a time
CHUNK_FRAMES = 1 << 16  # that become features at a time

# Saved in every checkpoint; a difference is refused.
FEATURE_SETTINGS = {
    "version": 1,
    "sample_rate": SAMPLE_RATE,
    "n_fft": N_FFT,
    "hop_length": HOP_LENGTH,
    "n_mels": N_MELS,
    "n_mfcc": N_MFCC,
    "top_db": TOP_DB,
    "normalisation": "song: each mel band less its mean, then one scale",
}
# Saved with the features. That silence is left out came later and checkpoints don't say it: no song that the released
# networks were trained on has any, so their features are the same to the last bit.
STORED_SETTINGS = FEATURE_SETTINGS | {
    "silence": f"left out: {SILENCE_DB} dB down for {SILENCE_FRAMES} frames, {EDGE_FRAMES} at the ends"
}
FOLDERS = {"melspectrogram": "melspectrogram_normalized", "mfcc": "mfcc"}
BINS = {"melspectrogram": N_MELS, "mfcc": N_MFCC}


# ---------------------------------------------------------------- features


@functools.cache
def mel_filters() -> np.ndarray:
    """Triangular filters, float32 (128, 1025), equal to ``librosa.filters.mel``; importing that takes seconds.

    Slaney's mel scale (Auditory Toolbox, 1998): linear to 1 kHz, then 27 steps for each factor of 6.4; each filter
    has unit area.
    """
    linear, step = 200 / 3, np.log(6.4) / 27  # Hz a mel below 1 kHz; logarithm of Hz a mel above
    top = 15 + np.log(SAMPLE_RATE / 2 / 1000) / step
    mels = np.linspace(0, top, N_MELS + 2)
    edges = np.where(mels < 15, linear * mels, 1000 * np.exp(step * (mels - 15)))
    bins = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return (np.maximum(0, np.minimum(rise, fall)) * 2 / (edges[2:] - edges[:-2])[:, None]).astype(np.float32)


@functools.cache
def _mel_bands() -> list[tuple[int, np.ndarray]]:
    """Each filter's first bin and its weights from there on, without the zeros.

    Sixty times fewer multiplications than with the whole matrix, and too few for BLAS to start threads, which takes
    30 ms a block where the cores are busy.
    """
    bands = [(np.flatnonzero(row), row) for row in mel_filters()]
    return [(int(bins[0]), row[bins[0] : bins[-1] + 1].copy()) for bins, row in bands]


def mel_power(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Mel power spectrogram, float32 (128, frames), of a sound given in float32 blocks of any size.

    Equal to ``librosa.feature.melspectrogram`` with zero padding, but in bounded memory and without its imports:
    frames are centred, one is cut every 512 samples, there are 1 + samples // 512.
    """
    return _mel_rows(blocks).T


def _mel_rows(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The same as (frames, 128), in memory of its own."""
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32)
    margin = np.zeros(N_FFT // 2, dtype=np.float32)
    pending, frames = margin, 0
    mels = np.empty((GROWTH, N_MELS), dtype=np.float32)
    for block in itertools.chain(blocks, [margin]):
        pending = np.concatenate([pending, block])
        if len(pending) >= N_FFT:
            cuts = np.lib.stride_tricks.sliding_window_view(pending, N_FFT)[::HOP_LENGTH]
            spectrum = np.fft.rfft(cuts * hann)  # scipy's is faster, but takes longer to import than a song takes
            if frames + len(cuts) > len(mels):  # grows in place: a long song is in memory once
                mels.resize((frames + max(len(cuts), GROWTH), N_MELS), refcheck=False)
            power = spectrum.real**2 + spectrum.imag**2
            for band, (first, weights) in enumerate(_mel_bands()):
                mels[frames : frames + len(cuts), band] = power[:, first : first + len(weights)] @ weights
            frames += len(cuts)
            pending = pending[len(cuts) * HOP_LENGTH :]
    mels.resize((frames, N_MELS), refcheck=False)
    return mels


def normalised_log_mel(mel: np.ndarray) -> np.ndarray:
    """Log-mel in which level and mastering of the song are gone, float32 (128, frames), of powers; works in place.

    Decibels down to 80 below the loudest cell; each band less its own mean over the song (cepstral mean
    normalisation: Furui 1981); one scale, the standard deviation over all that remains. Silence gives zeros.
    """
    np.maximum(mel, np.finfo(np.float32).tiny, out=mel)
    np.log10(mel, out=mel)
    mel *= 10
    np.maximum(mel, mel.max() - TOP_DB, out=mel)
    mel -= mel.mean(axis=1, keepdims=True, dtype=np.float64)
    spread = np.sqrt(np.mean([np.square(band, dtype=np.float64).mean() for band in mel]))
    mel /= max(spread, 1e-3)
    return mel


def song_features(blocks: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The features of one song, as stored, trained on and detected with.

    Parameters
    ----------
    blocks : float32 (n,) each, mono at 22,050 Hz: a ``SoundReader``, or ``[samples]``

    Returns
    -------
    ``melspectrogram`` float16 (128, frames) and ``mfcc`` float16 (20, frames), of 1 + samples // 512 frames less those
    of silence. The MFCCs are the orthonormal DCT-II of the normalised log-mel, so they carry the same normalisation.
    """
    return timed_features(blocks)[0]


def timed_features(blocks: Iterable[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """``song_features``, and which of the song's frames they have, bool (1 + samples // 512,)."""
    rows = _mel_rows(blocks)
    sounding = is_sounding(rows)
    if not sounding.all():
        frames = np.flatnonzero(sounding)
        for first in range(0, len(frames), GROWTH):  # in place, as a long song is large
            part = frames[first : first + GROWTH]
            rows[first : first + len(part)] = rows[part]
        rows.resize((len(frames), N_MELS), refcheck=False)
    normalised_log_mel(rows.T)
    pieces: dict[str, list[np.ndarray]] = {kind: [] for kind in BINS}
    for first in range(0, len(rows), CHUNK_FRAMES)[::-1]:  # one round but for a long song
        pieces["melspectrogram"].insert(0, rows[first:].T.astype(np.float16, order="C"))
        pieces["mfcc"].insert(0, _mfcc(rows[first:]).astype(np.float16))
        rows.resize((first, N_MELS), refcheck=False)  # gives the memory of what is done back
    return {kind: np.concatenate(parts, axis=1) for kind, parts in pieces.items()}, sounding


def is_sounding(rows: np.ndarray) -> np.ndarray:
    """Which frames of a mel power spectrogram (frames, 128) are no silence of some length, bool (frames,).

    Silence is no part of the music: the bands' means would be of it too, and its windows would have a say. A click
    amid silence goes with it. All frames count where less than a second would be left.
    """
    loudest = rows.max(axis=1)
    silent = loudest < loudest.max() * 10 ** (-SILENCE_DB / 10)
    firsts, lengths = _runs(silent)
    ends = np.pad(silent[firsts] & (lengths >= SILENCE_FRAMES), 1, constant_values=True)
    click = ~silent[firsts] & (lengths < EDGE_FRAMES) & ends[:-2] & ends[2:]
    silent |= np.repeat(click, lengths)
    firsts, lengths = _runs(silent)
    least = np.full(len(firsts), SILENCE_FRAMES)
    least[[0, -1]] = EDGE_FRAMES
    keep = ~np.repeat(silent[firsts] & (lengths >= least), lengths)
    return keep if keep.sum() >= SILENCE_FRAMES else np.ones_like(keep)


def silence_note(sounding: np.ndarray) -> str:
    """A sentence for the user where a second or more of a song is left out; "" otherwise."""
    silence = (~sounding).sum() / FRAMES_PER_SECOND
    return f"{silence:.1f} s left out as silence ({SILENCE_DB:g} dB below the loudest)" if silence >= 1 else ""


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal flags begin, and how long they are."""
    firsts = np.flatnonzero(np.diff(flags, prepend=~flags[:1]))
    return firsts, np.diff(firsts, append=len(flags))


def _mfcc(rows: np.ndarray) -> np.ndarray:
    """MFCCs (20, frames) of log-mel rows (frames, 128).

    A few frames at a time, too few for BLAS to start threads: with their number the last bits would change.
    """
    basis = dct_basis()
    return np.concatenate([basis @ rows[first : first + 64].T for first in range(0, len(rows), 64)], axis=1)


def dct_basis() -> np.ndarray:
    """Orthonormal DCT-II, float32 (20, 128): log-mel -> MFCC; its transpose leads back."""
    order, band = np.arange(N_MFCC)[:, None], np.arange(N_MELS)
    basis = np.cos(np.pi / N_MELS * (band + 0.5) * order) * np.sqrt(2 / N_MELS)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


# ---------------------------------------------------------------- feature files


def feature_path(data: Path, kind: str, track: str) -> Path:
    """Where a track's features of a kind, "melspectrogram" or "mfcc", are stored."""
    return data / "processed" / FOLDERS[kind] / f"{track}.npy"


def check_feature_settings(
    settings: object, where: Path, remedy: str, own: dict[str, object] = FEATURE_SETTINGS
) -> None:
    """Raise UserError unless ``settings``, found in ``where``, are this code's ``own``."""
    if settings != own:
        found = settings if isinstance(settings, dict) else {}
        wrong = sorted(key for key in {*found, *own} if found.get(key) != own.get(key))
        raise UserError(f"{where} was made with other feature settings ({', '.join(wrong)}): {remedy}")


def load_features(catalogue: Catalogue, kind: str, tracks: Iterable[str]) -> list[np.ndarray]:
    """The stored features of tracks, float16 (bins, frames) each. Raises UserError if any is absent or foreign."""
    maker = "extract_features.py"
    done = read_index(catalogue.data / "processed" / "features.json")
    features = []
    for track in tracks:
        if done.get(track) != catalogue.songs[track].sha256:
            raise UserError(
                f"no features of {track} as it is now: run {maker} again, and prepare_gtzan_data.py if that names it"
            )
        path = feature_path(catalogue.data, kind, track)
        feature = read_array(path, maker)
        if (
            feature.shape[:-1] != (BINS[kind],)
            or not feature.size
            or feature.dtype != np.float16
            or not np.isfinite(feature).all()
        ):
            raise UserError(f"{path} holds no features: delete it and run {maker} again")
        features.append(feature)
    return features


def read_index(path: Path) -> dict[str, str]:
    """Which song's content (SHA-256) each track's features were made of. Raises UserError if that can't be said."""
    maker = "extract_features.py --force" if path.exists() else "extract_features.py"
    index = read_json(path, maker, "settings", "songs")
    check_feature_settings(index["settings"], path, "run extract_features.py --force to make all anew", STORED_SETTINGS)
    if not isinstance(index["songs"], dict):
        raise UserError(f"{path} lists no songs: run extract_features.py --force to make all anew")
    return index["songs"]


Extracted = tuple[str, str | None, str | None]  # track, the problem if any, what is to be said of its sound


def _extract(track: str, audio: Path, sha256: str, targets: dict[str, Path]) -> Extracted:
    """Write one song's feature files, unless that can't be done or the file isn't the one of that hash."""
    problem = note = None
    try:
        features, sounding = timed_features(SoundReader(audio))
        note = silence_note(sounding)
    except UserError as error:
        problem = str(error)
    # After decoding, which is then known to have been of this file; what is no longer the song may not be decodable
    if not_it := no_file(audio) or ("has changed since it was checked" if file_sha256(audio) != sha256 else ""):
        problem = f"{audio}: {not_it}: run prepare_gtzan_data.py again"
    if problem:
        return track, problem, None
    for kind, path in targets.items():
        write_array(path, features[kind])
    return track, None, f"{audio}: {note}" if note else None


def _extract_all(catalogue: Catalogue, tracks: list[str], workers: int) -> Iterator[Extracted]:
    """Extract in worker processes, whose own stderr nobody reads; the tracks come back as they are finished."""
    from joblib import Parallel, delayed

    from extract_features import _extract  # by its module's name: workers can't import a function of __main__

    def targets(track: str) -> dict[str, Path]:
        return {kind: feature_path(catalogue.data, kind, track) for kind in FOLDERS}

    jobs = (
        delayed(_extract)(track, catalogue.audio_path(track), catalogue.songs[track].sha256, targets(track))
        for track in tracks
    )
    return Parallel(return_as="generator_unordered", **workers_end_with_us(workers, len(tracks)))(jobs)


def _run(args: argparse.Namespace) -> int:
    catalogue = read_catalogue(args.data)
    index_path = args.data / "processed" / "features.json"
    done: dict[str, str] = {}
    if index_path.exists() and not args.force:
        done = read_index(index_path)

    usable = [song for song in catalogue.songs.values() if song.verdict == "ok"]
    todo = [
        song.track
        for song in usable
        if done.get(song.track) != song.sha256
        or not all(feature_path(args.data, kind, song.track).exists() for kind in FOLDERS)
    ]

    def save_index() -> None:
        write_json(index_path, {"settings": STORED_SETTINGS, "songs": dict(sorted(done.items()))})

    for track in todo:
        done.pop(track, None)
    if todo and index_path.exists():  # it must not vouch for files that are about to change
        save_index()
    started = saved = time.monotonic()
    failed = 0
    for track, problem, note in progress(_extract_all(catalogue, todo, args.workers), "features", len(todo)):
        if problem:
            failed += 1
            complain(f"{problem}; skipped")
            continue
        if note:
            complain(note)
        done[track] = catalogue.songs[track].sha256
        if time.monotonic() - saved > 5:  # a kill costs five seconds of work
            save_index()
            saved = time.monotonic()
    save_index()
    rows: list[tuple[str, object]] = [
        ("songs", len(usable)),
        ("made now", len(todo) - failed),
        ("there before", len(usable) - len(todo)),
    ]
    rows += [("failed", failed), ("seconds", f"{time.monotonic() - started:.1f}")]
    print(format_table(("features", ""), rows))
    return 1 if failed else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--force", action="store_true", help="make all features anew, whatever is there")
    args = parser.parse_args(argv)
    with locked(args.data):
        return _run(args)


if __name__ == "__main__":
    sys.exit(main())
