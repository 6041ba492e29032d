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

import argparse
import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import (
    IDLE_SECONDS,
    Catalogue,
    UserError,
    argument_parser,
    command,
    complain,
    format_table,
    locked,
    positive_int,
    progress,
    read_array,
    read_catalogue,
    read_json,
    write_array,
    write_json,
)
from mp3_frames import mended
from sound_faults import flaw, no_file

SAMPLE_RATE = 22_050  # Hz
N_FFT = 2048  # samples
HOP_LENGTH = 512  # samples between frames: 43.07 frames a second
N_MELS = 128
N_MFCC = 20
TOP_DB = 80.0  # dB below the song's loudest mel cell where the log-mel is cut off
FRAMES_PER_SECOND = SAMPLE_RATE / HOP_LENGTH
MIN_SECONDS = 0.1  # less sound than this is refused
MAX_SECONDS = 3 * 3600.0  # more is left out: a few kilobytes of flac can claim to be days of silence
MIN_RATE = 1000  # Hz; less can hold no music, and would make an hour of every minute
LOUDEST = 1e12  # times full scale; the squares of more overflow
BLOCK_FRAMES = 1 << 16  # samples a channel that are decoded at a time
READ_FRAMES = 1 << 12  # that are asked for at once: so many are lost where a file breaks off
AV_SUFFIXES = frozenset({".m4a", ".mp4", ".aac", ".wma"})  # what libsndfile doesn't read and PyAV does

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
BINS = {"melspectrogram": N_MELS, "mfcc": N_MFCC}


# ---------------------------------------------------------------- decoding


