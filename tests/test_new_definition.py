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


#: A parameter with a block axis alone: no Kronecker structure, so KFAC, KFLR and KFRA give its exact block.
PRELU = '''"""torch.nn.PReLU with a slope per channel."""

from sympy import Piecewise

from satchel_gen.definitions import Example, Layer, Statement, indices, tensors

n, c, r = indices("n c r*")
x, y, w = tensors("input output weight")

PRELU = Layer(
    name="PReLU",
    input=x[n, c, r],
    parameters=(w[c],),
    statements=(Statement(y[n, c, r], Piecewise((x[n, c, r], x[n, c, r] > 0), (w[c] * x[n, c, r], True))),),
    examples=(Example((3,), {"num_parameters": 3}), Example((3, 2), {"num_parameters": 3})),
)
'''


@pytest.mark.parametrize("name,text", [("Softsign", SOFTSIGN), ("PReLU", PRELU)])
def test_a_layer_is_one_file(tmp_path, name, text):
    """It joins the definitions of a copy; the generic tests of layers, features and references then cover it."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    copy = tmp_path / "copy"
    (copy / f"gen/satchel_gen/definitions/layers/{name.lower()}.py").write_text(text)
    paths = os.pathsep.join(str(copy / part) for part in ("generated", "gen", "tests"))
    environment = os.environ | {"PYTHONPATH": paths}

    def run(*arguments: str) -> str:
        result = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert f"layers/{name.lower()}.py" in run("-m", "satchel_gen", "generate")
    assert f"| {name} |" in run("-m", "satchel_gen", "list", "--markdown")
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", name, "tests/test_features.py")
    assert "passed" in tested and "no tests ran" not in tested
