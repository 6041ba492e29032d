"""Archives that nobody vouches for: the songs come out, and nothing else happens."""

from __future__ import annotations

import functools
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare_gtzan_data
from archives import Limits, extract_songs, place_of
from common import UserError

GENEROUS = Limits()


def make_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return path


def make_tar(path: Path, members: Mapping[str, bytes], *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
        for info in odd:
            bundle.addfile(info)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_zip_songs_only(tmp_path: Path) -> None:
    archive = make_zip(
        tmp_path / "a.zip",
        {
            "Data/features_30_sec.csv": b"x",
            "Data/images_original/blues/blues00000.png": b"x",
            "Data/genres_original/blues/blues.00000.wav": b"one",
            "__MACOSX/Data/genres_original/blues/._blues.00000.wav": b"x",
            "Data\\genres_original\\rock\\rock.00001.wav": b"two",
        },
    )
    extract_songs(archive, tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {"blues/blues.00000.wav": b"one", "rock/rock.00001.wav": b"two"}


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", ""])
def test_tar_of_any_compression(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"genres.tar.{suffix}".rstrip(".")
    with tarfile.open(archive, f"w:{suffix}") as bundle:
        info = tarfile.TarInfo("genres/blues/blues.00000.au")
        info.size = 3
        bundle.addfile(info, io.BytesIO(b"one"))
    extract_songs(archive, tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {"blues/blues.00000.au": b"one"}


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as bundle:
        bundle.writestr("notes.txt", "none")
    archive = tmp_path / "genres.tar"
    with tarfile.open(archive, "w") as bundle:
        for name, content in (("genres/blues/blues.00000.au", b"one"), ("genres/notes.zip", inner.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    assert zipfile.is_zipfile(archive)
    extract_songs(archive, tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {"blues/blues.00000.au": b"one"}


def test_sound_that_is_passed_over_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("blues/a.oga", "loose.ogg", "blues/b.wma", "blues/cover.jpg", "blues/._a.mp4", "__MACOSX/blues/a.m4b")
    extract_songs(make_zip(tmp_path / "a.zip", dict.fromkeys(names, b"one")), tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {"blues/a.oga": b"one", "blues/b.wma": b"one"}
    assert capsys.readouterr().err.endswith("sound files in no genre folder are not used, 1 there\n")


@pytest.mark.parametrize(("stored", "genre"), [("Räp".encode(), "Räp"), ("Räp".encode("cp437"), "Räp")])
def test_names_of_a_zip_that_declares_no_encoding(tmp_path: Path, stored: bytes, genre: str) -> None:
    archive = make_zip(tmp_path / "a.zip", {f"{'x' * len(stored)}/a.wav": b"one"})
    content = archive.read_bytes()
    assert content.count(b"x" * len(stored) + b"/a.wav") == 2  # before the song and in the directory
    archive.write_bytes(content.replace(b"x" * len(stored), stored))
    extract_songs(archive, tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {f"{genre}/a.wav": b"one"}


def test_second_run_changes_nothing_and_other_archive_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "genres"
    archive = make_zip(tmp_path / "a.zip", {"blues/a.wav": b"one"})
    extract_songs(archive, target, GENEROUS)
    (target / "blues" / "mine.wav").write_bytes(b"added by the user")
    extract_songs(archive, target, GENEROUS)
    assert set(contents(target)) == {"blues/a.wav", "blues/mine.wav"}
    assert capsys.readouterr().err == ""
    (target / "blues" / "mine.wav").unlink()
    (target / "blues" / "a.wav").unlink()
    extract_songs(archive, target, GENEROUS)
    assert f"{target} lacks 1 songs of {archive}" in capsys.readouterr().err
    with pytest.raises(UserError, match="another archive"):
        extract_songs(make_zip(tmp_path / "b.zip", {"blues/a.wav": b"two"}), target, GENEROUS)


def test_folder_of_the_user_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "genres").mkdir()
    with pytest.raises(UserError, match="there already"):
        extract_songs(make_zip(tmp_path / "a.zip", {"blues/a.wav": b"one"}), tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {}


def test_names_that_collide_without_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"blues/a.wav": b"first", "x/Blues/A.WAV": b"second", "Blues/b.wav": b"third", "jazz/a.wav": b"fourth"}
    extract_songs(make_zip(tmp_path / "a.zip", members), tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {"blues/a.wav": b"first", "blues/b.wav": b"third", "jazz/a.wav": b"fourth"}
    assert "'x/Blues/A.WAV'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_one_name_the_first_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    archive, songs = tmp_path / f"a{suffix}", [b"first", b"second"]
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as bundle:
            for content in songs:
                bundle.writestr("blues/a.wav", content)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for content in songs:
                info = tarfile.TarInfo("blues/a.wav")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    extract_songs(archive, tmp_path / "genres", GENEROUS)
    assert contents(tmp_path / "genres") == {"blues/a.wav": b"first"}
    assert "a second blues/a.wav" in capsys.readouterr().err


def assert_refused(archive: Path, match: str, limits: Limits = GENEROUS) -> None:
    folder = archive.parent
    before = set(folder.parent.rglob("*"))
    with pytest.raises(UserError, match=match):
        extract_songs(archive, folder / "genres", limits)
    assert set(folder.parent.rglob("*")) == before, "a refused archive leaves nothing behind"


@pytest.mark.parametrize("name", ["../../blues/evil.wav", "/blues/evil.wav", "C:\\blues\\evil.wav", "a/../b/evil.wav"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_outside_names_are_refused(tmp_path: Path, name: str, make: type) -> None:
    suffix = ".zip" if make is make_zip else ".tar.gz"
    assert_refused(make(tmp_path / f"a{suffix}", {"blues/good.wav": b"1", name: b"2"}), "points outside")


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o060666, 0o010666], ids=["link", "character", "block", "pipe"])
def test_zip_links_and_devices_are_refused(tmp_path: Path, mode: int) -> None:
    odd = zipfile.ZipInfo("blues/evil.wav")
    odd.external_attr = mode << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(odd, "/etc/passwd")
    assert_refused(tmp_path / "a.zip", "a link|not an ordinary file")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    odd = tarfile.TarInfo("blues/evil.wav")
    odd.type, odd.linkname = kind, "/etc/passwd"
    assert_refused(make_tar(tmp_path / "a.tar.gz", {"blues/good.wav": b"1"}, odd), "a link|not an ordinary file")


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"blues/a.wav": b"1"})
    content = bytearray(archive.read_bytes())
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + offset] |= 1
    archive.write_bytes(content)
    assert_refused(archive, "encrypted")


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(members=2), "more than 2 members"),
        (Limits(member_bytes=999), "with 0.0 GB"),
        (Limits(total_bytes=2500), "more than 0.0 GB"),
    ],
)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_bombs_are_refused(tmp_path: Path, limits: Limits, match: str, make: type) -> None:
    suffix = ".zip" if make is make_zip else ".tar.gz"
    archive = make(tmp_path / f"a{suffix}", {f"blues/{number}.wav": bytes(1000) for number in range(3)})
    assert_refused(archive, match, limits)
    extract_songs(archive, tmp_path / "genres", None)
    assert len(contents(tmp_path / "genres")) == 3


def test_only_the_option_lifts_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_gtzan_data, "Limits", functools.partial(Limits, members=2))
    archive = make_zip(tmp_path / "a.zip", {f"{genre}/{n}.wav": b"no sound" for genre in "ab" for n in (1, 2)})
    options = ["--data", str(tmp_path / "data"), "--source", str(archive), "--workers", "1"]
    assert prepare_gtzan_data.main(options) == 1
    assert "more than 2 members: use --no-archive-limits if you trust it" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert prepare_gtzan_data.main([*options, "--no-archive-limits"]) == 1
    assert "none of the 4 songs" in capsys.readouterr().err


def test_a_tar_whose_notes_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """tarfile reads a long name or a PAX header whole before any limit can see it."""
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        note = tarfile.TarInfo("note")
        note.type, note.size = kind, 1 << 32
        assert_refused(make_tar(tmp_path / "a.tar.gz", {"blues/good.wav": b"1"}, note), "claims 4294967296 bytes")


def test_a_tar_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as bundle:
        bundle.addfile(tarfile.TarInfo("first.txt"))
        back = tarfile.TarInfo("second.txt")
        back.pax_headers = {"size": "-1536"}  # to its own PAX header
        bundle.addfile(back)
    assert_refused(tmp_path / "a.tar", "claims -1536 bytes")


def test_zip_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    """The limits go by announced sizes, so no more than that may be written."""
    archive = make_zip(tmp_path / "a.zip", {"blues/a.wav": bytes(100_000)})
    content = bytearray(archive.read_bytes())
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", content, content.index(header) + offset, 10)
    archive.write_bytes(content)
    assert_refused(archive, "damaged")


def test_damage_is_told(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar.gz", {f"blues/{n}.wav": bytes(range(256)) * 50 for n in range(9)}).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path / "a.tar.gz", "damaged")
    whole = make_zip(tmp_path / "h.zip", {f"blues/{n}.wav": bytes(range(256)) * 50 for n in range(9)}).read_bytes()
    for part in (len(whole) // 2, len(whole) - 10):  # without its directory, and within it
        (tmp_path / "h.zip").write_bytes(whole[:part])
        assert_refused(tmp_path / "h.zip", "damaged")
    (tmp_path / "b.zip").write_bytes(b"<html>404</html>")
    assert_refused(tmp_path / "b.zip", "damaged")
    assert_refused(make_zip(tmp_path / "c.zip", {"readme.txt": b"x", "song.wav": b"x"}), "no songs")


@given(st.text(alphabet="ab./\\:~ \0", max_size=20))
def test_no_name_leads_out_of_the_folder(prefix: str) -> None:
    try:
        place = place_of(prefix + "/song.wav")
    except UserError:
        return
    if place is not None:
        genre, name = place
        assert genre not in ("", ".", "..")
        assert not {"/", "\\"} & {*genre, *name}
