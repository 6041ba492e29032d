"""What is wrong with a sound file, before and after libsndfile has read it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_SHORTER = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)$", re.MULTILINE)
MOST_PAGES = 500_000  # of an Ogg file that are looked at: far more than three hours have, and soon done
NOTEWORTHY = 0.1  # seconds; a smaller lack is a matter of rounding
_ENDLESS = 1e9  # seconds, promised where libsndfile can't tell the length, as of several streams
_ASF, _MATROSKA = bytes.fromhex("3026b2758e66cf11"), bytes.fromhex("1a45dfa3")
_STREAMED = 0x7FFFF000  # bytes, announced by programs that write to a pipe and don't know the length


def flaw(log: str, place: float, missing: float, to_end: bool) -> list[str]:
    """What is wrong with a file by libsndfile's log of it: no sentence or one.

    Parameters
    ----------
    place : seconds into the file where reading ended
    missing : seconds that libsndfile promised and didn't give
    to_end : nothing should follow
    """
    if "Corrupted bitstream" in log or "reports a hole" in log:
        return ["damaged places were left out"]
    if NOTEWORTHY <= missing < _ENDLESS:
        return [f"breaks off after {place:.1f} s of {place + missing:.1f} s"]
    if to_end and "lacks an end-of-stream bit" in log:
        return [f"breaks off after {place:.1f} s (the end of its stream is missing)"]
    for announced, there in _SHORTER.findall(log):
        whole = place * int(announced) / max(1, int(there))
        if to_end and int(announced) < _STREAMED and whole - place >= NOTEWORTHY:
            return [f"breaks off after {place:.1f} s of the {whole:.1f} s that its header announces"]
    return []


def has_several_streams(path: Path) -> bool:
    """Whether an Ogg file goes on after its sound has ended, with another beginning (RFC 3533): recordings of radio.

    The beginnings of all streams that play at once come before anything else.
    """
    began = False
    with path.open("rb") as file:
        for _ in range(MOST_PAGES):
            header = file.read(27)
            if not header.startswith(b"OggS"):  # what lies between two pages
                at = (header + (rest := file.read(1 << 16))).find(b"OggS", 1)
                if at < 0:
                    break
                file.seek(at - len(header) - len(rest), os.SEEK_CUR)
                continue
            if len(header) < 27:
                break
            begins = bool(header[5] & 2)
            if begins and began:
                return True
            began = not begins
            file.seek(sum(file.read(header[26])), os.SEEK_CUR)
    return False


def is_for_av(path: Path) -> bool:
    """Whether a file begins as MP4, wma (ASF), webm (Matroska) or bare AAC do: downloads often have other names."""
    with path.open("rb") as file:
        head = file.read(1 << 13)
    frame = _aac_frame(head)
    bare_aac = frame > 0 and _aac_frame(head[frame:]) > 0
    return head[4:8] == b"ftyp" or head.startswith((_ASF, _MATROSKA)) or bare_aac


def _aac_frame(head: bytes) -> int:
    """The length in bytes of the frame of AAC (ADTS, ISO/IEC 13818-7) that begins here; 0 if none does."""
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return 0
    return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5


def is_unfinished(path: Path) -> bool:
    """Whether a wav's header announces no sound and some follows, as where a recorder was killed: no further chunks."""
    end = path.stat().st_size
    with path.open("rb") as file:
        riff = file.read(12)
        if (riff[:4], riff[8:]) != (b"RIFF", b"WAVE"):
            return False
        after = 0  # the end of the empty chunk of sound
        while len(header := file.read(8)) == 8 and min(header[:4]) >= ord(" "):  # a chunk's name; sound seldom looks so
            length = int.from_bytes(header[4:], "little")
            if header[:4] == b"data" and length == 0:
                after = file.tell()
            file.seek(length + length % 2, os.SEEK_CUR)
        return 0 < after < end and file.tell() not in (end, end + 1)  # chunks would fill the file


def no_file(path: Path) -> str:
    """Why nothing can be read from a path, which may be a pipe that nobody writes to; "" if it is a file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a file"
        with path.open("rb"):  # decoders don't say why they can't
            return ""
    except FileNotFoundError:
        return "no such file"
    except ValueError:  # NUL
        return "no name of a file; a list has one name a line"
    except OSError as error:
        return error.strerror or str(error)
