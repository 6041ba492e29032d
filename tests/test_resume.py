"""A training that is killed and resumed ends as one that was not; the seed decides everything else."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import equal, log, no_larger_files, one_line, stopped_in, weights

import train_bigru_cnn
import train_ecas_cnn
from checkpoints import load_checkpoint, save_checkpoint
from files import WriteError
from hyper_dynamic import Trainer
from rules import ADDED

NAME = "ecas_cnn"
OPTIONS = ("--epochs", 5, "--check-every", 2, "--width", 0.05, "--window", 48, "--share", 0.4, "--threads", 1)
OPTIONS = tuple(map(str, (*OPTIONS, "--struggle-after", 0, "--graduate-at", 0.1, "--device", "cpu")))  # rules at work


def arguments(data: Path, models: Path, *more: object) -> list[str]:
    return ["--data", str(data), "--models", str(models), *OPTIONS, *map(str, more)]


@pytest.fixture(scope="module")
def data(mini_features) -> Path:
    return mini_features[0]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A models folder with a run that nothing interrupted."""
    models = tmp_path_factory.mktemp("whole")
    assert train_ecas_cnn.main(arguments(data, models, "--seed", 7)) == 0
    return models


def progress(models: Path) -> dict[str, Any]:
    meta = load_checkpoint(models / NAME / "model.safetensors", "")[1]
    return {key: value for key, value in meta["progress"].items() if key != "seconds"}


def test_the_rules_are_at_work_in_this_run(whole):
    classes = [state for record in log(whole) for state in record.get("classes", {}).values()]
    assert {state["struggling"] for state in classes} == {True, False} or any(s["graduated"] for s in classes)
    assert len({state["weight"] for state in classes}) > 1


def command(repo: Path, data: Path, models: Path) -> list[str]:
    return [sys.executable, str(repo / f"train_{NAME}.py"), *arguments(data, models, "--seed", 7)]


def run_until(words: list[str], models: Path, epochs: int, number: int) -> tuple[int, list[str]]:
    """Start a training, send it a signal once the log holds so many epochs; its exit code and what is on stderr."""
    path = models / NAME / "log.jsonl"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 200
        while not (path.with_name("latest.safetensors").exists() and path.read_text().count("\n") >= epochs):
            assert run.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(number)
        errors = run.communicate(timeout=200)[1]
    assert not (models / NAME / "model.safetensors").exists()
    return run.returncode, errors.splitlines()


def test_killed_and_resumed_equals_uninterrupted(repo, data, whole, tmp_path):
    words = command(repo, data, tmp_path)
    path = tmp_path / NAME / "log.jsonl"
    run_until(words, tmp_path, 2, signal.SIGKILL)
    with path.open("a") as stream:
        stream.write('{"epoch": 4, "lo')  # what a kill may leave: half a line, half a checkpoint
    (tmp_path / NAME / ".latest.safetensors.x.mgf-part").write_bytes(b"half")

    subprocess.run([*words, "--resume"], check=True, capture_output=True, timeout=200)
    assert equal(tmp_path, whole)
    assert log(tmp_path) == log(whole)
    assert progress(tmp_path) == progress(whole)
    files = ["latest.safetensors", "log.jsonl", "model.safetensors"]
    assert sorted(file.name for file in (tmp_path / NAME).iterdir()) == files


