"""Put genres into the tags of sound files, with mutagen: requirements-formats.txt."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import UserError
from files import PART, hidden

ID3V1 = 128  # bytes at the end of an mp3


def check_installed() -> None:
    """Raise UserError if mutagen isn't there."""
    try:
        import mutagen  # noqa: F401
    except ImportError:
        raise UserError("--write-tags needs mutagen: pip install -r requirements-formats.txt") from None


def plain(genre: str) -> str:
    """A genre's name without case, spaces and signs: "Hip-Hop" is "hiphop"."""
    return "".join(filter(str.isalnum, genre)).lower()


def read_genre(path: Path) -> list[str]:
    """The genres in a file's tags, often none. Raises UserError if it has no tags that mutagen knows."""
    return _genres(*_open(path))


def write_genre(path: Path, genre: str) -> None:
    """Make ``genre`` the only genre in a file's tags; the rest of the file, its sound too, stays as it is.

    Tags of ID3v2.3 stay that: in 2.4, which mutagen prefers, some of their frames have no place. ID3v2.2 becomes 2.3.
    A copy is changed, read again, and only then put in the file's place, if all other tags are in it as they were.

    Raises
    ------
    UserError where that fails; the file is then as it was.
    """
    target = path.resolve()  # behind a link it is the file that changes, not the link
    copy = None
    try:
        suffix = f"{PART}{path.suffix}"
        descriptor, name = tempfile.mkstemp(prefix=hidden(path.stem), suffix=suffix, dir=target.parent)
        os.close(descriptor)
        copy = Path(name)
        shutil.copy2(path, copy)
        audio, key = _open(copy)
        length, others = audio.info.length, _others(audio, key)
        if key == "TCON":
            from mutagen.id3 import TCON, ID3FileType

            audio.tags.add(TCON(encoding=3, text=[genre]))
            last = _last_bytes(copy) if isinstance(audio, ID3FileType) else b""
            audio.save(v2_version=3 if (2, 2) <= audio.tags.version[:2] < (2, 4) else 4, v23_sep=None)
            if last.startswith(b"TAG"):  # ID3v1, which mutagen would write anew from the other frames
                with copy.open("r+b") as stream:
                    stream.seek(-ID3V1, os.SEEK_END)
                    stream.write(last[:-1] + bytes([_number(genre)]))
        else:
            audio.tags[key] = [genre]
            audio.save()
        written = _open(copy)[0]
        if _genres(written, key) != [genre] or abs(written.info.length - length) > 0.1:
            raise UserError(f"{path}: its tags can't be written; the file is as it was")
        if _others(written, key) != others:
            raise UserError(f"{path}: its tags can't be written without a change to others; the file is as it was")
        if hasattr(os, "chown"):
            owner = target.stat()
            for user, group in ((-1, owner.st_gid), (owner.st_uid, -1)):
                with suppress(OSError):  # a user can't give files away, to a group of theirs at most
                    os.chown(copy, user, group)
        os.replace(copy, target)
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: its tags can't be written ({reason}); the file is as it was") from None
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)


def _open(path: Path) -> tuple[Any, str]:
    """A file's tags as mutagen has them, and the key of the genre there."""
    import mutagen
    from mutagen.asf import ASF
    from mutagen.id3 import ID3
    from mutagen.mp4 import MP4

    try:
        audio = mutagen.File(path)
        if audio is not None and isinstance(audio.tags, ID3) and audio.tags.version >= (2,):
            # Its own frames as they are: not as 2.4 has them, nor with those of ID3v1 among them
            audio = type(audio)(path, translate=False, load_v1=False)
            for picture in audio.tags.getall("APIC"):  # of 2.2, where types are three letters
                picture.mime = {"JPG": "image/jpeg", "PNG": "image/png"}.get(picture.mime, picture.mime)
    except Exception as error:  # MutagenError and, of damaged files, whatever else goes wrong
        raise UserError(f"{path}: its tags can't be read ({error or type(error).__name__})") from None
    try:
        if audio.tags is None:
            audio.add_tags()  # in memory
    except Exception:  # there is no file type, or one without tags
        raise UserError(f"{path}: its format carries no tags that mutagen knows") from None
    if isinstance(audio.tags, ID3):
        return audio, "TCON"
    return audio, "\xa9gen" if isinstance(audio, MP4) else "WM/Genre" if isinstance(audio, ASF) else "genre"


def _genres(audio: Any, key: str) -> list[str]:
    value = audio.tags.get(key, [])
    return [str(genre) for genre in getattr(value, "genres", value)]


def _others(audio: Any, key: str) -> dict[str, str]:
    """A file's tags but for the genre, those that mutagen doesn't understand too."""
    known = {name: repr(value) for name, value in dict(audio.tags).items() if name.lower() != key.lower()}
    return known | {"unknown": repr(sorted(getattr(audio.tags, "unknown_frames", [])))}


def _last_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(-min(ID3V1, path.stat().st_size), os.SEEK_END)
        return stream.read()


def _number(genre: str) -> int:
    """Of a genre in ID3v1, however its name is written there; 255 if it is none of those."""
    from mutagen.id3 import TCON

    genre, *known = map(plain, (genre, *TCON.GENRES))
    return known.index(genre) if genre in known else 255
