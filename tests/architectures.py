"""The blocks that real networks are made of, tiny: what modules do to one another beyond a chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import (
    GELU,
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm,
    Linear,
    MaxPool2d,
    PReLU,
    ReLU,
    Sequential,
    SiLU,
    Softmax,
    Tanh,
    Upsample,
)  # fmt: skip

from cases import Network, Wired


def residual(m: Any, x: Tensor) -> Tensor:
    """ResNet (He et al., 2016), with group normalisation."""
    h = m.act(m.norm1(m.conv1(m.stem(x))))
    return m.head(m.act(m.norm2(m.conv2(h)) + h))


def downsampled(m: Any, x: Tensor) -> Tensor:
    """Its block with a stride: the skip has a convolution of its own."""
    h = m.act(m.norm(m.conv1(x)))
    return m.head(m.act(m.conv2(h) + m.shortcut(x)))


def inception(m: Any, x: Tensor) -> Tensor:
    """Szegedy et al. (2015)."""
    branches = [m.one(x), m.three(m.act(m.reduce(x))), m.pooled(m.pool(x))]
    return m.head(m.act(torch.cat(branches, 1)))


def unet(m: Any, x: Tensor) -> Tensor:
    """Ronneberger et al. (2015): down, up, beside what was there."""
    fine = m.act(m.encode(x))
    coarse = m.act(m.bottom(m.down(fine)))
    return m.head(m.act(m.decode(torch.cat([m.up(coarse), fine], 1))))


def siamese(m: Any, x: Tensor) -> Tensor:
    """One convolution for both halves, of different sizes."""
    near, far = m.act(m.conv(x[..., :2])), m.act(m.conv(x))
    return m.head(near.mean((2, 3)) - far.mean((2, 3)))


def recurrent(m: Any, x: Tensor) -> Tensor:
    """One convolution of its own output, and so of another size."""
    h = m.act(m.conv(x))
    return m.head(m.act(m.conv(h)).mean((2, 3)) - h.amax((2, 3)))


def grown(m: Any, x: Tensor) -> Tensor:
    """One transposed convolution of inputs of different lengths, with one slope for both."""
    near, far = m.act(m.conv(x[..., :2])), m.act(m.conv(x))
    return m.head(near.mean(2) - far.mean(2))


def mixer(m: Any, x: Tensor) -> Tensor:
    """Tolstikhin et al. (2021): over tokens, then over channels."""
    h = x + m.tokens(m.norm1(x).transpose(1, 2)).transpose(1, 2)
    h = h + m.out(m.act(m.channels(m.norm2(h))))
    return m.head(h.mean(1))


def attention(m: Any, x: Tensor) -> Tensor:
    """A block with the norm first (Xiong et al., 2020), of modules alone."""
    h = m.norm1(x)
    weights = m.softmax(m.q(h) @ m.k(h).transpose(1, 2) * 0.5)
    h = x + m.o(weights @ m.v(h))
    h = h + m.down(m.dropout(m.act(m.up(m.norm2(h)))))
    return m.head(h.mean(1))


def text(m: Any, x: Tensor) -> Tensor:
    """Kim (2014): a table, a convolution over time, the largest."""
    h = m.act(m.conv(m.table(x).transpose(1, 2)))
    return m.head(h.amax(2))


def excited(m: Any, x: Tensor) -> Tensor:
    """Squeeze and excitation (Hu et al., 2018): channels, scaled by a function of all of them."""
    h = m.conv(x)
    scale = m.gate(m.act(m.squeeze(h.mean((2, 3)))))
    return m.head(h * scale[:, :, None, None])


def normalised_twice(m: Any, x: Tensor) -> Tensor:
    """One norm in two places, of different sizes: statistics belong to a use."""
    h = m.act(m.norm(m.conv(x)))
    return m.head(m.norm(h[..., :2]).mean((2, 3)) - h.amax((2, 3)))


IMAGE = (3, 2, 4, 4)
ARCHITECTURES = (
    Network("residual", lambda: Wired(
        residual, stem=Conv2d(2, 4, 1), conv1=Conv2d(4, 4, 3, padding=1, bias=False), norm1=GroupNorm(2, 4), act=ReLU(),
        conv2=Conv2d(4, 4, 3, padding=1), norm2=GroupNorm(1, 4), head=Sequential(AdaptiveAvgPool2d(1), Flatten(), Linear(4, 3)),
    ), (3, 2, 3, 4)),
    Network("downsampled", lambda: Wired(
        downsampled, conv1=Conv2d(2, 3, 3, stride=2, padding=1), norm=InstanceNorm2d(3, affine=True), act=SiLU(),
        conv2=Conv2d(3, 3, 3, padding="same"), shortcut=Conv2d(2, 3, 1, stride=2), head=Sequential(Flatten(), Linear(18, 3)),
    ), (3, 2, 4, 5)),
    Network("inception", lambda: Wired(
        inception, one=Conv2d(2, 1, 1), reduce=Conv2d(2, 3, 1), three=Conv2d(3, 2, 3, padding="same", padding_mode="reflect"),
        pool=MaxPool2d(3, 1, 1), pooled=Conv2d(2, 1, 1), act=PReLU(), head=Sequential(AvgPool2d(2), Flatten(), Linear(16, 3)),
    ), IMAGE),
    Network("unet", lambda: Wired(
        unet, encode=Conv2d(2, 3, 3, padding=1), down=MaxPool2d(2), bottom=Conv2d(3, 4, 1), up=ConvTranspose2d(4, 2, 2, stride=2),
        decode=Conv2d(5, 2, 3, padding=1, padding_mode="circular"), act=Tanh(), head=Sequential(Flatten(), Linear(32, 2)),
    ), (2, 2, 4, 4)),
    Network("upsampled", lambda: Sequential(
        Conv2d(2, 3, 2), Tanh(), Upsample(scale_factor=2, mode="bilinear"), Conv2d(3, 2, 3), Flatten(), Linear(8, 2)
    ), (3, 2, 3, 3)),
    Network("siamese_convolution", lambda: Wired(siamese, conv=Conv2d(2, 3, 2), act=Tanh(), head=Linear(3, 2)), IMAGE),
    Network("recurrent_convolution", lambda: Wired(
        recurrent, conv=Conv2d(4, 4, 2, padding=(1, 0), groups=2), act=Tanh(), head=Linear(4, 3)
    ), (3, 4, 2, 3)),
    Network("siamese_transposed", lambda: Wired(
        grown, conv=ConvTranspose1d(4, 6, 3, stride=2, groups=2, bias=False), act=PReLU(), head=Linear(6, 3)
    ), (3, 4, 3)),
    Network("depthwise_separable", lambda: Sequential(
        Conv2d(3, 6, 3, padding=1, groups=3), ReLU(), Conv2d(6, 2, 1, bias=False), SiLU(), AvgPool2d(2), Flatten(), Linear(8, 3)
    ), (3, 3, 4, 4)),
    Network("batch_norm", lambda: Sequential(
        Conv2d(2, 3, 2, bias=False), BatchNorm2d(3).eval(), ReLU(inplace=True), MaxPool2d(2), Flatten(), Linear(3, 3)
    ), IMAGE),
    Network("mixer", lambda: Wired(
        mixer, norm1=LayerNorm(4), tokens=Linear(3, 3), norm2=LayerNorm(4), channels=Linear(4, 5), act=GELU(), out=Linear(5, 4),
        head=Linear(4, 3),
    ), (3, 3, 4)),
    Network("attention_block", lambda: Wired(
        attention, norm1=LayerNorm(4), q=Linear(4, 3), k=Linear(4, 3, bias=False), v=Linear(4, 2), softmax=Softmax(2),
        o=Linear(2, 4), norm2=LayerNorm(4), up=Linear(4, 5), act=GELU("tanh"), dropout=Dropout(0.5).eval(), down=Linear(5, 4),
        head=Linear(4, 3),
    ), (3, 2, 4)),
    Network("text", lambda: Wired(
        text, table=Embedding(6, 3, padding_idx=0), conv=Conv1d(3, 4, 2), act=ReLU(), head=Linear(4, 3)
    ), (4, 5), below=6),
    Network("normalised_twice", lambda: Wired(
        normalised_twice, conv=Conv2d(2, 4, 2), norm=GroupNorm(2, 4), act=PReLU(4), head=Linear(4, 3)
    ), IMAGE),
    Network("layer_norm_twice", lambda: Wired(
        lambda m, x: m.head(m.norm(m.act(m.norm(x)).mean(1, keepdim=True)).sum(1)), norm=LayerNorm(4), act=Tanh(), head=Linear(4, 3)
    ), (3, 2, 4)),
    Network("excited", lambda: Wired(
        excited, conv=Conv2d(2, 3, 2), squeeze=Linear(3, 2), act=ReLU(), gate=Sequential(Linear(2, 3), nn.Sigmoid()),
        head=Sequential(Flatten(), Linear(27, 2)),
    ), IMAGE),
)  # fmt: skip
