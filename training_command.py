"""The command line of the three training scripts: options from the settings, one run of the loop, a short table."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from catalogue import read_catalogue
from common import UserError, argument_parser, complain, format_table, number
from distributed import local_size, team_on
from files import WriteError, locked
from hyper_dynamic import Trainer, pick_device
from rules import MAX_EPOCHS, OPTIONS, Settings, add_option
from stopping import Stopped, keep_unfinished, resume_command, signals_to

if TYPE_CHECKING:
    from torch import nn


def read_options(
    argv: Sequence[str] | None, doc: str | None, settings: Settings, recipe_only: bool = False
) -> tuple[argparse.Namespace, Settings]:
    """The command line of a training script, and the settings that it asks for. Exits with 2 on bad usage.

    With ``recipe_only`` the options that place and start a run are bad usage too: a protocol gives them itself.
    """
    shared = [] if recipe_only else ["--data", "--models", "--seed", "--device", "--threads"]
    parser = argument_parser(doc, *shared, add_help=not recipe_only)
    if not recipe_only:
        stopped = parser.add_mutually_exclusive_group()
        stopped.add_argument("--resume", action="store_true", help="go on with this run where it stopped")
        stopped.add_argument(
            "--force", action="store_true", help="begin anew where a training was stopped, and give it up"
        )
    parser.add_argument(
        "--refit",
        type=number(int, 0, MAX_EPOCHS),
        default=0,
        metavar="N",
        help="further epochs, on training and validation songs; with --resume also after a finished training or its "
        "refit. Validation figures stay those from before",
    )
    for name in OPTIONS:
        add_option(parser, name, getattr(settings, name))
    args = parser.parse_args(argv)
    if args.refit and not args.last:
        parser.error("--refit goes on from the schedule's end: leave --last at 1")
    if args.refit and not args.final_rate:
        parser.error("--refit goes on with the last learning rate: that of --final-rate 0 is none")
    return args, dataclasses.replace(settings, **{name: getattr(args, name) for name in OPTIONS})


def training_command(
    argv: Sequence[str] | None, doc: str | None, settings: Settings, build: Callable[..., nn.Module]
) -> int:
    """``main`` of a training script: options from the settings, one run, a short table."""
    args, settings = read_options(argv, doc, settings)

    import torch

    torch.set_num_threads(max(1, args.threads // local_size()))
    folder = args.models / settings.name
    with team_on(pick_device(args.device)) as team, ExitStack() as stack:
        catalogue = team.tell(read_catalogue, args.data)
        team.tell(stack.enter_context, locked(folder))
        if not (args.resume or args.force):
            team.tell(keep_unfinished, folder)
        trainer = Trainer(settings, build, catalogue, folder, args.seed, team, refit=args.refit)
        if team.rank == 0:
            songs = f"{trainer.scheduled} training songs"
            songs += f" ({len(trainer.labels)} in the refit)" if args.refit else ""
            print(f"{settings.name} on {team}, {songs}, split {catalogue.split['name']}")
        try:
            with signals_to(trainer.stop, signal.SIGINT, signal.SIGTERM):
                meta = trainer.run(args.resume)
        except Stopped as stop:
            if team.rank == 0:
                complain(f"stopped by {stop}, all is saved; go on with: {resume_command(team.launcher(), argv)}")
            return 128 + stop.number
        except WriteError as error:
            resume = " with --resume" if (folder / "latest.safetensors").exists() else ""
            raise UserError(f"{error}{resume}") from None
        except OSError as error:
            resume = ", go on with --resume" if (folder / "latest.safetensors").exists() else " and run this again"
            raise UserError(f"{folder} can't be written to ({error}): make room{resume}") from None
    if team.rank:
        return 0
    rows = [
        ("validation accuracy, %", f"{100 * meta['validation_accuracy']:.1f}"),
        ("label_conditioned_composite, %", f"{100 * meta['label_conditioned_composite']:.1f}"),
        ("temperature", f"{meta['temperature']:.2f}"),
        ("released epoch", meta["released_epoch"]),
        ("windows trained on", trainer.state.windows),
        ("seconds", f"{trainer.state.seconds:.0f}"),
    ]
    print(format_table((settings.name, ""), rows))
    if args.refit:
        print("Validation figures and temperature are from before the refit.")
    return 0
