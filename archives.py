"""Take the songs out of a zip or tar archive that nobody vouches for.

Only regular files with a sound suffix are taken, only the name of their folder (the genre) and their own name are
used, and nothing is left behind unless the whole archive could be read.
"""

from __future__ import annotations

import functools
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import IO

from common import UserError, complain, progress
from decoding import AV_SUFFIXES
from files import PART, file_sha256, read_json, write_json

SOUND_SUFFIXES = AV_SUFFIXES | {".wav", ".au", ".mp3", ".mp2", ".ogg", ".oga", ".flac", ".aiff", ".aif", ".opus"}
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MARKER = ".extracted.json"
COPY_BYTES = 1 << 20
UTF8_NAME = 1 << 11  # flag of a zip's member
TAR_NOTES = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
NOTE_BYTES = 1 << 20  # of names and the like; tarfile reads such a note into memory whole


@dataclass(frozen=True)
class Limits:
    """What an archive may hold at most; an archive bomb is larger, GTZAN (2,000 members, 1.4 GB) far smaller."""

    members: int = 50_000
    member_bytes: int = 1 << 30
    total_bytes: int = 1 << 35


@dataclass(frozen=True)
class Member:
    name: str
    size: int  # bytes, as the archive claims
    oddity: str  # why it isn't an ordinary file; "" if it is
    open: Callable[[], IO[bytes]]


