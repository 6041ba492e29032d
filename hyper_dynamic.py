"""The hyper-dynamic loop: devices, seeds, training by the rules of ``rules.py``, checkpoints.

``training_command.py`` hands a network and its settings to ``Trainer``; everything that happens to it happens here.
torch is imported where it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catalogue import Catalogue
from checkpoints import fill_network, load_checkpoint, save_checkpoint, strides
from common import UserError, library_versions, progress
from distributed import Team
from extract_features import dct_basis, load_features
from figures import class_accuracies, confidence_threshold, fit_temperature
from files import write_text
from predict import log_softmax, network_outputs
from rules import (
    ADDED,
    ClassState,
    Schedule,
    Settings,
    class_weights,
    flag,
    learning_rate,
    training_window,
    update_classes,
)
from stopping import Stopped, random_state, set_random_state

if TYPE_CHECKING:
    import torch
    from torch import nn

    from augment import Augmentation

GRADIENT_NORM = 5.0
VALIDATION_WINDOWS = 4  # a song, in the checks during training; the final figure takes all


# ---------------------------------------------------------------- device, seed


def pick_device(choice: str = "auto") -> torch.device:
    """MPS, else CUDA, else CPU; or the one asked for. Raises UserError if that one is absent or unknown."""
    import torch

    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, present in there.items() if present)
    if not there.get(choice):
        raise UserError(f"--device {choice}: no such device here; try --device auto")
    return torch.device(choice)


def keep_freed_memory(largest: int, total: int) -> None:
    """Let glibc keep what a layer frees for the next one: pieces up to ``largest``, 32 at most, of ``total`` MB.

    Without that each large tensor is asked of the system anew, and its page faults take a third of the time. Other
    systems have allocators of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, largest << 20)  # M_MMAP_THRESHOLD: larger pieces go back to the system at once
        mallopt(-1, total << 20)  # M_TRIM_THRESHOLD


def set_seed(*parts: int) -> np.random.Generator:
    """Seed torch and give a numpy generator; the same numbers give the same draws."""
    import torch

    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
    return np.random.default_rng(parts)


# ---------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run stands, beside its tensors; saved with every epoch, and when a signal stops it within one."""

    classes: list[ClassState]
    best_accuracies: list[float]  # each class's best check: of the kind that the published method reports
    best_loss: float | None = None  # of the check behind best.safetensors; without ``last`` only
    epoch: int = 0  # the next one
    steps: int = 0
    windows: int = 0  # trained on so far
    frames: int = 0  # in them
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch that are done
    held_out: dict[str, float] | None = None  # figures of the schedule's end, once validation songs are trained on


