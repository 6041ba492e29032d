"""One checkpoint format for networks, fusion and runs in progress: tensors and plain values, no code.

It is a safetensors file whose metadata hold a record (JSON) and the SHA-256 sum of record and tensors: one file and one
rename, so that no stop leaves weights beside the sum of others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError
from extract_features import FEATURE_SETTINGS, check_feature_settings
from files import whole_file

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINT_FORMAT = 2


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and plain values as one safetensors file, whole or not at all; it outlasts a power cut.

    Raises UserError where it can't be written.
    """
    from safetensors.torch import save

    text = json.dumps({"format": CHECKPOINT_FORMAT, "feature_settings": FEATURE_SETTINGS, **meta})
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # in memory first: ``save_file`` would write to a name of its own, which nobody sweeps up after a kill
    content = save(whole, metadata={"music_genre_fusion": text, "sha256": content_sum(text, whole)})
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def content_sum(record: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a record and of tensors (contiguous, on the CPU): names, types, shapes and bytes, in hexadecimal."""
    import torch

    digest = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path, made_by: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote; runs no code from the file.

    Raises UserError, naming the script that makes the file, if it is absent, broken, not what was saved, of another
    format, made with other feature settings, or if a tensor holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            meta = json.loads(texts["music_genre_fusion"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if meta["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {meta['format']}, this code reads {CHECKPOINT_FORMAT}")
        if texts["sha256"] != content_sum(texts["music_genre_fusion"], tensors):
            raise ValueError("its content is not that of its SHA-256 sum")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    except FileNotFoundError:
        raise UserError(f"{path} is not there: run {made_by} first") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no checkpoint ({error}): run {made_by} again") from None
    check_feature_settings(meta.get("feature_settings"), path, f"run {made_by} again")
    return tensors, meta


def check_fit(network: nn.Module, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise UserError unless saved tensors have the names, shapes and kinds of numbers of a network's."""

    def form(tensor: torch.Tensor) -> str:
        kind = "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else "whole"
        return f"{list(tensor.shape)} of {kind} numbers"

    saved, own = ({name: form(t) for name, t in values.items()} for values in (tensors, network.state_dict()))
    for name in sorted({*own, *saved}):
        if saved.get(name) != own.get(name):
            problem = f"{name} is {saved.get(name, 'absent')}, the network's {own.get(name, 'absent')}"
            raise UserError(f"{where} doesn't fit the network ({problem}): train it again")


def strides(network: nn.Module) -> dict[str, list[int]]:
    """The strides of a network's layers by name: what makes it another network without changing a weight's shape."""
    return {name: list(layer.stride) for name, layer in network.named_modules() if hasattr(layer, "stride")}


def fill_network(network: nn.Module, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Put saved weights (any precision) into a network. Raises UserError as ``check_fit``."""
    check_fit(network, tensors, where)
    network.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
