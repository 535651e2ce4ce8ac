"""What a pass will need at the least, before anything is computed: an error instead of the end of the process.

Counted is what grows with samples or columns and cannot be split: fields of individual quantities, and KFRA's matrix. All else is of
the order of the parameters, or passes in ranges of columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from .available import available
from .averaged import needed_bytes
from .demand import AVERAGED, Demand
from .errors import NotEnoughMemory
from .extension import Extension
from .kept import kept
from .plan import Place, Plan
from .settings import current

#: Bytes up to which the machine is not asked.
SMALL = 1 << 28


def check(plan: Plan, demand: Demand, samples: int, columns: int) -> bool:
    """Refuse what does not fit into the memory that is left, unless the user has set a limit; whether the machine had to be asked.

    columns: of the exact factor.
    """
    if current().memory_limit is not None or not plan.uses:
        return False
    places = [uses[0] for uses in plan.uses.values()]
    parameters = [place.parameter for place in places]
    asked = False
    if AVERAGED in demand.sources(plan.definitions):
        needed, where = needed_bytes(plan, samples, parameters[0].element_size())
        asked = _refuse(demand.features(plan.definitions, "averaged"), where, needed, parameters[0].device)
    copies = samples * sum(max(columns, extension.mc_samples or 1) for extension in demand.extensions)
    if copies * sum(map(_bytes, parameters)) <= SMALL:  # whatever it is that they ask for
        return asked
    sizes = [
        (_field_bytes(demand, e, place, samples, columns), place, e.name) for place in places for e in demand.extensions
    ]
    _, place, _ = max(sizes, key=lambda some: some[0])
    features = dict.fromkeys(name for size, _, name in sizes if size)
    where = f"{place.call.record.where}, parameter {place.name!r}"
    needed, device = sum(size for size, *_ in sizes), place.parameter.device
    return _refuse(features, where, needed, device, _replaced(parameters, demand)) or asked


def _field_bytes(demand: Demand, extension: Extension, place: Place, samples: int, columns: int) -> int:
    """Of a field that is larger than its parameter; others are not counted."""
    layer, copies = place.call.record.definition, 0
    for _, need in demand.asked(extension, layer):
        rule = layer.parameters[place.name].get(need.quantity)
        number = samples if need.samples is None else len(need.samples)
        wide = {"exact": columns, "mc": extension.mc_samples or 1}.get(need.source, 1)
        copies = max(copies, (0, number, number * wide)[(rule and rule.lead) or 0])
    return copies * _bytes(place.parameter)


def _replaced(parameters: Iterable[Tensor], demand: Demand) -> int:
    """Bytes of the fields that the pass will overwrite."""
    fields = [vars(parameter).get(extension.field) for parameter in parameters for extension in demand.extensions]
    return sum(_bytes(field) for field in fields if isinstance(field, Tensor))


def _refuse(features: Collection[str], where: str, needed: int, device: torch.device, replaced: int = 0) -> bool:
    """Whether the machine had to be asked."""
    if needed <= SMALL:
        return False
    there = available(device)
    if there is not None and needed > there + replaced:
        kept.clear()
        there = available(device) or 0
        if needed > there + replaced:
            raise NotEnoughMemory(features, where, needed, there + replaced)
    return True


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
