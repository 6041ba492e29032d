"""Train the ECAS-CNN: MFCC input, four blocks with efficient channel and spatial attention, a 128-d feature.

Reads   data/metadata.json, data/processed/*_files.txt, data/processed/mfcc/
Writes  models/ecas_cnn/model.safetensors   the frozen network: averaged weights in half precision, calibrated
        models/ecas_cnn/best.safetensors    with --last 0: the weights of the least validation loss so far
        models/ecas_cnn/latest.safetensors  everything that --resume needs
        models/ecas_cnn/log.jsonl           a line an epoch
Next    train_bigru_cnn.py, then extract_model_features.py

Example
    python train_ecas_cnn.py --seed 0
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise

from common import command
from extract_features import N_MFCC, dct_basis
from rules import Settings
from training_command import training_command

SETTINGS = Settings(name="ecas_cnn", features="mfcc", epochs=50)  # 70 take 35 minutes on two slow cores


@command
def main(argv: Sequence[str] | None = None) -> int:
    return training_command(argv, __doc__, SETTINGS, lambda *args: NETWORK(*args))


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    sys.exit(main())  # before torch is loaded below

import torch  # noqa: E402
from torch import nn  # noqa: E402

from layers import Rhythm, convolution_block, mean_and_max  # noqa: E402

FEATURE_SIZE = 128
CHANNELS = (192, 256, 384, 512)
STRIDES = ((1, 4), (2, 2), (2, 1), (1, 2))  # coefficients, time


class ECA(nn.Module):
    """Efficient channel attention: a 1-D convolution over pooled channels (Wang et al., CVPR 2020).

    The kernel size follows from the channel count: 5 for 128 to 512 channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        kernel = int(abs((math.log2(channels) + 1) / 2)) | 1
        self.mix = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.mix(x.mean((2, 3))[:, None]))[:, 0, :, None, None]


class SpatialAttention(nn.Module):
    """A 7x7 convolution over the channels' mean and maximum (CBAM: Woo et al., ECCV 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.mix(torch.cat(mean_and_max(x, 1), 1)))


class Deltas(nn.Module):
    """MFCCs, their slopes over nine frames, the slopes of those (Furui 1986): (batch, n, t) -> (batch, 3, n, t)."""

    def __init__(self) -> None:
        super().__init__()
        steps = torch.arange(-4.0, 5.0, device="cpu")  # on the meta device it would load torch._dynamo: a second
        self.register_buffer("slope", (steps / steps.square().sum())[None, None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [x[:, None]]
        for _ in range(2):
            padded = nn.functional.pad(levels[-1], (4, 4, 0, 0), mode="replicate")
            levels.append(nn.functional.conv2d(padded, self.slope))
        return torch.cat(levels, 1)


class MelBands(nn.Module):
    """The mel bands that MFCCs describe: (batch, 20, t) -> (batch, 128, t)."""

    def __init__(self) -> None:
        super().__init__()
        basis = torch.tensor(dct_basis().T, dtype=torch.float32, device="cpu")
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.basis @ x


class ECASCNN(nn.Module):
    """(batch, 20 MFCCs, frames) -> logits (batch, classes), feature (batch, 128).

    With ``rhythm`` the feature is also of the tempogram of the mel bands that the MFCCs describe.
    """

    feature_size = FEATURE_SIZE

    def __init__(self, classes: int, width: float = 1.0, rhythm: int = 0):
        super().__init__()
        channels = [max(8, round(width * number)) for number in CHANNELS]
        self.deltas = Deltas()
        self.scale = nn.BatchNorm1d(3 * N_MFCC)  # coefficients differ tenfold in spread
        blocks: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise([3, *channels])):
            blocks += convolution_block(inputs, outputs, (5, 7) if index == 0 else 3, STRIDES[index])
            blocks += [ECA(outputs), SpatialAttention()]
        self.blocks = nn.Sequential(*blocks)
        pooled = 2 * channels[-1] + rhythm * Rhythm.size
        self.feature = nn.Sequential(nn.Linear(pooled, FEATURE_SIZE), nn.BatchNorm1d(FEATURE_SIZE), nn.SiLU())
        self.classify = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURE_SIZE, classes))
        self.rhythm = nn.Sequential(MelBands(), Rhythm()) if rhythm else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heard = [] if self.rhythm is None else [self.rhythm(x)]
        x = self.deltas(x)
        x = self.scale(x.flatten(1, 2)).view_as(x)
        x = self.blocks(x.contiguous(memory_format=torch.channels_last))
        pooled = torch.cat(mean_and_max(x, 2, 3), 1).flatten(1)
        feature = self.feature(torch.cat([pooled, *heard], 1))
        return self.classify(feature), feature


NETWORK = ECASCNN

if __name__ == "__main__":
    sys.exit(main())
