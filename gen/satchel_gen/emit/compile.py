"""Ahead-of-time compilation of emitted Triton kernels without a GPU, and what the compiled code uses.

`measure` runs in a process of its own: TRITON_INTERPRET, which tests set, changes Triton for good where it is imported.
A table for an emitted module: `python -m satchel_gen.emit.compile generated/satchel/kernels/linear.py`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
#: What a kernel is compiled for: the dtype of its operands, and TF32 products of float32.
DTYPES: Mapping[str, str] = {"float32": "*fp32", "tf32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64"}


@dataclass(frozen=True)
class Usage:
    """What the compiled code of a kernel uses: registers per thread, bytes of shared memory, spilling instructions."""

    module: str
    kernel: str
    target: str
    dtype: str
    tiles: str
    registers: int
    shared: int
    spills: int


@dataclass(frozen=True)
class Job:
    """A kernel in its default configuration for one target; it goes by name, because kernels do not pickle."""

    path: Path
    kernel: str
    target: str
    dtype: str
    longer: int = 0


def measure(
    paths: Sequence[Path], targets: Iterable[str] = tuple(TARGETS), dtypes: Iterable[str] = tuple(DTYPES)
) -> list[Usage]:
    """Compiles every kernel of emitted modules; results in TRITON_CACHE_DIR are reused."""
    command = [sys.executable, "-m", __name__, *map(str, paths), "--json"]
    command += ["--targets", *targets, "--dtypes", *dtypes]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kernels do not compile for {', '.join(targets)}:\n{done.stderr}")
    return [Usage(**usage) for usage in json.loads(done.stdout)]


def kernel_names(path: Path) -> list[str]:
    """The names of the kernels in an emitted module, in its order."""
    return re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)


def streamed(path: Path) -> list[str]:
    """The kernels that also take rows longer than registers hold."""
    return re.findall(r"^def (\w+_kernel)\([^)]*\bWHOLE\b", path.read_text(), re.MULTILINE)


def table(usages: Iterable[Usage]) -> str:
    """The usages as a Markdown table."""
    names = [column.name for column in fields(Usage)]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    rows = ["| " + " | ".join(str(value) for value in asdict(usage).values()) + " |" for usage in usages]
    return "\n".join([head, *rows])


def show(package: Path, console: Console) -> bool:
    """Prints what every kernel of an emitted package uses; whether none spills."""
    paths = [path for path in sorted((package / "kernels").glob("*.py")) if kernel_names(path)]
    rows = Table(*(column.name for column in fields(Usage)))
    with console.status("compiling"):
        usages = measure(paths)
    for usage in usages:
        rows.add_row(*(str(value) for value in asdict(usage).values()), style="red" if usage.spills else None)
    console.print(rows)
    return not any(usage.spills for usage in usages)


def compile_all(jobs: Sequence[Job], workers: int = 2) -> list[Usage]:
    """Compiles the jobs in forked processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        return list(pool.map(compile_one, jobs, chunksize=4))


