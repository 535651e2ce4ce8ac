"""Kronecker factors of parameters that functions use, where these are linear maps: against a trace of every F.linear and matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Wired
from conftest import Agree
from parameters import N, built, inputs, reference, targets
from reference import jacobian
from satchel import backpack, extend
from satchel.extensions import KFAC, KFLR, KFRA, DiagGGNMC


class LinearMaps:
    """Every F.linear and torch.matmul with a part of a parameter: its input, the part, and a zero added to its output."""

    def __init__(self, parameters: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
        self.parameters = parameters
        self.uses: list[tuple[str, int, bool, Tensor, Tensor]] = []
        self.biases: list[tuple[str, int, Tensor]] = []
        linear, matmul = F.linear, torch.matmul
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: self.use(linear(x, w, b), x, w, b, False))
        monkeypatch.setattr(torch, "matmul", lambda x, w: self.use(matmul(x, w), x, w, None, True))

    def use(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        probe = torch.zeros_like(out, requires_grad=True)
        name, start = self.find(weight)
        self.uses.append((name, start, transposed, x.detach(), probe))
        if bias is not None:
            self.biases.append((*self.find(bias), probe))
        return out + probe

    def find(self, part: Tensor) -> tuple[str, int]:
        """The parameter, and the first of its rows."""
        same = (part.untyped_storage().data_ptr(), part.storage_offset())
        for name, p in self.parameters.items():
            if p.untyped_storage().data_ptr() == same[0]:
                return name, same[1] // p.stride(0)
        raise AssertionError("no parameter")


def kronecker(
    name: str, x: Tensor, approximation: str, run: Callable[[Any, Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    """[B, A] or [B] of every parameter; a use of a part has zero rows for the rest. Only the rows of a sample see its output."""
    model = built(name)
    wanted = reference(name, len(x), x.shape[1], "mean")
    with pytest.MonkeyPatch.context() as monkeypatch:
        maps = LinearMaps(dict(model.named_parameters()), monkeypatch)
        output = run(model, x)
    probes = [use[4] for use in maps.uses] + [probe for _, _, probe in maps.biases]
    flat = output.reshape(len(x), -1)
    cotangents = {id(p): t for p, t in zip(probes, jacobian(flat, probes), strict=True)}

    def factor(name: str, uses: list[tuple[int, Tensor]], axis: int) -> Tensor:
        columns = []
        for start, probe in uses:
            T = cotangents[id(probe)]
            T = T.reshape(*flat.shape, -1, T.shape[-1])
            total = model.get_parameter(name).shape[axis]
            columns.append(F.pad(T, (start, total - start - T.shape[-1])))
        T = torch.cat(columns, 2)
        T = T if approximation == "expand" else T.sum(2, keepdim=True)
        return torch.einsum("nfro,nfg,ngrq->oq", T, wanted.curvature, T)

    fields: dict[str, list[Tensor]] = {}
    for key in {use[0] for use in maps.uses}:
        uses = [use for use in maps.uses if use[0] == key]
        a = torch.cat([u[3].reshape(-1, u[3].shape[-1]) for u in uses])
        A = a.T @ a / (len(a) if approximation == "expand" else len(x))
        fields[key] = [factor(key, [(u[1], u[4]) for u in uses], 1 if uses[0][2] else 0), A]
    for key in {bias[0] for bias in maps.biases}:
        fields[key] = [factor(key, [bias[1:] for bias in maps.biases if bias[0] == key], 0)]
    return fields


def step_by_step(m: Any, x: Tensor) -> Tensor:
    """An LSTM of two layers, in functions."""
    h = x
    for k in range(2):
        cell, outputs = m.cell, []
        w, u, b, c = (getattr(cell, f"{what}_l{k}") for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        state = cells = torch.zeros(len(x), 3, dtype=x.dtype)
        for gates in F.linear(h, w, b).unbind(1):
            i, f, g, o = (gates + F.linear(state, u, c)).chunk(4, 1)
            cells = f.sigmoid() * cells + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cells.tanh()
            outputs.append(state)
        h = torch.stack(outputs, 1)
    return m.head(h[:, -1])


LINEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{
        name: lambda m, x: m(x)
        for name in ("functional", "product", "nothing else", "sequence first", "attention", "attention batch first",
                     "attention without bias", "cross attention", "cross attention batch first", "cross attention kdim")
    },
    "LSTM of two layers, batch first": step_by_step,
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("approximation", ["expand", "backpack"])
@pytest.mark.parametrize("samples", [N, 1])
def test_kronecker_factors(name: str, approximation: str, samples: int, agree: Agree) -> None:
    x = inputs(samples)
    model, loss = extend(built(name)), extend(nn.CrossEntropyLoss())
    with backpack(KFLR(approximation=approximation)):
        loss(model(x), targets(name, x)).backward()
    wanted = kronecker(name, x, approximation, LINEAR[name])
    agree({key: p.kflr for key, p in model.named_parameters()}, wanted)


def test_functions_are_as_modules() -> None:
    """What is drawn, and the averaged curvature, of functional uses are those of the same network in modules."""
    x = inputs(N)
    twin = Wired(
        lambda m, x: m.b(torch.tanh(m.p(x)).mean(1)), p=nn.Linear(4, 5, bias=False), b=nn.Linear(5, 3)
    ).double()
    model = built("functional")
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    for network in (extend(model), extend(twin)):
        generator = torch.Generator().manual_seed(3)
        with backpack(KFAC(mc_samples=2, generator=generator), DiagGGNMC(mc_samples=2, generator=generator), KFRA()):
            extend(nn.CrossEntropyLoss())(network(x), targets("functional", x)).backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(theirs.kfac, ours.kfac)
        torch.testing.assert_close(theirs.kfra, ours.kfra)
        torch.testing.assert_close(theirs.diag_ggn_mc, ours.diag_ggn_mc)
        torch.testing.assert_close(theirs.grad, ours.grad)
