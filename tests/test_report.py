"""The page of ``--report``: what it holds, and how it behaves in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from browser import Browser, find_chromium
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from decoding import decode
from detector_report import Report, check_target, page

GENRES = ["blues", "jazz", "rock"]
RUN = {"model": "fusion", "weights": "0123456789ab", "min_confidence": 0.5, "start": 0.0, "duration": None}
HOSTILE = [
    b"<img src=x onerror='hacked=1'>.wav",
    b'"><b>&amp;.wav',
    b"two\nlines\r\xe2\x80\xaevaw.wav",
    b"caf\xe9 #1?.wav",
]


def record(path: str, *probabilities: float, seconds: float = 60.0, **more: object) -> dict:
    """A JSON line's record of a song in two sections."""
    likeliest = GENRES[probabilities.index(max(probabilities))]
    ends = ((0, seconds / 2, likeliest), (seconds / 2, seconds, "blues"))
    return {
        "path": path,
        "duration_s": seconds,
        "probabilities": dict(zip(GENRES, probabilities, strict=True)),
        "confident": max(probabilities) >= 0.5,
        "sounds_like": None,
        "notes": [],
        "timeline": [{"start_s": a, "end_s": b, "genre": g, "probability": 0.6} for a, b, g in ends],
        **more,
    }


def data_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with Browser(program) as opened:
        opened.size(1300, 900)
        opened.prefer("light")
        yield opened


@pytest.fixture(scope="module")
def library(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 1,200 songs that aren't there, of which one has no answer and one is speech."""
    path = tmp_path_factory.mktemp("library") / "report.html"
    report = Report(path, GENRES, RUN, {})
    for number in range(1198):
        part = (number % 97) / 100
        name = f"/music/band {number % 50}/song {number}.mp3"
        report._take(record(name, part, (1 - part) * 0.4, (1 - part) * 0.6, seconds=20 + number))
    report._take(record("/music/talk.mp3", 0.1, 0.1, 0.8, confident=False, sounds_like="speech", notes=["mended"]))
    report._take({"path": "/music/broken.mp3", "error": "/music/broken.mp3: can't be decoded (why)"})
    report.finish()
    return path


# ---------------------------------------------------------------- the file


NAMES = st.one_of(st.text("<>\"'&script!-\\\n"), st.text(), st.binary().map(os.fsdecode))


@settings(max_examples=50)
@given(st.lists(NAMES.map(lambda name: name.replace("/", "").replace("\0", "") or "a"), min_size=1, max_size=5))
def test_no_name_leaves_its_string(names):
    """Whatever the names, the page differs from that of a harmless name in its JSON only."""

    def rendered(names: list[str]) -> tuple[str, str]:
        report = Report(Path("page.html"), GENRES, RUN, {})
        for name in names:
            report._take({"path": f"/music/{name}/{name}", "error": f"{name}: bad"})
            report._take(record(f"/music/{name}", 0.5, 0.3, 0.2, notes=[name.encode(errors="ignore").decode()]))
        text = page(report.songs, GENRES, RUN, Path("/music"))
        text.encode("utf-8")
        before, rest = text.split('id="data">')
        inside, after = rest.split("</script>", 1)
        assert "<" not in inside
        return inside, before + after

    inside, around = rendered(names)
    assert around == rendered(["a"])[1]
    shown = [song["name"] for song in json.loads(inside)["songs"]]
    assert len(shown) == 2 * len(names)
    assert not any(re.search("[\n\r\u202e\ud800-\udfff]", name) for name in shown)


def test_songs_below_the_page_are_found_relative_to_it(tmp_path):
    songs = [{"folder": f"{tmp_path}/a b/", "name": "50%.wav"}, {"folder": "/else/", "name": "javascript:x.wav"}]
    urls = [song["url"] for song in data_of(page(songs, GENRES, RUN, tmp_path))["songs"]]
    assert urls == ["./a%20b/50%25.wav", "file:///else/javascript%3Ax.wav"]


def test_the_page_may_be_named_by_a_way_round(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    report = Report(Path("../page.html"), GENRES, RUN, {})
    report.add(str(tmp_path / "a.wav"), UserError("bad"))
    report._take(record(str(tmp_path / "b.wav"), 0.5, 0.3, 0.2))
    report.finish()
    assert data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["songs"][1]["url"] == "./b.wav"
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "sub" / "link").symlink_to(tmp_path / "far" / "off")
    report.path = Path("link/../page.html")  # far/page.html
    report.finish()
    url = data_of((tmp_path / "far" / "page.html").read_text(encoding="utf-8"))["songs"][1]["url"]
    assert url == (tmp_path / "b.wav").as_uri()


def test_only_an_earlier_report_is_replaced(detect, tmp_path):
    song = tmp_path / "song.wav"
    song.write_bytes(b"<!doctype html>\nprecious")
    with pytest.raises(UserError, match=r"song\.wav is there already and is no report: choose another --report"):
        check_target(song)
    code, out, err = detect("--report", song, song)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert song.read_bytes().endswith(b"precious")
    Report(tmp_path / "report.html", GENRES, RUN, {}).finish()
    check_target(tmp_path / "report.html")
    check_target(tmp_path / "new.html")


def test_the_order_is_that_of_the_answer_where_rounding_hides_it(tmp_path):
    report = Report(tmp_path / "page.html", GENRES, RUN, {})
    report._take(record("/music/a.wav", 0.33331, 0.33334, 0.33335))
    report.finish()
    assert data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["songs"][0]["order"] == [2, 1, 0]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    Report(tmp_path / "link.html", GENRES, RUN, {}).finish()
    assert (tmp_path / "link.html").is_symlink()
    check_target(tmp_path / "page.html")


def test_a_page_beside_json_lines_has_the_songs_answered_before(detect, repo, tmp_path):
    samples = decode(repo / "examples" / "demo_song.ogg", 4, 2).samples
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, samples, 22_050)
    args = ("--jsonl", "--output", tmp_path / "out.jsonl", "--resume", "--report", tmp_path / "new" / "out.html")
    assert detect(*args, tmp_path / "a.wav")[:2] == (0, "")
    assert detect(*args, tmp_path / "none.wav", tmp_path / "a.wav", tmp_path / "b.wav")[0] == 1
    songs = {song["name"]: song for song in data_of((tmp_path / "new" / "out.html").read_text("utf-8"))["songs"]}
    assert sorted(songs) == ["a.wav", "b.wav", "none.wav"]
    assert songs["a.wav"]["probabilities"] == songs["b.wav"]["probabilities"]
    assert songs["b.wav"]["timeline"], "sections are in the page even without --timeline"
    assert songs["none.wav"]["error"].endswith("no such file")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_a_page_of_more_answers_outlives_an_interruption(detect, repo, models, tmp_path):
    samples = decode(repo / "examples" / "demo_song.ogg", 4, 1).samples
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, samples, 22_050)
    args = ("--jsonl", "--output", tmp_path / "out.jsonl", "--resume", "--report", tmp_path / "out.html")
    assert detect(*args, tmp_path / "b.wav")[0] == 0
    before = (tmp_path / "out.html").read_text()
    command = [sys.executable, repo / "genre_detector.py", "--models", models, *args, "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(os.fsencode(tmp_path / "a.wav") + b"\nnone.wav\n")
        process.stdin.flush()
        assert b"none.wav" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "out.html").read_text() == before
    assert detect(*args, tmp_path / "a.wav", tmp_path / "b.wav")[0] == 0
    assert len(data_of((tmp_path / "out.html").read_text("utf-8"))["songs"]) == 2


