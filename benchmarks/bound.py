"""What the programs of a cell cost at the least: their operations at the machine's best rate, or each byte moved once.

Every rule that runs is counted. One that chooses among programs is counted as the generator states them, and by the least of them;
any other by the operations of its matrix products and the sizes of its operands and its result. What passes through autograd's own
nodes (pooling, views) is free, and so is the part of a first-order rule that autograd's weight gradient already pays for:
Σ_n g_n is that gradient. The bound is therefore of these algorithms: another may do with fewer operations, none of these with less time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cells import CELLS, is_exact
from peers.individual import FIRST_ORDER

#: Bytes of the arrays that bandwidth is measured on: within the caches, and beyond.
SIZES = (1 << 15, 1 << 18, 1 << 21, 1 << 24, 1 << 28)


@dataclass(frozen=True)
class Work:
    """Operations, and bytes of operands and result."""

    flops: int
    bytes: int


def _of_gradients(gradient: Any, images: Any, kernel: Any, *others: Any, out_shape: Any = None) -> int:
    """Of a convolution's gradients; torch's own formula takes every group for all channels."""
    *_, transposed, _, _, wanted = others
    return 2 * prod(images if transposed else gradient) * prod(kernel[1:]) * sum(wanted[:2])


def _of_linear(x: Any, weight: Any, *others: Any, out_shape: Any = None) -> int:
    return 2 * prod(x) * weight[0]


_FORMULAS: dict[Any, Callable[..., int]] = {torch.ops.aten.convolution_backward: _of_gradients}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _FORMULAS[torch.ops.mkldnn._linear_pointwise] = _of_linear


def machine() -> dict[str, Any]:
    """Operations and bytes per second, elapsed and of all threads' CPU time: the best of several tries."""
    from satchel.runtime.torch_private import has_product, product

    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    products = [partial(torch.mm, a, b, out=torch.empty(1536, 1536))]
    if has_product(a, b):
        products.append(partial(product, a, b))
    measured = [_rate(run, 2 * 1536**3) for run in products]
    rates: dict[str, Any] = {"flops": {clock: max(rate[clock] for rate in measured) for clock in measured[0]}}
    rates["bytes"] = {}
    for size in SIZES:
        source, target = torch.ones(size // 8), torch.ones(size // 8)
        rates["bytes"][str(size)] = _rate(partial(target.copy_, source), size)
    return rates


def _rate(work: Callable[[], Any], amount: int, tries: int = 7) -> dict[str, float]:
    """Each try takes 20 ms or one call."""
    found = {"wall": 0.0, "cpu": 0.0}
    for _ in range(tries):
        wall, cpu, calls = time.perf_counter(), time.process_time(), 0
        while calls == 0 or time.perf_counter() - wall < 0.02:
            work()
            calls += 1
        found["wall"] = max(found["wall"], amount * calls / (time.perf_counter() - wall))
        found["cpu"] = max(found["cpu"], amount * calls / max(1e-9, time.process_time() - cpu))
    return found


def count(network: str, cell: str) -> dict[str, Any]:
    """The work of every rule in a pass, the operations of a forward pass, and the bytes of each feature's results."""
    from peers import satchel_api
    from problems import NETWORKS
    from satchel.runtime import rules
    from satchel.runtime.matmul import onednn_speed

    onednn_speed()  # measured once in a process, by products that are no rule's
    found: list[Work] = []
    rules.install(counted(rules.registry(), found))
    results = satchel_api.build(NETWORKS[network].task(is_exact(cell)), CELLS[cell])()
    task = NETWORKS[network].task(batch=1)
    with FlopCounterMode(display=False) as counter:
        task.model(task.x)
    batch = len(NETWORKS[network].task(is_exact(cell)).x)
    return {
        "rules": [(work.flops, work.bytes) for work in found],
        "forward": batch * counter.get_total_flops(),
        "results": {feature: sum(map(_size, fields)) for feature, fields in results.items()},
    }


def _size(field: Any) -> int:
    return field.nbytes if isinstance(field, Tensor) else sum(map(_size, field))


def counted(value: Any, found: list[Work]) -> Any:
    """A registry whose rules note what they cost."""
    from satchel.runtime.rules import Rule

    if isinstance(value, Rule):
        return replace(value, aten=_noting(value.aten, found))
    if isinstance(value, Mapping):
        return {key: counted(item, found) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(counted(item, found) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: counted(getattr(value, field.name), found) for field in fields(value)})
    return value


def _noting(function: Callable[..., Tensor], found: list[Work]) -> Callable[..., Tensor]:
    from satchel.runtime import cost

    def noting(*operands: Any, **out: Tensor) -> Tensor:
        with cost.recorded() as choices, FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            result = function(*operands, **out)
        if choices:
            programs = choices[0]
            flops, elements = min(p.flops for p in programs), min(p.elements for p in programs)
            found.append(Work(flops, elements * result.element_size()))
        else:
            tensors = [result, *(operand for operand in operands if isinstance(operand, Tensor))]
            found.append(Work(counter.get_total_flops(), sum(t.numel() * t.element_size() for t in tensors)))
        return result

    return noting


def bound(counts: dict[str, Any], rates: dict[str, Any], cell: str) -> dict[str, Any]:
    """Seconds of elapsed and CPU time that the features of a cell add at the least, and that writing each one's results takes."""
    found: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        rate = rates["flops"][clock]
        seconds = sum(max(flops / rate, moved / _bandwidth(moved, rates, clock)) for flops, moved in counts["rules"])
        if not FIRST_ORDER.isdisjoint(CELLS[cell]):
            seconds -= min(counts["forward"], sum(flops for flops, _ in counts["rules"])) / rate
        found[clock] = max(0.0, seconds)
    written = {
        feature: {clock: size / _bandwidth(size, rates, clock) for clock in ("wall", "cpu")}
        for feature, size in counts["results"].items()
    }
    return found | {
        "written": written,
        "flops": sum(flops for flops, _ in counts["rules"]),
        "bytes": sum(moved for _, moved in counts["rules"]),
    }


def _bandwidth(moved: int, rates: dict[str, Any], clock: str) -> float:
    """The best that was measured on as much data, or more."""
    return max(rate[clock] for size, rate in rates["bytes"].items() if int(size) >= min(moved, SIZES[-1]))
