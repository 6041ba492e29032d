"""Fusion and its choice, temperatures, intervals: against known values and the libraries they restate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import edit_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from tiny_data import write_tiny_data

import train_fusion
from catalogue import Catalogue, Song, read_catalogue
from common import UserError
from figures import (
    accuracy_without,
    bootstrap_difference,
    calibration_error,
    class_accuracies,
    confidence_threshold,
    draw_confusion,
    fit_temperature,
    mcnemar,
    perfect_calibration_error,
    rare_genres,
    song_figures,
    wilson_interval,
)
from files import file_sha256, write_array, write_json
from predict import is_confident, log_softmax
from tables import markdown, percent, with_tables
from train_fusion import (
    CANDIDATES,
    Fusion,
    Rows,
    _fit_linear,
    artist_folds,
    choose,
    cross_validated,
    fit_average,
    fit_weighted,
    log_loss,
)
from verify_model_features import linear_separability


def made_up_rows(songs: int, members: int = 3, classes: int = 4, seed: int = 0) -> Rows:
    """Songs of which every member knows something, the first the most."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=songs)
    labels[:classes] = range(classes)
    scores = rng.normal(size=(songs, members, classes))
    scores[np.arange(songs), :, labels] += np.linspace(3, 0.5, members)
    return Rows(log_softmax(scores).astype(np.float32), rng.normal(size=(songs, 12)).astype(np.float32), labels)


# ---------------------------------------------------------------- the map


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
def test_average_is_the_mean_of_log_probabilities(songs, members, classes, seed):
    scores = 5 * np.random.default_rng(seed).normal(size=(songs, members, classes))
    rows = Rows(log_softmax(scores).astype(np.float32), np.zeros((songs, 3)), np.zeros(songs, dtype=int))
    outputs = fit_average(rows)(rows.log_probabilities, rows.features)
    np.testing.assert_allclose(outputs, log_softmax(rows.log_probabilities.mean(axis=1)), atol=1e-5)


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_gives_log_probabilities(name):
    rows = replace(made_up_rows(60), kept=np.array([0, 3, 5]))
    outputs = CANDIDATES[name](rows)(rows.log_probabilities, rows.features)
    assert outputs.shape == (60, 4)
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(np.exp(outputs).sum(axis=1), 1, atol=1e-9)
    if name != "features":  # which hold nothing here
        assert (outputs.argmax(axis=1) == rows.labels).mean() > 0.8


def test_weights_follow_what_members_know():
    rows = made_up_rows(400)
    weights = fit_weighted(rows).coefficients.reshape(3, 4, 4)[:, 0, 0]
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert weights[0] > weights[1] > weights[2] > 0
    same = Rows(rows.log_probabilities[:, [0, 0]], rows.features, rows.labels)
    np.testing.assert_allclose(fit_weighted(same).coefficients[[0, 4], 0], 0.5, atol=1e-3)


def test_weights_of_few_songs_stay_near_equal():
    """Three songs that one of three members knows: too few to trust it alone."""
    scores = np.array([[[9.0, 0], [0, 9], [0, 9]]] * 3)
    rows = Rows(log_softmax(scores).astype(np.float32), np.zeros((3, 0)), np.zeros(3, dtype=int))
    assert 0.34 < fit_weighted(rows).coefficients[0, 0] < 0.75


def test_temperature_divides_the_scores():
    rng = np.random.default_rng(0)
    fusion = Fusion("any", rng.normal(size=(8, 4)), rng.normal(size=4), np.zeros(0, dtype=np.int64), temperature=2.0)
    rows = made_up_rows(5, members=2)
    scores = rows.log_probabilities.reshape(5, 8) @ fusion.coefficients + fusion.intercept
    expected = np.exp(scores / 2) / np.exp(scores / 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(fusion(rows.log_probabilities, rows.features)), expected, rtol=1e-9)


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 2, 3], [1, 3]], ids=["all", "one missing", "two classes"])
def test_linear_fit_is_scikit_learns(present):
    rng = np.random.default_rng(1)
    labels = rng.choice(present, 80)
    inputs = rng.normal([3, -20, 0.1, 5, 0], [1, 9, 0.01, 2, 1], (80, 5))
    inputs[:, 0] += labels
    fusion = _fit_linear("stacked", inputs, labels, 4, np.arange(5), c=0.5)
    standard = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-6)
    expected = LogisticRegression(C=0.5, max_iter=2000).fit(standard, labels).predict_proba(standard)
    outputs = np.exp(fusion(np.zeros((80, 1, 4)), inputs))
    missing = [c for c in range(4) if c not in present]
    assert outputs[:, missing].max(initial=0) < 1e-3
    np.testing.assert_allclose(
        outputs[:, present] / outputs[:, present].sum(axis=1, keepdims=True), expected, atol=2e-3
    )


