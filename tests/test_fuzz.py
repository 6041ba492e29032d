"""What tests/fuzz/run.py fuzzes, for a second each: valid files, cut off and with bytes changed."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz.targets import SEEDS, TARGETS

CHANGED = 25  # copies of each seed


@pytest.mark.parametrize("name", TARGETS)
def test_cut_and_changed_files_end_in_a_line_or_an_answer(name, tmp_path):
    rng = np.random.default_rng(0)
    contents = [b"", *SEEDS[name]()]
    for seed in SEEDS[name]():
        contents += [seed[:place] for place in rng.integers(0, len(seed), CHANGED)]
        for _ in range(CHANGED):
            changed = np.frombuffer(seed, dtype=np.uint8).copy()
            places = rng.integers(0, min(len(changed), rng.choice([40, 400, 40_000])), rng.integers(1, 5))
            changed[places] = rng.integers(0, 256, len(places))
            contents.append(changed.tobytes())
    for number, content in enumerate(contents):
        folder = tmp_path / str(number)
        folder.mkdir()
        TARGETS[name](content, folder)
