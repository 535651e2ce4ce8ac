"""Base of the features: which quantities a feature needs of a layer, and its value from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .errors import SubsamplingOutOfRange
from .rules import Layer, Need, Sizes

SCALINGS = ("backpack", "table5")
APPROXIMATIONS = ("expand", "reduce", "backpack")


class Extension:
    """A feature. After `with backpack(extension): loss.backward()`, `parameter.<field>` holds its value.

    scaling: "backpack" (BackPACK's values) or "table5" (those of the cheat sheet's Table 5).
    subsampling: the samples that an individual quantity is computed for, None for all.
    mc_samples, generator: number of Monte-Carlo samples and the generator that they are drawn from.
    approximation: how Kronecker factors treat shared axes, None for the layer's default.
    """

    field: ClassVar[str]
    #: Whether the value stays differentiable under `create_graph=True`; other fields are computed without a graph.
    differentiable: ClassVar[bool] = False
    #: Whether the value is a sum of quantities, each of exact columns with the same of residual ones and of a diagonal.
    additive: ClassVar[bool] = False

    def __init__(
        self,
        *,
        scaling: str = "backpack",
        subsampling: Sequence[int] | None = None,
        mc_samples: int | None = None,
        generator: torch.Generator | None = None,
        approximation: str | None = None,
    ) -> None:
        if scaling not in SCALINGS:
            raise ValueError(f"{self.name}: scaling must be one of {', '.join(SCALINGS)}; got {scaling!r}")
        if approximation is not None and approximation not in APPROXIMATIONS:
            known = ", ".join(APPROXIMATIONS)
            raise ValueError(f"{self.name}: approximation must be one of {known}, or None; got {approximation!r}")
        if mc_samples is not None and (
            isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1
        ):
            raise ValueError(f"{self.name}: mc_samples must be a positive integer; got {mc_samples!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"{self.name}: generator must be a torch.Generator or None; got {generator!r}")
        if subsampling is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in subsampling):
            raise ValueError(
                f"{self.name}: subsampling must be a sequence of sample indices or None; got {subsampling!r}"
            )
        self.scaling = scaling
        self.subsampling = None if subsampling is None else tuple(subsampling)
        self.mc_samples = mc_samples
        self.generator = generator
        self.approximation = approximation

    @property
    def name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        given = {
            key: value
            for key, value in vars(self).items()
            if value is not None and (key, value) != ("scaling", "backpack")
        }
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"

    def check(self, samples: int) -> None:
        """Refuse, before a field is set, what does not fit the batch."""
        for index in self.subsampling or ():
            if not -samples <= index < samples:
                raise SubsamplingOutOfRange(self.name, index, samples)

    def needs(self, layer: Layer) -> tuple[Need, ...]:
        """The quantities that the value is made of; a parameter without one of them goes without."""
        raise NotImplementedError

    def value(self, q: Mapping[str, Tensor], sizes: Sizes) -> Tensor | list[Tensor]:
        """The field, from the quantities by name."""
        raise NotImplementedError