# ---------------------------------------------------------------- the choice


def test_a_gain_within_its_standard_error_is_no_gain():
    rng = np.random.default_rng(0)
    average = rng.normal(1, 0.5, 100)
    noise = rng.normal(size=100)
    noise = (noise - noise.mean()) / noise.std()
    for gain, expected in ((-0.05, "average"), (0.09, "average"), (0.11, "stacked")):
        assert choose({"average": average, "stacked": average - gain - noise}) == expected
    assert choose({"average": average, "stacked": average - 1, "features": average - 2}) == "features"
    assert choose({"average": average, "stacked": average.copy()}) == "average"


def test_held_out_songs_are_scored_by_a_fit_without_them():
    rows = made_up_rows(10)
    seen = []

    def fit(some: Rows) -> Fusion:
        seen.append(some.features[:, 0].tolist())
        return fit_average(some)

    folds = [(np.arange(5, 10), np.arange(5)), (np.arange(5), np.arange(5, 10))]
    outputs = cross_validated(fit, rows, folds)
    assert seen == [rows.features[5:, 0].tolist(), rows.features[:5, 0].tolist()]
    np.testing.assert_allclose(outputs, fit_average(rows)(rows.log_probabilities, rows.features))
    np.testing.assert_array_equal(log_loss(outputs, rows.labels), [-outputs[i, c] for i, c in enumerate(rows.labels)])


def catalogue_of(artists: list[str]) -> tuple[Catalogue, list[str]]:
    songs = {
        f"song{index}": Song(f"song{index}", f"a/{index}", "", "a", artist, 30.0, 22_050, str(index), "ok")
        for index, artist in enumerate(artists)
    }
    return Catalogue(["a"], songs, {}, {}, Path()), list(songs)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["Ann", "ann", "Bob", "Cid", "Dee", ""]), min_size=3, max_size=40), st.integers(0, 99))
def test_folds_keep_artists_together(artists, seed):
    catalogue, tracks = catalogue_of(["Ann", "Bob", *artists])
    folds = artist_folds(catalogue, tracks, [], seed)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(len(tracks)))
    for rest, held in folds:
        names = [{catalogue.songs[tracks[i]].artist.casefold() for i in part} - {""} for part in (rest, held)]
        assert not names[0] & names[1]
        assert len(rest)
    again = artist_folds(catalogue, tracks, [], seed)
    assert [held.tolist() for _, held in again] == [held.tolist() for _, held in folds]


def test_folds_keep_repeats_together_where_artists_are_not_known():
    catalogue, tracks = catalogue_of([""] * 20)
    repeats = [("song3", "song11"), ("song11", "song19"), ("song4", "elsewhere")]
    for seed in range(5):
        for rest, held in artist_folds(catalogue, tracks, repeats, seed):
            assert len({3, 11, 19} & {*rest.tolist()}) in (0, 3), held


def test_one_artist_makes_no_folds():
    assert artist_folds(*catalogue_of(["Ann", "ann"]), [], seed=0) == []
    catalogue, tracks = catalogue_of(["", ""])
    assert artist_folds(catalogue, tracks, [("song0", "song1")], seed=0) == []


