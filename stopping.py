"""Stopping a training after any step, and what it takes to go on from there to the last bit."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import load_checkpoint
from common import UserError

if TYPE_CHECKING:
    import torch


class Stopped(Exception):
    """A signal ended a training after a step, and all is saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_to(hear: Callable[[int], object], *numbers: int) -> Iterator[None]:
    """Signals of these numbers call ``hear`` with theirs and do nothing else. For the main thread."""
    before = {number: signal.signal(number, lambda number, _frame: hear(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command(launcher: Sequence[str], argv: Sequence[str] | None) -> str:
    """The command line that goes on with this run: ``launcher``, the script, its arguments, ``--resume``."""
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--force"]
    words = [*launcher, sys.argv[0], *given]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def unfinished(folder: Path) -> str:
    """How far the training in a folder has come, "41 of 200 epochs", if it isn't at its end and can go on; else ""."""
    try:
        stopped = load_checkpoint(folder / "latest.safetensors", "")[1]
        epoch, epochs = stopped["progress"]["epoch"], stopped["settings"]["epochs"] + stopped.get("refit", 0)
    except (UserError, KeyError, TypeError):
        return ""  # absent, or nothing can go on from it
    with suppress(UserError):
        if load_checkpoint(folder / "model.safetensors", "")[1].get("progress") == stopped["progress"]:
            return ""  # it came to its end
    return f"{epoch} of {epochs} epochs"


def keep_unfinished(folder: Path) -> None:
    """Raise UserError if the training in a folder was stopped before its end, so that it can go on."""
    if done := unfinished(folder):
        what = f"a training that was stopped after {done}"
        raise UserError(f"{folder} holds {what}: go on with --resume, or give it up with --force")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's generators stand, uint8 tensors by kind of device."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else states | {device.type: getattr(torch, device.type).get_rng_state()}


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's generators where ``random_state`` found them."""
    import torch

    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type])
