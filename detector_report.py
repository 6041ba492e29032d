"""The detector's answers as one HTML page that needs no network: ``detector_report.html`` filled in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from common import UserError
from detector_output import UNLIKE, as_record, printable
from files import check_replaceable, write_text

if TYPE_CHECKING:
    from genre_detector import Prediction

TEMPLATE = Path(__file__).with_name("detector_report.html")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # line breaks and turns of direction
MARK = "<!-- music_genre_fusion report -->"  # in the template's second line


class Report:
    """Takes answers one by one, like the writers of ``detector_output``, and writes the page at the end.

    Parameters
    ----------
    path : the page
    genres : names of the classes
    run : what was asked of which model, as in a JSON line
    earlier : records of songs that were answered before, by path; may grow until ``finish``
    """

    def __init__(self, path: Path, genres: list[str], run: dict[str, Any], earlier: dict[str, dict[str, Any]]):
        self.path, self.genres, self.run, self.earlier = path, genres, run | {"timeline": True}, earlier
        self.songs: list[dict[str, Any]] = []

    def add(self, path: str, answer: Prediction | UserError) -> None:
        """Take one song's answer, or why it has none."""
        self._take(as_record(path, answer, self.run))

    def _take(self, record: dict[str, Any]) -> None:
        folder, name = os.path.split(os.path.abspath(record["path"]))
        song: dict[str, Any] = {"folder": os.path.join(folder, ""), "name": name, "timeline": []}
        if "error" in record:
            song["error"] = _shown(record["error"])
        else:
            song["seconds"] = record["duration_s"]
            likely = record["probabilities"]
            song["probabilities"] = [round(likely[genre], 4) for genre in self.genres]
            ranked = sorted(likely, key=lambda genre: -likely[genre])  # by what isn't rounded
            song["order"] = [self.genres.index(genre) for genre in ranked]
            song["confident"] = record["confident"]
            song["unlike"] = UNLIKE.get(record["sounds_like"], "")
            song["notes"] = record["notes"]
            song["timeline"] = [
                [part["start_s"], part["end_s"], self.genres.index(part["genre"]), round(part["probability"], 3)]
                for part in record.get("timeline", [])
            ]
        self.songs.append(song)

    def finish(self) -> None:
        """Write the page whole, or not at all. Raises WriteError if that can't be."""
        for record in [*self.earlier.values()]:  # after Ctrl-C another thread may still add to them
            self._take(record)
        home = Path(os.path.abspath(self.path)).parent
        if os.path.realpath(home) != os.path.realpath(self.path.parent):  # ".." after a link leads elsewhere
            home = self.path.absolute().parent
        write_text(Path(os.path.realpath(self.path)), page(self.songs, self.genres, self.run, home))


def check_target(path: Path) -> None:
    """Raise UserError if ``path`` is something else than an earlier report."""
    check_replaceable(path, MARK, "report", "--report")


def page(songs: list[dict[str, Any]], genres: list[str], run: dict[str, Any], home: Path) -> str:
    """The page, to be put into the folder ``home``.

    Whatever a file name contains, it reaches the page as a JSON string without ``<``, which the page's script only
    puts there as text; the content security policy lets nothing run but that script and nothing load but sound.
    """
    try:
        common = os.path.join(os.path.commonpath([song["folder"] for song in songs]), "")
    except ValueError:  # no songs, or songs on several drives
        common = ""
    rows = []
    for song in songs:
        shown = {"folder": _shown(song["folder"][len(common) :]), "name": _shown(song["name"])}
        rows.append(song | shown | {"url": None if "error" in song else _url(song, home)})
    sure = f"confident from {100 * run['min_confidence']:.1f} %" if run["min_confidence"] < 1 else "none confident"
    about = f"{run['model']} (weights {run['weights']}), {sure}"
    if run["start"]:
        about += f", from {run['start']:g} s on"
    if run["duration"] is not None:
        about += f", {run['duration']:g} s of each song"
    common = _shown(common)
    data = {"genres": genres, "songs": rows, "folder": common, "about": f"{common} \u00b7 {about}" if common else about}

    template = TEMPLATE.read_text(encoding="utf-8")
    hashes = {
        tag: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        for tag in ("style", "script")
        if (found := re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL))
    }
    policy = f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
    policy += "media-src 'self' file:; base-uri 'none'; form-action 'none'"
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{policy}}", policy).replace("{{data}}", text)


def _shown(name: str) -> str:
    """A name in which what would break the line, turn it round or isn't Unicode is spelled out."""
    return printable(CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), name))


def _url(song: dict[str, Any], home: Path) -> str:
    """Where the page finds a song: relative below its own folder, so that both can be moved together."""
    path = Path(song["folder"], song["name"])
    if path.is_relative_to(home):
        return "./" + quote(os.fsencode(path.relative_to(home).as_posix()))
    return path.as_uri()