class SoundReader:
    """Iterate over a sound file as float32 blocks, mono (mean of the channels) at 22,050 Hz, in bounded memory.

    Parameters
    ----------
    path : wav, flac, ogg, opus, mp3, au or aiff, which libsndfile reads; m4a, mp4, aac or wma, for which PyAV must be
        installed (requirements-formats.txt)
    start, duration : seconds; the part of the file to read (None: to its end)

    After iteration ``rate`` is the file's own rate in Hz, ``seconds`` the length read and ``notes`` what had to be
    mended: samples that are not finite become 0; a file that breaks off is used as far as it goes; broken places in mp3
    and ogg are left out; of a file longer than three hours the rest is left out.

    Raises
    ------
    UserError, in one line, where nothing can be decoded, less than 0.1 s was there or the rate is below 1 kHz.
    """

    def __init__(self, path: Path, start: float = 0.0, duration: float | None = None):
        self.path, self.start, self.duration = path, start, duration
        self.rate, self.seconds, self.notes = 0, 0.0, list[str]()

    def __iter__(self) -> Iterator[np.ndarray]:
        if problem := no_file(self.path):
            raise UserError(f"{self.path}: {problem}")
        blocks = self._with_av() if self.path.suffix.lower() in AV_SUFFIXES else self._mono()
        try:
            yield from self._resampled(blocks)
        except UserError:
            raise
        except Exception as error:  # decoders of strangers' files raise what they like
            raise UserError(f"{self.path}: can't be decoded ({_reason(error)})") from None
        if self.seconds < MIN_SECONDS:
            raise UserError(f"{self.path}: {self.seconds:.3f} s of sound, at least {MIN_SECONDS} s needed")

    def _resampled(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        import soxr

        resampler = None
        not_numbers = read = 0
        for mono in blocks:
            if resampler is None:  # the rate is known with the first block
                if self.rate < MIN_RATE:
                    raise UserError(f"{self.path}: {self.rate} samples a second, at least {MIN_RATE} needed")
                resampler = soxr.ResampleStream(self.rate, SAMPLE_RATE, 1, dtype="float32")
            room = round(MAX_SECONDS * self.rate) - read
            finite = np.abs(mono[:room]) < LOUDEST  # and a number
            not_numbers += int((~finite).sum())
            read += len(finite)
            yield resampler.resample_chunk(np.where(finite, mono[:room], np.float32(0)))
            if len(mono) > room:
                self.notes.append(f"longer than {MAX_SECONDS / 3600:g} hours: the rest was left out")
                break
        if resampler is None:
            return
        yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        if read and not_numbers == read:
            raise UserError(f"{self.path}: holds no sound, only NaN, infinity or larger than {LOUDEST:.0e}")
        if not_numbers:
            self.notes.append(f"{not_numbers} samples were NaN, infinite or beyond {LOUDEST:.0e} and became silence")
        self.seconds = read / self.rate

    def _opened(self, stack: contextlib.ExitStack) -> Any:
        """The file in libsndfile's hands; of an mp3 that it can't read to its end, a mended copy."""
        import soundfile

        stream = None
        name = str(self.path) if os.name == "nt" else os.fsencode(self.path)  # which needn't be valid text
        try:
            stream = stack.enter_context(soundfile.SoundFile(name))
        except soundfile.LibsndfileError:
            if self.path.suffix.lower() != ".mp3":
                raise
        if stream is not None and stream.format != "MP3":
            return stream
        copy, problem = mended(self.path, -1 if stream is None else stream.frames)
        if problem:
            self.notes.append(problem)
        if copy is None:
            return stream or soundfile.SoundFile(name)  # which says why it can't be opened
        return stack.enter_context(soundfile.SoundFile(stack.enter_context(copy)))

    def _mono(self) -> Iterator[np.ndarray]:
        """The wanted part of the file at its own rate, as far as libsndfile can read it."""
        import soundfile

        with contextlib.ExitStack() as stack:
            stream = self._opened(stack)
            self.rate = stream.samplerate
            if self.start:
                stream.seek(min(round(self.start * self.rate), stream.frames))
            place = stream.tell()
            stream.seekable = lambda: False  # soundfile seeks after each read, where mpg123 loses the thread
            wanted = stream.frames - place
            if self.duration is not None:
                wanted = min(wanted, round(self.duration * self.rate))
            error, ended = None, False
            while wanted > 0 and not ended:
                pieces: list[np.ndarray] = []
                while wanted > 0 and not ended and len(pieces) < BLOCK_FRAMES // READ_FRAMES:
                    try:
                        piece = stream.read(min(READ_FRAMES, wanted), dtype="float32", always_2d=True)
                    except soundfile.LibsndfileError as caught:
                        piece, error = np.zeros((0, 1), dtype=np.float32), caught
                    ended = not len(piece)
                    wanted -= len(piece)
                    pieces.append(piece.mean(axis=1))
                place += sum(map(len, pieces))
                yield np.concatenate(pieces)
            if error is not None:
                self._breaks_off(place / self.rate, error)
            elif stream.format != "MP3":  # of which ``mended`` has said what there is to say
                self.notes += flaw(stream.extra_info, place / self.rate, wanted / self.rate, place == stream.frames)

    def _with_av(self) -> Iterator[np.ndarray]:
        """The same through PyAV, which decodes what libsndfile doesn't."""
        try:
            import av
        except ImportError:
            raise UserError(
                f"{self.path}: {self.path.suffix} needs PyAV: pip install -r requirements-formats.txt"
            ) from None

        read = 0
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.audio:
                    raise UserError(f"{self.path}: can't be decoded (there is no sound in it)")
                stream = container.streams.audio[0]
                self.rate = stream.rate
                # Seeking is inexact in these formats: what comes before the start is decoded and dropped
                skip = round(self.start * self.rate)
                wanted = None if self.duration is None else round(self.duration * self.rate)
                pending: list[np.ndarray] = []
                resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=self.rate)
                frames = itertools.chain(container.decode(stream), [None])  # None flushes the resampler
                for piece in itertools.chain.from_iterable(map(resampler.resample, frames)):
                    mono = piece.to_ndarray().mean(axis=0, dtype=np.float32)[skip:]
                    skip -= min(skip, piece.samples)
                    mono = mono if wanted is None else mono[: wanted - read]
                    read += len(mono)
                    pending.append(mono)
                    if sum(map(len, pending)) >= BLOCK_FRAMES:
                        yield np.concatenate(pending)
                        pending.clear()
                    if read == wanted:
                        break
        except (av.FFmpegError, OSError, ValueError) as error:
            if not read:
                raise ValueError(_reason(error)) from None
            self._breaks_off(read / self.rate, error)
        if read:
            yield np.concatenate(pending) if pending else np.zeros(0, dtype=np.float32)

    def _breaks_off(self, seconds: float, error: Exception) -> None:
        self.notes.append(f"breaks off after {seconds:.1f} s ({_reason(error)})")


