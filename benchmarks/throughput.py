"""How much of a training step is the network: the loop's windows a second against the bare network and convolutions.

loop          the training loop itself: windows cut and augmented, mixed, forward, backward, optimiser, running average
network       forward and backward of the same network on one ready batch
convolutions  its convolutions alone, one after the other on inputs of the shapes they get, forward and backward

One thread; seconds are the processor's (time.process_time), so that other programs matter less, though they still slow
memory. The three take turns, and each figure is the median of its turns. The songs are noise, which costs as much.

Reads   nothing
Writes  nothing; prints a table a network

Examples
    python benchmarks/throughput.py
    python benchmarks/throughput.py --networks train_dpa_cnn --width 0.25 --turns 9
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from catalogue import Catalogue, Song
from common import argument_parser, command, format_table, positive_int
from extract_model_features import MEMBERS
from files import write_array, write_json
from rules import add_option

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hyper_dynamic import Trainer

GENRES = [f"genre{number}" for number in range(10)]
FRAMES = 1292  # of 30 s


def noise_catalogue(folder: Path, kind: str, songs: int) -> Catalogue:
    """A catalogue whose songs' features are noise: ``songs`` to train on, one a genre to validate."""
    from extract_features import N_MELS, N_MFCC, STORED_SETTINGS, feature_path

    rng = np.random.default_rng(0)
    bins = N_MFCC if kind == "mfcc" else N_MELS
    names = {"train": [f"t{number}" for number in range(songs)], "val": [f"v{number}" for number in range(len(GENRES))]}
    catalogue = Catalogue(GENRES, {}, names | {"test": []}, {"name": "noise"}, folder)
    for number, name in enumerate(names["train"] + names["val"]):
        catalogue.songs[name] = Song(name, name, name, GENRES[number % len(GENRES)], "", 30.0, 22_050, name, "ok")
        write_array(feature_path(folder, kind, name), rng.standard_normal((bins, FRAMES)).astype(np.float16))
    index = {"settings": STORED_SETTINGS, "songs": {name: name for name in catalogue.songs}}
    write_json(folder / "processed" / "features.json", index)
    return catalogue


def convolutions(network: nn.Module, batch: torch.Tensor) -> Callable[[], None]:
    """A call that runs every convolution of a network forward and backward, on noise in the shapes of its inputs."""
    import torch

    found: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        like = inputs[0].detach()
        found.append((module, torch.randn_like(like).requires_grad_(bool(found)), torch.randn_like(output)))

    kinds = (torch.nn.Conv1d, torch.nn.Conv2d)
    hooks = [module.register_forward_hook(note) for module in network.modules() if isinstance(module, kinds)]
    network(batch)
    for hook in hooks:
        hook.remove()

    def work() -> None:
        for module, inputs, gradient in found:
            wanted = [*module.parameters(), *([inputs] if inputs.requires_grad else [])]
            torch.autograd.grad(module(inputs), wanted, gradient)

    return work


def whole_network(network: nn.Module, batch: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A call that runs a network forward and backward on one batch."""
    from torch.nn.functional import cross_entropy

    def work() -> None:
        for parameter in network.parameters():
            parameter.grad = None
        cross_entropy(network(batch)[0], labels).backward()

    return work


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(trainer: Trainer, turns: int, batches: int) -> list[float]:
    """Windows a second of loop, network and convolutions: medians over turns of ``batches`` batches each."""
    import torch

    settings = trainer.settings
    torch.manual_seed(0)
    bins = trainer.songs.shape[1]
    batch = torch.randn(settings.batch_size, settings.window, bins).transpose(1, 2)
    labels = torch.arange(settings.batch_size) % len(GENRES)
    trainer.network.train()
    bare, alone = whole_network(trainer.network, batch, labels), convolutions(trainer.network, batch)
    windows = settings.batch_size * batches
    found: list[list[float]] = [[], [], []]
    for turn in range(turns + 1):
        before = trainer.state.windows
        spent = [seconds(lambda turn=turn: trainer._train_epoch(turn))]
        rates = [(trainer.state.windows - before) / spent[0]]
        for work in (bare, alone):
            spent.append(seconds(lambda work=work: [work() for _ in range(batches)]))
            rates.append(windows / spent[-1])
        if turn:  # the first warms up
            for rate, all_rates in zip(rates, found, strict=True):
                all_rates.append(rate)
    return [float(np.median(rates)) for rates in found]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    scripts = list(MEMBERS.values())
    add("--networks", nargs="+", default=scripts, choices=scripts, help="training scripts whose networks are measured")
    add_option(parser, "width", 1.0)
    add("--window", type=positive_int, metavar="N", help="frames; if not given, as in the script's settings")
    add("--turns", type=positive_int, default=7, metavar="N", help="measurements of each, after one to warm up")
    add("--batches", type=positive_int, default=8, metavar="N", help="batches a measurement")
    args = parser.parse_args(argv)

    import torch

    from distributed import Team
    from hyper_dynamic import Trainer

    torch.set_num_threads(1)
    rows = []
    for name in args.networks:
        script = importlib.import_module(name)
        window = args.window or script.SETTINGS.window
        plain = {"share": 1.0, "short_windows": 0.0, "width": args.width, "window": window, "epochs": args.turns + 1}
        settings = dataclasses.replace(script.SETTINGS, **plain)
        with tempfile.TemporaryDirectory() as folder:
            songs = max(1, round(settings.batch_size * args.batches * window * (1 - settings.overlap) / FRAMES))
            catalogue = noise_catalogue(Path(folder), settings.features, songs)
            trainer = Trainer(settings, script.NETWORK, catalogue, Path(folder), 0, Team(torch.device("cpu")))
            loop, network, alone = measure(trainer, args.turns, args.batches)
        shares = [f"{100 * loop / network:.0f}", f"{100 * loop / alone:.0f}"]
        rows.append([name.removeprefix("train_"), f"{loop:.1f}", f"{network:.1f}", f"{alone:.1f}", *shares])
    header = (
        f"windows of {args.window or 'the usual number of'} frames a CPU second",
        "loop",
        "network",
        "convolutions",
        "loop / network, %",
        "loop / convolutions, %",
    )
    print(format_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
