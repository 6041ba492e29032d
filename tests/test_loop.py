"""What a training step does: windows changed, labels blended, weights decayed, gradients bounded, songs measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import write_tiny_data
from torch import nn

import train_bigru_cnn
from augment import Augmentation
from catalogue import read_catalogue
from distributed import Team
from extract_features import N_MFCC, load_features
from extract_model_features import load_members
from figures import confidence_threshold, fit_temperature
from hyper_dynamic import GRADIENT_NORM, Trainer
from predict import log_softmax, network_outputs
from rules import Settings, class_weights

UNCHANGED = Augmentation(*(0.0 for _ in dataclasses.fields(Augmentation)))
SONGS = 18


class Mean(nn.Module):
    """One layer on each band's mean over time; keeps what it heard last."""

    feature_size = N_MFCC

    def __init__(self, classes: int, width: float, rhythm: int):
        super().__init__()
        self.line = nn.Linear(N_MFCC, classes)

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.heard = windows
        return self.line(windows.mean(2)), windows.mean(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("even") / "data", dict.fromkeys("abc", (SONGS // 3, 2, 1)))


def trainer_on(data: Path, folder: Path, augmentation: Augmentation | None = UNCHANGED, **settings: float) -> Trainer:
    rules = Settings("x", "mfcc", window=32, share=1.0, **settings)
    return Trainer(rules, Mean, read_catalogue(data), folder, 0, Team(torch.device("cpu")), augmentation)


def heard_by(trainer: Trainer, start: int = 5) -> torch.Tensor:
    """What the network hears of a window of each song."""
    trainer._loss(np.arange(SONGS), np.full(SONGS, start), None, 32)
    return trainer.network.heard


def test_windows_are_changed_as_the_augmentation_says(data, tmp_path):
    plain = trainer_on(data, tmp_path, mixup=0.0)
    frames = torch.stack([plain.songs[first + 5 : first + 37].float() for first in plain.places])
    heard = heard_by(plain)
    torch.testing.assert_close(heard, (frames @ plain.basis @ plain.basis.T).transpose(1, 2), atol=1e-3, rtol=0)
    for change in ("tempo", "contrast"):
        changed = heard_by(trainer_on(data, tmp_path, dataclasses.replace(UNCHANGED, **{change: 0.2}), mixup=0.0))
        assert (changed - heard).abs().max() > 0.05, change
    assert trainer_on(data, tmp_path, None).augmentation == Augmentation()


def test_labels_are_blended_as_their_windows_are_and_smoothed(data, tmp_path):
    """Songs that are nothing but their label: what the network hears says how the labels were blended."""
    trainer = trainer_on(data, tmp_path, mixup=1.0, label_smoothing=0.1)
    for first, length, label in zip(trainer.places, trainer.lengths, trainer.labels, strict=True):
        trainer.songs[first : first + length] = torch.eye(N_MFCC)[label].half()
    blended = []
    for _ in range(5):
        loss, each = trainer._loss(np.arange(SONGS), np.zeros(SONGS, dtype=np.int64), None, 32)
        means = trainer.network.heard.mean(2)
        targets = 0.9 * means[:, :3] + 0.1 / 3
        expected = -(targets * trainer.network.line(means).log_softmax(1)).sum(1).detach()
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-3)
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-3)
        blended.append(((targets > 0.1) & (targets < 0.85)).any())
    assert any(blended)


def test_weights_of_layers_decay_and_gradients_are_bounded(data, tmp_path):
    trainer = trainer_on(data, tmp_path, mixup=0.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimiser.step()
    after = dict(trainer.network.named_parameters())
    rate = trainer.optimiser.param_groups[0]["lr"]
    left = 1 - rate * trainer.settings.weight_decay
    torch.testing.assert_close(after["line.weight"], before["line.weight"] * left, rtol=1e-6, atol=0)
    assert torch.equal(after["line.bias"], before["line.bias"])

    trainer.songs *= 1000
    trainer._train_epoch(0)
    norm = torch.cat([parameter.grad.flatten() for parameter in trainer.network.parameters()]).norm()
    assert norm == pytest.approx(GRADIENT_NORM, rel=1e-3)


def test_a_training_begins_with_weights_by_rarity(tmp_path):
    data = write_tiny_data(tmp_path / "data", {"a": (9, 2, 1), "b": (2, 2, 1), "c": (4, 2, 1)})
    trainer = trainer_on(data, tmp_path)
    weights = [state.weight for state in trainer.state.classes]
    assert weights == class_weights([None] * 3, [9, 2, 4], trainer.settings)
    assert weights[0] < weights[2] < weights[1]


def test_what_is_measured_is_what_the_released_network_says(tmp_path):
    data = write_tiny_data(tmp_path / "data", {"a": (8, 30, 1), "b": (8, 30, 1)})
    options = "--epochs 4 --check-every 1 --width 0.05 --window 32 --share 1 --batch-size 4 --threads 1 --device cpu"
    assert train_bigru_cnn.main(["--data", str(data), "--models", str(tmp_path), *options.split()]) == 0
    [member] = load_members(tmp_path, ["cnn_bigru"], "cpu")
    catalogue = read_catalogue(data)
    tracks = catalogue.splits["val"]
    songs, labels = load_features(catalogue, "melspectrogram", tracks), catalogue.labels(tracks)

    def said(limit: int | None) -> np.ndarray:
        outputs = network_outputs(member.network, songs, member.window, member.overlap, limit)
        return np.stack([windows.mean(axis=0) for windows, _ in outputs])

    last = json.loads((tmp_path / "cnn_bigru" / "log.jsonl").read_text().splitlines()[-1])
    # The release is in half precision, and a check during the training hears four windows a song
    assert last["val_loss"] == pytest.approx(-said(4)[np.arange(len(labels)), labels].mean(), abs=2e-3)
    outputs = said(None)
    assert member.meta["validation_accuracy"] == (outputs.argmax(1) == labels).mean()
    assert member.meta["temperature"] == pytest.approx(fit_temperature(outputs, labels), rel=1e-2)
    threshold = confidence_threshold(log_softmax(outputs, member.meta["temperature"]), labels)
    assert member.meta["min_confidence"] == pytest.approx(threshold, abs=2e-3)
    assert threshold < 1
