"""Turn every usable song into a normalised log-mel spectrogram and MFCCs, one .npy file each.

This module is the one home of the audio constants, of decoding and of the features: training, evaluation
and detection all call ``song_features``.

Reads   data/metadata.json and the songs it names
Writes  data/processed/melspectrogram_normalized/<track>.npy  float16 (128, frames)
        data/processed/mfcc/<track>.npy                       float16 (20, frames)
        data/processed/features.json                          the settings, and which song each file came from
Next    train_dpa_cnn.py, train_ecas_cnn.py, train_bigru_cnn.py

Example
    python extract_features.py --workers 2
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import (
    Catalogue,
    UserError,
    argument_parser,
    command,
    complain,
    format_table,
    positive_int,
    progress,
    read_array,
    read_catalogue,
    read_json,
    write_array,
    write_json,
)

SAMPLE_RATE = 22_050  # Hz
N_FFT = 2048  # samples
HOP_LENGTH = 512  # samples between frames: 43.07 frames a second
N_MELS = 128
N_MFCC = 20
TOP_DB = 80.0  # dB below the song's loudest mel cell where the log-mel is cut off
FRAMES_PER_SECOND = SAMPLE_RATE / HOP_LENGTH
MIN_SECONDS = 0.1  # less sound than this is refused
BLOCK_FRAMES = 1 << 16  # samples a channel that are decoded at a time
STFT_BLOCK = 2048  # frames that are transformed at a time: bounds the memory of a long song

# Saved with the features and in every checkpoint; a difference is refused.
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
FOLDERS = {"melspectrogram": "melspectrogram_normalized", "mfcc": "mfcc"}


# ---------------------------------------------------------------- decoding


@dataclass
class Sound:
    """Decoded audio: ``samples`` float32 mono at 22,050 Hz, and what had to be mended to get it."""

    samples: np.ndarray
    rate: int  # Hz, of the file as found
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def decode(path: Path, start: float = 0.0, duration: float | None = None) -> Sound:
    """Decode a sound file to mono (mean of the channels) at 22,050 Hz.

    Parameters
    ----------
    path : file that libsndfile reads: wav, flac, ogg, opus, mp3, au, aiff
    start, duration : seconds; the part of the file to decode (None: to its end)

    Returns
    -------
    Sound. Samples that are not finite become 0 and a file that breaks off is used as far as it goes; both are
    said in ``notes``.

    Raises
    ------
    UserError, in one line, where nothing can be decoded or less than 0.1 s is left.
    """
    import soundfile
    import soxr

    if not path.is_file():
        raise UserError(f"{path}: not a file" if path.exists() else f"{path}: no such file")
    blocks: list[np.ndarray] = []
    notes: list[str] = []
    try:
        with soundfile.SoundFile(path) as stream:
            rate = stream.samplerate
            if start:
                stream.seek(min(round(start * rate), stream.frames))
            wanted = stream.frames - stream.tell()
            if duration is not None:
                wanted = min(wanted, round(duration * rate))
            resample = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32").resample_chunk
            not_numbers = read = 0
            try:
                while read < wanted:
                    block = stream.read(min(BLOCK_FRAMES, wanted - read), dtype="float32", always_2d=True)
                    if not len(block):
                        break
                    read += len(block)
                    mono = block.mean(axis=1)
                    finite = np.isfinite(mono)
                    not_numbers += int((~finite).sum())
                    blocks.append(resample(np.where(finite, mono, np.float32(0))))
            except soundfile.LibsndfileError as error:
                notes.append(f"breaks off after {read / rate:.1f} s ({_reason(error)})")
            blocks.append(resample(np.zeros(0, dtype=np.float32), last=True))
    except (soundfile.LibsndfileError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: can't be decoded ({_reason(error)})") from None
    if read and not_numbers == read:
        raise UserError(f"{path}: holds no numbers, only NaN or infinity")
    if not_numbers:
        notes.append(f"{not_numbers} samples were NaN or infinite and became silence")
    samples = np.concatenate(blocks)
    if len(samples) < MIN_SECONDS * SAMPLE_RATE:
        raise UserError(f"{path}: {len(samples) / SAMPLE_RATE:.3f} s of sound, at least {MIN_SECONDS} s needed")
    return Sound(samples, rate, notes)


def _reason(error: Exception) -> str:
    """libsndfile's reason without the file name that it repeats."""
    return str(getattr(error, "error_string", error)).rstrip(".")


# ---------------------------------------------------------------- features


@functools.cache
def _mel_filters() -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS)


