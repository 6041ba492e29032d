"""Run the frozen networks over all songs: an 896-d feature and calibrated log-probabilities per song.

The 896 places are the CNN-BiGRU's 256 (attention-weighted mean and standard deviation), the DPA-CNN's 512 and
the ECAS-CNN's 128, each the mean over a song's windows. The networks were trained on the training songs, after a
--refit on the validation songs too, and remember them, so those rows look better than any new song's will:
provenance.json marks them as in-sample and train_fusion.py learns from held-out rows only.

Reads   models/{cnn_bigru,dpa_cnn,ecas_cnn}/model.safetensors, data/processed/
Writes  data/fusion_features/{train,val,test}_features.npy           float32 (songs, 896)
        data/fusion_features/{train,val,test}_log_probabilities.npy  float32 (songs, members, classes)
        data/fusion_features/{train,val,test}_labels.npy             int64 (songs,)
        data/fusion_features/{train,val,test}_tracks.npy             names (songs,)
        data/fusion_features/provenance.json
Next    create_cleaned_features.py

Example
    python extract_model_features.py
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catalogue import SPLITS, Catalogue, read_catalogue
from checkpoints import check_fit, fill_network, load_checkpoint, strides
from common import UserError, argument_parser, command, complain, format_table, library_versions, progress
from extract_features import FOLDERS, load_features
from files import file_sha256, locked, read_json, write_array, write_json
from hyper_dynamic import keep_freed_memory, pick_device
from predict import log_softmax, network_outputs
from rules import ADDED, MAX_WINDOW
from stopping import unfinished

if TYPE_CHECKING:
    from torch import nn

# The fusion's members, in the order of their features, and the script that trains each. A fourth network is one
# more script with SETTINGS and NETWORK, and one line here.
MEMBERS = {"cnn_bigru": "train_bigru_cnn", "dpa_cnn": "train_dpa_cnn", "ecas_cnn": "train_ecas_cnn"}


@dataclass(frozen=True)
class Member:
    """A frozen network and what its checkpoint says of it."""

    name: str
    network: nn.Module
    meta: dict[str, Any]
    sha256: str  # of the checkpoint

    @property
    def genres(self) -> list[str]:
        return self.meta["genres"]

    @property
    def window(self) -> int:
        return self.meta["settings"]["window"]

    @property
    def overlap(self) -> float:
        return self.meta["settings"]["overlap"]

    @property
    def knows(self) -> tuple[str, ...]:
        """The splits that it was trained on."""
        return ("train", "val") if recipe(self.meta)["refit"] else ("train",)

    @property
    def feature_size(self) -> int:
        return self.network.feature_size

    def outputs(self, songs: Sequence[dict[str, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Calibrated log-probabilities (windows, classes) and features (windows, d) of each song's windows.

        Raises UserError where they are no numbers, because the weights are too large.
        """
        kind = self.meta["settings"]["features"]
        raw = network_outputs(self.network, [song[kind] for song in songs], self.window, self.overlap)
        if not all(np.isfinite(array).all() for pair in raw for array in pair):
            raise UserError(f"{self.name} answers with NaN or infinity: train it again with {MEMBERS[self.name]}.py")
        return [(log_softmax(windows, self.meta["temperature"]), features) for windows, features in raw]


def recipe(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint's training and its epochs of refit; networks to be compared have the same."""
    return ADDED | meta.get("settings", {}) | {"refit": meta.get("refit", 0)}


def _unusable(meta: dict[str, Any]) -> str:
    """The first thing that a checkpoint says of its network and that can't be; "" if there is none."""
    settings, genres = meta["settings"], meta["genres"]
    usable = {
        "genres": len(genres) >= 2 and len({*genres}) == len(genres) and all(isinstance(g, str) for g in genres),
        "features": settings["features"] in FOLDERS,
        "window": isinstance(settings["window"], int) and 1 <= settings["window"] <= MAX_WINDOW,
        "overlap": 0 <= settings["overlap"] <= 0.95,
        "width": 0 < settings["width"] < math.inf,
        "rhythm": recipe(meta)["rhythm"] in (0, 1),
        "temperature": 0 < meta["temperature"] < math.inf,
        "min_confidence": 0 <= meta["min_confidence"] <= 1,
        "split": isinstance(meta["split"]["name"], str) and {*SPLITS} == {*meta["split"]["sha256"]},
    }
    return next((name for name, good in usable.items() if not good), "")


def load_members(models: Path, names: Iterable[str] = MEMBERS, device: str = "auto") -> list[Member]:
    """The frozen networks below a models folder.

    Raises UserError if one is absent or broken, or if they don't agree on genres, windows and training songs.
    """
    import torch

    keep_freed_memory(16, 48)
    members: list[Member] = []
    for name in names:
        path = models / name / "model.safetensors"
        tensors, meta = load_checkpoint(path, f"{MEMBERS[name]}.py")
        sha256 = file_sha256(path)  # now: a training may end while the network is in use
        build = importlib.import_module(MEMBERS[name]).NETWORK
        try:
            if problem := _unusable(meta):
                raise ValueError(problem)
            shape = len(meta["genres"]), meta["settings"]["width"], recipe(meta)["rhythm"]
            with torch.device("meta"):  # no memory before the shapes are known to fit: a file may claim any width
                check_fit(build(*shape), tensors, path)
            network = build(*shape)
            if meta["strides"] != strides(network):
                raise ValueError("architecture: its strides are others")
            members.append(Member(name, network, meta, sha256))
            key = [meta["genres"], meta["settings"]["window"], meta["settings"]["overlap"], meta["split"]]
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f"{path} lacks a usable {error}: train it again with {MEMBERS[name]}.py") from None
        fill_network(network, tensors, path)
        network.to(pick_device(device)).eval()
        first = members[0].meta
        if key != [first["genres"], first["settings"]["window"], first["settings"]["overlap"], first["split"]]:
            raise UserError(f"{path} differs from {members[0].name} in genres, windows or split: train both alike")
    return members