def test_the_choice_and_its_calibration_are_of_songs_that_it_was_not_fitted_on(tmp_path):
    """One member knows, two say noise and are sure of it: what is fitted to that looks better on the songs it saw."""
    data = write_tiny_data(tmp_path / "data", dict.fromkeys("abcd", (1, 25, 1)), frames=2)
    repeats = [["a.val0", "d.val3"], ["b.val1", "c.val9"]]
    edit_metadata(data, lambda metadata: metadata.update(repeats=[{"tracks": pair} for pair in repeats]))
    catalogue = read_catalogue(data)
    tracks = catalogue.splits["val"]
    labels = catalogue.labels(tracks)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(100, 3, 4))
    scores[np.arange(100), 0, labels] += 4
    scores[:, 1:] *= 3
    rows = Rows(log_softmax(scores).astype(np.float32), rng.normal(size=(100, 150)).astype(np.float32), labels)
    rows = replace(rows, kept=np.arange(150))
    folder, models = data / "fusion_features", tmp_path / "models"
    write_array(folder / "val_log_probabilities.npy", rows.log_probabilities)
    write_array(folder / "val_features.npy", rows.features)
    write_array(folder / "val_labels.npy", labels)
    write_array(folder / "val_tracks.npy", np.array(tracks))
    write_array(folder / "selector.npy", np.ones(150, dtype=bool))
    members = {}
    for name in ("one", "two", "three"):
        network = models / name / "model.safetensors"
        network.parent.mkdir(parents=True)
        network.write_text(name)
        members[name] = file_sha256(network)
    made = {"split": catalogue.split, "members": members, "settings": {}, "sizes": {}, "held_out": {"val": True}}
    write_json(folder / "provenance.json", made)
    assert train_fusion.main(["--data", str(data), "--models", str(models)]) == 0

    fusion, meta = train_fusion.load_fusion(models)
    folds = artist_folds(catalogue, tracks, repeats, 0)
    outputs = {name: cross_validated(fit, rows, folds) for name, fit in CANDIDATES.items()}
    for name, values in outputs.items():
        assert meta["candidates"][name]["log_loss"] == pytest.approx(log_loss(values, labels).mean())
    assert fusion.kind == choose({name: log_loss(values, labels) for name, values in outputs.items()}) != "average"
    assert fusion.temperature == pytest.approx(fit_temperature(outputs[fusion.kind], labels))
    threshold = confidence_threshold(log_softmax(outputs[fusion.kind], fusion.temperature), labels)
    assert meta["min_confidence"] == pytest.approx(threshold)
    assert threshold < 1


# ---------------------------------------------------------------- figures


def test_macro_f1_by_hand():
    figures = song_figures(np.eye(3)[[0, 0, 0, 1, 1]], np.array([0, 0, 1, 1, 2]), ["a", "b", "c"])
    assert figures["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    assert figures["song_accuracy"] == pytest.approx(3 / 5)


def test_rare_genres_are_some_of_them():
    assert rare_genres({"a": 3, "b": 14, "c": 15, "d": 0}) == ["a", "b"]
    assert rare_genres({"a": 3, "b": 14}) == []
    assert rare_genres({"a": 20}) == []


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval_known_values(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(1, 2000), st.data())
def test_wilson_interval_holds_the_proportion(count, data):
    right = data.draw(st.integers(0, count))
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count + 1e-12
    assert right / count - 1e-12 <= high <= 1
    assert wilson_interval(count - right, count) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_calibration_error_known_values():
    sure = np.array([[1.0, 0.0]] * 10)
    assert calibration_error(sure, np.zeros(10, dtype=int)) == pytest.approx(0)
    assert calibration_error(sure, np.ones(10, dtype=int)) == pytest.approx(1)
    assert calibration_error(sure, np.arange(10) % 2) == pytest.approx(0.5)
    two_bins = np.array([[0.85, 0.15]] * 2 + [[0.95, 0.05]] * 2)  # 35 % too sure, 5 % too unsure
    assert calibration_error(two_bins, np.array([0, 1, 0, 0])) == pytest.approx((0.35 + 0.05) / 2)
    one_of_ten_bins = np.array([[0.81, 0.19], [0.89, 0.11]] * 10)
    assert calibration_error(one_of_ten_bins, np.array([0, 0] * 7 + [0, 1] * 3)) == pytest.approx(0)  # 17 of 20
    four_fifths = np.tile([0.8, 0.2], (10, 1))
    assert calibration_error(four_fifths, np.array([0] * 8 + [1] * 2)) == pytest.approx(0)


def test_calibration_error_by_chance():
    assert perfect_calibration_error(np.array([[1.0, 0.0]] * 10), np.arange(10)) == (0, 0)
    few, many = (perfect_calibration_error(np.tile([0.8, 0.2], (n, 1)), np.arange(n)) for n in (25, 2500))
    assert few[0] == pytest.approx(0.08 * np.sqrt(2 / np.pi), rel=0.1)  # one bin, whose part has this standard error
    assert few[1] == pytest.approx(1.96 * 0.08, rel=0.15)
    assert many[0] == pytest.approx(few[0] / 10, rel=0.15)
    thrice = perfect_calibration_error(np.tile([0.8, 0.2], (75, 1)), np.tile(np.arange(25), 3))
    assert thrice == pytest.approx(few), "more answers about the same songs are no more songs"
    apart = np.array([[0.8, 0.2], [0.2, 0.8]] * 25)
    assert perfect_calibration_error(apart, np.repeat(np.arange(25), 2)) == pytest.approx(few), "nor if they differ"


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.3, 1))
def test_the_threshold_is_the_lowest_that_holds_its_promise(seed, count, wanted):
    rng = np.random.default_rng(seed)
    outputs, labels = log_softmax(rng.normal(0, 2, (count, 4))), rng.integers(0, 4, count)
    top, right = np.exp(outputs).max(axis=1), outputs.argmax(axis=1) == labels
    threshold = confidence_threshold(outputs, labels, wanted)
    answered = is_confident(top, threshold)
    assert not answered.any() or right[answered].mean() >= wanted
    lower = [right[top >= t] for t in top if t < threshold]
    assert all(wilson_interval(answers.sum(), len(answers))[0] < wanted for answers in lower)