def mel_power(samples: np.ndarray) -> np.ndarray:
    """Mel power spectrogram, float32 (128, frames); frames are centred and one is cut every 512 samples.

    Equal to ``librosa.feature.melspectrogram`` with zero padding, but made block by block.
    """
    import librosa

    padded = np.pad(samples.astype(np.float32, copy=False), N_FFT // 2)
    frames = 1 + len(samples) // HOP_LENGTH
    mel = np.empty((N_MELS, frames), dtype=np.float32)
    for first in range(0, frames, STFT_BLOCK):
        last = min(first + STFT_BLOCK, frames)
        part = padded[first * HOP_LENGTH : (last - 1) * HOP_LENGTH + N_FFT]
        spectrum = librosa.stft(part, n_fft=N_FFT, hop_length=HOP_LENGTH, center=False)
        mel[:, first:last] = _mel_filters() @ (spectrum.real**2 + spectrum.imag**2)
    return mel


def normalised_log_mel(mel: np.ndarray) -> np.ndarray:
    """Log-mel in which level and mastering of the song are gone, float32 (128, frames).

    Decibels down to 80 below the loudest cell; each band less its own mean over the song (cepstral mean
    normalisation: Furui 1981); one scale, the standard deviation over all that remains. Silence gives zeros.
    """
    decibels = 10 * np.log10(np.maximum(mel, np.finfo(np.float32).tiny))
    np.maximum(decibels, decibels.max() - TOP_DB, out=decibels)
    decibels -= decibels.mean(axis=1, keepdims=True, dtype=np.float64)
    return (decibels / max(decibels.std(dtype=np.float64), 1e-3)).astype(np.float32)


def song_features(samples: np.ndarray) -> dict[str, np.ndarray]:
    """The features of one song, as stored, trained on and detected with.

    Parameters
    ----------
    samples : float32 (n,), mono at 22,050 Hz

    Returns
    -------
    ``melspectrogram`` float16 (128, frames) and ``mfcc`` float16 (20, frames), frames = 1 + n // 512. The MFCCs
    are the orthonormal DCT-II of the normalised log-mel, so they carry the same normalisation.
    """
    from scipy.fft import dct

    log_mel = normalised_log_mel(mel_power(samples))
    mfcc = dct(log_mel, type=2, norm="ortho", axis=0)[:N_MFCC]
    return {"melspectrogram": log_mel.astype(np.float16), "mfcc": mfcc.astype(np.float16)}


# ---------------------------------------------------------------- feature files


def feature_path(data: Path, kind: str, track: str) -> Path:
    return data / "processed" / FOLDERS[kind] / f"{track}.npy"


def check_feature_settings(settings: object, where: Path, remedy: str) -> None:
    """Raise UserError unless ``settings``, found in ``where``, are those of this code."""
    if settings != FEATURE_SETTINGS:
        found = settings if isinstance(settings, dict) else {}
        wrong = sorted(key for key in {*found, *FEATURE_SETTINGS} if found.get(key) != FEATURE_SETTINGS.get(key))
        raise UserError(f"{where} was made with other feature settings ({', '.join(wrong)}): {remedy}")


def load_features(catalogue: Catalogue, kind: str, tracks: Iterable[str]) -> list[np.ndarray]:
    """The stored features of tracks, float16 (bins, frames) each. Raises UserError if any is absent or foreign."""
    maker = "extract_features.py"
    index_path = catalogue.data / "processed" / "features.json"
    index = read_json(index_path, maker)
    check_feature_settings(index.get("settings"), index_path, f"run {maker} --force")
    features = []
    for track in tracks:
        if index["songs"].get(track) != catalogue.songs[track].sha256:
            raise UserError(f"no features of {track} as it is now: run {maker} again")
        features.append(read_array(feature_path(catalogue.data, kind, track), maker))
    return features


def _extract(track: str, audio: Path, targets: dict[str, Path]) -> tuple[str, str | None]:
    """Write one song's feature files; the problem if that can't be done."""
    try:
        features = song_features(decode(audio).samples)
    except UserError as error:
        return track, str(error)
    for kind, path in targets.items():
        write_array(path, features[kind])
    return track, None


def _extract_all(catalogue: Catalogue, tracks: list[str], workers: int) -> Iterator[tuple[str, str | None]]:
    """Extract in worker processes; the tracks come back as they are finished, each with its problem if any."""
    from joblib import Parallel, delayed

    from extract_features import _extract  # by its module's name: workers can't import a function of __main__

    def targets(track: str) -> dict[str, Path]:
        return {kind: feature_path(catalogue.data, kind, track) for kind in FOLDERS}

    jobs = (delayed(_extract)(track, catalogue.audio_path(track), targets(track)) for track in tracks)
    return Parallel(n_jobs=workers, return_as="generator_unordered")(jobs)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--force", action="store_true", help="make all features anew, whatever is there")
    args = parser.parse_args(argv)

    catalogue = read_catalogue(args.data)
    index_path = args.data / "processed" / "features.json"
    done: dict[str, str] = {}
    if index_path.exists() and not args.force:
        index = read_json(index_path, "extract_features.py --force")
        check_feature_settings(index.get("settings"), index_path, "run extract_features.py --force to make all anew")
        done = index["songs"]

    usable = [song for song in catalogue.songs.values() if song.verdict == "ok"]
    todo = [
        song.track
        for song in usable
        if done.get(song.track) != song.sha256
        or not all(feature_path(args.data, kind, song.track).exists() for kind in FOLDERS)
    ]

    def save_index() -> None:
        write_json(index_path, {"settings": FEATURE_SETTINGS, "songs": dict(sorted(done.items()))})

    started = saved = time.monotonic()
    failed = 0
    for track, problem in progress(_extract_all(catalogue, todo, args.workers), "features", len(todo)):
        if problem:
            failed += 1
            complain(f"{problem}; skipped")
            continue
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


if __name__ == "__main__":
    sys.exit(main())
