"""Prepare, extract, train and resume in any order, stopped at any write, with files lost and songs changed between.

Three short stories by default; ``STORIES=300 python -m pytest tests/test_any_order.py`` tells more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import extract_features
import prepare_gtzan_data
import train_bigru_cnn
from checkpoints import load_checkpoint
from files import file_sha256

STORIES = int(os.environ.get("STORIES", "3"))
OPTIONS = {"epochs": 2, "check-every": 1, "width": 0.05, "window": 32, "share": 0.5, "batch-size": 4}
QUICK = [f"--{name}={value}" for name, value in OPTIONS.items()] + ["--threads=1", "--device=cpu"]
NAMES = [f"{genre}/{genre}.{number:05d}.wav" for genre in ("polka", "samba") for number in range(5)]
EVER = NAMES[:4] + NAMES[5:9]  # the songs that are never taken away
stops = st.none() | st.tuples(st.integers(1, 25), st.booleans())


class Stop(BaseException):
    """What a kill is to the code."""


@contextmanager
def stopping(stop: tuple[int, bool] | None) -> Iterator[None]:
    """Stop the work at its n-th write, just before or just after the file gets its name."""
    honest, count = os.replace, 0

    def replace(*args: object) -> None:
        nonlocal count
        count += 1
        if stop == (count, False):
            raise Stop
        honest(*args)
        if stop == (count, True):
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield


def write_song(path: Path, take: int = 0) -> None:
    rng = np.random.default_rng([*path.name.encode(), take])
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * rng.standard_normal(round(1.1 * 22_050)), 22_050)


class Story(RuleBasedStateMachine):
    references: dict[frozenset[tuple[str, str]], dict[str, torch.Tensor]] = {}  # noqa: RUF012 (shared on purpose)

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        for name in EVER:
            write_song(self.root / "songs" / name)
        self.data, self.models = self.root / "data", self.root / "models"
        self.damaged = False

    def call(self, main, *args: str, stop: tuple[int, bool] | None = None) -> int | None:
        """A script's exit code, None if it was stopped; nothing but UserError may end it otherwise."""
        try:
            with stopping(stop):
                code = main(["--data", str(self.data), *args])
        except Stop:
            return None
        assert code in (0, 1)
        return code

    @initialize(ready=st.booleans())
    def begin(self, ready):
        if ready:
            self.prepare(0, None)
            self.extract(None)

    @rule(seed=st.integers(0, 1), stop=stops)
    def prepare(self, seed, stop):
        source = ("--source", str(self.root / "songs"), "--workers", "1", "--seed", str(seed))
        assert self.call(prepare_gtzan_data.main, *source, stop=stop) in (0, None)

    @rule(stop=stops)
    def extract(self, stop):
        self.call(extract_features.main, "--workers", "1", stop=stop)

    @rule(
        stop=st.none() | st.tuples(st.integers(1, 4), st.booleans()),
        how=st.sampled_from([[], ["--resume"], ["--force"]]),
    )
    def train(self, stop, how):
        options = ["--models", str(self.models), *QUICK, *how]
        self.call(train_bigru_cnn.main, *options, stop=stop)

    @rule(place=st.integers(0, 10**6), part=st.sampled_from([None, 0, 0.5, 0.99]))
    def lose(self, place, part):
        """A file goes, or is cut off as by a power cut."""
        files = sorted(path for folder in (self.data, self.models) for path in folder.rglob("*") if path.is_file())
        if files and part is None:
            files[place % len(files)].unlink()
        elif files:
            self.damaged = True
            os.truncate(files[place % len(files)], int(part * files[place % len(files)].stat().st_size))

    @rule(name=st.sampled_from(sorted({*NAMES} - {*EVER})))
    def come_or_go(self, name):
        path = self.root / "songs" / name
        path.unlink() if path.exists() else write_song(path)

    @rule(name=st.sampled_from(EVER), take=st.integers(0, 1))
    def change(self, name, take):
        write_song(self.root / "songs" / name, take)

    @invariant()
    def nothing_is_left_half_done(self):
        assert not [path for path in self.root.rglob(".*") if path.suffix in (".mgf-part", ".lock")]

    def teardown(self):
        """Whatever happened: all steps once more end as they do in a new folder, going on with what is there.

        After damage, which a step may only be able to name, they begin anew.
        """
        try:
            songs = frozenset((path.name, file_sha256(path)) for path in (self.root / "songs").rglob("*.wav"))
            if songs not in self.references:
                self.references[songs] = self.weights("new")
            found = self.weights(".", ["--force"] if self.damaged else [])
            assert found.keys() == self.references[songs].keys()
            assert all(torch.equal(found[name], value) for name, value in self.references[songs].items())
        finally:
            shutil.rmtree(self.root)

    def weights(self, where: str, force: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        self.data, self.models = self.root / where / "data", self.root / where / "models"
        source = str(self.root / "songs")
        assert self.call(prepare_gtzan_data.main, "--source", source, "--workers", "1") == 0
        assert self.call(extract_features.main, "--workers", "1", *force) == 0
        train = ("--models", str(self.models), *QUICK)
        if force or self.call(train_bigru_cnn.main, *train, "--resume"):  # refused: nothing is there to go on with
            assert self.call(train_bigru_cnn.main, *train, "--force") == 0
        return load_checkpoint(self.models / "cnn_bigru" / "model.safetensors", "")[0]


def test_any_order_of_steps_and_stops_ends_alike():
    options = settings(max_examples=STORIES, stateful_step_count=10)
    run_state_machine_as_test(Story, settings=options)


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_features_of_a_song_that_came_and_went_are_not_taken_for_the_others(tmp_path, last):
    """Killed at any write while songs have other contents, which then have the first ones again."""
    songs, data = tmp_path / "songs", tmp_path / "data"
    feature = data / "processed" / "mfcc" / "polka.00000.npy"

    def prepare_and_extract(take: int, stop: tuple[int, bool] | None = None) -> None:
        for name in NAMES:
            write_song(songs / name, take)
        assert prepare_gtzan_data.main(["--data", str(data), "--source", str(songs), "--workers", "1"]) == 0
        with stopping(stop):
            assert extract_features.main(["--data", str(data), "--workers", "1"]) == 0

    prepare_and_extract(0)
    first = feature.read_bytes()
    with pytest.raises(Stop):
        prepare_and_extract(1, stop=(last, True))
    prepare_and_extract(0)
    assert feature.read_bytes() == first
