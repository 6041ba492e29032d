"""Recipes of training as text ("epochs=48 share=0.2"), and the CSV files of the runs that followed them."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import UserError
from files import whole_file
from rules import OPTIONS, option_type

Row = dict[str, str]


def read_recipe(text: str) -> dict[str, Any]:
    """The settings in "epochs=48 share=0.2". Raises UserError if one is none or has a value that can't be."""
    changes = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in OPTIONS or not value:
            raise UserError(f"--recipe {word}: write NAME=N with one of {', '.join(OPTIONS)}")
        try:
            changes[name] = option_type(name)(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--recipe {word}: {error}") from None
    return changes


def recipe_text(recipe: dict[str, Any], settings_by: Callable[[str], Any]) -> str:
    """The part of a recipe that makes a difference to the settings, in order: "" is the training script's own."""
    plain, words = settings_by(""), [f"{name}={value:g}" for name, value in sorted(recipe.items())]
    return " ".join(word for word in words if settings_by(word) != plain)


def fingerprint(*settings: Any) -> str:
    """Tells settings (dataclasses) apart: the same recipe is another one when the script's defaults have changed."""
    text = json.dumps([dataclasses.asdict(part) for part in settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_rows(path: Path, fields: Sequence[str]) -> list[Row]:
    """The runs of a CSV that may be absent. Raises UserError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != tuple(fields):
            raise UserError(f"{path} has other columns: move it away or name another folder with --results")
        return list(reader)


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_rows(path: Path, rows: Sequence[Row], fingerprint_of: Callable[[Row], str]) -> None:
    """Raise UserError if a run's recipe means other settings now than it did then."""
    for row in rows:
        if row["settings"] != fingerprint_of(row):
            recipe = row["recipe"] or "the script's recipe"
            raise UserError(f"{path} has a run of {recipe} from before the script's settings changed: move it away")
