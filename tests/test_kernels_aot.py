"""Every shape of Triton kernel compiles without a GPU for each target, and spills no registers on NVIDIA's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernel_programs import CONTRACTIONS, PROGRAMS, write_package

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles only where TRITON_INTERPRET is not set", allow_module_level=True)

from satchel_gen.emit.compile import DTYPES, TARGETS, Job, compile_all, compile_one, jobs, kernel_names, table


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("aot"), "compiled", PROGRAMS)


def test_every_program_has_a_kernel(emitted: Path) -> None:
    assert kernel_names(emitted) == [f"{program.name}_kernel" for program in PROGRAMS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(emitted: Path, target: str, dtype: str) -> None:
    usages = compile_all(jobs(emitted, targets=(target,), dtypes=(dtype,)))
    assert len(usages) == len(PROGRAMS)
    spilled = [usage for usage in usages if usage.spills]
    if target.startswith("sm_"):
        assert not spilled, "\n" + table(spilled)
    assert all(usage.registers > 0 for usage in usages)


def test_spills_are_seen(emitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter counts: a tile far too large for its warps must spill."""
    from satchel_gen.emit import compile as module

    configured = module._configured

    def oversized(kernel: object, configuration: int) -> tuple[object, dict[str, int], int]:
        bare, blocks, _ = configured(kernel, configuration)
        return bare, blocks | {"BLOCK_M": 128, "BLOCK_N": 128}, 4

    monkeypatch.setattr(module, "_configured", oversized)
    usage = compile_one(Job(emitted, f"{CONTRACTIONS[2].name}_kernel", "sm_80", "float32"))
    assert usage.spills > 0
    assert "sm_80" in table([usage])


def test_interpreted_kernels_are_refused(emitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_all(jobs(emitted))