def compile_one(job: Job) -> Usage:
    """Compiles one kernel and reads from the binary what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, options = _configured(getattr(_module(job.path), job.kernel), job.dtype, job.longer)
    signature = _signature(kernel, job.dtype, constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    target = GPUTarget(*TARGETS[job.target])
    if target.backend != "cuda":
        options.pop("maxnreg", None)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = (_nvidia_usage if target.backend == "cuda" else _amd_usage)(compiled.asm)
    blocks = [f"{name.removeprefix('BLOCK_')}={size}" for name, size in constants.items() if name.startswith("BLOCK")]
    tiles = " ".join([*blocks, f"warps={options['num_warps']}"])
    return Usage(job.path.stem, job.kernel, job.target, job.dtype, tiles, registers, compiled.metadata.shared, spills)


@functools.cache
def _module(path: Path) -> ModuleType:
    """Imports an emitted module inside its package, which may lie anywhere."""
    package = path.resolve().parents[1]
    sys.path.insert(0, str(package.parent))
    return importlib.import_module(f"{package.name}.{path.parent.name}.{path.stem}")


def _configured(kernel: Any, dtype: str, longer: int) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The bare kernel, and the constants and the compiler's options that its launcher or its autotuner passes it.

    Rows are `longer` than what registers hold.
    """
    import torch
    import triton.language as tl

    double = dtype == "float64"
    constants: dict[str, Any] = {
        "COMPUTE": tl.float64 if double else tl.float32,
        "PRECISION": "tf32" if dtype in ("tf32", "bfloat16") else "ieee",
    }
    tuned: dict[str, int] = {}
    options: dict[str, int] = {"num_warps": 4}
    if hasattr(kernel, "configs"):
        configs = kernel.configs
        if kernel.early_config_prune is not None:
            configs = kernel.early_config_prune(configs, {}, **constants)
        first = configs[0]
        kernel, tuned, options = kernel.fn, dict(first.kwargs), {"num_warps": first.num_warps}
        options |= {"maxnreg": first.maxnreg} if first.maxnreg else {}
    launch = importlib.import_module(f"{kernel.fn.__module__.rsplit('.', 2)[0]}.runtime.triton_launch")
    constants["BLOCK"] = launch.POINTWISE_BLOCK
    sums = torch.float64 if double else torch.float32
    rows: dict[str, int] = {}
    if "WHOLE" in kernel.arg_names:
        rows["WHOLE"], rows["BLOCK_K"], rows["BLOCK_ROW"], warps = launch.stage_tile(
            launch.longest(sums) + longer, 1, sums
        )
        options = {"num_warps": warps, **launch.registers(warps)}
    elif {"BLOCK", "BLOCK_ROW"} <= set(kernel.arg_names):
        rows["BLOCK"], rows["BLOCK_ROW"], warps = launch.row_tile(launch.longest(sums), 1, sums)
        options = {"num_warps": warps, **launch.registers(warps)}
    constants["BLOCK_M"] = launch.gram_rows(2**20, sums)
    if "BLOCK_LANE" in kernel.arg_names:
        constants |= {"BLOCK_ROW": launch.REDUCE_ROWS, "BLOCK_LANE": launch.REDUCE_LANES}
    constants |= {name: 28 if name.isupper() else 2 for name in _geometry(kernel, constants)}
    constants |= rows | tuned
    return kernel, {name: value for name, value in constants.items() if name in kernel.arg_names}, options


def _geometry(kernel: Any, constants: Mapping[str, Any]) -> list[str]:
    """Extents and numbers that are compiled into a kernel. Extents must exceed a tile, lest its loop be compiled away."""
    return [p.name for p in kernel.params if p.is_constexpr and p.name not in {*constants, "BLOCK_N"}]


def _signature(kernel: Any, dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """The type of each argument: results have the accumulation type, indices are 64-bit, numbers as they state."""
    integers = _integer_pointers(kernel.src)
    wide = DTYPES["float64" if dtype == "float64" else "float32"]
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif name in integers:
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = wide if name == "out_ptr" else DTYPES[dtype]
        else:
            signature[name] = "i32"
    return signature


def _integer_pointers(source: str) -> set[str]:
    """The pointers that are loaded without a conversion to the accumulation type: those to indices."""
    values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    bare = [value for value in values if isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.load"]
    names = {name.id for load in bare for name in ast.walk(load) if isinstance(name, ast.Name)}
    return {name for name in names if name.endswith("_ptr")}


def _nvidia_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers per thread, and how many instructions move registers to and from local memory (none without a stack)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(asm["cubin"])
        binary.flush()

        def dumped(what: str) -> str:
            return subprocess.run([tool, what, binary.name], check=True, capture_output=True, text=True).stdout

        ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", dumped("-res-usage"))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", dumped("-sass"))) if int(stack) else 0
    return int(registers), spills


def _amd_usage(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Vector registers per thread, and spilled registers, as the assembler states them."""
    found = re.findall(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)", asm["amdgcn"])
    count = {name: int(value) for name, value in found}
    return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of emitted Triton kernels.")
    parser.add_argument("paths", nargs="+", type=Path, help="modules of kernels inside their packages")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    jobs = [
        Job(path, kernel, target, dtype, longer)
        for path in options.paths
        for kernel in kernel_names(path)
        for target in options.targets
        for dtype in options.dtypes
        for longer in ((0, 1) if kernel in streamed(path) else (0,))
    ]
    usages = compile_all(jobs)
    print(json.dumps([asdict(usage) for usage in usages]) if options.json else table(usages))


if __name__ == "__main__":
    main()
