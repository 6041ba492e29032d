"""Layers that more than one network is made of."""

from __future__ import annotations

import torch
from torch import nn


class Convolution(nn.Conv2d):
    """A 2-D convolution that multiplies in bfloat16 while it trains, once ``fast`` is set.

    Its sums, input and output stay float32, and a network in use (``eval``) computes in float32 throughout.
    """

    fast = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.fast and self.training):
            return super().forward(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).float()


def set_fast(network: nn.Module, device: torch.device) -> None:
    """Let a network's convolutions train in bfloat16 if the device has instructions for it."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
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


def mean_and_max(x: torch.Tensor, *dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum over dimensions, which are kept with size 1."""
    return _MeanAndMax.apply(x, dims)