class Entry(tarfile.TarInfo):
    """A header of a tar; refused before tarfile acts on it where that would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Entry:
        entry = super().frombuf(buf, encoding, errors)
        if entry.type in TAR_NOTES and entry.size > NOTE_BYTES:
            raise UserError(f"the archive has a header that claims {entry.size} bytes: download it again")
        return entry


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def is_sound_name(path: PurePath) -> bool:
    """Whether a file is named like one with sound; macOS litters archives with ``._<name>`` copies that have none."""
    hidden = path.name.startswith(".") or "__MACOSX" in path.parts
    return path.suffix.lower() in SOUND_SUFFIXES and not hidden


def extract_songs(archive: Path, target: Path, limits: Limits | None) -> None:
    """Put the songs of an archive at ``target/<genre>/<file>``; nothing is done if they are there already.

    Parameters
    ----------
    archive : zip or tar (plain, gzip, bzip2, xz)
    target : folder that is made, whole or not at all
    limits : None for an archive that is trusted whatever its size

    Raises
    ------
    UserError where the archive is damaged, too large, holds no songs, or holds songs that are links, encrypted
    or point outside; and where ``target`` has other contents.
    """
    digest = file_sha256(archive)
    if target.exists():
        if not (target / MARKER).exists():
            remedy = f"use it by --source {target}, or delete it to extract {archive}"
            raise UserError(f"{target} is there already: {remedy}")
        made_of = read_json(target / MARKER, "prepare_gtzan_data.py", "sha256", "songs")
        if made_of["sha256"] != digest:
            raise UserError(f"{target} holds the songs of another archive: delete it, then run this again")
        if (gone := made_of["songs"] - sum(map(is_sound_name, target.glob("*/*")))) > 0:
            complain(f"{target} lacks {gone} songs of {archive}: delete it and run this again to have them back")
        return
    partial = target.with_name(f".{target.name}{PART}")
    shutil.rmtree(partial, ignore_errors=True)
    made = not partial.parent.exists()
    try:
        count = _extract(archive, partial, limits)
        write_json(partial / MARKER, {"archive": archive.name, "sha256": digest, "songs": count})
        partial.rename(target)
    except UserError:
        raise
    except Exception as error:  # readers of broken archives raise what they like
        if isinstance(error, OSError) and error.errno is not None:
            problem = f"can't be extracted to {target} ({error.strerror}): mend that and run this again"
        else:
            problem = f"is damaged ({error}): download it again"
        raise UserError(f"{archive} {problem}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made:
            with suppress(OSError):  # unless the songs are there
                partial.parent.rmdir()


def _extract(archive: Path, target: Path, limits: Limits | None) -> int:
    """Extract into a new folder; the number of songs."""
    genres: dict[str, str] = {}
    taken: set[str] = set()
    unused = 0
    target.mkdir(parents=True)
    total = 0
    for number, member in enumerate(progress(_members(archive), "extracting"), start=1):
        total += member.size
        if limits:
            _check_limits(archive, member, number, total, limits)
        place = place_of(member.name)
        if place is None:
            unused += is_sound_name(PureWindowsPath(member.name))
            continue
        if member.oddity:
            raise UserError(f"{archive}: {member.name!r} is {member.oddity}: not extracted, nothing was written")
        genre, name = place
        # Two names that differ in case or composition are one file on macOS and Windows.
        genre = genres.setdefault(_fold(genre), genre)
        key = _fold(f"{genre}/{name}")
        if key in taken:
            complain(f"{archive}: a second {genre}/{name} ({member.name!r}) is left out")
            continue
        taken.add(key)
        if member.size > shutil.disk_usage(target).free:
            raise UserError(f"no room on the disk of {target.parent} for {member.name!r}: make room and run this again")
        (target / genre).mkdir(exist_ok=True)
        with member.open() as source, (target / genre / name).open("wb") as sink:
            _copy(source, sink, member)
    if unused:
        complain(f"{archive}: sound files in no genre folder are not used, {unused} there")
    if not taken:
        raise UserError(f"{archive} holds no songs: expected <genre>/<song>, {', '.join(sorted(SOUND_SUFFIXES))}")
    return len(taken)


def _is_zip(archive: Path) -> bool:
    """Whether it is a zip: a tar that ends with one looks like one too."""
    with archive.open("rb") as stream:
        return stream.read(4) == b"PK\3\4" or (archive.suffix.lower() == ".zip" and zipfile.is_zipfile(stream))


def _members(archive: Path) -> Iterator[Member]:
    if _is_zip(archive):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir():
                    mode = info.external_attr >> 16
                    odd = "encrypted" if info.flag_bits & 1 else _oddity(mode) if stat.S_IFMT(mode) else ""
                    yield Member(_zip_name(info), info.file_size, odd, functools.partial(bundle.open, info))
        return
    # Not as a "r|*" stream, which takes a cut-off download for a whole one
    with tarfile.open(archive, tarinfo=Entry) as stream:
        for entry in stream:
            if entry.size < 0:  # what stands before it would be read again and again
                raise tarfile.TarError(f"{entry.name!r} claims {entry.size} bytes")
            if not entry.isdir():
                odd = "" if entry.isreg() else "a link" if entry.issym() or entry.islnk() else "not an ordinary file"
                yield Member(entry.name, entry.size, odd, functools.partial(_open, stream, entry))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name; without a declaration it counts as DOS's code page 437, but Info-ZIP's UTF-8 lacks one too."""
    if not info.flag_bits & UTF8_NAME:
        with suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _open(stream: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    content = stream.extractfile(entry)
    if content is None:
        raise tarfile.TarError(f"{entry.name!r} has no content")
    return content


def _oddity(mode: int) -> str:
    return "" if stat.S_ISREG(mode) else "a link" if stat.S_ISLNK(mode) else "not an ordinary file"


def place_of(name: str) -> tuple[str, str] | None:
    """Genre and file name of a song in an archive; None for anything else. Raises UserError if it points outside."""
    path = PureWindowsPath(name)  # knows both separators and drive letters
    if not is_sound_name(path) or len(path.parts) < 2:
        return None
    if path.anchor or ".." in path.parts:
        raise UserError(f"the archive holds {name!r}, which points outside of it: nothing was written")
    return path.parts[-2], path.name


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _check_limits(archive: Path, member: Member, number: int, total: int, limits: Limits) -> None:
    problem = ""
    if number > limits.members:
        problem = f"more than {limits.members} members"
    elif member.size > limits.member_bytes:
        problem = f"{member.name!r} with {member.size / 1e9:.1f} GB"
    elif total > limits.total_bytes:
        problem = f"more than {limits.total_bytes / 1e9:.1f} GB"
    if problem:
        raise UserError(f"{archive} holds {problem}: use --no-archive-limits if you trust it")


def _copy(source: IO[bytes], sink: IO[bytes], member: Member) -> None:
    """Copy exactly as many bytes as were announced, and checked against the limits."""
    left = member.size
    while block := source.read(min(COPY_BYTES, left + 1)):
        left -= len(block)
        if left < 0:
            raise zipfile.BadZipFile(f"{member.name!r} is longer than announced")
        sink.write(block)
    if left:
        raise zipfile.BadZipFile(f"{member.name!r} is shorter than announced")