def check_split(members: Sequence[Member], catalogue: Catalogue) -> None:
    """Raise UserError unless a catalogue's training and validation songs are those of the members' training."""
    now = catalogue.contents()
    for member in members:
        split = member.meta["split"]
        if split != catalogue.split or member.genres != catalogue.genres:
            raise UserError(
                f"{member.name} was trained on split {split['name']!r}, seed {split['seed']}, not on the one in "
                f"{catalogue.data}, whose test songs it may have seen: train it again, prepare that split, or name the "
                "lists of its songs to evaluate.py with --seen"
            )
        if (member.meta.get("contents") or now) != now:  # which older releases don't say
            raise UserError(
                f"{member.name} was trained on songs that have other contents in {catalogue.data} now, where its test "
                "songs may be some of them: train it again"
            )


def fusion_inputs(outputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Join the members' outputs for one song's windows.

    Returns log-probabilities float32 (windows, members, classes) and features float32 (windows, 896).
    """
    return np.stack([windows for windows, _ in outputs], axis=1), np.concatenate([f for _, f in outputs], axis=1)


def song_inputs(windows: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fusion's inputs for a song from those for its windows: (members, classes) and (896,).

    Each member's mean log-probabilities are log-probabilities again, as the answers of ``evaluate.py`` are.
    """
    return log_softmax(windows.mean(axis=0)), vectors.mean(axis=0)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What provenance.json says of the files beside it. Raises UserError if it is absent or damaged."""
    maker = "extract_model_features.py"
    kinds = {"split": dict, "members": dict, "settings": dict, "sizes": dict, "held_out": dict}
    provenance = read_json(folder / "provenance.json", maker, *kinds)
    whole = all(isinstance(provenance[key], kind) for key, kind in kinds.items())
    if (
        not whole
        or "val" not in provenance["held_out"]
        or not all(type(d) is int for d in provenance["sizes"].values())
    ):
        raise UserError(f"{folder / 'provenance.json'} is damaged: run {maker} again")
    return provenance


def _split_rows(catalogue: Catalogue, members: list[Member], split: str) -> dict[str, np.ndarray]:
    """The arrays of one split, by the last part of their file names."""
    tracks = catalogue.splits[split]
    features, log_probabilities = [], []
    kinds = sorted({member.meta["settings"]["features"] for member in members})
    loaded = {kind: load_features(catalogue, kind, tracks) for kind in kinds}
    for index in progress(range(len(tracks)), split):
        song = {kind: loaded[kind][index] for kind in kinds}
        rows, vector = song_inputs(*fusion_inputs([member.outputs([song])[0] for member in members]))
        log_probabilities.append(rows)
        features.append(vector)
    return {
        "features": np.stack(features).astype(np.float32),
        "log_probabilities": np.stack(log_probabilities).astype(np.float32),
        "labels": catalogue.labels(tracks),
        "tracks": np.array(tracks),
    }


def _run(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    catalogue = read_catalogue(args.data)
    members = load_members(args.models, device=args.device)
    check_split(members, catalogue)
    for member in members:
        if done := unfinished(args.models / member.name):
            complain(f"a newer training of {member.name} isn't done ({done}): the network from before it is used")
    folder = args.data / "fusion_features"
    rows = []
    held_out = {split: all(split not in member.knows for member in members) for split in SPLITS}
    made = {split: _split_rows(catalogue, members, split) for split in args.splits}
    # Rows of other networks must not be mixed with these; without provenance.json nothing uses what a stop leaves
    for old in [folder / "provenance.json", *folder.glob("*.npy")]:
        old.unlink(missing_ok=True)
    for split, arrays in made.items():
        for name, array in arrays.items():
            write_array(folder / f"{split}_{name}.npy", array)
        right = arrays["log_probabilities"].argmax(2) == arrays["labels"][:, None]
        figures = [f"{100 * part:.1f}" for part in right.mean(axis=0)] if split != "test" else ["-"] * len(members)
        rows.append([split, len(right), "held out" if held_out[split] else "in-sample", *figures])
    write_json(
        folder / "provenance.json",
        {
            "genres": catalogue.genres,
            "split": catalogue.split,
            "members": {member.name: member.sha256 for member in members},
            "settings": {m.name: recipe(m.meta) for m in members},
            "sizes": {m.name: m.feature_size for m in members},
            "held_out": held_out,
            "versions": library_versions(),
        },
    )
    print(format_table(("split", "songs", "rows are", *(f"{m.name}, %" for m in members)), rows))
    print("Test songs are scored once, by evaluate.py.")
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data", "--models", "--device", "--threads")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        default=SPLITS,
        help="only these; the fusion needs val, verify_model_features.py all three",
    )
    args = parser.parse_args(argv)
    with locked(args.data):
        return _run(args)


if __name__ == "__main__":
    sys.exit(main())
