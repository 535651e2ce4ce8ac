"""Emitted Triton kernels compile without a GPU for each target and spill no registers: here one module of every shape.

`make kernels` compiles all of them, for every target and dtype, and fails where one spills.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_programs import CONTRACTIONS, PROGRAMS, write_package
from satchel_gen.emit.compile import DTYPES, TARGETS, kernel_names, measure, table

EMITTED = Path(__file__).parents[1] / "generated" / "satchel" / "kernels"
MODULES = [EMITTED / f"{name}.py" for name in ("conv1d", "cross_entropy_loss", "layer_norm", "linear", "softplus")]


@pytest.mark.parametrize(("target", "dtype"), list(zip(TARGETS, DTYPES, strict=True)))
def test_kernels_compile_without_spills(target: str, dtype: str) -> None:
    usages = measure(MODULES, targets=(target,), dtypes=(dtype,))
    found = [(u.module, u.kernel) for u in usages]
    assert list(dict.fromkeys(found)) == [(path.stem, name) for path in MODULES for name in kernel_names(path)]
    assert all(usage.registers > 0 for usage in usages)
    spilled = [usage for usage in usages if usage.spills]
    assert not spilled, "\n" + table(spilled)


def test_every_program_has_a_kernel(tmp_path: Path) -> None:
    path = write_package(tmp_path, "several", PROGRAMS)
    assert kernel_names(path) == [f"{program.name}_kernel" for program in PROGRAMS]


def test_spills_are_seen(tmp_path: Path) -> None:
    """The counter counts: a tile far too large for its warps must spill."""
    path = write_package(tmp_path, "spilling", CONTRACTIONS[2:3])
    launch = path.parents[1] / "runtime" / "triton_launch.py"
    first = '{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=8'
    text = launch.read_text()
    assert first in text
    launch.write_text(
        text.replace(first, '{"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16}, num_warps=4').replace("4096", "16384")
    )
    (usage,) = measure([path], targets=("sm_80",), dtypes=("float32",))
    assert usage.spills > 0
    assert "| sm_80 | float32 |" in table([usage])


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    path = write_package(tmp_path, "broken", CONTRACTIONS[:1])
    path.write_text(path.read_text().replace("tl.dot(", "tl.dott("))
    with pytest.raises(RuntimeError, match="dott"):
        measure([path], targets=("sm_80",), dtypes=("float32",))
