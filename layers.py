"""Layers that more than one network is made of."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import nn

Pair = tuple[int, int]
Fast = Literal["", "bfloat16", "products"]


class Convolution(nn.Conv2d):
    """A 2-D convolution, without bias, that trains as fast as the processor can once ``set_fast`` has said how.

    With "bfloat16" it multiplies in that and sums in float32; what it returns is float32 again, rounded to bfloat16.
    With "products" the gradient of its weights is made of matrix products. A network in use (``eval``) computes in
    float32 throughout.
    """

    fast: Fast = ""

    def __init__(self, inputs: int, outputs: int, kernel: int | Pair, stride: int | Pair = 1, padding: int | Pair = 0):
        super().__init__(inputs, outputs, kernel, stride, padding, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.fast == "bfloat16":
            with torch.autocast(x.device.type, torch.bfloat16):
                return super().forward(x).float()
        if self.training and self.fast == "products" and self.in_channels >= 8:  # with fewer, copying takes over
            return _WeightsByProducts.apply(x, self.weight, self.stride, self.padding)
        return super().forward(x)


def convolution_block(inputs: int, outputs: int, kernel: int | Pair, stride: int | Pair) -> list[nn.Module]:
    """A convolution that keeps the size but for its stride, batch normalisation and SiLU."""
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return [Convolution(inputs, outputs, kernel, stride, padding), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)]


class _WeightsByProducts(torch.autograd.Function):
    """A convolution of channels_last tensors, the gradient of its weights by im2col, an example at a time.

    oneDNN has no kernel for that gradient on processors with AVX2 alone that is as fast as its others: a matrix product
    of each example's output gradient and the patches of its input takes half to two thirds of the time.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, stride: Pair, padding: Pair) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            settings = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
            of_x = torch.ops.aten.convolution_backward(of_output, x, weight, *settings, (True, False, False))[0]
        (outputs, inputs, *kernel), (high, wide) = weight.shape, ctx.padding
        padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, wide, wide, high, high))
        patches = padded.unfold(1, kernel[0], ctx.stride[0]).unfold(2, kernel[1], ctx.stride[1])
        patches = patches.permute(0, 1, 2, 4, 5, 3)  # example, row, column, kernel's row and column, channel
        of_weight = weight.new_zeros(outputs, *kernel, inputs)
        for patch, gradient in zip(patches, of_output.permute(0, 2, 3, 1), strict=True):
            rows = gradient.reshape(-1, outputs)
            of_weight.view(outputs, -1).addmm_(rows.t(), patch.reshape(len(rows), -1))
        return of_x, of_weight.permute(0, 3, 1, 2), None, None


def set_fast(network: nn.Module, device: torch.device) -> None:
    """Let a network's convolutions train in the fastest way that is known for the device."""
    fast: Fast = ""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        if able.get("avx512_bf16") or able.get("amx_bf16"):
            fast = "bfloat16"
        elif able.get("avx2") and not able.get("avx512_f"):
            fast = "products"
    elif device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        fast = "bfloat16"
    for layer in network.modules():
        if isinstance(layer, Convolution):
            layer.fast = fast


class _MeanAndMax(torch.autograd.Function):
    """As autograd's own, which counts tied maxima in int64 and takes several times as long."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        most = x.amax(dims, keepdim=True)
        ctx.save_for_backward(x, most)
        ctx.dims = dims
        return x.mean(dims, keepdim=True), most

    @staticmethod
    def backward(ctx, of_mean: torch.Tensor, of_most: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, most = ctx.saved_tensors
        here = torch.eq(x, most, out=torch.empty_like(x))
        share = of_most / here.sum(ctx.dims, keepdim=True)  # tied maxima share
        return torch.addcmul(of_mean * (most.numel() / x.numel()), here, share), None


BANDS, LAGS = 32, 128  # of a tempogram; a lag is a frame, 128 are 3 s


class Tempogram(nn.Module):
    """Which rhythms a window has: (batch, mels, frames), normalised log-mels -> (batch, 1, 32 bands, 128 lags).

    The autocorrelation of each band's onset strength, as part of what it is at lag 0 (Grosche, Müller & Kurth, ICASSP
    2010). It doesn't tell when in the window a beat falls.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = nn.functional.avg_pool1d(x.transpose(1, 2), x.shape[1] // BANDS).transpose(1, 2)
        onsets = torch.diff(bands, prepend=bands[..., :1]).clamp(min=0)
        onsets = onsets - onsets.mean(2, keepdim=True)
        length = onsets.shape[2] + LAGS  # padded, so that no lag reaches round the end
        spectrum = torch.fft.rfft(onsets, length)
        products = torch.fft.irfft(spectrum.real.square() + spectrum.imag.square(), length)
        energy = products[..., :1]
        floor = 0.1 * energy.mean(1, keepdim=True) + 1e-3  # bands without onsets have no rhythm
        return (products[..., 1 : LAGS + 1] / (energy + floor))[:, None]


class Rhythm(nn.Module):
    """What a small network hears in the tempogram: (batch, mels, frames) -> (batch, 64)."""

    size = 64

    def __init__(self) -> None:
        super().__init__()
        self.tempogram, self.scale = Tempogram(), nn.BatchNorm2d(1)
        blocks = [convolution_block(*block) for block in ((1, 24, (5, 7), 2), (24, 48, 3, 2), (48, 64, 3, 2))]
        self.blocks = nn.Sequential(*itertools.chain(*blocks))
        places = 64 * BANDS // 8 * LAGS // 8  # which lag it is counts: nothing is pooled
        self.feature = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(places, self.size), nn.BatchNorm1d(self.size), nn.SiLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale(self.tempogram(x)).contiguous(memory_format=torch.channels_last)
        return self.feature(self.blocks(x).flatten(1))


def mean_and_max(x: torch.Tensor, *dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum over dimensions, which are kept with size 1."""
    return _MeanAndMax.apply(x, dims)
