"""What each process of ``test_distributed.py`` does: train and refit two small networks, leave what it ends with.

``team_work.py DATA OUT`` writes OUT/<network>.<rank>.safetensors (weights and their averages) and .json (its progress).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_ecas_cnn
from augment import Augmentation
from catalogue import read_catalogue
from distributed import team_on
from extract_features import N_MFCC
from hyper_dynamic import Trainer
from rules import Settings

SMALL = {"epochs": 3, "check_every": 1, "window": 48, "share": 0.2, "graduate_at": 0.1, "batch_size": 9, "last": 1}
UNCHANGED = Augmentation(**{field.name: 0.0 for field in dataclasses.fields(Augmentation)})


class Linear(nn.Module):
    """Without normalisation and dropout, so that a step knows nothing of how its batch is shared out."""

    def __init__(self, classes: int, width: float, rhythm: int):
        super().__init__()
        self.classify = nn.Linear(N_MFCC, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = x.mean(2)
        return self.classify(feature), feature


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    catalogue = read_catalogue(data)
    runs = [
        (Settings(name="linear", features="mfcc", mixup=0.0, learning_rate=0.05, **SMALL), Linear, UNCHANGED),
        (Settings(name="ecas_cnn", features="mfcc", width=0.05, **SMALL), train_ecas_cnn.NETWORK, None),
    ]
    with team_on(torch.device("cpu")) as team:
        for settings, build, augmentation in runs:
            trainer = Trainer(settings, build, catalogue, out / settings.name, 7, team, augmentation, refit=1)
            team.tell(trainer.folder.mkdir, 0o777, True)
            trainer.run(resume=False)
            tensors = {f"network.{name}": value for name, value in trainer.network.state_dict().items()}
            tensors |= {f"means.{number}": value for number, value in enumerate(trainer._means)}
            name = f"{settings.name}.{team.rank}"
            save_file({key: value.clone().contiguous() for key, value in tensors.items()}, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(asdict(trainer.state) | {"seconds": 0}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
