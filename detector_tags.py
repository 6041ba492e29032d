"""Put genres into the tags of sound files, with mutagen: requirements-formats.txt."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import UserError
from files import PART


def check_installed() -> None:
    """Raise UserError if mutagen isn't there."""
    try:
        import mutagen  # noqa: F401
    except ImportError:
        raise UserError("--write-tags needs mutagen: pip install -r requirements-formats.txt") from None


def read_genre(path: Path) -> list[str]:
    """The genres in a file's tags, often none. Raises UserError if it has no tags that mutagen knows."""
    audio, key = _open(path)
    value = (audio.tags or {}).get(key)
    return [] if value is None else [str(genre) for genre in getattr(value, "text", value)]


def write_genre(path: Path, genre: str) -> None:
    """Make ``genre`` the only genre in a file's tags; the rest of the file, its sound too, stays as it is.

    A copy is changed, read again, and only then put in the file's place.

    Raises
    ------
    UserError where that fails; the file is then as it was.
    """
    target = path.resolve()  # behind a link it is the file that changes, not the link
    copy = None
    try:
        prefix, suffix = f".{path.stem[:80]}.", f"{PART}{path.suffix}"
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
        os.close(descriptor)
        copy = Path(name)
        shutil.copy2(path, copy)
        audio, key = _open(copy)
        length = audio.info.length
        if audio.tags is None:
            audio.add_tags()
        if key == "TCON":
            from mutagen.id3 import TCON

            audio.tags.add(TCON(encoding=3, text=[genre]))
        else:
            audio.tags[key] = [genre]
        audio.save()
        if read_genre(copy) != [genre] or abs(_open(copy)[0].info.length - length) > 0.1:
            raise UserError(f"{path}: its tags can't be written; the file is as it was")
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
    from mutagen.aiff import AIFF
    from mutagen.asf import ASF
    from mutagen.wave import WAVE

    try:
        audio = mutagen.File(path, easy=True)
    except Exception as error:  # MutagenError and, of damaged files, whatever else goes wrong
        raise UserError(f"{path}: its tags can't be read ({error or type(error).__name__})") from None
    if audio is None:
        raise UserError(f"{path}: its format carries no tags that mutagen knows")
    return audio, "TCON" if isinstance(audio, WAVE | AIFF) else "WM/Genre" if isinstance(audio, ASF) else "genre"
