"""One checkpoint format for networks, fusion and runs in progress: tensors and plain values, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError, whole_file
from extract_features import FEATURE_SETTINGS, check_feature_settings

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINT_FORMAT = 1


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and plain values as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    record = {"format": CHECKPOINT_FORMAT, "feature_settings": FEATURE_SETTINGS, **meta}
    with whole_file(path) as temporary:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"music_genre_fusion": json.dumps(record)})


def load_checkpoint(path: Path, made_by: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote; runs no code from the file.

    Raises UserError, naming the script that makes the file, if it is absent, broken, of another format or made
    with other feature settings.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["music_genre_fusion"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if meta["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {meta['format']}, this code reads {CHECKPOINT_FORMAT}")
    except FileNotFoundError:
        raise UserError(f"{path} is not there: run {made_by} first") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint ({error}): run {made_by} again") from None
    check_feature_settings(meta.get("feature_settings"), path, f"run {made_by} again")
    return tensors, meta


def fill_network(network: nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Put saved weights (any precision) into a network. Raises UserError if names or shapes don't fit."""
    try:
        network.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[:2][-1].strip()  # of a line for each tensor
        raise UserError(f"{where} doesn't fit the network ({first}): train it again") from None
