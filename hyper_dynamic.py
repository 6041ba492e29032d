"""The hyper-dynamic loop: devices, seeds, windows, graduation, training, checkpoints.

The three ``train_*.py`` scripts hand a network and its settings to ``training_command``; everything that
happens to it happens here. torch is imported where it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints import fill_network, load_checkpoint, save_checkpoint
from common import (
    Catalogue,
    UserError,
    argument_parser,
    complain,
    format_table,
    library_versions,
    progress,
    read_catalogue,
    write_text,
)
from extract_features import N_MELS, N_MFCC, load_features
from predict import (
    calibrated,
    class_accuracies,
    confidence_threshold,
    fit_temperature,
    network_outputs,
    window_hop,
    window_starts,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

EMA_DECAY = 0.995  # of the weights that are validated and released
GRADIENT_NORM = 5.0
VALIDATION_WINDOWS = 6  # a song, in the checks during training; the final figure takes all


# ---------------------------------------------------------------- settings


def setting(default: Any, text: str, low: float = 0, high: float = math.inf) -> Any:
    """A field that is an option of the training scripts, refused outside its range."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run; every field but the first two is an option of the script."""

    name: str  # of the folder below models/
    features: str  # "melspectrogram" or "mfcc"
    epochs: int = setting(90, "length of the schedule; it has no early stopping", low=1)
    batch_size: int = setting(16, "windows a step", low=2)
    learning_rate: float = setting(2e-3, "peak of the one-cycle schedule")
    weight_decay: float = setting(0.02, "of AdamW, on weight matrices only")
    window: int = setting(260, "frames a window, 43 a second; the published method has 130", low=1)
    overlap: float = setting(0.5, "of neighbouring windows", high=0.95)
    share: float = setting(0.12, "part of all windows an epoch draws; the published method has 1", low=0.001, high=1)
    label_smoothing: float = setting(0.1, "part of each target spread over all classes", high=1)
    mixup: float = setting(0.3, "alpha of mixup; 0 switches it off")
    width: float = setting(1.0, "factor on the channels of the network", low=0.01)
    graduate_at: float = setting(0.85, "smoothed validation accuracy at which a class graduates")
    demote_margin: float = setting(0.10, "a graduate this far below graduate-at goes back to full training", high=1)
    smoothing: float = setting(0.6, "weight of the past in the smoothed accuracy", high=1)
    rehearsal_rate: float = setting(0.25, "part of its windows that a graduated class still trains on", 0.01, 1)
    struggle_below: float = setting(0.5, "smoothed accuracy below which a class struggles", high=1)
    struggle_after: float = setting(0.17, "part of the schedule before a class can struggle", high=1)
    struggling_overlap: float = setting(0.75, "overlap of training windows of a struggling class", high=0.95)
    weight_strength: float = setting(1.0, "how far class weights follow the errors")
    consolidation: float = setting(0.2, "last part of the schedule, in which every class trains in full", high=1)
    check_every: int = setting(3, "epochs between two looks at the validation songs", low=1)


# ---------------------------------------------------------------- device, seed


def pick_device(choice: str = "auto") -> torch.device:
    """MPS, else CUDA, else CPU; or the one asked for. Raises UserError if that one isn't there."""
    import torch

    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, present in there.items() if present)
    if not there[choice]:
        raise UserError(f"--device {choice}: no such device here; try --device auto")
    return torch.device(choice)


def set_seed(*parts: int) -> np.random.Generator:
    """Seed torch and give a numpy generator; the same numbers give the same draws."""
    import torch

    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
    return np.random.default_rng(parts)


# ---------------------------------------------------------------- windows of an epoch


