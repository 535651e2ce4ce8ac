"""Ahead-of-time compilation of emitted Triton kernels without a GPU, and what the compiled code uses.

`table(compile_all(jobs(path)))` is a table for one emitted module. The process must not have TRITON_INTERPRET set: it turns
kernels into interpreted functions when they are imported.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = ("float32", "tf32", "bfloat16", "float64")
POINTERS = {"float32": "*fp32", "tf32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64"}


@dataclass(frozen=True)
class Job:
    """One kernel in one configuration for one target; kernels go by name, because they do not pickle."""

    path: Path
    kernel: str
    target: str
    dtype: str
    configuration: int = 0


@dataclass(frozen=True)
class Usage:
    """What the compiled code of one job uses: registers per thread, bytes of shared memory, spilled registers."""

    kernel: str
    target: str
    dtype: str
    blocks: str
    registers: int
    shared: int
    spills: int


def kernel_names(path: Path) -> list[str]:
    """The names of the kernels in an emitted module, in its order."""
    return re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)


def jobs(path: Path, targets: Iterable[str] = TARGETS, dtypes: Iterable[str] = DTYPES) -> list[Job]:
    """Every kernel in its default configuration."""
    return [Job(path, kernel, target, dtype) for kernel in kernel_names(path) for target in targets for dtype in dtypes]


def compile_all(work: Sequence[Job], workers: int = 2) -> list[Usage]:
    """Compiles the jobs in forked processes; the results lie in TRITON_CACHE_DIR and are reused from there."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1; unset it and start again")
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        return list(pool.map(compile_one, work, chunksize=8))


def compile_one(job: Job) -> Usage:
    """Compiles one kernel and reads its resources from the binary."""
    kernel, blocks, warps = _configured(getattr(_module(job.path), job.kernel), job.configuration)
    signature, constants = _signature(kernel, job.dtype, blocks)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget(*TARGETS[job.target])
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    read = _nvidia_usage if target.backend == "cuda" else _amd_usage
    registers, spills = read(compiled.asm)
    shown = " ".join(f"{name.removeprefix('BLOCK_').removeprefix('BLOCK')}{size}" for name, size in blocks.items())
    return Usage(
        job.kernel, job.target, job.dtype, f"{shown} warps{warps}", registers, compiled.metadata.shared, spills
    )


_LOADED: dict[Path, ModuleType] = {}


def _module(path: Path) -> ModuleType:
    """Imports an emitted module inside its package, which may lie anywhere."""
    if path not in _LOADED:
        package = path.parents[1]
        if str(package.parent) not in sys.path:
            sys.path.insert(0, str(package.parent))
        _LOADED[path] = importlib.import_module(f"{package.name}.{path.parent.name}.{path.stem}")
    return _LOADED[path]


def _configured(kernel: Any, configuration: int) -> tuple[Any, dict[str, int], int]:
    """The bare kernel, its block sizes and its warps, from the autotuner and from what the launchers pass."""
    blocks: dict[str, int] = {}
    warps = 4
    if hasattr(kernel, "configs"):
        config = kernel.configs[configuration]
        kernel, blocks, warps = kernel.fn, dict(config.kwargs), config.num_warps
    launch = importlib.import_module(f"{kernel.fn.__module__.rsplit('.', 2)[0]}.runtime.triton_launch")
    passed = {"BLOCK": launch.POINTWISE_BLOCK, "BLOCK_M": launch.gram_rows(2**20), "BLOCK_LANE": launch.REDUCE_LANES}
    if "BLOCK_LANE" in kernel.arg_names:
        passed["BLOCK_ROW"] = launch.REDUCE_ROWS
    else:
        passed |= {"BLOCK_ROW": launch.ROW_LANES, "BLOCK_K": launch.ROW_STEPS}
    return kernel, {name: size for name, size in (passed | blocks).items() if name in kernel.arg_names}, warps


def _signature(kernel: Any, dtype: str, blocks: dict[str, int]) -> tuple[dict[str, str], dict[str, Any]]:
    wide = "*fp64" if dtype == "float64" else "*fp32"
    constants: dict[str, Any] = {
        "COMPUTE": tl.float64 if dtype == "float64" else tl.float32,
        "PRECISION": "tf32" if dtype in ("tf32", "bfloat16") else "ieee",
        **blocks,
    }
    integers = _integer_pointers(kernel.src)
    summed = "BLOCK_LANE" in blocks or "BLOCK_M" in blocks
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in integers:
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = wide if name == "out_ptr" and summed else POINTERS[dtype]
        else:
            signature[name] = "i32"
    return signature, {name: value for name, value in constants.items() if name in signature}


def _integer_pointers(source: str) -> set[str]:
    """The pointers that are loaded without a conversion to the accumulation type: those to indices."""
    loads = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    bare = [load for load in loads if isinstance(load, ast.Call) and ast.unparse(load.func) == "tl.load"]
    return {
        name.id for load in bare for name in ast.walk(load) if isinstance(name, ast.Name) and name.id.endswith("_ptr")
    }


def _nvidia_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers per thread, and how many instructions move registers to and from local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(asm["cubin"])
        binary.flush()
        command = [str(tool), "-res-usage", "-sass", binary.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (registers,) = re.findall(r"REG:(\d+)", text)
    return int(registers), len(re.findall(r"\b(?:LDL|STL)\b", text))


def _amd_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Vector registers per thread, and spilled registers, as the assembler states them."""
    count = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)", asm["amdgcn"])
    }
    return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]


def table(usages: Iterable[Usage]) -> str:
    """The usages as a Markdown table."""
    rows = [
        f"| {u.kernel} | {u.target} | {u.dtype} | {u.blocks} | {u.registers} | {u.shared} | {u.spills} |"
        for u in usages
    ]
    return "\n".join(
        ["| kernel | target | dtype | tiles | registers | shared | spills |", "|---|---|---|---|---|---|---|", *rows]
    )
