"""What the launchers of the Triton kernels share: types, precision of dot products, tiles, and how work is split."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
PROGRAMS = 256  # enough to fill a large GPU about twice
TILE_ROWS = 128  # no tile has more rows
SMALLEST_TILE = 32  # rows and columns of the smallest matrix tile
POINTWISE_BLOCK = 1024
REDUCE_ROWS, REDUCE_LANES = 8, 128
ROW_STEPS, ROW_LANES, ROW_WARPS = 32, 32, 4
RESIDENT = 4096  # float32 numbers of the longest row that stays in registers
SECTOR = 8  # float32 numbers that memory is read by


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size. Triton's own takes 3 µs, as long as an operation of torch."""
    return -(-size // block)


def power_of_2(least: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(least - 1, 0).bit_length()


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 if an operand is, else float32."""
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of an accumulation dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(a: Tensor, b: Tensor, squared: bool = False) -> str:
    """The `input_precision` of a dot product: IEEE, unless torch was told that less is enough or TF32 loses nothing.

    TF32 holds every float16 and bfloat16 number, but not their squares. Few AMD GPUs have it.
    """
    if torch.version.hip is not None or accumulator(a, b) == torch.float64:
        return "ieee"
    exact = not squared and a.dtype in HALF and b.dtype in HALF
    return "tf32" if exact or torch.get_float32_matmul_precision() != "highest" else "ieee"


def splits(tiles: int, steps: int) -> int:
    """Into how many partial sums `steps` terms are split, so that few output tiles still fill the device."""
    return max(1, min(cdiv(steps, 4), PROGRAMS // max(tiles, 1)))


def check_strides(*strides: int) -> None:
    """Offsets inside a tile are 32-bit numbers: refuse strides that would overflow them."""
    if max(strides) * TILE_ROWS >= 2**31:
        raise ValueError(
            f"a stride of {max(strides)} elements overflows the 32-bit offsets inside a Triton tile; "
            f'use backend("aten") for this layer'
        )


def check_spans(*elements: int) -> None:
    """Offsets from the first element of a sample are 32-bit numbers too: refuse samples that would overflow them."""
    if max(elements) >= 2**31:
        raise ValueError(
            f"a span of {max(elements)} elements overflows the 32-bit offsets inside a Triton tile; "
            f'use backend("aten") for this layer'
        )


def gram_rows(rows: int, dtype: torch.dtype) -> int:
    """The side of a tile of a Gram matrix: no larger than it must be, no smaller than a tensor core takes."""
    return min(32 if dtype == torch.float64 else 64, max(16, power_of_2(rows)))


def resident(elements: int, stride: int, *tensors: Tensor) -> bool:
    """Whether a row of some elements, `stride` apart, stays in registers, with 32-bit offsets."""
    return elements <= longest(accumulator(*tensors)) and elements * stride < 2**31


def longest(dtype: torch.dtype) -> int:
    """How many elements a row in registers may have."""
    return RESIDENT // 2 if dtype == torch.float64 else RESIDENT


def row_tile(elements: int, stride: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Elements and rows of a tile of whole rows, and its warps.

    Short rows share a program; so do rows whose elements lie side by side, `stride` of them, if they fit: memory comes by sectors.
    """
    block = power_of_2(elements)
    beside = power_of_2(min(stride, SECTOR))
    rows = max(1, 1024 // block, min(beside, longest(dtype) // block))
    width = 2 if dtype == torch.float64 else 1
    return block, rows, min(16, max(4, width * block * rows // 256))


def stage_tile(elements: int, stride: int, dtype: torch.dtype) -> tuple[bool, int, int, int]:
    """Whether a row is read whole, and the elements and rows of a tile, and its warps."""
    if elements * min(stride, SECTOR) <= longest(dtype):
        return (True, *row_tile(elements, stride, dtype))
    return False, ROW_STEPS, ROW_LANES, ROW_WARPS


def registers(warps: int) -> dict[str, int]:
    """All the registers that a block of some warps can have: unasked, ptxas spills a few where one more block then fits.

    AMD's compiler has no such option.
    """
    return {} if torch.version.hip is not None else {"maxnreg": min(255, 65536 // (32 * warps))}


def tiles(*configs: triton.Config) -> list[triton.Config]:
    """Autotuning configurations; the interpreter, which cannot measure, takes the first."""
    return list(configs[:1] if triton.knobs.runtime.interpret else configs)


def fitting(configs: list[triton.Config], tensors: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """The matrix tiles whose sums stay in registers: float64 takes twice the room."""
    most = 1024 if constants["COMPUTE"] == tl.float64 else 4096
    return [config for config in configs if config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"] <= most]


#: What a dtype starts from has its registers, so that it spills none; of the others ptxas decides, and the tuner measures.
MATRIX_TILES = tiles(
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=8, **registers(8)),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=8),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=4, **registers(4)),
)
GRAM_TILES = tiles(
    triton.Config({"BLOCK_K": 16}, num_warps=8),
    triton.Config({"BLOCK_K": 32}, num_warps=8),
    triton.Config({"BLOCK_K": 32}, num_warps=4),
)
