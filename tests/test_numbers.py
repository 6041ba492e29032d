"""Numbers that go wrong and classes that are odd: training is defined for all of them, or says so in one line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import write_tiny_data
from torch import nn

import hyper_dynamic
import train_bigru_cnn
import train_dpa_cnn
from catalogue import read_catalogue
from checkpoints import load_checkpoint
from common import UserError
from distributed import Team
from extract_model_features import MEMBERS, load_members
from stopping import resume_command
from train_fusion import CANDIDATES, Rows

OPTIONS = {"epochs": 4, "check-every": 1, "width": 0.05, "window": 32, "share": 1, "batch-size": 4}
OPTIONS |= {"struggle-after": 1, "short-windows": 0}  # an epoch has the same windows as the others but for graduation
QUICK = [f"--{name}={value}" for name, value in OPTIONS.items()] + ["--threads=1", "--device=cpu"]
EVEN = {"a": (3, 2, 1), "b": (3, 2, 1), "c": (3, 2, 1)}


def train(data: Path, *options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run a small training, which must succeed; its log and what its checkpoint says."""
    models = data.parent / "models"
    assert train_bigru_cnn.main(["--data", str(data), "--models", str(models), *QUICK, *options]) == 0
    [member] = load_members(models, ["cnn_bigru"], "cpu")
    log = [json.loads(line) for line in (models / "cnn_bigru" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 4
    for record in log:
        for state in record["classes"].values():
            assert 0.5 <= state["weight"] <= 2
            assert state["accuracy"] is None or 0 <= state["accuracy"] <= 1
        assert np.isfinite(record["val_loss"])
    assert 0 <= member.meta["label_conditioned_composite"] <= 1
    return log, member.meta


def windows(log: list[dict[str, Any]]) -> list[int]:
    """Windows of each epoch."""
    return np.diff([0, *(record["windows"] for record in log)]).tolist()


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("songs", "known"),
    [
        ({**EVEN, "c": (0, 2, 1)}, {"a", "b", "c"}),
        ({**EVEN, "c": (3, 0, 1)}, {"a", "b"}),
        ({**EVEN, "c": (0, 0, 1)}, {"a", "b"}),
        ({"a": (1, 1, 1), "b": (1, 1, 1), "c": (1, 1, 1)}, {"a", "b", "c"}),
        ({"a": (9, 1, 0), "b": (1, 5, 0)}, {"a", "b"}),
    ],
    ids=["none to train on", "none to validate", "neither", "one song each", "uneven"],
)
def test_any_classes_are_trained(tmp_path, songs, known):
    log, meta = train(write_tiny_data(tmp_path / "data", songs))
    assert meta["genres"] == sorted(songs)
    for record in log:
        assert {genre for genre, state in record["classes"].items() if state["accuracy"] is not None} == known
        assert np.mean([state["weight"] for state in record["classes"].values()]) == pytest.approx(1, abs=1e-6)
    never = set(songs) - known
    assert not any(record["classes"][genre]["graduated"] for record in log for genre in never)


def test_all_classes_graduate_at_once(tmp_path):
    log, _ = train(write_tiny_data(tmp_path / "data", EVEN), "--graduate-at", "0", "--consolidation", "0.25")
    assert all(state["graduated"] for record in log for state in record["classes"].values())
    assert len(log[0]["moves"]) == 3
    full, *rehearsal, last = windows(log)
    assert all(0.1 < count / full < 0.45 for count in rehearsal), "a quarter of the windows"
    assert last / full == pytest.approx(1, abs=0.25), "consolidation trains every class in full"


@pytest.mark.parametrize("name", MEMBERS)
def test_a_network_with_a_tempogram_is_trained_and_known_again(tmp_path, capsys, name):
    where = ["--data", str(write_tiny_data(tmp_path / "data", EVEN)), "--models", str(tmp_path)]
    script = importlib.import_module(MEMBERS[name])
    assert script.main([*where, *QUICK, "--rhythm", "1"]) == 0
    [member] = load_members(tmp_path, [name], "cpu")
    assert member.network.rhythm is not None
    assert script.main([*where, *QUICK, "--resume"]) == 1
    assert "was made with --rhythm 1: repeat its options" in capsys.readouterr().err


def test_no_class_ever_graduates(tmp_path):
    log, _ = train(write_tiny_data(tmp_path / "data", EVEN), "--graduate-at", "2")
    assert not any(state["graduated"] for record in log for state in record["classes"].values())
    assert min(windows(log)) / max(windows(log)) > 0.7


def test_an_epoch_without_a_window_is_no_error(tmp_path):
    log, _ = train(write_tiny_data(tmp_path / "data", EVEN), "--share", "0.001")
    assert log[0]["loss"] is None
    assert windows(log)[0] < 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_songs_is_refused(tmp_path, capsys, split):
    counts = (0, 2, 1) if split == "train" else (2, 0, 1)
    data = write_tiny_data(tmp_path / "data", dict.fromkeys("ab", counts))
    assert train_bigru_cnn.main(["--data", str(data), "--models", str(tmp_path / "models"), *QUICK]) == 1
    assert f"there are no {split} songs: run prepare_gtzan_data.py" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("kind", CANDIDATES)
@pytest.mark.parametrize("labels", [[1] * 8, [0, 1] * 4, [0] * 7 + [2]], ids=["one class", "two of three", "one song"])
def test_every_fusion_is_defined_whatever_classes_it_sees(kind, labels):
    rng = np.random.default_rng(0)
    outputs = np.log(rng.dirichlet(np.ones(3), (8, 2))).astype(np.float32)
    features = rng.normal(0, 1, (8, 5)).astype(np.float32)
    features[:, 0] = 1  # never varies
    fusion = CANDIDATES[kind](Rows(outputs, features, np.array(labels), kept=np.arange(5)))
    result = fusion(outputs, features)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(np.exp(result).sum(axis=1), 1)
    if kind in ("stacked", "features") and labels == [1] * 8:
        assert (result.argmax(axis=1) == 1).all()


# ---------------------------------------------------------------- numbers


class Explosive(nn.Module):
    """Its outputs are finite, and its gradient isn't: that of a square root at 0."""

    feature_size = 4

    def __init__(self, classes: int, width: float, rhythm: int):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))
        self.line = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = x[:, :4].mean(2) * (1 + self.zero.sqrt())
        return self.line(feature), feature


