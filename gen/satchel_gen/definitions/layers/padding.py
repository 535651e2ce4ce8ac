"""torch.nn's padding over 1, 2 and 3 axes: elements move, repeat, or stand beside constants."""

from typing import Any

from satchel_gen.definitions import Example, Passing

WIDTHS = (2, 1, 0, 2, 1, 1)
FORMULAS = {
    "Zero": "output[n, c, h…] = input[n, c, h − p, …], 0 outside",
    "Constant": "output[n, c, h…] = input[n, c, h − p, …], a constant outside",
    "Reflection": "output[n, c, h…] = input[n, c, …], reflected at the first and the last element",
    "Replication": "output[n, c, h…] = input[n, c, …], the first and the last element repeated",
    "Circular": "output[n, c, h…] = input[n, c, (h − p) mod H, …]",
}


def padding(kind: str, rank: int) -> Passing:
    """The module over `rank` axes."""
    arguments: dict[str, Any] = {"padding": WIDTHS[: 2 * rank]} | ({"value": 0.7} if kind == "Constant" else {})
    shape = (1 if rank == 3 else 2, *(2, 3, 4)[-rank:])
    return Passing(f"{kind}Pad{rank}d", FORMULAS[kind], examples=(Example(shape, arguments),))


ZERO_PAD1D, ZERO_PAD2D, ZERO_PAD3D = (padding("Zero", rank) for rank in (1, 2, 3))
CONSTANT_PAD1D, CONSTANT_PAD2D, CONSTANT_PAD3D = (padding("Constant", rank) for rank in (1, 2, 3))
REFLECTION_PAD1D, REFLECTION_PAD2D, REFLECTION_PAD3D = (padding("Reflection", rank) for rank in (1, 2, 3))
REPLICATION_PAD1D, REPLICATION_PAD2D, REPLICATION_PAD3D = (padding("Replication", rank) for rank in (1, 2, 3))
CIRCULAR_PAD1D, CIRCULAR_PAD2D, CIRCULAR_PAD3D = (padding("Circular", rank) for rank in (1, 2, 3))