def test_stopped_within_an_epoch_and_resumed_as_told_equals_uninterrupted(repo, data, whole, tmp_path):
    words = command(repo, data, tmp_path)
    for epochs, number, code in ((1, signal.SIGTERM, 143), (3, signal.SIGINT, 130)):
        found, lines = run_until(words, tmp_path, epochs, number)
        assert (found, len(lines)) == (code, 1), lines
        tensors, meta = load_checkpoint(tmp_path / NAME / "latest.safetensors", "")
        assert meta["progress"]["losses"], "it didn't stop within an epoch"
        assert "random.cpu" in tensors
        words = shlex.split(lines[0].partition("go on with: ")[2])
        assert words.count("--resume") == 1
    subprocess.run(words, check=True, capture_output=True, timeout=200)
    assert equal(tmp_path, whole)
    assert log(tmp_path) == log(whole)
    assert progress(tmp_path) == progress(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits on files")
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(data, tmp_path, monkeypatch, capsys):
    words = arguments(data, tmp_path, "--seed", 7)
    with stopped_in(1, monkeypatch):
        assert train_ecas_cnn.main(words) == 128 + signal.SIGTERM
    kept = tmp_path / NAME / "latest.safetensors"
    before = kept.read_bytes()
    capsys.readouterr()
    with no_larger_files(len(before) // 2):
        assert train_ecas_cnn.main([*words, "--resume"]) == 1
    assert str(kept.parent) in one_line(capsys)
    assert kept.read_bytes() == before
    assert not list(kept.parent.glob(".*.mgf-part"))


def test_the_seed_decides_the_run(data, whole, tmp_path):
    torch.rand(3)  # whatever was drawn before
    assert train_ecas_cnn.main(arguments(data, tmp_path / "same", "--seed", 7)) == 0
    assert equal(tmp_path / "same", whole)
    assert log(tmp_path / "same") == log(whole)
    assert train_ecas_cnn.main(arguments(data, tmp_path / "other", "--seed", 8)) == 0
    assert not equal(tmp_path / "other", whole)


def test_resuming_a_finished_run_changes_nothing(data, whole, tmp_path):
    models = shutil.copytree(whole, tmp_path / "models")
    assert train_ecas_cnn.main(arguments(data, models, "--seed", 7, "--resume")) == 0
    assert equal(models, whole)
    assert log(models) == log(whole)


@pytest.mark.parametrize(
    ("change", "what"),
    [(("--batch-size", 8), "--batch-size "), (("--seed", 8), "another seed, "), (("--epochs", 6), "with --epochs 5: ")],
)
def test_resume_with_other_options_is_refused(data, whole, tmp_path, capsys, change, what):
    models = shutil.copytree(whole, tmp_path / "models")
    assert train_ecas_cnn.main(arguments(data, models, "--seed", 7, *change, "--resume")) == 1
    line = one_line(capsys)
    assert what in line
    assert "latest.safetensors" in line
    assert equal(models, whole)
    assert log(models) == log(whole)


def test_resume_of_nothing_is_refused(data, tmp_path, capsys):
    assert train_ecas_cnn.main(arguments(data, tmp_path, "--resume")) == 1
    assert "without --resume" in one_line(capsys)


@pytest.mark.parametrize("saved", [False, True])
def test_a_full_disk_asks_for_resume_where_there_is_something_to_resume(data, tmp_path, monkeypatch, capsys, saved):
    def run(trainer, resume):
        if saved:
            trainer._save_latest()
        raise WriteError("the log can't be written: make room, then run this again")

    monkeypatch.setattr(Trainer, "run", run)
    assert train_ecas_cnn.main(arguments(data, tmp_path)) == 1
    assert one_line(capsys).endswith("run this again" + " with --resume" * saved)


def test_a_loss_that_is_no_number_ends_the_run(data, tmp_path, capsys):
    assert train_bigru_cnn.main(arguments(data, tmp_path, "--learning-rate", 1e30)) == 1
    line = one_line(capsys)
    assert "the loss is " in line
    assert "--learning-rate" in line
    assert not (tmp_path / "cnn_bigru" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "option", ["--epochs 0", "--overlap 1", "--share 0", "--batch-size 1", "--learning-rate nan", "--width inf"]
)
def test_options_out_of_range_are_bad_usage(capsys, option):
    with pytest.raises(SystemExit) as caught:
        train_ecas_cnn.main(option.split())
    assert caught.value.code == 2
    assert option.split()[0] in capsys.readouterr().err


def test_the_end_of_the_schedule_is_released(whole):
    assert load_checkpoint(whole / NAME / "model.safetensors", "")[1]["released_epoch"] == 5
    last, _ = load_checkpoint(whole / NAME / "latest.safetensors", "")
    assert all(
        torch.equal(last[f"average.{name}"].half(), value)
        for name, value in weights(whole).items()
        if value.is_floating_point()
    )


def test_a_training_from_before_a_setting_was_added_goes_on(data, whole, tmp_path):
    models = shutil.copytree(whole, tmp_path / "models")
    latest = models / NAME / "latest.safetensors"
    tensors, meta = load_checkpoint(latest, "")
    settings = {name: value for name, value in meta["settings"].items() if name not in ADDED}
    save_checkpoint(latest, tensors, meta | {"settings": settings})
    assert train_ecas_cnn.main(arguments(data, models, "--seed", 7, "--resume")) == 0
    assert equal(models, whole)


def test_the_least_validation_loss_is_released_where_that_is_asked_for(data, tmp_path):
    """The learning rate is so high that the last check is not the best, with one seed or another."""
    options = ("--last", 0, "--check-every", 1, "--learning-rate", 1)
    for seed in range(9):
        assert train_ecas_cnn.main(arguments(data, tmp_path, *options, "--seed", seed)) == 0
        losses = [record["val_loss"] for record in log(tmp_path)]
        if min(losses) < losses[-1]:  # which seeds have it depends on the processor
            break
    best, meta = load_checkpoint(tmp_path / NAME / "best.safetensors", "")
    assert meta["progress"]["best_loss"] == min(losses) < losses[-1]
    assert load_checkpoint(tmp_path / NAME / "model.safetensors", "")[1]["released_epoch"] == 1 + np.argmin(losses)
    assert all(
        torch.equal(best[name].half(), value) for name, value in weights(tmp_path).items() if value.is_floating_point()
    )
