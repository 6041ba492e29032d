"""Read sound files of any kind as mono at 22,050 Hz: the one way from a file to samples."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError
from mp3_frames import mended
from sound_faults import flaw, has_several_streams, is_for_av, is_unfinished, no_file

SAMPLE_RATE = 22_050  # Hz
MIN_SECONDS = 0.1  # less sound than this is refused
MAX_SECONDS = 3 * 3600.0  # more is left out: a few kilobytes of flac can claim to be days of silence
MIN_RATE = 1000  # Hz; less can hold no music, and would make an hour of every minute
LOUDEST = 1e12  # times full scale; the squares of more overflow
BLOCK_FRAMES = 1 << 16  # samples a channel that are decoded at a time
READ_FRAMES = 1 << 12  # that are asked for at once: so many are lost where a file breaks off
LEAST_GAP = 0.1  # seconds; shorter jumps of frames' times are rounding
AV_SUFFIXES = frozenset({".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm"})  # what libsndfile doesn't read and PyAV does


class SoundReader:
    """Iterate over a sound file as float32 blocks, mono (mean of the channels) at 22,050 Hz, in bounded memory.

    Parameters
    ----------
    path : wav, flac, ogg, opus, mp3, au or aiff, which libsndfile reads; m4a, mp4, aac, wma or webm, by its name or its
        first bytes, for which PyAV must be installed (requirements-formats.txt)
    start, duration : seconds; the part of the file to read (None: to its end)

    After iteration ``rate`` is the file's own rate in Hz, ``seconds`` the length read and ``notes`` what had to be
    mended: samples that are not finite become 0; a file that breaks off is used as far as it goes; broken places in
    mp3, ogg and what PyAV reads are left out; of a file longer than three hours the rest is left out; of an Ogg file
    further streams are heard with PyAV, if they are like the first in rate, channels and codec.

    Raises
    ------
    UserError, in one line, where nothing can be decoded, less than 0.1 s was there or the rate is below 1 kHz.
    """

    def __init__(self, path: Path, start: float = 0.0, duration: float | None = None):
        self.path, self.start, self.duration = path, start, duration
        self.rate, self.seconds, self.notes = 0, 0.0, list[str]()

    def __iter__(self) -> Iterator[np.ndarray]:
        for name, value in (("start", self.start), ("duration", self.duration)):
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{self.path}: a {name} of {value} s can't be: give a number from 0 on")
        if problem := no_file(self.path):
            raise UserError(f"{self.path}: {problem}")
        several = has_several_streams(self.path)  # of which libsndfile reads the first
        known = self.path.suffix.lower() in AV_SUFFIXES or is_for_av(self.path)
        with_av = known or (several and importlib.util.find_spec("av"))
        if several:
            rest = "whose damage can't be told" if with_av else "the others need requirements-formats.txt"
            self.notes.append(f"several streams one after the other, {rest}")
        try:
            blocks = self._with_av(several) if with_av else self._mono()
            yield from self._resampled(blocks)
        except UserError:
            raise
        except Exception as error:  # decoders of strangers' files raise what they like
            raise UserError(f"{self.path}: can't be decoded ({_reason(error)})") from None
        if self.seconds < MIN_SECONDS:
            since = f" from {self.start:g} s on" if self.start else ""
            raise UserError(f"{self.path}: {self.seconds:.3f} s of sound{since}, at least {MIN_SECONDS} s needed")

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
            if not stream.frames and is_unfinished(self.path):
                if importlib.util.find_spec("av") is None:
                    extra = "what may follow needs requirements-formats.txt"
                    raise UserError(f"{self.path}: by its header there is no sound in it; {extra}")
                self.notes.append("by its header there is no sound in it: read to the end of the file")
                try:
                    yield from self._with_av(several=False)
                except ValueError as why:
                    raise UserError(f"{self.path}: by its header there is no sound in it ({why})") from None
                return
            place = stream.seek(min(round(self.start * self.rate), stream.frames)) if self.start else 0
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
            elif stream.format == "MP3":  # of which ``mended`` has said what there is to say
                if not wanted and place < stream.frames:  # a part before the end
                    self.notes = [note for note in self.notes if not note.startswith("breaks off")]
            else:
                self.notes += flaw(stream.extra_info, place / self.rate, wanted / self.rate, place == stream.frames)

    def _with_av(self, several: bool) -> Iterator[np.ndarray]:
        """The same through PyAV, which decodes what libsndfile doesn't."""
        try:
            import av
        except ImportError:
            kind = (
                self.path.suffix
                if self.path.suffix.lower() in AV_SUFFIXES
                else "MP4, wma, webm or AAC, which it holds,"
            )
            raise UserError(f"{self.path}: {kind} needs PyAV: pip install -r requirements-formats.txt") from None

        read, end, jumps = 0, None, 0.0
        try:
            with av.open(f"file:{self.path}", "r") as container:  # a name with a colon is no address
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
                    ahead = 0.0 if end is None or piece.time is None else piece.time - end
                    jumps += ahead if ahead > LEAST_GAP and not skip else 0.0
                    end = None if piece.time is None else piece.time + piece.samples / self.rate
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
            self._breaks_off(self.start + read / self.rate, error)
        if jumps and not several:  # each of which has times of its own
            self.notes.append(f"its times jump by {jumps:.1f} s: sound may be missing")
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
