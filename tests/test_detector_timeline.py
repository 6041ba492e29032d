"""Sections of a song: they fill it, and neighbours differ."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector_timeline import sections, window_borders
from predict import log_softmax, window_starts

GENRES = list("abcdefghij")


@given(st.integers(0, 2**32 - 1), st.integers(1, 2000), st.floats(0, 100))
def test_sections_fill_the_song_and_differ_from_their_neighbours(seed, frames, start):
    rng = np.random.default_rng(seed)
    starts = window_starts(frames, 64, 0.5)
    seconds = frames * 512 / 22_050
    borders = window_borders(starts, 64, np.ones(frames, dtype=bool), start, seconds)
    assert len(borders) == len(starts) + 1
    assert (np.diff(borders) >= 0).all()
    found = sections(log_softmax(rng.normal(0, 3, (len(starts), 10))), borders, GENRES)
    assert (found[0].start_s, found[-1].end_s) == (start, start + seconds)
    for one, other in pairwise(found):
        assert one.end_s == other.start_s
        assert one.genre != other.genre
    assert all(0.1 <= section.probability <= 1 for section in found)


@pytest.mark.parametrize(("ends", "after"), [(700, 5), (701, 6), (749, 6), (750, 6)])
def test_windows_lie_where_they_are_in_the_file_though_silence_is_left_out(ends, after):
    sounding = np.ones(1500, dtype=bool)
    sounding[:400] = sounding[ends : ends + 200] = False
    starts = window_starts(int(sounding.sum()), 100, 0.5)
    borders = window_borders(starts, 100, sounding, 5.0, 35.0) - 5
    frames = borders * 22_050 / 512
    assert (borders[0], borders[-1]) == (0, 35)
    assert frames[1] == pytest.approx(400 + 75)  # between the first window's middle and the second's
    assert frames[after - 1] == pytest.approx(400 + 50 * after - 25)
    assert frames[after] == pytest.approx(ends + 200)  # where sound begins again
    assert frames[after + 1] == pytest.approx(600 + 50 * after + 75)
    assert frames[-2] == pytest.approx(1500 - 75)


def test_sections_by_hand():
    scores = np.zeros((20, 3))
    scores[:10, 0] = scores[10:, 2] = 4
    scores[4] = [0, 5, 0]  # one odd window is smoothed away
    starts = np.arange(20) * 130
    found = sections(log_softmax(scores), window_borders(starts, 260, np.ones(2730, dtype=bool), 0, 63.4), GENRES)
    assert [section.genre for section in found] == ["a", "c"]
    assert found[0].end_s == pytest.approx((9.5 * 130 + 130) / 43.07, abs=0.01)
