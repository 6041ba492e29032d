"""Train the DPA-CNN: log-mel input, five convolutional blocks, dual parallel attention, a 512-d feature.

Reads   data/metadata.json, data/processed/*_files.txt, data/processed/melspectrogram_normalized/
Writes  models/dpa_cnn/model.safetensors   the frozen network: averaged weights in half precision, calibrated
        models/dpa_cnn/best.safetensors    with --last 0: the weights of the least validation loss so far
        models/dpa_cnn/latest.safetensors  everything that --resume needs
        models/dpa_cnn/log.jsonl           a line an epoch
Next    train_ecas_cnn.py, train_bigru_cnn.py, then extract_model_features.py

Example
    python train_dpa_cnn.py --seed 0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from common import command
from rules import Settings
from training_command import training_command

SETTINGS = Settings(name="dpa_cnn", features="melspectrogram")


@command
def main(argv: Sequence[str] | None = None) -> int:
    return training_command(argv, __doc__, SETTINGS, lambda *args: NETWORK(*args))


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    sys.exit(main())  # before torch is loaded below

import torch  # noqa: E402
from torch import nn  # noqa: E402

from layers import Rhythm, convolution_block, mean_and_max  # noqa: E402

FEATURE_SIZE = 512
CHANNELS = (96, 192, 256, 384, 512)
# The first block shrinks most: multiplications are what a CPU counts.
STRIDES = (4, 2, 2, 1, 2)


class DualParallelAttention(nn.Module):
    """Channel and spatial attention side by side, each added through a gate that starts at zero.

    After Wen et al. 2023 (Multimedia Tools and Applications 83:10211), with the channel and spatial maps of
    CBAM (Woo et al., ECCV 2018). (batch, channels, height, width) -> the same.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(4, channels // reduction)
        self.squeeze = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, channels))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.gates = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channel = torch.sigmoid(sum(self.squeeze(pooled.flatten(1)) for pooled in mean_and_max(x, 2, 3)))
        place = torch.sigmoid(self.spatial(torch.cat(mean_and_max(x, 1), 1)))
        return x * (1 + self.gates[0] * channel[:, :, None, None] + self.gates[1] * place)


class DPACNN(nn.Module):
    """(batch, 128 mels, frames) -> logits (batch, classes), feature (batch, 512).

    With ``rhythm`` the feature is also of the tempogram.
    """

    feature_size = FEATURE_SIZE

    def __init__(self, classes: int, width: float = 1.0, rhythm: int = 0):
        super().__init__()
        channels = [max(8, round(width * number)) for number in CHANNELS]
        blocks: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise([1, *channels])):
            blocks += convolution_block(inputs, outputs, 7 if index == 0 else 3, STRIDES[index])
            if index > 0:
                blocks.append(DualParallelAttention(outputs))
        self.blocks = nn.Sequential(*blocks)
        pooled = 2 * channels[-1] + rhythm * Rhythm.size
        self.feature = nn.Sequential(nn.Linear(pooled, FEATURE_SIZE), nn.BatchNorm1d(FEATURE_SIZE), nn.SiLU())
        self.classify = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURE_SIZE, classes))
        self.rhythm = Rhythm() if rhythm else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heard = [] if self.rhythm is None else [self.rhythm(x)]
        x = self.blocks(x[:, None].contiguous(memory_format=torch.channels_last))
        pooled = torch.cat(mean_and_max(x, 2, 3), 1).flatten(1)
        feature = self.feature(torch.cat([pooled, *heard], 1))
        return self.classify(feature), feature


NETWORK = DPACNN

if __name__ == "__main__":
    sys.exit(main())