def draw_windows(
    lengths: Sequence[int],
    overlaps: Sequence[float],
    rates: Sequence[float],
    window: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of one epoch, shuffled.

    Each song's windows lie on a grid of its own overlap that starts at a random frame; ``rate`` of them are
    drawn without replacement, rounded at random so that the mean is exact.

    Returns
    -------
    song, start : int64 (windows,)
    """
    song, start = [], []
    for index, (frames, overlap, rate) in enumerate(zip(lengths, overlaps, rates, strict=True)):
        starts = window_starts(frames, window, overlap, int(rng.integers(window_hop(window, overlap))))
        count = min(len(starts), int(rate * len(starts) + rng.random()))
        song.append(np.full(count, index, dtype=np.int64))
        start.append(rng.choice(starts, count, replace=False))
    order = rng.permutation(sum(map(len, song)))
    return np.concatenate(song)[order], np.concatenate(start)[order]


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True)
class ClassState:
    """What the loop knows of one class."""

    accuracy: float | None = None  # smoothed over checks; None before the first, or without validation songs
    graduated: bool = False
    struggling: bool = False
    weight: float = 1.0  # of the class in the loss


def smooth(past: float | None, measured: float | None, smoothing: float) -> float | None:
    """Exponential mean from 0 on, so that neither one lucky check nor the noise of 15 songs decides.

    None is no measurement: a class without validation songs.
    """
    return past if measured is None else smoothing * (past or 0.0) + (1 - smoothing) * measured


def is_graduated(accuracy: float | None, graduated: bool, rules: Settings) -> bool:
    """A class graduates at the threshold and is demoted once it is below the threshold less the margin."""
    return accuracy is not None and accuracy >= rules.graduate_at - (rules.demote_margin if graduated else 0.0)


def is_struggling(accuracy: float | None, epoch: int, rules: Settings) -> bool:
    """Below the threshold, once the schedule is far enough on for that to mean something."""
    return accuracy is not None and accuracy < rules.struggle_below and epoch >= rules.struggle_after * rules.epochs


def class_weights(accuracies: Sequence[float | None], songs: Sequence[int], rules: Settings) -> list[float]:
    """Loss weights between 0.5 and 2 with mean 1, larger for classes with more errors and for rare classes.

    ``songs`` are the training songs of each class; a class of unknown accuracy counts as average.
    """
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    average = sum(known) / max(1, len(known))
    lacks = np.array([0.0 if accuracy is None else average - accuracy for accuracy in accuracies])
    rarity = np.maximum(songs, 1) ** -0.5
    raw = np.exp(rules.weight_strength * lacks) * rarity / rarity.mean()
    low, high = -raw.max(), 2.0  # the shift that makes the bounded weights' mean 1 lies between these
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(raw + shift, 0.5, 2).mean() < 1 else (low, shift)
    return [float(weight) for weight in np.clip(raw + high, 0.5, 2)]


def update_classes(
    states: Sequence[ClassState], measured: Sequence[float | None], songs: Sequence[int], epoch: int, rules: Settings
) -> list[ClassState]:
    """Every class's state after a check: per-class validation accuracy ``measured`` at ``epoch``."""
    accuracies = [smooth(state.accuracy, now, rules.smoothing) for state, now in zip(states, measured, strict=True)]
    return [
        ClassState(
            accuracy,
            is_graduated(accuracy, state.graduated, rules),
            is_struggling(accuracy, epoch, rules),
            weight,
        )
        for state, accuracy, weight in zip(states, accuracies, class_weights(accuracies, songs, rules), strict=True)
    ]


def in_consolidation(epoch: int, rules: Settings) -> bool:
    return epoch >= rules.epochs * (1 - rules.consolidation)


def training_rate(state: ClassState, epoch: int, rules: Settings) -> float:
    """Part of its windows that a class trains on in an epoch: never 0."""
    rehearses = state.graduated and not in_consolidation(epoch, rules)
    return rules.share * (rules.rehearsal_rate if rehearses else 1.0)


def training_overlap(state: ClassState, rules: Settings) -> float:
    return rules.struggling_overlap if state.struggling else rules.overlap


def learning_rate(done: float, peak: float) -> float:
    """One cycle over the schedule: up linearly for 15 % of it, down to 0 on a half cosine (``done`` from 0 to 1)."""
    return peak * (done / 0.15 if done < 0.15 else (1 + math.cos(math.pi * (done - 0.15) / 0.85)) / 2)


# ---------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run stands, beside its tensors; saved with every epoch."""

    classes: list[ClassState]
    best_accuracies: list[float]  # each class's best check: what the published method reports
    epoch: int = 0  # the next one
    steps: int = 0
    windows: int = 0  # trained on so far
    seconds: float = 0.0
    best_loss: float | None = None  # of the validation checks


class Trainer:
    """One training run of one network."""

    def __init__(
        self,
        settings: Settings,
        build: Callable[..., nn.Module],
        catalogue: Catalogue,
        folder: Path,
        seed: int,
        device: str,
    ):
        import torch

        from augment import Augmentation, dct_basis

        self.settings, self.catalogue, self.folder, self.seed = settings, catalogue, folder, seed
        self.device = pick_device(device)
        set_seed(seed)
        self.network = build(len(catalogue.genres), settings.width).to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        matrices = [p for p in self.network.parameters() if p.ndim > 1]
        vectors = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        )
        self.augmentation = Augmentation()
        self.basis = dct_basis(N_MFCC, N_MELS).to(self.device) if settings.features == "mfcc" else None

        tracks = catalogue.splits["train"]
        features = load_features(catalogue, settings.features, tracks)
        self.lengths = [feature.shape[1] for feature in features]
        self.songs = torch.zeros(
            len(tracks), max(settings.window, *self.lengths), len(features[0]), dtype=torch.float16
        )
        for index, feature in enumerate(features):
            self.songs[index, : feature.shape[1]] = torch.from_numpy(feature.T)
        self.songs = self.songs.to(self.device)
        self.frames = torch.tensor(self.lengths, device=self.device)
        self.labels = catalogue.labels(tracks)
        self.class_songs = np.bincount(self.labels, minlength=len(catalogue.genres)).tolist()
        self.val_labels = catalogue.labels(catalogue.splits["val"])
        self.val_features = load_features(catalogue, settings.features, catalogue.splits["val"])
        weights = class_weights([None for _ in catalogue.genres], self.class_songs, settings)
        self.state = Progress([ClassState(weight=weight) for weight in weights], [0.0 for _ in weights])

    # -------- an epoch

    def run(self, resume: bool) -> dict[str, Any]:
        """Train to the end of the schedule, release the best averaged weights, return that checkpoint's meta."""
        log = self.folder / "log.jsonl"
        for rest in self.folder.glob(".*.part"):  # of a run that was killed
            rest.unlink()
        if resume:
            self._load_latest()
        records = [line for line in _lines(log) if json.loads(line)["epoch"] < self.state.epoch] if resume else []
        write_text(log, "".join(records))
        for epoch in progress(range(self.state.epoch, self.settings.epochs), self.settings.name):
            started = time.monotonic()
            record = self._train_epoch(epoch)
            if (epoch + 1) % self.settings.check_every == 0 or epoch + 1 == self.settings.epochs:
                record |= self._check(epoch)
            self.state.epoch = epoch + 1
            self.state.seconds += time.monotonic() - started
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record | {"seconds": round(self.state.seconds, 1)}) + "\n")
            self._save_latest()
        return self._release()

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        import torch

        rules, classes = self.settings, self.state.classes
        song, start = draw_windows(
            self.lengths,
            [training_overlap(classes[label], rules) for label in self.labels],
            [training_rate(classes[label], epoch, rules) for label in self.labels],
            rules.window,
            set_seed(self.seed, 1, epoch),
        )
        batches = [
            batch
            for batch in np.array_split(np.arange(len(song)), max(1, round(len(song) / rules.batch_size)))
            if len(batch) > 1  # batch normalisation needs two
        ]
        self.network.train()
        losses = []
        for step, batch in enumerate(batches):
            rate = learning_rate((epoch + step / len(batches)) / rules.epochs, rules.learning_rate)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            loss = self._loss(song[batch], start[batch])
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}: try a smaller --learning-rate")
            self.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
            self.optimiser.step()
            self.state.steps += 1
            self._follow()
            losses.append(loss.item())
        self.state.windows += len(song)
        return {"epoch": epoch, "loss": float(np.mean(losses)) if losses else None, "windows": self.state.windows}

    def _loss(self, song: np.ndarray, start: np.ndarray) -> torch.Tensor:
        """Class-weighted cross-entropy of augmented, mixed windows."""
        import torch
        from torch.nn.functional import cross_entropy

        from augment import change_windows, cut_windows, mixup

        rules = self.settings
        which, first = torch.from_numpy(song).to(self.device), torch.from_numpy(start).to(self.device)
        windows = cut_windows(self.songs, self.frames, which, first, rules.window, self.augmentation.tempo)
        windows, partner, part = mixup(change_windows(windows, self.augmentation, self.basis), rules.mixup)
        logits, _ = self.network(windows.transpose(1, 2))
        targets = torch.from_numpy(self.labels[song]).to(self.device)
        weights = torch.tensor([state.weight for state in self.state.classes], device=self.device)

        def loss(targets: torch.Tensor) -> torch.Tensor:
            each = cross_entropy(logits, targets, reduction="none", label_smoothing=rules.label_smoothing)
            return (each * weights[targets]).mean()

        return part * loss(targets) + (1 - part) * loss(targets[partner])

    def _follow(self) -> None:
        """Move the averaged weights towards the trained ones; faster at first."""
        import torch

        decay = min(EMA_DECAY, (1 + self.state.steps) / (10 + self.state.steps))
        with torch.no_grad():
            for mean, now in zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - decay)
                else:
                    mean.copy_(now)

    # -------- validation

    def _validate(self, limit: int | None) -> np.ndarray:
        """Mean log-probabilities over windows of the validation songs by the averaged weights, (songs, classes)."""
        outputs = network_outputs(self.average, self.val_features, self.settings.window, self.settings.overlap, limit)
        return np.stack([windows.mean(axis=0) for windows, _ in outputs])

    def _check(self, epoch: int) -> dict[str, Any]:
        """Look at the validation songs, apply the rules, keep the weights with the least loss so far."""
        outputs = self._validate(VALIDATION_WINDOWS)
        right = outputs.argmax(1) == self.val_labels
        loss = -float(outputs[np.arange(len(right)), self.val_labels].mean())
        genres, before = self.catalogue.genres, self.state.classes
        measured = class_accuracies(right, self.val_labels, len(genres))
        self.state.classes = update_classes(before, measured, self.class_songs, epoch, self.settings)
        pairs = zip(self.state.best_accuracies, measured, strict=True)
        self.state.best_accuracies = [max(best, now or 0.0) for best, now in pairs]
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_loss = loss
            save_checkpoint(self.folder / "best.safetensors", self.average.state_dict(), self._meta())
        moves = [
            f"{genre} {'graduates' if now.graduated else 'is demoted'}"
            for genre, was, now in zip(genres, before, self.state.classes, strict=True)
            if was.graduated != now.graduated
        ]
        print(
            f"epoch {epoch + 1:4d}  validation {100 * right.mean():5.1f} %  loss {loss:.3f}  windows "
            f"{self.state.windows:7d}  graduated {sum(state.graduated for state in self.state.classes)}"
            + "".join(f"  {move}" for move in moves),
            flush=True,
        )
        return {
            "val_accuracy": float(right.mean()),
            "val_loss": loss,
            "moves": moves,
            "classes": {genre: asdict(state) for genre, state in zip(genres, self.state.classes, strict=True)},
        }

    # -------- what is kept

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "network": self.settings.name,
            "genres": self.catalogue.genres,
            "settings": asdict(self.settings),
            "seed": self.seed,
            "split": self.catalogue.split,
            "songs": {split: len(tracks) for split, tracks in self.catalogue.splits.items()},
            "versions": library_versions(),
            "progress": asdict(self.state),
        }

    def _save_latest(self) -> None:
        import torch

        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        save_checkpoint(self.folder / "latest.safetensors", tensors, self._meta())

    def _load_latest(self) -> None:
        path = self.folder / "latest.safetensors"
        tensors, meta = load_checkpoint(path, "this script without --resume")
        expected = self._meta()
        for key in ("settings", "seed", "split", "genres"):
            if meta[key] != expected[key]:
                raise UserError(f"{path} was made with another {key}: repeat its options, or start without --resume")
        parts: dict[str, dict[str, torch.Tensor]] = {"network": {}, "average": {}, "optimiser": {}}
        for name, value in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = value
        fill_network(self.network, parts["network"], path)
        fill_network(self.average, parts["average"], path)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in parts["optimiser"].items():
            index, rest = name.split(".")
            state.setdefault(int(index), {})[rest] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        saved = meta["progress"]
        self.state = Progress(**saved | {"classes": [ClassState(**values) for values in saved["classes"]]})

    def _release(self) -> dict[str, Any]:
        """Round the weights of the check with the least validation loss to half precision, calibrate, save them.

        Test songs have no part in this choice; the validation figure is the best of many checks.
        """
        best, path = self.folder / "best.safetensors", self.folder / "model.safetensors"
        tensors, chosen = load_checkpoint(best, "this script without --resume")
        halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        fill_network(self.average, halves, best)
        outputs = self._validate(None)
        songs = np.bincount(self.val_labels, minlength=len(self.catalogue.genres))
        temperature = fit_temperature(outputs, self.val_labels)
        meta = self._meta() | {
            "released_epoch": chosen["progress"]["epoch"] + 1,
            "temperature": temperature,
            "min_confidence": confidence_threshold(calibrated(outputs, temperature), self.val_labels),
            "validation_accuracy": float((outputs.argmax(1) == self.val_labels).mean()),
            "label_conditioned_composite": float(np.dot(songs, self.state.best_accuracies) / songs.sum()),
        }
        save_checkpoint(path, halves, meta)
        return meta


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may be absent or cut off in its last line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def training_command(
    argv: Sequence[str] | None, doc: str | None, settings: Settings, build: Callable[..., nn.Module]
) -> int:
    """``main`` of a training script: options from the settings, one run, a short table."""
    parser = argument_parser(doc, "--data", "--models", "--seed", "--device", "--threads")
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch of this run")
    options = {option.name: option for option in dataclasses.fields(settings) if option.metadata}
    for name, option in options.items():
        default, text = getattr(settings, name), option.metadata["help"]
        parser.add_argument(_flag(name), type=type(default), default=default, metavar="N", help=text)
    args = parser.parse_args(argv)
    for name, option in options.items():
        low, high = option.metadata["low"], option.metadata["high"]
        if not low <= getattr(args, name) <= high:  # NaN is in no range
            parser.error(f"{_flag(name)} must be at least {low}" + ("" if high == math.inf else f" and at most {high}"))
    settings = dataclasses.replace(settings, **{name: getattr(args, name) for name in options})

    import torch

    torch.set_num_threads(args.threads)
    catalogue = read_catalogue(args.data)
    trainer = Trainer(settings, build, catalogue, args.models / settings.name, args.seed, args.device)
    print(f"{settings.name} on {trainer.device}, {len(trainer.labels)} training songs, split {catalogue.split['name']}")
    try:
        meta = trainer.run(args.resume)
    except KeyboardInterrupt:
        complain("interrupted; the same command with --resume goes on after the last finished epoch")
        return 130
    rows = [
        ("validation accuracy, %", f"{100 * meta['validation_accuracy']:.1f}"),
        ("label_conditioned_composite, %", f"{100 * meta['label_conditioned_composite']:.1f}"),
        ("temperature", f"{meta['temperature']:.2f}"),
        ("released epoch", meta["released_epoch"]),
        ("windows trained on", trainer.state.windows),
        ("seconds", f"{trainer.state.seconds:.0f}"),
    ]
    print(format_table((settings.name, ""), rows))
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