class Trainer:
    """One training run of one network.

    The schedule trains on the training songs. ``refit`` more epochs train on the validation songs too, with what the
    rules said last; all that is measured on these songs is measured before.
    """

    def __init__(
        self,
        settings: Settings,
        build: Callable[..., nn.Module],
        catalogue: Catalogue,
        folder: Path,
        seed: int,
        team: Team,
        augmentation: Augmentation | None = None,
        schedule: Schedule | None = None,
        refit: int = 0,
    ):
        import torch

        from augment import Augmentation
        from layers import set_fast

        for split in ("train", "val"):
            if not catalogue.splits[split]:
                raise UserError(f"there are no {split} songs: run prepare_gtzan_data.py on more songs")
        self.settings, self.catalogue, self.folder, self.seed, self.refit = settings, catalogue, folder, seed, refit
        self.team, self.device = team, team.device
        if settings.batch_size < 2 * self.team.size:
            self.team.refuse(
                f"--batch-size {settings.batch_size} is too small for {self.team.size} processes: 2 for each"
            )
        keep_freed_memory(32, 256)  # the ECAS-CNN's first blocks leave tensors of 16 and 18 MB
        set_seed(seed)
        self.network = build(len(catalogue.genres), settings.width, settings.rhythm).to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.fast:
            set_fast(self.network, self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        pairs = zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True)
        floats = [(mean, now) for mean, now in pairs if mean.is_floating_point()]
        self._means, self._nows = ([pair[side] for pair in floats] for side in (0, 1))
        self._parallel = self.team.wrap(self.network)
        self._statistics = [  # of batch normalisation
            values for name, values in self.network.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        matrices = [p for p in self.network.parameters() if p.ndim > 1]
        vectors = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            fused=True,
        )
        self.augmentation = augmentation or Augmentation()
        self.schedule = schedule or Schedule(settings)
        self.basis = torch.from_numpy(dct_basis()).to(self.device) if settings.features == "mfcc" else None

        tracks = [*catalogue.splits["train"], *(catalogue.splits["val"] if refit else [])]
        features = load_features(catalogue, settings.features, tracks)
        self.lengths = [feature.shape[1] for feature in features]
        places = np.cumsum([0, *(max(settings.window, length) for length in self.lengths)])
        self.songs = torch.zeros(int(places[-1]), len(features[0]), dtype=torch.float16)  # one after the other
        for place, feature in zip(places[:-1], features, strict=True):
            self.songs[place : place + feature.shape[1]] = torch.from_numpy(feature.T)
        self.songs = self.songs.to(self.device)
        self.places = torch.from_numpy(places[:-1]).to(self.device)
        self.frames = torch.tensor(self.lengths, device=self.device)
        self.labels = catalogue.labels(tracks)
        self.scheduled = len(catalogue.splits["train"])  # the first songs; the others are for the refit
        self.class_songs = np.bincount(self.labels[: self.scheduled], minlength=len(catalogue.genres)).tolist()
        self.contents: dict[str, str] | None = catalogue.contents()
        self.val_labels = catalogue.labels(catalogue.splits["val"])
        self.val_features = load_features(catalogue, settings.features, catalogue.splits["val"])
        weights = class_weights([None for _ in catalogue.genres], self.class_songs, settings)
        self.state = Progress([ClassState(weight=weight) for weight in weights], [0.0 for _ in weights])
        self._signal = 0  # that asks for a stop
        self._random_state: dict[str, torch.Tensor] = {}  # to go on with within an epoch

    # -------- an epoch

    def run(self, resume: bool) -> dict[str, Any]:
        """Train to the end of the schedule, release the averaged weights, return that checkpoint's meta.

        Raises Stopped after the step in which ``stop`` was called, WriteError where a file can't be written, and
        UserError for a checkpoint that isn't of this run and for losses or weights that are no numbers.
        """
        log = self.folder / "log.jsonl"
        if resume:
            try:
                self._load_latest()
            except UserError as error:  # every rank has it
                self.team.refuse(str(error))
        else:  # what an earlier run left must not be what --resume goes on from
            for name in ("latest.safetensors", "best.safetensors"):
                self.team.tell((self.folder / name).unlink, True)
        try:
            records = [line for line in _lines(log) if json.loads(line)["epoch"] < self.state.epoch] if resume else []
        except (ValueError, KeyError, TypeError):
            self.team.refuse(f"{log} is damaged: delete it, then go on with --resume")
        self.team.tell(write_text, log, "".join(records))
        self._clock = time.monotonic()
        epochs = range(self.state.epoch, self.settings.epochs + self.refit)
        for epoch in epochs if self.team.rank else progress(epochs, self.settings.name):
            if epoch == self.settings.epochs and self.state.held_out is None:
                self.state.held_out = self.team.tell(self._held_out)
            record = self._train_epoch(epoch)
            left = self.settings.epochs - (epoch + 1)  # in the refit no song is left to check on
            if left == 0 or (left > 0 and (epoch + 1) % self.settings.check_every == 0):
                record |= self.team.tell(self._check, epoch)
                self.state = self.team.tell(lambda: self.state)
            self.state.epoch = epoch + 1
            self._count_seconds()
            self.team.tell(self._keep, log, record)
        return self.team.tell(self._release)

    def _keep(self, log: Path, record: dict[str, Any]) -> None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record | {"seconds": round(self.state.seconds, 1)}) + "\n")
        self._save_latest()

    def stop(self, number: int) -> None:
        """End the training after this step, as asked for by a signal."""
        self._signal = number

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.state.seconds, self._clock = self.state.seconds + now - self._clock, now

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        import torch

        rules, window = self.settings, training_window(epoch, self.settings)
        rng = set_seed(self.seed, 1, epoch)
        songs = len(self.labels) if epoch >= rules.epochs else self.scheduled
        drawn = self.schedule.draw(self.lengths[:songs], self.labels[:songs], self.state.classes, epoch, rng)
        song, start, factor = drawn
        batches = [
            batch
            for batch in np.array_split(np.arange(len(song)), max(1, round(len(song) / rules.batch_size)))
            if len(batch) >= 2 * self.team.size  # batch normalisation needs two
        ]
        if self._random_state and self.team.size == 1:
            set_random_state(self._random_state, self.device)
        elif self.state.losses or self.team.rank:
            set_seed(self.seed, 1, epoch, self.team.rank, len(self.state.losses))
        self._random_state = {}
        self.network.train()
        losses = self.state.losses
        for step, batch in enumerate(batches[len(losses) :], start=len(losses)):
            done = (epoch + step / len(batches)) / rules.epochs
            rate = learning_rate(done, rules.learning_rate, rules.final_rate)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            part = self.team.share(batch)
            loss, each = self._loss(song[part], start[part], None if factor is None else factor[part], window)
            loss = self.team.weigh(loss, part, batch)
            self.optimiser.zero_grad()
            loss.backward()
            mean, stop = self.team.agree(loss.item(), self._signal > 0, self._statistics)
            if not math.isfinite(mean):
                self.team.refuse(f"the loss is {mean} in epoch {epoch + 1}: try a smaller --learning-rate")
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
            if not torch.isfinite(norm):
                self.team.refuse(f"the gradient is {norm.item()} in epoch {epoch + 1}: try a smaller --learning-rate")
            self.optimiser.step()
            self.state.steps += 1
            self._update_average()
            self.schedule.learn(song[part], start[part], each)
            losses.append(mean)
            if stop:
                self._count_seconds()
                self.team.tell(self._save_latest)
                raise Stopped(self._signal or signal.SIGTERM)  # which another rank may have heard
        if not all(values.isfinite().all() for values in self.network.parameters()):  # the same on every rank
            self.team.refuse(f"the weights are no numbers after epoch {epoch + 1}: try a smaller --learning-rate")
        self.state.windows += len(song)
        self.state.frames += len(song) * window
        self.state.losses = []
        return {"epoch": epoch, "loss": float(np.mean(losses)) if losses else None, "windows": self.state.windows}

    def _loss(
        self, song: np.ndarray, start: np.ndarray, factor: np.ndarray | None, window: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted mean cross-entropy of augmented, mixed windows, and that of each window without weights."""
        import torch
        from torch.nn.functional import cross_entropy

        from augment import change_windows, cut_windows, mixup

        rules = self.settings
        which, first = torch.from_numpy(song).to(self.device), torch.from_numpy(start).to(self.device)
        windows = cut_windows(self.songs, self.places, self.frames, which, first, window, self.augmentation.tempo)
        windows, partner, part = mixup(change_windows(windows, self.augmentation, self.basis), rules.mixup)
        logits, _ = self._parallel(windows.transpose(1, 2))
        targets = torch.from_numpy(self.labels[song]).to(self.device)
        weights = torch.tensor([state.weight for state in self.state.classes], device=self.device)
        factors = 1 if factor is None else torch.from_numpy(factor).float().to(self.device)
        each, means = [], []
        for classes in (targets, targets[partner]):
            each.append(cross_entropy(logits, classes, reduction="none", label_smoothing=rules.label_smoothing))
            means.append((each[-1] * weights[classes] * factors).mean())
        loss = part * means[0] + (1 - part) * means[1]
        return loss, (part * each[0] + (1 - part) * each[1]).detach()

    def _update_average(self) -> None:
        """Move the averaged weights towards the trained ones (Polyak & Juditsky 1992); faster at first."""
        import torch

        decay = min(self.settings.average, (1 + self.state.steps) / (10 + self.state.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self._means, self._nows, 1 - decay)

    # -------- validation

    def validate(self, limit: int | None = None, network: nn.Module | None = None) -> np.ndarray:
        """Mean log-probabilities over windows of the validation songs by the averaged weights, (songs, classes)."""
        rules = self.settings
        outputs = network_outputs(network or self.average, self.val_features, rules.window, rules.overlap, limit)
        return np.stack([windows.mean(axis=0) for windows, _ in outputs])

    def _check(self, epoch: int) -> dict[str, Any]:
        """Look at the validation songs and apply the rules."""
        outputs = self.validate(VALIDATION_WINDOWS)
        right = outputs.argmax(1) == self.val_labels
        loss = -float(outputs[np.arange(len(right)), self.val_labels].mean())
        genres, before = self.catalogue.genres, self.state.classes
        measured = class_accuracies(right, self.val_labels, len(genres))
        self.state.classes = update_classes(before, measured, self.class_songs, epoch, self.settings)
        pairs = zip(self.state.best_accuracies, measured, strict=True)
        self.state.best_accuracies = [max(best, now or 0.0) for best, now in pairs]
        if not self.settings.last and (self.state.best_loss is None or loss < self.state.best_loss):
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
            "strides": strides(self.network),
            "seed": self.seed,
            "refit": self.refit,
            "split": self.catalogue.split,
            "contents": self.contents,
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
        if self.state.losses and self.team.size == 1:  # an epoch's start is seeded anew
            tensors |= {f"random.{name}": state for name, state in random_state(self.device).items()}
        save_checkpoint(self.folder / "latest.safetensors", tensors, self._meta())

    def _load_latest(self) -> None:
        import torch

        path = self.folder / "latest.safetensors"
        tensors, meta = load_checkpoint(path, "this script without --resume")
        expected = self._meta()
        if (refit := meta.get("refit", 0)) not in range(self.refit + 1):  # a shorter one goes on
            raise UserError(f"{path} was made with --refit {refit}: repeat that or ask for more, or begin with --force")
        if isinstance(meta.get("settings"), dict):
            meta["settings"] = ADDED | meta["settings"]
        for key in ("settings", "strides", "seed", "split", "genres"):
            if meta.get(key) != expected[key]:
                what = _other_options(meta.get(key), expected[key]) if key == "settings" else f"another {key}"
                what += f", {meta.get(key)}" * (key == "seed")
                raise UserError(f"{path} was made with {what}: repeat its options, or begin anew with --force")
        self.contents = meta.get("contents")  # which older versions didn't save
        if self.contents not in (None, expected["contents"]):
            raise UserError(f"{path} was made of songs that have changed since: begin anew with --force")
        parts: dict[str, dict[str, torch.Tensor]] = {"network": {}, "average": {}, "optimiser": {}, "random": {}}
        state: dict[int, dict[str, torch.Tensor]] = {}
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        try:
            for name, value in tensors.items():
                part, rest = name.split(".", 1)
                parts[part][rest] = value
            for name, value in parts["optimiser"].items():
                index, rest = name.split(".")
                if value.shape == parameters[int(index)].shape:  # the fused step reads memory in the parameter's order
                    value = torch.empty_like(parameters[int(index)], requires_grad=False).copy_(value)
                state.setdefault(int(index), {})[rest] = value
            saved = meta["progress"]
            self.state = Progress(**saved | {"classes": [ClassState(**values) for values in saved["classes"]]})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not of a run in progress ({error}): start without --resume") from None
        fill_network(self.network, parts["network"], path)
        fill_network(self.average, parts["average"], path)
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        self._random_state = parts["random"]

    def _weights(self) -> tuple[dict[str, torch.Tensor], int]:
        """The averaged weights to release, in half precision, and the epochs behind them.

        They are those of the end; without ``last`` those of the check with the least validation loss, and then the
        validation figure is the best of many. Test songs have no part in it.
        """
        tensors, epochs = self.average.state_dict(), self.state.epoch
        if not self.settings.last:
            tensors, chosen = load_checkpoint(self.folder / "best.safetensors", "this script without --resume")
            epochs = chosen["progress"]["epoch"] + 1
        halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        if not all(value.isfinite().all() for value in halves.values()):
            raise UserError("the weights are too large for half precision: try a smaller --learning-rate, with --force")
        return halves, epochs

    def _held_out(self) -> dict[str, float]:
        """What the validation songs say of the weights to release, before any training on them."""
        network = copy.deepcopy(self.average)
        fill_network(network, self._weights()[0], self.folder)
        outputs = self.validate(network=network)
        songs = np.bincount(self.val_labels, minlength=len(self.catalogue.genres))
        temperature = fit_temperature(outputs, self.val_labels)
        return {
            "temperature": temperature,
            "min_confidence": confidence_threshold(log_softmax(outputs, temperature), self.val_labels),
            "validation_accuracy": float((outputs.argmax(1) == self.val_labels).mean()),
            "label_conditioned_composite": float(np.dot(songs, self.state.best_accuracies) / songs.sum()),
        }

    def _release(self) -> dict[str, Any]:
        """Round the averaged weights to half precision, save them with their figures."""
        figures = self.state.held_out or self._held_out()
        halves, epochs = self._weights()
        fill_network(self.average, halves, self.folder)
        meta = self._meta() | {"released_epoch": epochs, **figures}
        save_checkpoint(self.folder / "model.safetensors", halves, meta)
        return meta


def _other_options(was: Any, now: dict[str, Any]) -> str:
    """In words, what differs in the settings of an earlier run."""
    differ = [name for name in now if isinstance(was, dict) and was.get(name) != now[name]]
    return ", ".join(f"{flag(name)} {was.get(name)}" for name in differ) or "other settings"


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may be absent or cut off in its last line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
