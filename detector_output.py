"""The detector's answers as text, JSON, JSON lines and CSV. docs/output.md describes the fields."""

from __future__ import annotations

import csv
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import UserError, one_line

if TYPE_CHECKING:
    from detector_timeline import Section
    from genre_detector import Prediction

SCHEMA = 1  # of JSON lines and CSV; grows when a field is removed or changes its meaning
UNLIKE = {"noise": "nothing but noise, a tone or silence", "speech": "speech"}  # what the detector calls no music
ANSWER: dict[str, type | tuple[type, ...]] = {  # what the record of a song holds that has an answer
    "duration_s": (int, float),
    "genre": str,
    "probabilities": dict,
    "confident": bool,
    "sounds_like": (str, type(None)),
    "notes": list,
}
BAR_WIDTH = 32
RULE_WIDTH = 64
PLAIN_WIDTH = 10_000  # columns where the output is no terminal: nothing is shortened


# ---------------------------------------------------------------- text


def clock(seconds: float, digits: int = 0) -> str:
    """Minutes and seconds: 1:05, or 1:05.0."""
    minutes, rest = divmod(round(seconds, digits), 60)
    return f"{int(minutes)}:{rest:0{digits + 3 if digits else 2}.{digits}f}"


def as_text(prediction: Prediction, top_k: int, timeline: bool = False, width: int = PLAIN_WIDTH) -> str:
    """The answer for people: file, duration, the likeliest genres with bars; lines of at most ``width`` columns."""
    ranked = prediction.ranked
    shown = ranked[:top_k]
    name = max(len(genre) for genre, _ in shown)
    bar = max(0, min(BAR_WIDTH, width - name - 13))
    lines = [
        f"File:      {_shortened(one_line(prediction.path), width - 11)}",
        f"Duration:  {clock(prediction.duration_s, 1)}  ({prediction.windows} window{'s' * (prediction.windows != 1)})",
        *(f"Note:      {note}" for note in prediction.notes),
        *([f"Note:      unlike music: {UNLIKE[prediction.sounds_like]}"] if prediction.sounds_like else []),
        f"Genre:     {prediction.genre}",
    ]
    if not prediction.confident:
        lines.append(f"Uncertain: {' or '.join(genre for genre, _ in ranked[:2])}")
    lines += ["", *(f"  {genre:{name}}  {100 * p:5.1f} %  {'#' * round(bar * p)}".rstrip() for genre, p in shown), ""]
    if timeline:
        lines += [*_timeline_rows(prediction.sections), ""]
    return "\n".join(map(one_line, lines))


def _timeline_rows(sections: Sequence[Section]) -> list[str]:
    name = max(len(section.genre) for section in sections)
    return [
        f"  {clock(section.start_s):>6} - {clock(section.end_s):>6}  {section.genre:{name}}  "
        f"{100 * section.probability:5.1f} %"
        for section in sections
    ]


def printable(text: str) -> str:
    """Text in which whatever of a file name is not valid Unicode is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shortened(path: str, width: int) -> str:
    """A path with its middle left out where it is too long: its end tells more than its start."""
    keep = max(8, width) - 3
    return path if len(path) <= keep + 3 else f"{path[: keep // 3]}...{path[keep // 3 - keep :]}"


# ---------------------------------------------------------------- records


def as_record(path: str, answer: Prediction | UserError, run: dict[str, Any]) -> dict[str, Any]:
    """A JSON line: everything known of a song, or why it has no answer, and what was asked of which model."""
    if isinstance(answer, UserError):
        return {"schema": SCHEMA, "path": path, "error": str(answer), "run": run}
    record = {
        "schema": SCHEMA,
        "path": path,
        "size": answer.size,
        "mtime": answer.mtime,
        **answer.as_json(),
        "confident": answer.confident,
        "unlike_music": answer.unlike_music,
        "sounds_like": answer.sounds_like,
        "nearest": [genre for genre, _ in answer.ranked[:2]],
        "notes": answer.notes,
    }
    if run["timeline"]:
        record["timeline"] = timeline_records(answer.sections)
    return record | {"run": run}


def timeline_records(sections: Sequence[Section]) -> list[dict[str, Any]]:
    return [
        asdict(section) | {"start_s": round(section.start_s, 3), "end_s": round(section.end_s, 3)}
        for section in sections
    ]


def songs_done(path: Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of the songs that a file of JSON lines answers and that are as they were; cuts off a last, broken line.

    Raises UserError if the file isn't one of the detector's.
    """
    records: dict[str, dict[str, Any]] = {}
    whole, start = 0, f'{{"schema": {SCHEMA}, "path": "'.encode()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line)):
                break  # the run was killed while it wrote
            try:
                record = json.loads(line)
                if record["schema"] != SCHEMA:
                    raise ValueError(f"schema {record['schema']}, this detector writes {SCHEMA}")
                if not isinstance(record["path"], str) or not isinstance(record["run"], dict):
                    raise ValueError("path or run")
                records[record["path"]] = record  # the last one holds
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                problem = f"{path}: line {number} is not of this detector ({error}): choose another --output"
                raise UserError(problem) from None
            whole += len(line)
    os.truncate(path, whole)
    return {
        name: record
        for name, record in records.items()
        if {"min_confidence_given": run["min_confidence_given"]} | record["run"] == run
        and _is_answer(record)
        and _unchanged(record)
    }


