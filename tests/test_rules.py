"""The rules of the hyper-dynamic loop: windows, graduation, struggling, weights, rates, defined for every class."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from predict import window_hop, window_starts
from rules import (
    ClassState,
    Settings,
    class_weights,
    draw_windows,
    in_consolidation,
    is_graduated,
    is_struggling,
    learning_rate,
    smooth,
    training_overlap,
    training_rate,
    training_window,
    update_classes,
)

RULES = Settings("any", "melspectrogram", epochs=90)
parts = st.floats(0, 1)
accuracies = st.none() | parts
classes = st.lists(st.tuples(accuracies, st.integers(0, 800)), min_size=1, max_size=12).filter(
    lambda drawn: any(songs for _, songs in drawn)
)
states = st.builds(ClassState, accuracies, st.booleans(), st.booleans(), st.floats(0.5, 2))


# ---------------------------------------------------------------- windows


def test_gtzan_song_has_nineteen_windows():
    assert len(window_starts(1292, 130, 0.5)) == 19
    assert window_starts(1292, 130, 0.5)[:3].tolist() == [0, 65, 130]


@given(st.integers(1, 3000), st.integers(1, 400), st.floats(0, 0.95))
def test_windows_cover_every_frame_and_end_with_the_song(frames, window, overlap):
    starts = window_starts(frames, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, frames - window)
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= window_hop(window, overlap)).all()
    covered = np.zeros(frames, dtype=bool)
    for start in starts:
        covered[start : start + window] = True
    assert covered.all()


@given(st.integers(1, 3000), st.integers(1, 400), st.floats(0, 0.95), st.data())
def test_offset_moves_the_grid_within_the_song(frames, window, overlap, data):
    offset = data.draw(st.integers(0, window_hop(window, overlap) - 1))
    starts = window_starts(frames, window, overlap, offset)
    last = max(0, frames - window)
    assert starts[0] == min(offset, last)
    assert starts[-1] == last
    assert (np.diff(starts) > 0).all()


songs = st.lists(st.tuples(st.integers(1, 700), st.sampled_from([0.0, 0.5, 0.75]), parts), min_size=1, max_size=8)


@given(songs, st.integers(1, 300), st.integers(0, 99))
def test_drawn_windows_lie_inside_their_songs_and_follow_the_seed(songs, window, seed):
    lengths, overlaps, rates = zip(*songs, strict=True)
    song, start = draw_windows(lengths, overlaps, rates, window, np.random.default_rng(seed))
    assert len(set(zip(song.tolist(), start.tolist(), strict=True))) == len(song)
    assert (start >= 0).all()
    assert (start <= np.maximum(0, np.array(lengths)[song] - window)).all()
    again = draw_windows(lengths, overlaps, rates, window, np.random.default_rng(seed))
    np.testing.assert_array_equal(song, again[0])
    np.testing.assert_array_equal(start, again[1])


def test_another_seed_draws_other_windows():
    one, two = (draw_windows([1292] * 20, [0.5] * 20, [0.3] * 20, 130, np.random.default_rng(s)) for s in (0, 1))
    assert one[1].tolist() != two[1].tolist()


@pytest.mark.parametrize("overlap", [0.5, 0.75])
@pytest.mark.parametrize("rate", [0.03, 0.12, 0.5, 1.0])
def test_mean_count_is_the_rate(rate, overlap):
    songs, frames, window = 3000, 1292, 260
    song, _ = draw_windows([frames] * songs, [overlap] * songs, [rate] * songs, window, np.random.default_rng(0))
    offsets = range(window_hop(window, overlap))
    grid = np.mean([len(window_starts(frames, window, overlap, offset)) for offset in offsets])
    assert len(song) / songs == pytest.approx(rate * grid, abs=0.06)


# ---------------------------------------------------------------- smoothing, graduation, struggling


@given(accuracies, accuracies, parts)
def test_smoothing_lies_between_past_and_present(past, measured, smoothing):
    smoothed = smooth(past, measured, smoothing)
    if measured is None:
        assert smoothed == past
    else:
        low, high = sorted((past or 0.0, measured))
        assert low - 1e-12 <= smoothed <= high + 1e-12


def test_smoothing_starts_from_nothing_so_that_one_lucky_check_is_not_enough():
    first = smooth(None, 1.0, RULES.smoothing)
    assert first == pytest.approx(1 - RULES.smoothing)
    assert not is_graduated(first, False, RULES)


@given(parts, parts, parts)
def test_graduation_has_hysteresis(accuracy, threshold, margin):
    rules = dataclasses.replace(RULES, graduate_at=threshold, demote_margin=margin)
    assert is_graduated(accuracy, False, rules) == (accuracy >= threshold)
    assert is_graduated(accuracy, True, rules) == (accuracy >= threshold - margin)
    assert is_graduated(threshold, False, rules)
    if is_graduated(accuracy, False, rules):
        assert is_graduated(accuracy, True, rules)


@given(parts, st.integers(0, 89))
def test_struggling_needs_low_accuracy_and_some_epochs(accuracy, epoch):
    assert is_struggling(accuracy, epoch, RULES) == (accuracy < 0.5 and epoch >= 0.17 * 90)
    late = dataclasses.replace(RULES, struggle_after=0.5)
    assert [is_struggling(0.49, check, late) for check in (44, 45)] == [False, True]
    assert not is_struggling(0.5, 89, late)


def test_a_class_without_validation_songs_neither_graduates_nor_struggles():
    before = [ClassState(), ClassState(accuracy=0.9, graduated=True)]
    for epoch in (0, 30, 89):
        missing, other = update_classes(before, [None, 0.9], [10, 10], epoch, RULES)
        assert (missing.accuracy, missing.graduated, missing.struggling) == (None, False, False)
        assert 0.5 <= missing.weight <= 2
        assert training_rate(missing, epoch, RULES) == RULES.share
        assert other.graduated


@given(st.lists(accuracies, min_size=1, max_size=10), st.integers(0, 89))
def test_update_applies_each_rule_to_each_class(measured, epoch):
    before = [ClassState(accuracy=0.8, graduated=index % 2 == 0) for index in range(len(measured))]
    after = update_classes(before, measured, [50] * len(measured), epoch, RULES)
    for was, now, seen in zip(before, after, measured, strict=True):
        assert now.accuracy == smooth(was.accuracy, seen, RULES.smoothing)
        assert now.graduated == is_graduated(now.accuracy, was.graduated, RULES)
        assert now.struggling == is_struggling(now.accuracy, epoch, RULES)
    expected = class_weights([state.accuracy for state in after], [50] * len(measured), RULES)
    assert [state.weight for state in after] == expected


@pytest.mark.parametrize(("measured", "graduates"), [(1.0, 10), (0.0, 0)])
def test_all_or_no_classes_graduated_is_defined(measured, graduates):
    state = [ClassState() for _ in range(10)]
    for epoch in range(0, 90, 3):
        state = update_classes(state, [measured] * 10, [70] * 10, epoch, RULES)
        assert all(training_rate(one, epoch, RULES) > 0 for one in state)
        assert [one.weight for one in state] == pytest.approx([1.0] * 10)
    assert sum(one.graduated for one in state) == graduates
    assert sum(one.struggling for one in state) == 10 - graduates


def test_a_class_that_falls_is_demoted_and_rises_again():
    state, seen = [ClassState()], []
    for epoch, measured in enumerate([1.0] * 8 + [0.0] * 2 + [1.0] * 8):
        state = update_classes(state, [measured], [70], epoch, RULES)
        seen.append(state[0].graduated)
    changes = [now for was, now in zip([False, *seen], seen, strict=False) if was != now]
    assert changes == [True, False, True]


# ---------------------------------------------------------------- weights


@given(classes, st.floats(0, 5))
def test_class_weights_are_bounded_with_mean_one(classes, strength):
    known, songs = zip(*classes, strict=True)
    weights = class_weights(known, songs, dataclasses.replace(RULES, weight_strength=strength))
    assert all(0.5 <= weight <= 2 for weight in weights)
    assert np.mean(weights) == pytest.approx(1, abs=1e-6)


@given(classes, st.data())
def test_more_errors_never_give_a_smaller_weight(classes, data):
    known, songs = map(list, zip(*classes, strict=True))
    index = data.draw(st.integers(0, len(known) - 1))
    assume(known[index] is not None)
    before = class_weights(known, songs, RULES)[index]
    known[index] = data.draw(st.floats(0, known[index]))
    assert class_weights(known, songs, RULES)[index] >= before - 1e-9


@given(classes, st.data())
def test_a_rarer_class_never_gets_a_smaller_weight(classes, data):
    known, songs = map(list, zip(*classes, strict=True))
    one, two = (data.draw(st.integers(0, len(known) - 1)) for _ in range(2))
    assume(songs[one])
    known[two], songs[two] = known[one], data.draw(st.integers(1, songs[one]))
    weights = class_weights(known, songs, RULES)
    assert weights[two] >= weights[one]


@given(classes, st.lists(st.tuples(st.integers(0, 12), accuracies), max_size=3))
def test_classes_without_training_songs_leave_the_others_weights_alone(classes, absent):
    expected = class_weights(*zip(*classes, strict=True), RULES)
    for place, accuracy in absent:
        classes.insert(place, (accuracy, 0))
        expected.insert(place, 1.0)
    assert class_weights(*zip(*classes, strict=True), RULES) == expected


def test_weights_differ_where_errors_or_counts_differ():
    worse, better = class_weights([0.4, 0.9], [70, 70], RULES)
    assert worse > 1.1 > 0.9 > better
    assert class_weights([None, None], [25, 100], RULES) == pytest.approx([4 / 3, 2 / 3])  # roots of the counts


# ---------------------------------------------------------------- rates


@given(states, st.integers(0, 89), st.floats(0.01, 1), st.floats(0.01, 1), parts)
def test_training_rate_is_never_zero_and_full_in_consolidation(state, epoch, share, rehearsal, consolidation):
    rules = dataclasses.replace(RULES, share=share, rehearsal_rate=rehearsal, consolidation=consolidation)
    rate = training_rate(state, epoch, rules)
    assert 0 < rate <= share
    if not state.graduated or in_consolidation(epoch, rules):
        assert rate == share
    else:
        assert rate == pytest.approx(share * rehearsal)


def test_consolidation_is_the_last_part_of_the_schedule():
    assert [epoch for epoch in range(90) if in_consolidation(epoch, RULES)] == list(range(72, 90))
    assert not any(in_consolidation(epoch, dataclasses.replace(RULES, consolidation=0)) for epoch in range(120))


def test_windows_are_half_as_long_early_on():
    rules = dataclasses.replace(RULES, window=261, short_windows=0.5)
    assert [training_window(epoch, rules) for epoch in (0, 44, 45, 89)] == [130, 130, 261, 261]
    assert training_window(0, dataclasses.replace(rules, short_windows=0.0)) == 261
    assert training_window(0, dataclasses.replace(rules, window=1)) == 1


@given(states)
def test_only_struggling_classes_get_denser_windows(state):
    assert training_overlap(state, RULES) == (0.75 if state.struggling else 0.5)


@settings(max_examples=30)
@given(st.floats(1e-5, 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_learning_rate_is_one_cycle_down_to_its_final_part(peak, final):
    curve = np.array([learning_rate(done, peak, final) for done in np.linspace(0, 1, 2001)])
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(final * peak, abs=1e-12)
    assert learning_rate(1.4, peak, final) == curve[-1]  # in a refit
    assert (curve[1:-1] > 0).all()
    assert curve.max() == pytest.approx(peak)
    top = 300  # 15 %
    assert (np.diff(curve[: top + 1]) > 0).all()
    assert (np.diff(curve[top:]) < 0).all() if final < 1 else np.ptp(curve[top:]) < 1e-12
