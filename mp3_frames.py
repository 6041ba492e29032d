"""Tell the frames of an mp3 file from whatever else is in it.

libsndfile guesses the length of an mp3 without a Xing header from its first frame, and gives up at a kilobyte that is
no frame. Both are mended here by a copy that holds a Xing header and frames, and nothing else.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # layer III of MPEG 1, 2 and 2.5
ROW = 3  # frames in a row: fewer may be chance
WINDOW = 1 << 16  # bytes searched at a time
CHANCES = 300_000  # marks that may turn out to be none, in a file: gigabytes of chance have fewer
ALIKE = 0xFFFE0C00  # of a header: what all frames of a file have in common (version, layer, rate)
KBITS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1; MPEG 2 has half, MPEG 2.5 a quarter
FINE = 3  # frames by which encoder delay and padding change a length


@dataclass
class Mp3:
    """What is in a file: ISO/IEC 11172-3 and 13818-3, layer III; the Xing header as LAME writes it."""

    header: int = 0  # of the first frame
    runs: list[tuple[int, int]] = field(default_factory=list)  # first byte and end of frames that follow each other
    frames: int = 0  # in the runs
    announced: int | None = None  # frames, by the Xing header
    cut: bool = False  # the file ends within a frame
    joined: bool = False  # frames of another version, rate or number of channels follow

    @property
    def samples(self) -> int:
        """Of all frames, a channel."""
        return self.frames * self.frame_samples

    @property
    def frame_samples(self) -> int:
        return 1152 if is_mpeg1(self.header) else 576


def is_mpeg1(header: int) -> bool:
    return (header >> 19) & 3 == 3


def hertz(header: int) -> int:
    """The sampling rate."""
    return RATES[(header >> 10) & 3] >> {3: 0, 2: 1, 0: 2}[(header >> 19) & 3]


def frame_length(header: int) -> int:
    """Bytes of the frame that begins with a header (its first 4 bytes, big-endian); 0 if it is no header of one."""
    version, rate, kbits = (header >> 19) & 3, (header >> 10) & 3, (header >> 12) & 15
    if header >> 21 != 0x7FF or (header >> 17) & 3 != 1 or version == 1 or rate == 3 or kbits in (0, 15):
        return 0
    mpeg1 = is_mpeg1(header)
    return (144 if mpeg1 else 72) * KBITS[mpeg1][kbits] * 1000 // hertz(header) + ((header >> 9) & 1)


def is_mono(header: int) -> bool:
    return (header >> 6) & 3 == 3


def survey(path: Path) -> Mp3:
    """Find the frames of a file in one pass, in bounded memory; ``frames`` is 0 where it is no mp3."""
    found = Mp3()
    size, chances = os.path.getsize(path), iter(range(CHANCES))
    with path.open("rb") as stream:
        place = _after_tags(stream)
        while (place := _next_run(stream, place, found.header, chances)) < size:
            start = place
            found.header = found.header or _header(stream, place)
            while length := _like(found.header, _header(stream, place)):
                if place + length > size:
                    found.cut = True
                    break
                place += length
                found.frames += 1
            if not found.runs:
                found.announced, length = _xing(stream, start)
                found.frames -= bool(length)
                start += length
            found.runs.append((start, place))
            if found.cut:
                break
        if found.runs and not found.cut:
            found.joined = _next_run(stream, found.runs[-1][1], 0, chances) < size
    return found


def mended(path: Path, frames: int) -> tuple[IO[bytes] | None, str]:
    """A copy of an mp3 that libsndfile reads to its end, if it needs one, and what was wrong with the original.

    Parameters
    ----------
    frames : samples a channel that libsndfile expects; -1 where it can't open the file

    Returns
    -------
    The copy, a temporary file (None: the original is good enough), and a sentence for the user ("": nothing to say).
    """
    found = survey(path)
    if not found.frames:
        return None, ""
    rate = hertz(found.header)
    seconds = found.samples / rate
    problem = ""
    if len(found.runs) > 1:
        gaps = len(found.runs) - 1
        problem = "a broken place was left out" if gaps == 1 else f"{gaps} broken places were left out"
    elif found.announced is not None and found.announced - found.frames > FINE:
        whole = found.announced * found.frame_samples / rate
        problem = f"breaks off after {seconds:.1f} s of {whole:.1f} s"
    elif found.cut:
        problem = f"breaks off after {seconds:.1f} s, within a frame"
    elif found.joined:
        problem = f"breaks off after {seconds:.1f} s, where sound of another kind follows"
    if len(found.runs) == 1 and frames >= found.samples - FINE * found.frame_samples:
        return None, problem
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (whoever reads it closes it)
    copy.write(_xing_frame(found))
    with path.open("rb") as stream:
        for start, end in found.runs:
            stream.seek(start)
            while start < end and (block := stream.read(min(1 << 20, end - start))):
                copy.write(block)
                start += len(block)
    copy.seek(0)
    return copy, problem


def _header(stream: IO[bytes], place: int) -> int:
    stream.seek(place)
    content = stream.read(4)
    return int.from_bytes(content, "big") if len(content) == 4 else 0


def _like(first: int, header: int) -> int:
    """The length of a frame like the first one; 0 if it isn't. What is heard ends where mono becomes stereo."""
    alike = (header ^ first) & ALIKE == 0 and is_mono(header) == is_mono(first)
    return frame_length(header) if alike else 0


