"""What the detector takes: files, folders, patterns, lists; formats that libsndfile doesn't read; parts of a song."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from decoding import SoundReader, decode
from detector_inputs import find_songs

# ---------------------------------------------------------------- files, folders, patterns


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Songs and other files, some hidden, in folders of folders."""
    names = ["b.mp3", "a.FLAC", "cover.jpg", "._a.FLAC", "sub/c.ogg", "sub/deep/d.wma", ".hidden/e.wav", "[x].wav"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(found: list[tuple[str, UserError | None]], folder: Path) -> list[str]:
    assert all(problem is None for _, problem in found)
    return [Path(path).relative_to(folder).as_posix() for path, _ in found]


def test_a_folder_gives_its_songs_at_any_depth(library):
    assert names(list(find_songs([str(library)])), library) == [
        "[x].wav",
        "a.FLAC",
        "b.mp3",
        "sub/c.ogg",
        "sub/deep/d.wma",
    ]


def test_a_folder_without_songs_is_an_error(library):
    [(name, problem)] = find_songs([str(library / "empty")])
    assert name == str(library / "empty")
    assert str(problem).startswith(f"{name}: a folder without songs (.aac, ")


def test_patterns_that_the_shell_left(library):
    assert names(list(find_songs([f"{library}/*.mp3", f"{library}/**/*.ogg"])), library) == ["b.mp3", "sub/c.ogg"]
    assert names(list(find_songs([f"{library}/s*"])), library) == ["sub/c.ogg", "sub/deep/d.wma"]
    everything = names(list(find_songs([f"{library}/sub/**"])), library)
    assert everything == ["sub/c.ogg", "sub/deep/d.wma"], "a folder's songs must not come twice"
    assert names(list(find_songs([f"{library}/sub/**/*"])), library) == everything
    assert names(list(find_songs([f"{library}/**/[sd]*"])), library) == everything


def test_links_are_followed_to_no_folder_twice(library, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "f.ogg").touch()
    (elsewhere / "back").symlink_to(library)
    links = {"sub/up": library, "sub/round": library / "sub", "there": elsewhere, "again": elsewhere}
    for name, target in links.items():
        (library / name).symlink_to(target)
    (library / "stored").symlink_to(library / ".hidden")
    found = ["again/f.ogg", "stored/e.wav", "sub/c.ogg", "sub/deep/d.wma"]
    assert names(list(find_songs([f"{library}/**/*.[ow]*"])), library) == ["[x].wav", *found]
    assert sorted(names(list(find_songs([str(library)])), library)) == sorted(["[x].wav", "a.FLAC", "b.mp3", *found])


def test_patterns_are_relative_to_where_one_is(library, monkeypatch):
    monkeypatch.chdir(library)
    assert [path for path, _ in find_songs(["**/*.[ow]*", "*/**/d.wma"])] == [
        "[x].wav",
        "sub/c.ogg",
        "sub/deep/d.wma",
        "sub/deep/d.wma",
    ]
    assert [path for path, _ in find_songs(["**/deep/**"])] == ["sub/deep/d.wma"]


def test_a_name_with_brackets_is_a_name(library):
    assert names(list(find_songs([str(library / "[x].wav")])), library) == ["[x].wav"]


def test_stars_within_a_name_are_no_depth(library):
    assert names(list(find_songs([f"{library}/s**"])), library) == ["sub/c.ogg", "sub/deep/d.wma"]
    assert names(list(find_songs([f"{library}/s**/*"])), library) == ["sub/c.ogg", "sub/deep/d.wma"]


@pytest.mark.parametrize("pattern", ["*.opus", "empty/**", "empty/**/*"])
def test_a_pattern_without_match_is_an_error(library, pattern):
    (library / "empty" / "as_well").mkdir()
    [(_, problem)] = find_songs([f"{library}/{pattern}"])
    assert "no file has such a name" in str(problem)


@given(st.lists(st.sampled_from(["a.mp3", "b c.ogg", "missing.wav"]), max_size=6))
def test_names_keep_their_order_and_number(given_names):
    assert [path for path, _ in find_songs(given_names)] == given_names


def test_a_list_is_read_line_by_line(library):
    lines = iter([b"x.mp3\r\n", b"\n", os.fsencode(library / "sub") + b"\n", b"caf\xe9.ogg"])
    found = find_songs(["first.wav", "-"], lines)
    assert [next(found)[0], next(found)[0]] == ["first.wav", "x.mp3"]
    assert next(lines) == b"\n", "lines were read before they were wanted"
    rest = [path for path, _ in found]
    assert rest == [str(library / "sub/c.ogg"), str(library / "sub/deep/d.wma"), os.fsdecode(b"caf\xe9.ogg")]


def test_an_empty_list_is_a_failure():
    [(name, problem)] = find_songs(["-"], iter([b"\n"]))
    assert (name, str(problem)) == ("-", "-: standard input names no song")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are always valid text")
def test_a_name_that_is_no_text_can_be_read(tmp_path, render_tone):
    os.rename(render_tone(tmp_path / "tone.wav", seconds=1), os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav"))
    [(path, _)] = find_songs([str(tmp_path)])
    assert decode(Path(path)).seconds == 1


# ---------------------------------------------------------------- formats of PyAV


@pytest.fixture(scope="session")
def encode() -> Callable[..., Path]:
    """Encode a chord with PyAV: ``encode(path, codec="aac", seconds=2, rate=44_100)`` returns the path."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-formats.txt")

    def make(path: Path, codec: str = "aac", seconds: float = 2.0, rate: int = 44_100) -> Path:
        t = np.arange(round(seconds * rate)) / rate
        left = 0.3 * np.sin(2 * np.pi * 440 * t) * (1 - t / seconds)
        sound = np.stack([left, 0.3 * np.sin(2 * np.pi * 660 * t)]).astype(np.float32)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, layout="stereo")
            stream.bit_rate = 128_000
            for first in range(0, sound.shape[1], 1024):
                block = np.ascontiguousarray(sound[:, first : first + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
                frame.rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.mark.parametrize(("suffix", "codec"), [(".m4a", "aac"), (".mp4", "aac"), (".aac", "aac"), (".wma", "wmav2")])
def test_av_formats_sound_like_what_went_in(encode, tmp_path, suffix, codec):
    sound = decode(encode(tmp_path / f"song{suffix}", codec))
    assert sound.rate == 44_100
    assert sound.notes == []
    assert sound.seconds == pytest.approx(2, abs=0.1)  # raw AAC and WMA can't say how much their encoder padded
    middle = sound.samples[5_000:37_768] * np.hanning(32_768)
    peaks = np.sort(np.fft.rfftfreq(len(middle), 1 / 22_050)[np.argsort(np.abs(np.fft.rfft(middle)))[-8:]])
    assert peaks[0] == pytest.approx(440, abs=4)
    assert peaks[-1] == pytest.approx(660, abs=4)
    assert np.abs(sound.samples[2_000:5_000]).max() == pytest.approx(0.3, abs=0.05), "the mean of both channels"


def test_what_an_av_file_has_lost_is_told(encode, tmp_path):
    path = encode(tmp_path / "song.wma", "wmav2", seconds=20)
    content = path.read_bytes()
    whole, told = decode(path), set()
    for place in range(len(content) // 8, len(content), len(content) // 8):
        path.write_bytes(content[:place] + bytes(4000) + content[place + 4000 :])
        sound = decode(path)
        if whole.seconds - sound.seconds > 0.1:
            [note] = sound.notes
            if "breaks off" not in note:
                told.add(place)
                missing = whole.seconds - sound.seconds
                assert float(note.split("jump by ")[1].split(" s:")[0]) == pytest.approx(missing, abs=0.06)
    assert told


@pytest.mark.parametrize(
    ("made", "codec", "named"),
    [
        ("m4a", "aac", "mp3"),
        ("aac", "aac", "mp3"),
        ("wma", "wmav2", "mp3"),
        ("webm", "libopus", "opus"),
        ("m4a", "aac", "m4b"),
        ("webm", "libopus", "webm"),
    ],
)
def test_what_av_reads_is_known_by_its_content(encode, tmp_path, monkeypatch, made, codec, named):
    path = encode(tmp_path / f"song.{made}", codec, rate=48_000).rename(tmp_path / f"other.{named}")
    assert decode(path).seconds == pytest.approx(2, abs=0.1)
    assert [*find_songs([str(tmp_path)])] == [(str(path), None)]
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"needs PyAV: pip install -r requirements-formats\.txt"):
        decode(path)


def test_an_mp3_that_begins_as_aac_might_is_an_mp3(render_tone, tmp_path, monkeypatch):
    path = render_tone(tmp_path / "song.mp3")
    whole = decode(path).seconds
    path.write_bytes(b"\xff\xf1\x50\x80\x04\xe0" + path.read_bytes())  # a header of AAC, and none after its 39 bytes
    monkeypatch.setitem(sys.modules, "av", None)
    assert decode(path).seconds == pytest.approx(whole, abs=0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_an_av_file_may_have_any_name(encode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = encode(tmp_path / "song.m4a").read_bytes()
    for name in map(os.fsdecode, (b"Live:Paris.m4a", b"file:x.m4a", b"caf\xe9.m4a")):
        Path(name).write_bytes(content)
        assert decode(Path(name)).seconds == pytest.approx(2, abs=0.1)


@settings(max_examples=10)
@given(start=st.integers(0, 75).map(lambda n: n / 50), duration=st.floats(0.2, 3))  # whole samples at both rates
def test_a_part_of_an_av_file_is_that_part(encode, tmp_path_factory, start, duration):
    path = tmp_path_factory.getbasetemp() / "part.m4a"
    whole = decode(path if path.exists() else encode(path))
    part = decode(path, start, duration)
    assert part.seconds == pytest.approx(min(duration, whole.seconds - start), abs=1e-3)
    there = whole.samples[round(start * 22_050) :][: len(part.samples)]
    inner = slice(200, len(there) - 200)  # the resampler rings at cuts
    np.testing.assert_allclose(part.samples[inner], there[inner], atol=0.02)


def test_an_av_file_that_breaks_off_is_used_as_far_as_it_goes(encode, tmp_path):
    path = encode(tmp_path / "song.wma", "wmav2", seconds=4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 1 < decode(path).seconds < 3


def test_what_av_cannot_read_is_one_line(tmp_path, capfd):
    pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-formats.txt")
    (tmp_path / "empty.aac").touch()
    with pytest.raises(UserError, match=r"empty\.aac: can't be decoded \(End of file\)$"):
        decode(tmp_path / "empty.aac")
    assert capfd.readouterr().err == ""
    path = tmp_path / "song.m4a"
    path.write_text("no music here\n" * 100)
    with pytest.raises(UserError, match=r"song\.m4a: can't be decoded \(.+\)$"):
        decode(path)


def test_a_header_that_was_never_completed_hides_no_sound(tmp_path, monkeypatch, render_tone):
    whole = render_tone(tmp_path / "song.wav")
    content = bytearray(whole.read_bytes())
    size = content.index(b"data") + 4
    content[4:8] = content[size : size + 4] = bytes(4)
    path = tmp_path / "killed.wav"
    path.write_bytes(content)
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"no sound in it; what may follow needs requirements-formats\.txt"):
            decode(path)
    pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-formats.txt")
    sound = decode(path)
    np.testing.assert_allclose(sound.samples, decode(whole).samples, atol=1e-4)
    assert sound.notes == ["by its header there is no sound in it: read to the end of the file"]
    path.write_bytes(content[: size + 4] + bytes(8 * 20_000))  # silence is no row of empty chunks
    assert decode(path).seconds == pytest.approx(80_000 / 22_050, abs=0.01)
    path.write_bytes(content)
    part, there = decode(path, 1, 0.5), decode(whole, 1, 0.5)
    np.testing.assert_allclose(part.samples, there.samples, atol=1e-4)


@pytest.mark.parametrize("pad", [0, 1])
def test_an_empty_wav_with_more_than_sound_in_it_is_empty(tmp_path, render_tone, pad):
    path = render_tone(tmp_path / "empty.wav", seconds=0)
    path.write_bytes(path.read_bytes() + b"LIST" + (50_000 - pad).to_bytes(4, "little") + b"\x55" * 50_000)
    with pytest.raises(UserError, match=r"0\.000 s of sound"):
        decode(path)


def test_without_av_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    path = tmp_path / "song.m4a"
    path.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"song\.m4a: \.m4a needs PyAV: pip install -r requirements-formats\.txt"):
        list(SoundReader(path))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"start": -5}, "a start of -5 s can't be"),
        ({"start": float("nan")}, "a start of nan s can't be"),
        ({"duration": float("inf")}, "a duration of inf s can't be"),
        ({"start": 500}, "0.000 s of sound from 500 s on"),
    ],
)
def test_a_part_that_is_none_is_named(detector, render_tone, tmp_path, part, said):
    with pytest.raises(UserError, match=said):
        detector.predict(render_tone(tmp_path / "a.wav"), **part)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no /dev/null")
def test_answers_go_to_ordinary_files(detect, render_tone, tmp_path):
    code, _, err = detect("--json", "--output", "/dev/null", render_tone(tmp_path / "a.wav"))
    assert code == 1
    assert err.endswith("no ordinary file: name another one with --output, or leave it out\n")