def test_an_exploding_gradient_ends_the_run_before_it_spoils_the_weights(tmp_path):
    catalogue = read_catalogue(write_tiny_data(tmp_path / "data", EVEN))
    settings = hyper_dynamic.Settings("explosive", "mfcc", epochs=3, window=32, share=1.0, check_every=1)
    trainer = hyper_dynamic.Trainer(settings, Explosive, catalogue, tmp_path / "models", 0, Team(torch.device("cpu")))
    with pytest.raises(UserError, match=r"the gradient is (nan|inf) in epoch 1: try a smaller --learning-rate"):
        trainer.run(resume=False)
    for network in (trainer.network, trainer.average):
        assert all(value.isfinite().all() for value in network.state_dict().values())
    assert not list((tmp_path / "models").glob("*.safetensors"))


def test_a_loss_that_is_no_number_leaves_the_last_good_epoch(tmp_path, monkeypatch, capsys):
    data, models = write_tiny_data(tmp_path / "data", EVEN), tmp_path / "models"
    honest = hyper_dynamic.Trainer._loss

    def poisoned(self, *batch):
        loss, each = honest(self, *batch)
        return loss * (float("nan") if self.state.epoch == 2 else 1), each

    monkeypatch.setattr(hyper_dynamic.Trainer, "_loss", poisoned)
    command = ["--data", str(data), "--models", str(models), *QUICK]
    assert train_dpa_cnn.main(command) == 1
    assert "the loss is nan in epoch 3: try a smaller --learning-rate" in capsys.readouterr().err
    assert load_checkpoint(models / "dpa_cnn" / "latest.safetensors", "")[1]["progress"]["epoch"] == 2
    monkeypatch.undo()
    assert train_dpa_cnn.main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("decay", "what"), [("0.2", "too large for half precision"), ("1e9", "no numbers after epoch 1")]
)
def test_weights_that_the_last_step_spoils_are_not_released(tmp_path, capsys, decay, what):
    data, models = write_tiny_data(tmp_path / "data", EVEN), tmp_path / "models"
    command = ["--data", str(data), "--models", str(models), *QUICK]
    assert train_dpa_cnn.main(command) == 0
    good = (models / "dpa_cnn" / "model.safetensors").read_bytes()
    two_steps = ["--epochs=1", "--batch-size=18", "--learning-rate=1e30", f"--weight-decay={decay}"]
    assert train_dpa_cnn.main([*command, *two_steps]) == 1
    assert f"{what}: try a smaller --learning-rate" in capsys.readouterr().err
    assert (models / "dpa_cnn" / "model.safetensors").read_bytes() == good


def test_a_training_that_was_stopped_is_given_up_only_when_told_to(tmp_path, monkeypatch, capsys):
    data, models = write_tiny_data(tmp_path / "data", EVEN), tmp_path / "models"
    folder, command = models / "cnn_bigru", ["--data", str(data), "--models", str(models), *QUICK]

    def fail(*_: object) -> None:
        raise UserError("as if it were stopped")

    monkeypatch.setattr(hyper_dynamic.Trainer, "_release", fail)
    assert train_bigru_cnn.main(command) == 1
    monkeypatch.undo()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options in ([], ["--epochs=9"]):
        capsys.readouterr()
        assert train_bigru_cnn.main([*command, *options]) == 1
        line = capsys.readouterr().err
        assert "stopped after 4 of 4 epochs: go on with --resume, or give it up with --force" in line
        assert line.count("\n") == 1
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert train_bigru_cnn.main([*command, "--resume"]) == 0
    assert train_bigru_cnn.main([*command, "--seed=1", "--epochs=1"]) == 0  # the one before came to its end
    (folder / "model.safetensors").unlink()
    assert train_bigru_cnn.main(command) == 1
    (folder / "latest.safetensors").write_bytes(b"nothing that could go on")
    assert train_bigru_cnn.main(command) == 0
    (folder / "model.safetensors").unlink()
    assert train_bigru_cnn.main([*command, "--force"]) == 0


@pytest.mark.parametrize("damage", [b"\0\0\n", b"[]\n", b"{}\n", b"\xff\n"])
def test_a_damaged_log_is_one_line_and_the_run_goes_on_without_it(tmp_path, capsys, damage):
    data, log = write_tiny_data(tmp_path / "data", EVEN), tmp_path / "models" / "cnn_bigru" / "log.jsonl"
    command = ["--data", str(data), "--models", str(tmp_path / "models"), *QUICK]
    assert train_bigru_cnn.main(command) == 0
    log.write_bytes(damage)
    capsys.readouterr()
    assert train_bigru_cnn.main([*command, "--resume"]) == 1
    assert f"{log} is damaged: delete it, then go on with --resume" in capsys.readouterr().err
    log.unlink()
    assert train_bigru_cnn.main([*command, "--resume"]) == 0


def test_the_command_that_goes_on_gives_nothing_up():
    words = resume_command(["python"], ["--force", "--epochs=9"])
    assert words.endswith(" --epochs=9 --resume")
    assert "--force" not in words