def test_a_threshold_by_hand():
    """The 95 % interval of 35 right answers in 35 begins at 0.901, that of 34 in 34 at 0.898."""
    top = np.linspace(0.6, 0.95, 36)
    outputs, labels = np.log(np.stack([top, 1 - top], axis=1)), np.array([1] + [0] * 35)
    assert confidence_threshold(outputs, labels) == pytest.approx(top[1])
    assert confidence_threshold(outputs[:-1], labels[:-1]) == 1
    assert is_confident(np.array([top[1], top[0]]), top[1]).tolist() == [True, False]
    assert not is_confident(1.0, 1.0), "no threshold holds, so that nothing is confident, not even what is certain"
    assert confidence_threshold(outputs, labels, 0.8) == pytest.approx(top[0])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    rng = np.random.default_rng(0)
    truth = log_softmax(2 * rng.normal(size=(20_000, 5)))
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(axis=1)  # drawn from these probabilities
    assert fit_temperature(truth * temperature, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("songs", [1, 5, 100])
def test_right_answers_alone_are_no_certainty(songs):
    """All songs right: as sure as Laplace's rule of succession, (songs + 1) / (songs + 2)."""
    scores, labels = np.tile([0.0, 2.0], (songs, 1)), np.ones(songs, dtype=int)
    sure = np.exp(log_softmax(scores, fit_temperature(scores, labels)))[:, 1]
    assert sure == pytest.approx((songs + 1) / (songs + 2), abs=1e-3)


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=10), st.floats(0.1, 10))
def test_calibrated_sums_to_one_and_keeps_the_order(scores, temperature):
    outputs = log_softmax(np.array(scores), temperature)
    assert np.exp(outputs).sum() == pytest.approx(1)
    assert outputs[int(np.argmax(scores))] == outputs.max()


def test_class_without_songs_has_no_accuracy():
    assert class_accuracies(np.array([True, False, True]), np.array([0, 0, 2]), 3) == [0.5, None, 1.0]
    assert (percent(None), percent(0.5)) == ("-", "50.0")


def test_accuracy_without_rare_genres_counts_the_others_songs():
    confusion = [[8, 2, 0], [1, 1, 0], [5, 0, 5]]
    assert accuracy_without(confusion, ["a", "b", "c"], ["b"]) == pytest.approx(13 / 20)
    assert accuracy_without(confusion, ["a", "b", "c"], []) == pytest.approx(14 / 22)
    assert accuracy_without(confusion, ["a", "b", "c"], ["a", "b", "c"]) is None


def test_mcnemar_known_values():
    first, second = np.zeros(20, dtype=bool), np.zeros(20, dtype=bool)
    assert mcnemar(first, second) == 1
    first[:6] = True  # six songs that one alone gets right: p = 2 / 2^6
    assert mcnemar(first, second) == pytest.approx(2 / 64)
    second[6:12] = True
    assert mcnemar(first, second) == 1