def _is_answer(record: dict[str, Any]) -> bool:
    typed = all(key in record and isinstance(record[key], kind) for key, kind in ANSWER.items())
    return typed and record["genre"] in record["probabilities"]


def _unchanged(record: dict[str, Any]) -> bool:
    try:
        now = os.stat(record["path"])
    except (OSError, ValueError):
        return False
    return (record.get("size"), record.get("mtime")) == (now.st_size, now.st_mtime)


# ---------------------------------------------------------------- writers


class Writer(ABC):
    """Takes answers one by one; ``finish`` is called once, also after Ctrl-C or SIGTERM."""

    def __init__(self, stream: IO[str], run: dict[str, Any]):
        self.stream, self.run = stream, run

    @abstractmethod
    def add(self, path: str, answer: Prediction | UserError) -> None:
        """Take one song's answer, or why it has none."""

    def finish(self) -> None:
        self.stream.flush()


class TextWriter(Writer):
    def __init__(self, stream: IO[str], run: dict[str, Any], top_k: int, device: str):
        super().__init__(stream, run)
        self.top_k, self.answered, self.all = top_k, 0, 0
        self.width = shutil.get_terminal_size().columns if stream.isatty() else PLAIN_WIDTH
        print(f"Music genre detection with {run['model']} on {device}", file=stream)
        print("=" * min(RULE_WIDTH, self.width), file=stream)

    def add(self, path: str, answer: Prediction | UserError) -> None:
        self.all += 1
        if not isinstance(answer, UserError):
            self.answered += 1
            text = as_text(answer, self.top_k, self.run["timeline"], self.width)
            print(text, file=self.stream, flush=True)

    def finish(self) -> None:
        if self.all > 1:
            print(f"{self.answered} of {self.all} songs classified", file=self.stream)
        super().finish()


class JsonWriter(Writer):
    """One array, written at the end."""

    def __init__(self, stream: IO[str], run: dict[str, Any]):
        super().__init__(stream, run)
        self.records: list[dict[str, Any]] = []

    def add(self, path: str, answer: Prediction | UserError) -> None:
        if isinstance(answer, UserError):
            self.records.append({"path": path, "error": str(answer)})
            return
        timeline = {"timeline": timeline_records(answer.sections)} if self.run["timeline"] else {}
        self.records.append(answer.as_json() | timeline)

    def finish(self) -> None:
        print(json.dumps(self.records, indent=1), file=self.stream)
        super().finish()


class JsonLinesWriter(Writer):
    def add(self, path: str, answer: Prediction | UserError) -> None:
        print(json.dumps(as_record(path, answer, self.run)), file=self.stream, flush=True)


class CsvWriter(Writer):
    """A row a song; the probability of genre g is in column ``p_g``."""

    def __init__(self, stream: IO[str], run: dict[str, Any], genres: Sequence[str]):
        super().__init__(stream, run)
        fields = [
            "schema",
            "path",
            "duration_s",
            "windows",
            "genre",
            "confident",
            "unlike_music",
            *(f"p_{g}" for g in genres),
            "error",
        ]
        self.rows = csv.DictWriter(stream, fields, lineterminator="\n")
        self.rows.writeheader()

    def add(self, path: str, answer: Prediction | UserError) -> None:
        record = as_record(path, answer, self.run)
        record |= {f"p_{genre}": f"{p:.6f}" for genre, p in record.get("probabilities", {}).items()}
        self.rows.writerow({name: _cell(record[name]) for name in self.rows.fieldnames if name in record})
        self.stream.flush()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool) else printable(value) if isinstance(value, str) else value
