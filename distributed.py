"""Several processes that train one network: ``torchrun --nproc-per-node=N train_dpa_cnn.py``.

They talk by gloo on CPU, by nccl on CUDA. Every process (a rank) draws the same windows of an epoch and takes its
share of each batch: ``--batch-size`` and ``--threads`` are totals. DistributedDataParallel averages the gradients,
each rank's loss weighted by the size of its share. A step is that of one process on the whole batch, with two
exceptions: what is drawn at random (augmentation, partners in mixup, dropout), and batch normalisation, which each rank
does on its own share. torch's SyncBatchNorm has no CPU implementation, and a run should not depend on the kind of
device. The running statistics are averaged over ranks at every step, so that they rest on the whole batch.

Rank 0 alone looks at the validation songs, applies the rules, writes and prints; the others take its word for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from common import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")


class Team:
    """The processes of a training. With one, nothing here does anything."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1):
        self.device, self.rank, self.size = device, rank, size

    def wrap(self, network: nn.Module) -> nn.Module:
        """A network whose gradients are averaged over ranks."""
        if self.size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(network, forward_sync_buffers=False)

    def share(self, batch: np.ndarray) -> np.ndarray:
        """This rank's part of a batch; the parts differ by one at most."""
        return batch[self.rank :: self.size]

    def weigh(self, loss: torch.Tensor, share: np.ndarray, batch: np.ndarray) -> torch.Tensor:
        """A share's mean loss, scaled such that the mean over ranks is the mean over the batch."""
        return loss if self.size == 1 else loss * (len(share) * self.size / len(batch))

    def agree(self, loss: float, stop: bool, statistics: Sequence[torch.Tensor]) -> tuple[float, bool]:
        """Mean loss over ranks, and whether any wants to stop; ``statistics`` become their mean, in place."""
        if self.size == 1:
            return loss, stop
        import torch
        from torch import distributed

        said = torch.tensor([loss, stop], dtype=torch.float32, device=self.device)
        mean = torch.cat([said, *(values.flatten() for values in statistics)])
        distributed.all_reduce(mean)
        mean /= self.size
        parts = mean[2:].split([values.numel() for values in statistics])
        for values, part in zip(statistics, parts, strict=True):
            values.copy_(part.view_as(values))
        return mean[0].item(), mean[1].item() > 0

    def tell(self, make: Callable[..., T], *args: Any) -> T:
        """What ``make(*args)`` gives on rank 0, on every rank. What it raises there ends all of them."""
        if self.size == 1:
            return make(*args)
        from torch import distributed

        word: list[Any] = [False, None]  # failed, value
        if self.rank == 0:
            try:
                word[1] = make(*args)
            except Exception:
                distributed.broadcast_object_list([True, None])
                raise
        distributed.broadcast_object_list(word)
        if word[0]:
            raise SystemExit(1)  # rank 0 says why
        return word[1]

    def refuse(self, message: str) -> NoReturn:
        """End every rank, all of which call this; rank 0 says why."""
        raise UserError(message) if self.rank == 0 else SystemExit(1)

    def launcher(self) -> list[str]:
        """The words before the script's name in the command that started this process."""
        return [sys.orig_argv[0]] if self.size == 1 else ["torchrun", f"--nproc-per-node={local_size()}"]

    def __str__(self) -> str:
        return str(self.device) if self.size == 1 else f"{self.size} processes, {self.device.type}"


@contextmanager
def team_on(device: torch.device) -> Iterator[Team]:
    """The team that ``torchrun`` started this process in, or one of its own. Raises UserError if it can't run there."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(device)
        return
    import torch
    from torch import distributed

    if device.type == "mps":
        raise UserError("torchrun needs CUDA or CPU: add --device cpu")
    if device.type == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise UserError(f"{there} CUDA devices for {number + 1} processes: start no more than one a device")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(device, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def local_size() -> int:
    """Processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
