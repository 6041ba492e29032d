"""Train the CNN-BiGRU: log-mel input, four convolutional layers, a bidirectional GRU, attention over time.

Its feature is the attention-weighted mean of the GRU's 128 outputs; the attention-weighted standard deviation
goes with it into the fusion, so that the 256 places there hold two things and not one thing twice.

Reads   data/metadata.json, data/processed/*_files.txt, data/processed/melspectrogram_normalized/
Writes  models/cnn_bigru/model.safetensors   the frozen network: averaged weights in half precision, calibrated
        models/cnn_bigru/best.safetensors    with --last 0: the weights of the least validation loss so far
        models/cnn_bigru/latest.safetensors  everything that --resume needs
        models/cnn_bigru/log.jsonl           a line an epoch
Next    extract_model_features.py

Example
    python train_bigru_cnn.py --seed 0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from common import command
from extract_features import N_MELS
from rules import Settings
from training_command import training_command

SETTINGS = Settings(name="cnn_bigru", features="melspectrogram")


@command
def main(argv: Sequence[str] | None = None) -> int:
    return training_command(argv, __doc__, SETTINGS, lambda *args: NETWORK(*args))


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    sys.exit(main())  # before torch is loaded below

import torch  # noqa: E402
from torch import nn  # noqa: E402

from layers import Rhythm, convolution_block  # noqa: E402

GRU_SIZE = 128  # both directions together
FEATURE_SIZE = 2 * GRU_SIZE  # mean and standard deviation
CHANNELS = (64, 128, 192, 256)
STRIDES = ((4, 4), (2, 2), (2, 1), (2, 1))  # mels, time


class AttentionPooling(nn.Module):
    """Attention-weighted mean and standard deviation over time (Okabe et al., Interspeech 2018).

    (batch, steps, size) -> (batch, 2 * size)
    """

    def __init__(self, size: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.score(x).softmax(1)
        mean = (weight * x).sum(1)
        variance = (weight * (x - mean[:, None]).square()).sum(1)
        return torch.cat([mean, (variance + 1e-5).sqrt()], 1)


class CNNBiGRU(nn.Module):
    """(batch, 128 mels, frames) -> logits (batch, classes), feature (batch, 256).

    With ``rhythm`` the logits are also of the tempogram, and the feature isn't.
    """

    feature_size = FEATURE_SIZE

    def __init__(self, classes: int, width: float = 1.0, rhythm: int = 0):
        super().__init__()
        channels = [max(8, round(width * number)) for number in CHANNELS]
        blocks: list[nn.Module] = []
        mels = N_MELS
        for index, (inputs, outputs) in enumerate(pairwise([1, *channels])):
            blocks += convolution_block(inputs, outputs, 7 if index == 0 else 3, STRIDES[index])
            mels //= STRIDES[index][0]
        self.blocks = nn.Sequential(*blocks)
        self.join = nn.Sequential(nn.Linear(channels[-1] * mels, 2 * GRU_SIZE), nn.SiLU(), nn.Dropout(0.2))
        self.gru = nn.GRU(2 * GRU_SIZE, GRU_SIZE // 2, batch_first=True, bidirectional=True)
        self.pool = AttentionPooling(GRU_SIZE)
        self.classify = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURE_SIZE + rhythm * Rhythm.size, classes))
        self.rhythm = Rhythm() if rhythm else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heard = [] if self.rhythm is None else [self.rhythm(x)]
        x = self.blocks(x[:, None].contiguous(memory_format=torch.channels_last))
        steps, _ = self.gru(self.join(x.flatten(1, 2).transpose(1, 2)))
        feature = self.pool(steps)
        return self.classify(torch.cat([feature, *heard], 1)), feature


NETWORK = CNNBiGRU

if __name__ == "__main__":
    sys.exit(main())