# ---------------------------------------------------------------- the browser


def names(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('tr.song .name')].map((e) => e.textContent)")


def failures(browser: Browser) -> list[dict]:
    return [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are always valid text")
def test_hostile_names_are_shown_and_played_but_never_run(browser, detect, repo, tmp_path):
    music = tmp_path / "<script>hacked=1</script>"
    music.mkdir(parents=True)  # the name holds a slash
    soundfile.write(tmp_path / "good.wav", decode(repo / "examples" / "demo_song.ogg", 4, 3).samples, 22_050)
    for name in HOSTILE:
        shutil.copy(tmp_path / "good.wav", os.path.join(os.fsencode(music), name))
    assert detect("--report", tmp_path / "page.html", music, tmp_path / "good.wav")[0] == 0
    browser.open(tmp_path / "page.html")
    assert sorted(names(browser)) == sorted(
        [
            "<img src=x onerror='hacked=1'>.wav",
            '"><b>&amp;.wav',
            "two\\nlines\\r\\u202evaw.wav",
            "caf\\udce9 #1?.wav",
            "good.wav",
        ]
    )
    assert browser.run("[typeof hacked, document.images.length, document.querySelectorAll('tbody b').length]") == [
        "undefined",
        0,
        3 * 5,  # the fills of the bars, no <b> of a name
    ]
    for index in range(5):  # every song plays: its address is right
        browser.run(f"document.querySelectorAll('.play')[{index}].click()")
        browser.until("!audio.paused && audio.duration > 2.9 && audio.currentTime > 0")
    assert browser.run("document.querySelectorAll('tr.playing').length") == 1
    browser.run("document.querySelectorAll('.play')[4].click()")
    browser.until("audio.paused")
    assert not failures(browser)
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert len(urls) >= 6
    assert all(url.startswith(("file:", "data:")) for url in urls), "the page asked for something of the network"


def test_a_library_sorts_and_filters(browser, library):
    browser.open(library)
    assert browser.run("document.title") == "Genres of 1200 songs"
    shown = names(browser)
    assert len(shown) <= 300, "rows come as they are needed"
    assert shown[:4] == ["broken.mp3", "talk.mp3", "song 0.mp3", "song 50.mp3"], "by folder, numbers as numbers"

    def head(column: int) -> str:
        browser.run(f"document.querySelectorAll('th button')[{column}].click()")
        return browser.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")

    tops = "found.map((song) => song.top)"
    assert head(2) == "descending"
    assert (found := browser.run(tops)) == sorted(found, reverse=True)
    assert head(2) == "ascending"
    assert (found := browser.run(tops)) == sorted(found)
    assert head(3) == "descending"
    assert names(browser)[0] == "song 1197.mp3"
    assert head(1) == "ascending"
    best = browser.run("found.map((song) => song.best)")
    assert best == [*sorted(best[:-1]), -1], "by genre, the song without an answer last"

    browser.run("document.querySelectorAll('.chip')[0].click()")  # blues
    assert set(browser.run("found.map((song) => song.best)")) == {0}
    browser.run("document.querySelector('.chip').click()")
    for state, expected in {"unlike": ["talk.mp3"], "failed": ["broken.mp3"]}.items():
        browser.run(f"$('state').value = '{state}', $('state').dispatchEvent(new Event('change'))")
        assert names(browser) == expected
        assert browser.run("$('count').textContent") == "1 of 1200 songs"
    assert "can't be decoded (why)" in browser.run("$('body').textContent")
    browser.run("$('state').value = 'all', $('state').dispatchEvent(new Event('change'))")
    assert not failures(browser)


def test_rows_come_until_all_are_there(browser, library):
    browser.open(library)
    before = len(names(browser))
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.until(f"document.querySelectorAll('tr.song').length > {before}")
    browser.run("$('rest').click(), dispatchEvent(new Event('beforeprint'))")
    assert browser.run("$('rest').hidden")
    assert len(set(browser.run("[...document.querySelectorAll('tr.song')].map((row) => row.dataset.song)"))) == 1200


def test_the_keyboard_is_enough(browser, library):
    browser.open(library)
    browser.run("$('find').focus()")
    for key in "talk":
        browser.press(key)
    browser.until("found.length === 1")
    browser.run("new Promise((done) => setTimeout(done))")  # the table isn't drawn anew after this
    focus = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
    seen = []
    for _ in range(8):
        browser.press("Tab")
        seen.append(browser.run(focus))
        if seen[-1] == "talk.mp3":
            break
    assert [*seen[-6:-1]] == ["Song", "Genre", "Probability", "Length", "Play talk.mp3"]
    browser.press("Enter")
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    detail = browser.run("document.querySelector('tr.more').innerText")
    assert "Note: mended" in detail
    assert "/music/talk.mp3" in detail
    assert re.search(r"rock\s+80.0 %\s+blues\s+10.0 %", detail)
    browser.press("Tab")
    assert browser.run(focus) == "Play from 0:00 \u2013 0:30 rock 60 %"
    browser.press("Enter")
    browser.until("$('trouble').textContent !== ''")  # the file isn't there, and the page says so


def test_everything_has_a_name_for_a_screen_reader(browser, library):
    browser.open(library)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            role, name = (str(node.get(key, {}).get("value", "")) for key in ("role", "name"))
            found.setdefault(role, []).append(name)
    assert found["table"] == ["Genres of 1200 songs"]
    assert found["columnheader"] == ["Play", "Song", "Genre", "Probability", "Timeline", "Length"]
    assert found["searchbox"] == ["Find songs by name or folder"]
    assert found["combobox"] == ["Show"]
    for role in ("button", "image", "combobox"):
        assert all(found[role]), f"a nameless {role}"
    assert len(found["row"]) > 50
    assert "0:00 \u2013 0:10 rock 60 %, 0:10 \u2013 0:20 blues 60 %" in found["image"]


def test_light_and_dark(browser, library):
    """As the system has it, until the button is pressed; readable in both (WCAG: 4.5 to 1)."""

    def lightness(element: str, what: str) -> float:
        script = f"getComputedStyle(document.querySelector('{element}')).{what}"
        red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", browser.run(script))[:3])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(element: str) -> float:
        bright, dim = sorted((lightness(element, "color"), lightness(".frame", "backgroundColor")), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    for preferred, sign in (("light", 1), ("dark", -1)):
        browser.prefer(preferred)
        browser.open(library)
        browser.run("localStorage.clear(), delete root.dataset.theme, nameTheme(), want.words = ['talk'], refresh()")
        assert sign * (lightness("body", "backgroundColor") - 0.5) > 0
        for element in (".name", ".genre", ".bar em", ".state", "#about", "#count", "th"):
            assert contrast(element) > 4.5, (preferred, element)
        browser.run("$('theme').click()")
        assert sign * (lightness("body", "backgroundColor") - 0.5) < 0
        browser.open(library)
        assert sign * (lightness("body", "backgroundColor") - 0.5) < 0, "the choice is kept"
    browser.run("localStorage.clear()")
    browser.prefer("light")


@pytest.mark.parametrize("width", [360, 768, 1300, 2200])
def test_nothing_sticks_out_at_any_width(browser, library, width):
    browser.size(width, 900)
    browser.open(library)
    browser.run("document.querySelectorAll('button.name')[1].click()")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.size(1300, 900)
