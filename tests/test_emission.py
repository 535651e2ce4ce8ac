"""What is emitted: deterministic to the byte, up to date, readable; a stale package fails with the difference."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from satchel_gen import cli, explain
from satchel_gen.definitions import load
from satchel_gen.emit import package

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "generated" / "satchel"


def run(*arguments: str, seed: str = "0", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(cwd / "gen"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "satchel_gen", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def files():
    return package.render(load(), "satchel")


def test_the_committed_package_is_what_the_definitions_say(files):
    assert not list(package.differences(files, GENERATED))


@pytest.mark.parametrize("seed", ["1", "4711"])
def test_the_same_bytes_under_any_hash_seed(files, tmp_path, seed):
    result = run("generate", "--out", str(tmp_path), seed=seed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(package.differences(files, tmp_path / "satchel"))


def test_writing_again_changes_nothing_and_removes_what_is_no_longer_generated(files, tmp_path):
    changed, stale = package.write(files, tmp_path)
    assert sorted(changed) == sorted(files) and stale == []
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files}
    (tmp_path / "layers" / "gone.py").write_text("")
    assert package.write(files, tmp_path) == ([], ["layers/gone.py"])
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in files}


def test_a_stale_package_fails_with_the_difference(tmp_path):
    run("generate", "--out", str(tmp_path))
    path = tmp_path / "satchel" / "layers" / "linear.py"
    path.write_text(path.read_text().replace("matmul(factor, weight)", "matmul(factor, 2 * weight)"))
    result = run("check", "--out", str(tmp_path))
    assert result.returncode == 1
    assert (
        "-    return matmul(factor, 2 * weight)" in result.stdout
        and "+    return matmul(factor, weight)" in result.stdout
    )
    assert "make generate" in result.stdout


def test_another_name_and_a_selection(tmp_path):
    result = run("generate", "--out", str(tmp_path), "--package", "knapsack", "--only", "Linear,MSELoss")
    assert result.returncode == 0, result.stdout
    layers = {path.stem for path in (tmp_path / "knapsack" / "layers").glob("*.py")}
    assert layers == {"__init__", "linear"}
    code = "import torch, knapsack; from knapsack.extensions import BatchGrad; knapsack.extend(torch.nn.Linear(2, 2)); print('ok')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "ok", result.stderr


def test_the_package_name_is_no_literal_of_the_generator():
    for path in (ROOT / "gen").rglob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert "satchel" not in words or path.name == "cli.py", path


def test_emitted_functions_carry_their_formula(files):
    for name, text in files.items():
        tree = ast.parse(text)
        assert ast.get_docstring(tree) or name in ("py.typed",), name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and name.split("/")[0] in ("layers", "losses", "kernels"):
                assert ast.get_docstring(node), f"{name}: {node.name}"


def test_the_package_is_self_contained(files):
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module or ""]
            for module in imported:
                root = module.split(".")[0]
                assert root in sys.stdlib_module_names or root in ("torch", "triton"), f"{name} imports {module}"


def test_list_and_explain():
    listed = run("list", "--markdown")
    for definition in (*load().layers, *load().losses, *load().features):
        assert definition.name in listed.stdout
    explained = run("explain", "Linear", "SumGradSquared")
    for step in (
        "Σ_{i} input[n, r, i] weight[o, i]",
        "δ(o, o′) input[n, r′, i]",
        "weight_sum_of_squares[o, i]",
        "blockwise",
        "def weight",
    ):
        assert step in explained.stdout, step
    assert run("explain", "Lin").returncode == 1


@pytest.mark.parametrize("name", ["Conv2d", "LayerNorm", "CrossEntropyLoss"])
def test_explain_takes_windows_stages_and_losses(name, monkeypatch):
    monkeypatch.setattr(explain, "code", str)
    text = "\n".join(part.text for part in explain.explain(load(), name))
    assert text.count("Triton: ") == text.count(" launch") - text.count("PyTorch: ") > 0


def test_explain_gives_bytes_where_it_is_told_sizes():
    """Linear's squares at one position: v² and its sum over one column move 4NO, then one kernel reads each operand once."""
    N, O, I = 100, 64, 48
    said = run("explain", "Linear", "SumGradSquared", "--sizes", f"V=1 N={N} R=1 O={O} I={I}").stdout
    elements = 4 * N * O + N * O + N * I + O * I
    assert f"weight_sum_of_squares_separated: 3 launches, {4 * elements / 1e6:.2f} MB of float32" in said
    assert run("explain", "Linear", "--sizes", "V:1").returncode == 1


def test_the_readme_shows_the_emitted_support_table():
    table = run("list", "--markdown").stdout.strip()
    assert table in (ROOT / "README.md").read_text()


def test_error_messages_keep_their_brackets(capsys):
    """An index in brackets is no markup of the terminal's."""
    with pytest.raises(typer.Exit):
        cli._fail("input[n, k] reads an undeclared tensor")
    assert "input[n, k]" in capsys.readouterr().out
