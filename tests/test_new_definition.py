"""The promise: one definition file, `generate`, and every feature is right, with no other change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SOFTSIGN = '''"""torch.nn.Softsign."""

from satchel_gen.definitions import activation, z
from sympy import Abs

SOFTSIGN = activation("Softsign", z / (1 + Abs(z)))
'''


@pytest.mark.parametrize("name,text", [("Softsign", SOFTSIGN)])
def test_a_layer_is_one_file(tmp_path, name, text):
    """It joins the definitions of a copy that has never heard of it; the generic tests of layers and features then cover it."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    copy = tmp_path / "copy"
    for folder in ("layers", "kernels"):
        (copy / f"generated/satchel/{folder}/{name.lower()}.py").unlink()
    (copy / f"gen/satchel_gen/definitions/layers/{name.lower()}.py").write_text(text)
    paths = os.pathsep.join(str(copy / part) for part in ("generated", "gen", "tests"))
    environment = os.environ | {"PYTHONPATH": paths}

    def run(*arguments: str) -> str:
        result = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert f"layers/{name.lower()}.py" in run("-m", "satchel_gen", "generate")
    assert f"| {name} |" in run("-m", "satchel_gen", "list", "--markdown")
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", name, "tests/test_layers.py")
    assert "passed" in tested and "no tests ran" not in tested