@dataclass(frozen=True)
class Sound:
    """A whole decoded file: ``samples`` float32 mono at 22,050 Hz, its own rate in Hz, what had to be mended."""

    samples: np.ndarray
    rate: int
    notes: list[str]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def decode(path: Path, start: float = 0.0, duration: float | None = None) -> Sound:
    """Read a sound file, or a part of it, into memory; parameters and errors are those of ``SoundReader``."""
    reader = SoundReader(path, start, duration)
    samples = np.concatenate(list(reader))
    return Sound(samples, reader.rate, reader.notes)


def _reason(error: Exception) -> str:
    """The decoder's reason without the file name that it repeats."""
    reason = getattr(error, "error_string", None)  # libsndfile's, without the name; empty where it has no words
    if reason is None:
        reason = str(getattr(error, "strerror", None) or error)
    # What libsndfile says of text named mp3, a file that is there
    return "Format not recognised" if "possibly a pipe" in reason else reason.rstrip(".") or "its header makes no sense"


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
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32)
    margin = np.zeros(N_FFT // 2, dtype=np.float32)
    pending, frames = margin, 0
    mels = np.empty((BLOCK_FRAMES // HOP_LENGTH, N_MELS), dtype=np.float32)
    for block in itertools.chain(blocks, [margin]):
        pending = np.concatenate([pending, block])
        if len(pending) >= N_FFT:
            cuts = np.lib.stride_tricks.sliding_window_view(pending, N_FFT)[::HOP_LENGTH]
            spectrum = np.fft.rfft(cuts * hann)  # scipy's is faster, but takes longer to import than a song takes
            if frames + len(cuts) > len(mels):  # grows in place: a long song is in memory once
                mels.resize((frames + max(len(cuts), BLOCK_FRAMES // 8), N_MELS), refcheck=False)
            power = spectrum.real**2 + spectrum.imag**2
            for band, (first, weights) in enumerate(_mel_bands()):
                mels[frames : frames + len(cuts), band] = power[:, first : first + len(weights)] @ weights
            frames += len(cuts)
            pending = pending[len(cuts) * HOP_LENGTH :]
    return mels[:frames].T


def normalised_log_mel(mel: np.ndarray) -> np.ndarray:
    """Log-mel in which level and mastering of the song are gone, float32 (128, frames); works in place.

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
    ``melspectrogram`` float16 (128, frames) and ``mfcc`` float16 (20, frames), frames = 1 + samples // 512. The
    MFCCs are the orthonormal DCT-II of the normalised log-mel, so they carry the same normalisation.
    """
    log_mel = normalised_log_mel(mel_power(blocks))
    mfcc = np.empty((N_MFCC, log_mel.shape[1]), dtype=np.float16)
    for first in range(0, log_mel.shape[1], BLOCK_FRAMES):  # one product but for a long song
        mfcc[:, first : first + BLOCK_FRAMES] = dct_basis() @ log_mel[:, first : first + BLOCK_FRAMES]
    return {"melspectrogram": log_mel.astype(np.float16, order="C"), "mfcc": mfcc}


def dct_basis(n_mfcc: int = N_MFCC, n_mels: int = N_MELS) -> np.ndarray:
    """Orthonormal DCT-II, float32 (n_mfcc, n_mels): log-mel -> MFCC; its transpose leads back."""
    order, band = np.arange(n_mfcc)[:, None], np.arange(n_mels)
    basis = np.cos(np.pi / n_mels * (band + 0.5) * order) * np.sqrt(2 / n_mels)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


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
    done = read_index(catalogue.data / "processed" / "features.json")
    features = []
    for track in tracks:
        if done.get(track) != catalogue.songs[track].sha256:
            raise UserError(f"no features of {track} as it is now: run {maker} again")
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
    index = read_json(path, "extract_features.py --force")
    settings, songs = (index.get(key) for key in ("settings", "songs")) if isinstance(index, dict) else (None, None)
    check_feature_settings(settings, path, "run extract_features.py --force to make all anew")
    if not isinstance(songs, dict):
        raise UserError(f"{path} lists no songs: run extract_features.py --force to make all anew")
    return songs


def _extract(track: str, audio: Path, targets: dict[str, Path]) -> tuple[str, str | None]:
    """Write one song's feature files; the problem if that can't be done."""
    try:
        features = song_features(SoundReader(audio))
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
    return Parallel(n_jobs=workers, return_as="generator_unordered", idle_worker_timeout=IDLE_SECONDS)(jobs)


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
