"""The rivals of hyper-dynamic training draw what they are said to, and the benchmark keeps what is done."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hyper_dynamic
import train_ecas_cnn
from catalogue import read_catalogue
from common import UserError
from distributed import Team
from predict import window_starts
from rules import ClassState, Schedule, Settings, learning_rate, training_overlap, update_classes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation
import training_cost
from recipes import check_rows, read_recipe, recipe_text
from rivals import SCHEDULES, Counted, InfoBatch, schedule_of, settings_of

TEAM = Team(torch.device("cpu"))
SCRIPT = Settings(name="x", features="mfcc", window=100)
LENGTHS = [1000] * 20
LABELS = np.arange(20) % 4
CLASSES = [ClassState() for _ in range(4)]


def settings(schedule: str, long: int = 300, **recipe: float) -> Settings:
    return settings_of(schedule, SCRIPT, long, recipe)


def draw(schedule: Schedule, epoch: int = 0, classes: list[ClassState] = CLASSES, seed: int = 0):
    return schedule.draw(LENGTHS, LABELS, classes, epoch, np.random.default_rng(seed))


def test_long_schedules_are_the_long_ones_and_short_ones_follow_the_recipe():
    lengths = {name: settings(name, 150, share=0.3, final_rate=0.5).epochs for name in SCHEDULES}
    assert {name for name, epochs in lengths.items() if epochs == 150} == {"plain-300", "published", "infobatch"}
    assert {epochs for epochs in lengths.values() if epochs != 150} == {SCRIPT.epochs // 2}
    assert settings("hyper-dynamic", share=0.3).share == 0.3
    assert settings("plain-300", share=0.3).share == 1
    assert settings("published", epochs=3).epochs == 300
    assert {settings(name, final_rate=0.5).final_rate for name in SCHEDULES} == {0.5}
    assert settings("hyper-dynamic") == SCRIPT


def test_a_recipe_is_what_makes_a_difference():
    """Long schedules have a share and a length of their own; what the script does anyway is no recipe."""
    changes = read_recipe("share=0.250 final_rate=.5 epochs=60")
    texts = {
        name: recipe_text(changes, lambda text, name=name: settings(name, **read_recipe(text))) for name in SCHEDULES
    }
    assert texts["hyper-dynamic"] == texts["random-drop"] == "epochs=60 final_rate=0.5"
    assert texts["plain-300"] == texts["published"] == "final_rate=0.5"


@pytest.mark.parametrize("word", ["features=mfcc", "name=x", "share", "depth=3"])
def test_a_recipe_of_what_is_no_option_is_refused(word):
    with pytest.raises(UserError, match=f"--recipe {word}: write NAME=N with one of epochs, "):
        read_recipe(word)


@pytest.mark.parametrize(
    "word", ["epochs=few", "epochs=1.5", "share=-1", "overlap=1.5", "width=nan", "learning_rate=inf"]
)
def test_a_recipe_that_cannot_be_trained_is_refused(word):
    with pytest.raises(UserError, match=f"--recipe {word}: (must be at least|.* is no )"):
        read_recipe(word)


def test_runs_of_other_defaults_are_refused(tmp_path):
    row = {"recipe": "epochs=60", "settings": "0123abcd"}
    check_rows(tmp_path, [row], lambda row: "0123abcd")
    with pytest.raises(UserError, match="a run of epochs=60 from before the script's settings changed"):
        check_rows(tmp_path, [row], lambda row: "4567abcd")


def test_the_committed_runs_are_those_of_the_recipes_they_name(repo):
    for module, name in ((training_cost, "training_cost.csv"), (ablation, "ablation.csv")):
        path = repo / "benchmarks" / "results" / name
        rows = training_cost.read_rows(path, module.FIELDS)
        assert len(rows) > 30
        check_rows(path, rows, module.fingerprint_of)


@pytest.mark.parametrize("name", ["plain-300", "published"])
def test_plain_draws_every_window(name):
    for epoch in (0, 299):
        song, start, factor = draw(schedule_of(name, settings(name), 0.0, []), epoch)
        assert factor is None
        for one in range(len(LENGTHS)):
            first = int(start[song == one].min())
            assert sorted(start[song == one]) == window_starts(1000, 100, 0.0, first).tolist()


def test_published_drops_a_graduate_for_good():
    rules = settings("published")
    states = [ClassState(0.9, graduated=True), *CLASSES[1:]]
    for _ in range(3):
        states = update_classes(states, [0.0] * 4, [5] * 4, 299, rules)
    assert [state.graduated for state in states] == [True, False, False, False]
    song, _, _ = draw(schedule_of("published", rules, 0.0, []), 299, states)
    assert set(LABELS[song]) == {1, 2, 3}


def test_no_class_is_treated_apart_in_plain_schedules():
    for name in ("plain-300", "infobatch", "plain-short", "random-drop"):
        for accuracy in (0.0, 1.0):
            states = update_classes(CLASSES, [accuracy, 0.5, 0.5, 0.5], [5] * 4, 299, settings(name))
            assert not any(state.graduated or state.struggling for state in states)
            assert len({state.weight for state in states}) == 1


@pytest.mark.parametrize("counts", [[7, 0, 100], [700, 3, 12]])
def test_equal_budgets_are_equal(counts):
    rules = settings("random-drop", 3)
    for epoch, count in enumerate(counts):
        song, start, _ = draw(Counted(rules, counts), epoch)
        assert len(song) == len(start) == count
        if count > 50:
            assert set(LABELS[song]) == {0, 1, 2, 3}
    short = schedule_of("plain-short", settings("plain-short", epochs=7), 0.5, counts)
    assert sum(short.counts) == sum(counts)
    assert max(short.counts) - min(short.counts) <= 1


def test_struggling_classes_draw_denser_windows():
    rules = settings("hyper-dynamic", 40)
    plain, struggling = ([ClassState(struggling=flag) for _ in range(4)] for flag in (False, True))
    counts = [
        len(Schedule(rules).draw([2000] * len(LABELS), LABELS, classes, 20, np.random.default_rng(0))[0])
        for classes in (plain, struggling)
    ]
    hops = [window_starts(2000, rules.window, training_overlap(ClassState(struggling=flag), rules)) for flag in (0, 1)]
    assert counts[1] / counts[0] == pytest.approx(len(hops[1]) / len(hops[0]), rel=0.05)
    assert counts[1] > 1.3 * counts[0]


def test_infobatch_leaves_out_half_of_the_easy_windows_and_counts_the_rest_twice():
    rules = settings("infobatch", 40)
    schedule = InfoBatch(rules)
    song, start, factor = draw(schedule)
    assert factor is None
    easy = song < 15
    schedule.learn(song, start, torch.from_numpy(np.where(easy, 0.1, 2.0)))
    kept_easy = []
    for seed in range(30):
        every = len(draw(Schedule(rules), 1, seed=seed)[0])
        song, start, factor = draw(schedule, 1, seed=seed)
        assert set(factor[song < 15]) == {2.0}
        assert (song >= 15).sum() == pytest.approx(every / 4, abs=5), "a hard window was left out"
        kept_easy.append((song < 15).sum() / (every * 3 / 4))
    assert np.mean(kept_easy) == pytest.approx(0.5, abs=0.04)
    song, _, factor = draw(schedule, 35)  # the last eighth
    assert factor is None
    assert len(song) > 300


def test_a_factor_scales_the_loss_of_its_window(mini_features, tmp_path):
    """Ones change nothing; a window of factor 0 leaves no trace in the weights."""
    catalogue = read_catalogue(mini_features[0])

    class Factors(Schedule):
        value = 1.0

        def draw(self, *args):
            song, start, _ = super().draw(*args)
            return song, start, np.full(len(song), self.value)

    quick = {"epochs": 1, "width": 0.02, "window": 48, "share": 0.2, "weight_decay": 0.0}
    rules = Settings(name="x", features="mfcc", **quick)
    ends = []
    for schedule in (None, Factors(rules), Factors(rules)):
        trainer = hyper_dynamic.Trainer(rules, train_ecas_cnn.NETWORK, catalogue, tmp_path, 3, TEAM, schedule=schedule)
        before = [p.detach().clone() for p in trainer.network.parameters()]
        if len(ends) == 2:
            schedule.value = 0.0
        trainer._train_epoch(0)
        ends.append((before, [p.detach() for p in trainer.network.parameters()]))
    assert all(torch.equal(one, two) for one, two in zip(ends[0][1], ends[1][1], strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(*ends[0], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(*ends[2], strict=True))


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_classs_weight_scales_the_loss_of_its_windows(mini_features, tmp_path, weight):
    rules = Settings(name="x", features="mfcc", width=0.02, window=48, mixup=0)
    trainer = hyper_dynamic.Trainer(rules, train_ecas_cnn.NETWORK, read_catalogue(mini_features[0]), tmp_path, 3, TEAM)
    trainer.state.classes = [ClassState(weight=weight), *(ClassState() for _ in trainer.state.classes[1:])]
    songs = len(trainer.labels)
    loss, each = trainer._loss(np.arange(songs), np.zeros(songs, dtype=np.int64), None, rules.window)
    expected = (each.numpy() * np.where(trainer.labels == 0, weight, 1)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_long_song_costs_the_memory_of_its_own_frames(mini_features, tmp_path):
    rules = Settings(name="x", features="mfcc", width=0.02, window=48)
    trainer = hyper_dynamic.Trainer(rules, train_ecas_cnn.NETWORK, read_catalogue(mini_features[0]), tmp_path, 3, TEAM)
    assert len(trainer.songs) == sum(max(rules.window, length) for length in trainer.lengths)


@pytest.mark.parametrize(("final", "average"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.9999)])
def test_the_loop_follows_the_settings_of_rate_and_average(mini_features, tmp_path, final, average):
    rules = Settings(
        name="x", features="mfcc", epochs=2, width=0.02, window=48, share=0.2, final_rate=final, average=average
    )
    trainer = hyper_dynamic.Trainer(rules, train_ecas_cnn.NETWORK, read_catalogue(mini_features[0]), tmp_path, 3, TEAM)
    for epoch in range(rules.epochs):
        trainer._train_epoch(epoch)
    steps = trainer.state.steps // rules.epochs
    expected = learning_rate(1 - 1 / (steps * rules.epochs), rules.learning_rate, final)
    assert trainer.optimiser.param_groups[0]["lr"] == pytest.approx(expected)
    same = [torch.equal(mean, now) for mean, now in zip(trainer._means, trainer._nows, strict=True)]
    assert all(same) == (average == 0)


def test_graduation_is_told_by_epoch_and_reported_as_published():
    def check(epoch: int, accuracy: float, graduated: bool) -> dict[str, object]:
        return {"epoch": epoch, "classes": {"jazz": {"accuracy": accuracy, "graduated": graduated}}}

    checks = [
        check(2, 0.4, False),
        check(5, 0.9, True),
        check(8, 0.95, True),
        check(11, 0.2, False),
        check(14, 1, True),
    ]
    assert training_cost.spans(checks, "jazz") == "6-12 15-15"
    assert training_cost.spans(checks[:1], "jazz") == ""
    assert training_cost.spans(checks[:3], "jazz") == "6-9"
    assert training_cost.reported(checks[:4], "jazz") == 0.9
    assert training_cost.reported(checks[:1], "jazz") == 0.4


def test_every_change_of_the_ablation_is_one():
    """From one of two recipes, of which the second has what the first has not."""
    other = "average=0.995 final_rate=0 weight_decay=0.02"
    for change in ablation.CHANGES:
        runs = [ablation.changed("train_ecas_cnn", recipe, change, 20) for recipe in ("", other)]
        bases = [ablation.changed("train_ecas_cnn", recipe, "none", 20) for recipe in ("", other)]
        assert (runs == bases) == (change == "none"), change
    with pytest.raises(UserError, match="--recipe shar=1"):
        ablation.changed("train_ecas_cnn", "shar=1", "none", 20)


def test_the_ablation_keeps_repeats_together_where_artists_are_not_known(mini_features, monkeypatch):
    catalogue = read_catalogue(mini_features[0])
    nobody = {track: dataclasses.replace(song, artist="") for track, song in catalogue.songs.items()}
    tracks = sorted(catalogue.splits["train"])
    pairs = list(zip(tracks[::2], tracks[1::2], strict=False))
    monkeypatch.setattr(ablation, "read_repeats", lambda _: pairs)
    for seed in range(3):
        splits = ablation.new_split(dataclasses.replace(catalogue, songs=nobody), seed).splits
        assert all(len({*pair} & {*splits["train"]}) in (0, 2) for pair in pairs)


def test_the_error_of_a_change_allows_for_splits_that_share_songs():
    def row(change: str, seed: int, right: int, windows: int) -> dict[str, str]:
        figures = {"songs": "100", "right": str(right), "log_loss": "0.5", "windows": str(windows)}
        return {"network": "n", "recipe": "", "epochs": "9", "change": change, "seed": str(seed), **figures}

    rows = [row("none", seed, 70, 1000) for seed in range(3)]
    rows += [row("better", seed, right, 500) for seed, right in ((0, 72), (1, 74))]
    _, (none, better) = ablation.summary(rows, "n", "", "9")
    assert none == ["none", "3", "70.0", "", "0.500", "", "1000", ""]
    error = 2**0.5 * (1 / 2 + 0.2 / 0.8) ** 0.5  # of gains of 2 and 4 points
    assert better == ["better", "2", "73.0", f"+3.0 +- {error:.1f}", "0.500", "+0.000 +- 0.000", "500", "-50 %"]
    assert ablation.summary(rows[3:], "n", "", "9")[1] == [["better", "2", *["-"] * 6]]


def test_the_benchmark_runs_and_goes_on(mini_features, run_script, tmp_path, capsys):
    args = ["--data", str(mini_features[0]), "--results", str(tmp_path), "--network", "train_ecas_cnn", "--width=0.02"]
    args += ["--epochs", "12", "--recipe", "window=48", "epochs=3", "short_windows=0.5"]
    first = run_script("benchmarks/training_cost.py", *args, "--schedules", "hyper-dynamic")
    assert "hyper-dynamic  seed 0" in first.stdout
    assert training_cost.main(args) == 1
    assert "--resume" in capsys.readouterr().err
    assert training_cost.main([*args, "--schedules", "hyper-dynamic", "random-drop", "plain-short", "--resume"]) == 0
    assert "hyper-dynamic  seed 0" not in capsys.readouterr().out
    rows = {row["schedule"]: row for row in csv.DictReader((tmp_path / "training_cost.csv").open())}
    assert set(rows) == {"hyper-dynamic", "random-drop", "plain-short"}
    ours = rows["hyper-dynamic"]
    assert rows["random-drop"]["windows_by_epoch"] == ours["windows_by_epoch"]
    assert rows["random-drop"]["frames"] == ours["frames"]
    assert rows["plain-short"]["windows"] == ours["windows"]
    assert int(rows["plain-short"]["frames"]) == 48 * int(ours["windows"]) > int(ours["frames"])
    assert all(0 <= int(row["test_right"]) <= int(row["test_songs"]) for row in rows.values())
    pictures = {"training_cost.csv", "training_cost.png", "graduation.png"}
    assert {path.name for path in tmp_path.iterdir()} == pictures