def _after_tags(stream: IO[bytes]) -> int:
    """Where the ID3v2 tags at the start end, as far as they tell the truth."""
    place = 0
    while True:
        stream.seek(place)
        head = stream.read(10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 127:
            return place
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        end = place + 10 + length + (10 if head[5] & 16 else 0)
        stream.seek(end)
        if not stream.read(1):  # a tag longer than the file
            return place + 10
        place = end


def _next_run(stream: IO[bytes], place: int, first: int, chances: Iterator[int]) -> int:
    """Where the next row of frames starts, like ``first`` if that isn't 0; far behind the end if there is none.

    A mark that begins no row takes one of the ``chances``; without any left, there is none either.
    """
    while True:
        stream.seek(place)
        window = stream.read(WINDOW)
        for match in SYNC.finditer(window):
            at = place + match.start()
            like = first or _header(stream, at)
            for _ in range(ROW):
                length = _like(like, _header(stream, at))
                if not length:
                    break
                at += length
            else:
                return place + match.start()
            if next(chances, None) is None:
                return 1 << 62
        if len(window) < WINDOW:
            return 1 << 62
        place += WINDOW - 1  # a mark may lie across the border


def _xing(stream: IO[bytes], place: int) -> tuple[int | None, int]:
    """Frames that a Xing header announces (None if it doesn't say), and its frame's length; 0 if there is none."""
    header = _header(stream, place)
    stream.seek(place + 4 + _side_bytes(header))
    content = stream.read(12)
    if len(content) < 12 or content[:4] not in (b"Xing", b"Info"):
        return None, 0
    counted = content[7] & 1
    return int.from_bytes(content[8:], "big") if counted else None, frame_length(header)


def _side_bytes(header: int) -> int:
    """Bytes of side information behind a frame's header."""
    mono = is_mono(header)
    return (17 if mono else 32) if is_mpeg1(header) else (9 if mono else 17)


def _xing_frame(found: Mp3) -> bytes:
    """A frame that holds nothing but the number of frames behind it."""
    header = (found.header | 1 << 16) & ~0xF200 | 9 << 12  # no checksum, no padding, room enough
    content = bytes(_side_bytes(header)) + b"Xing" + (1).to_bytes(4, "big") + found.frames.to_bytes(4, "big")
    return header.to_bytes(4, "big") + content.ljust(frame_length(header) - 4, b"\0")