def test_bootstrap_draws_a_tracks_answers_together():
    first, second = np.array([True] * 12 + [False] * 8), np.array([False] * 6 + [True] * 6 + [False] * 8)
    low, high = bootstrap_difference(first, second, np.arange(20))
    assert low < 0.3 < high
    assert high - low == pytest.approx(0.4, abs=0.1)  # 2 * 1.96 * sqrt(0.3 * 0.7 / 20)
    twice = bootstrap_difference(np.tile(first, 2), np.tile(second, 2), np.tile(np.arange(20), 2))
    assert twice == pytest.approx((low, high))
    assert bootstrap_difference(first, first, np.arange(20)) == (0, 0)
    assert bootstrap_difference(first, second, np.zeros(20)) == (-1, 1)


def test_separability_tells_signal_from_noise_and_too_few():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 12)
    noise = rng.normal(size=(60, 20)).astype(np.float32)
    signal = noise + 6 * np.eye(5, 20)[labels]
    accuracy, guess = linear_separability(signal, labels)
    assert accuracy > 0.9
    assert guess == pytest.approx(0.2)
    assert linear_separability(noise, labels)[0] < 0.45
    assert linear_separability(signal[:12], labels[:12]) is None
    assert linear_separability(signal[::6], labels[::6]) is None


# ---------------------------------------------------------------- documents


def test_tables_go_between_the_marks_and_stay_put(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "# Ähnlich\n<!-- evaluate.py -->\nold\n\\1 table\n<!-- end -->\nrest <!-- end -->\n", encoding="utf-8"
    )
    once = with_tables(path, "new \\1\n| a |", "evaluate.py")
    assert once == "# Ähnlich\n<!-- evaluate.py -->\nnew \\1\n| a |\n<!-- end -->\nrest <!-- end -->\n"
    path.write_text(once, encoding="utf-8")
    assert with_tables(path, "new \\1\n| a |", "evaluate.py") == once


def test_a_bar_in_a_genre_is_no_new_column():
    assert "| R\\|B | 3 |" in markdown("", [(["genre", "songs"], [["R|B", "3"]])])


@pytest.mark.parametrize(
    "genres", [["jazz", "techno"], ["Singer-Songwriter", "x" * 37, "y" * 200], list("abcdefghijkl")]
)
def test_a_confusion_picture_holds_its_title_and_names(tmp_path, genres):
    from matplotlib import image

    path, count = tmp_path / "confusion.png", len(genres)
    draw_confusion(5 * np.eye(count, dtype=int), genres, "cnn_bigru: 83.9 % of 131 test songs", path)
    pixels = image.imread(path)[..., :3]
    outermost = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    assert all((edge == 1).all() for edge in outermost), "something is cut off"
    dark = (pixels < (0.1, 0.3, 0.5)).all(axis=2).mean()  # the diagonal
    assert dark > 0.1 / count, "the matrix has no room"


def test_characters_that_the_font_lacks_are_told_in_one_line(tmp_path, capsys, recwarn):
    draw_confusion(np.eye(2, dtype=int), ["jazz", "\u6f14\u6b4c"], "two genres", tmp_path / "confusion.png")
    assert capsys.readouterr().err.count("boxes stand for characters that the font lacks") == 1
    assert not recwarn


def test_a_genre_with_dollar_signs_is_no_formula(tmp_path):
    draw_confusion(np.eye(2, dtype=int), ["Ca$h \\frac$", "A$AP"], "two genres", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").exists()


def test_documents_without_marks_or_absent_are_refused(tmp_path):
    path = tmp_path / "README.md"
    with pytest.raises(UserError, match=r"README\.md can't be read"):
        with_tables(path, "new", "evaluate.py")
    path.write_text("no marks here\n<!-- end -->\n")
    with pytest.raises(UserError, match=r"README\.md has no"):
        with_tables(path, "new", "evaluate.py")
    path.write_text("<!-- evaluate.py -->\nits end is lost\n<!-- evaluate.py --protocol artist -->\n<!-- end -->\n")
    with pytest.raises(UserError, match=r"README\.md has no"):
        with_tables(path, "new", "evaluate.py")
