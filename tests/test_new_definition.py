"""The promise: one definition file, `generate`, and every feature is right, with no other change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SOFTSIGN = '''"""torch.nn.Softsign."""

from satchel_gen.definitions import activation, z
from sympy import Abs

SOFTSIGN = activation("Softsign", z / (1 + Abs(z)))
'''


def test_an_activation_is_one_file(tmp_path):
    """Softsign joins the definitions of a copy; the generic tests of layers, features and references then cover it."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    copy = tmp_path / "copy"
    (copy / "gen/satchel_gen/definitions/layers/softsign.py").write_text(SOFTSIGN)
    paths = os.pathsep.join(str(copy / part) for part in ("generated", "gen", "tests"))
    environment = os.environ | {"PYTHONPATH": paths}

    def run(*arguments: str) -> str:
        result = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert "layers/softsign.py" in run("-m", "satchel_gen", "generate")
    assert "| Softsign |" in run("-m", "satchel_gen", "list", "--markdown")
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "Softsign", "tests/test_features.py")
    assert "passed" in tested and "no tests ran" not in tested
