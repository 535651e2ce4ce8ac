"""Breaks the definitions, rules, templates and engine on purpose, one at a time, and shows that the suite notices each.

    make mutants            all of them
    make mutants ARGS=sign  those whose name contains "sign"

A mutant changes one string in a copy of the repository, regenerates, and runs the tests named beside it until one fails.
A mutant that survives, or whose text is no longer found, fails the script.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

ROOT = Path(__file__).parents[1]
FEATURES = "tests/test_features.py"


@dataclass(frozen=True)
class Mutant:
    """`old` → `new` in one file."""

    name: str
    file: str
    old: str
    new: str
    tests: str = FEATURES

    def occurrences(self, root: Path = ROOT) -> int:
        """How often `old` stands in the file; once, where the mutant can be made."""
        return (root / self.file).read_text().count(self.old)


GEN = "gen/satchel_gen"
MUTANTS = [
    Mutant("definition: sign of a sigmoid", f"{GEN}/definitions/layers/sigmoid.py", "sigmoid(z))", "1 - sigmoid(z))"),
    Mutant("definition: kink of ReLU", f"{GEN}/definitions/layers/relu.py", "z > 0", "z > 1"),
    Mutant("definition: scale of tanh", f"{GEN}/definitions/layers/tanh.py", "tanh(z))", "2 * tanh(z))"),
    Mutant("definition: index of the weight", f"{GEN}/definitions/layers/linear.py", "Sum(W[o, i] * x[n, r, i], i) + b[o]",
           "Sum(W[o, i] * x[n, r, i], i) + 2 * b[o]"),
    Mutant("definition: norms centred once", f"{GEN}/definitions/standardised.py", "Statement(shifted[axes], x - shift[kept])",
           "Statement(shifted[axes], x)", "tests/test_accuracy.py"),
    Mutant("definition: scale of the squared error", f"{GEN}/definitions/losses/mse_loss.py", "(f[n, j] - y[n, j]) ** 2",
           "(f[n, j] - y[n, j]) ** 2 / 2"),
    Mutant("definition: variance of the likelihood", f"{GEN}/definitions/losses/mse_loss.py", "Rational(1, 2)", "Rational(1, 1)",
           "tests/test_monte_carlo.py"),
    Mutant("definition: sign of the cross-entropy", f"{GEN}/definitions/losses/cross_entropy_loss.py", "lse[n, r] - Sum(",
           "lse[n, r] + Sum("),
    Mutant("definition: targets of zero", f"{GEN}/definitions/losses/bce_with_logits_loss.py", "1 - y[n, j]", "1 + y[n, j]",
           "tests/test_losses.py"),
    Mutant("calculus: weight of a sampled factor", f"{GEN}/calculus/likelihood.py", "_root(loss.weight, loss) * score",
           "loss.weight * score", "tests/test_losses.py"),
    Mutant("runtime: the reflection of an exact factor", f"{GEN}/runtime/householder.py", "weights / (1 + largest)",
           "weights / (2 + largest)", "tests/test_householder.py"),
    Mutant("runtime: a view that the loss takes is its own", f"{GEN}/runtime/promise.py", "if start.loss.direct else None",
           "if start.loss is not None else None", "tests/test_errors_of_calls.py"),
    Mutant("runtime: any scale of a loss is valid", f"{GEN}/runtime/curvature.py", " or not 0 <= self.arriving < inf", "",
           "tests/test_errors_of_tensors.py"),
    Mutant("runtime: what a loss has saved is read inside a checkpoint", f"{GEN}/runtime/curvature.py",
           "self.loss.checkpointed or reduction", "reduction", "tests/test_errors_of_modules.py"),
    Mutant("runtime: needs are known by the kind of a feature alone", f"{GEN}/runtime/demand.py",
           "(type(extension), *vars(extension).items())", "type(extension)", "tests/test_monte_carlo.py"),
    Mutant("runtime: threads stay few", f"{GEN}/runtime/modes.py", "torch.set_num_threads(threads)", "torch.set_num_threads(1)",
           "tests/test_modes.py"),
    Mutant("emission: eps of what is standardised", f"{GEN}/emit/idioms.py", "{len(over)}, eps)", "{len(over)}, 2 * eps)",
           "tests/test_layers.py"),
    Mutant("lowering: a coefficient meets a product twice", f"{GEN}/lowering/plan.py", "product / coefficient / small * slot",
           "product / small * slot", "tests/test_layers.py"),
    Mutant("runtime: the pivot of an exact factor", f"{GEN}/runtime/householder.py", "weights.max(0", "weights.min(0",
           "tests/test_householder.py"),
    Mutant("feature: variance without its 1/N", f"{GEN}/definitions/features/variance.py",
           "value=SQUARED_DEVIATIONS.symbol / SAMPLES", "value=SQUARED_DEVIATIONS.symbol"),
    Mutant("feature: root of the scale of a square root", f"{GEN}/definitions/features/sqrt_ggn_exact.py", "sqrt(UNIT / SAMPLES)",
           "(UNIT / SAMPLES)"),
    Mutant("feature: table5 scale of the second moment", f"{GEN}/definitions/features/sum_grad_squared.py", "UNIT**2 *", "UNIT *"),
    Mutant("feature: norm instead of its square", f"{GEN}/definitions/features/batch_l2_grad.py", "value=SQUARED_NORM.symbol",
           "value=sqrt(SQUARED_NORM.symbol)"),
    Mutant("quantity: input factor over positions", f"{GEN}/definitions/quantities.py",
           'a[n, g, q, i2], n, q) / (N * extent(q))', 'a[n, g, q, i2], n, q) / N'),
    Mutant("quantity: averaging of KFRA", f"{GEN}/definitions/quantities.py", "J[n, y2, x2] * G[y, y2], n, y, y2) / N",
           "J[n, y2, x2] * G[y, y2], n, y, y2)"),
    Mutant("runtime: averaging of KFRA's block", f"{GEN}/runtime/averaged.py", "rows.permute(2, 1, 0)).mean(1)",
           "rows.permute(2, 1, 0)).sum(1)",
           "tests/test_layers.py"),
    Mutant("runtime: KFRA without what lies between uses", f"{GEN}/runtime/averaged.py", "if (block := joint.get(a, b)) is not None",
           "if a == b and (block := joint.get(a, b)) is not None", "tests/test_architectures.py"),
    Mutant("runtime: positions of one use", f"{GEN}/runtime/quantities.py", "sum(use.positions for use in uses)", "uses[0].positions",
           "tests/test_architectures.py"),
    Mutant("calculus: every quantity adds over uses", f"{GEN}/calculus/additive.py", "not JOINED.isdisjoint(total.over)", "True",
           "tests/test_architectures.py"),
    Mutant("quantity: sign of a sample's residual", f"{GEN}/definitions/quantities.py", "Sum(sign[v, n] * T**2, v))", "Sum(T**2, v))"),
    Mutant("calculus: a block axis taken for a Kronecker axis", f"{GEN}/calculus/kronecker.py",
           "outer = tuple(axis for axis in parameter_axes if axis in pairs and axis not in read)",
           "outer = tuple(axis for axis in parameter_axes if axis in pairs)", "tests/test_structure.py"),
    Mutant("lowering: cross term of deviations", f"{GEN}/lowering/deviations.py", "2 * centre * e", "centre * e",
           "tests/test_structure.py"),
    Mutant("runtime: columns add instead of standing side by side", f"{GEN}/runtime/harvest.py", "need.quantity != PER_SAMPLE", "True",
           "tests/test_paths.py"),
    Mutant("runtime: subsampling of factors alone", f"{GEN}/runtime/subsampling.py", "found[self.samples]",
           "found[: len(self.samples)]"),
    Mutant("quantity: square of the residual's diagonal", f"{GEN}/definitions/quantities.py",
           "DIAGONAL_SUM = Quantity(\"diagonal_sum\", (p,), Sum(J[n, y, p] ** 2 * d[n, y], n, y))",
           "DIAGONAL_SUM = Quantity(\"diagonal_sum\", (p,), Sum(J[n, y, p] * d[n, y], n, y))"),
    Mutant("calculus: derivative of logsumexp", f"{GEN}/calculus/derive.py", "sympy.exp(body - value)", "sympy.exp(value - body)",
           "tests/test_calculus.py"),
    Mutant("calculus: derivative of a sigmoid", f"{GEN}/notation.py", "return value * (1 - value)", "return value * (1 + value)",
           "tests/test_calculus.py"),
    Mutant("lowering: square left out", f"{GEN}/lowering/squares.py", "term.factor * inner.factor**2", "term.factor * inner.factor",
           "tests/test_programs.py"),
    Mutant("printer: transposed operand", f"{GEN}/emit/aten.py", '"" if b == (*over, *columns) else ".T"',
           '".T" if b == (*over, *columns) else ""'),
    Mutant("emit: a tensor read again for each column", f"{GEN}/emit/kernels/pointwise.py",
           "if held == {len(longer)} or not held <= {0, len(longer)}:", "if held == {len(longer)}:", "tests/test_traffic.py"),
    Mutant("template: a row read again in each loop", "templates/kernels/row.py.jinja", "if not WHOLE:", "if True:",
           "tests/test_traffic.py"),
    Mutant("lowering: tiles that share an operand", f"{GEN}/lowering/programs.py", "if not set(side) & set(read.walked):",
           "if set(side) & set(read.walked):", "tests/test_traffic.py"),
    Mutant("runtime: accumulation over blocks", f"{GEN}/runtime/blocks.py", "].add_(value) if", "].sub_(value) if",
           "tests/test_programs.py"),
    Mutant("runtime: columns of products by sample", f"{GEN}/runtime/windows.py", "factor.movedim(0, 2).reshape(N * G, V * O, T)",
           "factor.movedim(0, 2).transpose(2, 3).reshape(N * G, V * O, T)", "tests/test_convolutions.py"),
    Mutant("runtime: fields on the memory of intermediates", f"{GEN}/runtime/blocks.py",
           "else empty(full, dtype, keep)\n        pullbacks", "else shared(full, dtype, factor.device)\n        pullbacks",
           "tests/test_memory.py"),
    Mutant("runtime: storage of gradients seen", f"{GEN}/runtime/fields.py",
           "return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()",
           "return tensor.untyped_storage().data_ptr()", "tests/test_lifetime.py"),
    Mutant("runtime: fields of the first of several uses", f"{GEN}/runtime/backward.py", "self.surveyed_all = not (",
           "self.surveyed_all = True or (", "tests/test_several_losses.py"),
    Mutant("runtime: fields before what arrives is known to be the loss's", f"{GEN}/runtime/backward.py",
           "self._kept(edge, gradients)  # now", "pass  # now", "tests/test_errors_of_calls.py"),
    Mutant("runtime: blocks with the axes of a transposed parameter", f"{GEN}/runtime/record.py",
           "return parameter.mT if self.transposed else parameter", "return parameter", "tests/test_parameters.py"),
    Mutant("runtime: δ held until the pass ends", f"{GEN}/runtime/harvest.py", "use.release()", "use.record",
           "tests/test_lifetime.py"),
    Mutant("runtime: intermediates of transforms on shared memory", f"{GEN}/runtime/memory.py", " or inside_functorch():", ":",
           "tests/test_sums.py"),
    Mutant("runtime: what is standardised is not centred", f"{GEN}/runtime/sums.py", "torch.sub(tensor, mean, out",
           "torch.sub(tensor, 0 * mean, out", "tests/test_sums.py"),
    Mutant("runtime: blocks in the place of an earlier one", f"{GEN}/runtime/blocks.py", "else kept[columns, samples]",
           "else kept[columns, : samples.stop - samples.start]", "tests/test_memory.py"),
    Mutant("lowering: axes of a pullback in another order", f"{GEN}/lowering/squares.py", "(*axes, *own, *order)",
           "(*axes, *own[::-1], *order)", "tests/test_memory.py"),
    Mutant("runtime: deviations without the drift of their mean", f"{GEN}/runtime/blocks.py", "value=-1 / self.count",
           "value=0 / self.count", "tests/test_programs.py"),
    Mutant("runtime: a mean that does not move", f"{GEN}/runtime/blocks.py", "alpha=1 / self.count", "alpha=0",
           "tests/test_programs.py"),
    Mutant("runtime: structures without their axes", f"{GEN}/runtime/torch_private.py", "for along in axes]) if axes else",
           "for along in axes]) if axes is 0 else", "tests/test_surveyed.py"),
    Mutant("runtime: structures without their edges", f"{GEN}/runtime/structure.py", "key += (found, number)",
           "key.append(number)", "tests/test_surveyed.py"),
    Mutant("runtime: structures without what stands above", f"{GEN}/runtime/structure.py", "samples, below_loss]", "samples]",
           "tests/test_surveyed.py"),
    Mutant("runtime: structures without parameters that nobody wants", f"{GEN}/runtime/record.py", "self.checkpointed, present,",
           "self.checkpointed,", "tests/test_surveyed.py"),
    Mutant("runtime: steps of a recognised plan in another order", f"{GEN}/runtime/structure.py", "return tuple(found)",
           "return tuple(found[::-1])", "tests/test_surveyed.py"),
    Mutant("runtime: operands remembered from one use to the next", f"{GEN}/runtime/harvest.py",
           "        use.forget()", "        pass", "tests/test_spared.py"),
    Mutant("runtime: δ that another use's layer asks for is dropped", f"{GEN}/runtime/backward.py",
           " or not self.surveyed_all\n", "\n", "tests/test_several_losses.py"),
    Mutant("runtime: fields on the memory of δ", f"{GEN}/runtime/harvest.py",
           "Tensor.data_ptr, use.tensors)", "Tensor.data_ptr, use.tensors[1:])",
           "tests/test_lifetime.py"),
    Mutant("runtime: constants with the graph of a quantity that they share", f"{GEN}/runtime/harvest.py",
           "in_grad_mode(differentiable, _value", "in_grad_mode(graph, _value", "tests/test_differentiable.py"),
    Mutant("runtime: an overwritten parameter is not looked at", f"{GEN}/runtime/record.py",
           'self.parameter(operand.removesuffix("_shape"))', "pass",
           "tests/test_errors_of_tensors.py"),
    Mutant("runtime: norms that are no squares", f"{GEN}/runtime/sums.py", "dim=axes).square()", "dim=axes)"),
    Mutant("runtime: fields on the memory of what others are made of", f"{GEN}/runtime/averaged.py",
           "copied(value, pair.one.parameter) if value.data_ptr() == pair.averaged.data_ptr() else value", "value", "tests/test_api.py"),
    Mutant("runtime: fields on the memory of another parameter's", f"{GEN}/runtime/quantities.py",
           "copied(use.memo[rule.aten], use.parameter)", "use.memo[rule.aten]", "tests/test_api.py"),
    Mutant("runtime: columns of a reshaped input by its rule", f"{GEN}/runtime/passing.py",
           "_past_reshapes(*inputs[0][1]) != step.record.edge", "inputs[0][1] != step.record.edge", "tests/test_by_node.py"),
    Mutant("runtime: one of a layer's nodes for all", f"{GEN}/runtime/passing.py",
           "not is_accumulator(node)]", "_past_reshapes(node, nr) == step.record.edge]", "tests/test_by_node.py"),
    Mutant("runtime: columns by a node of another precision", f"{GEN}/runtime/sweep.py",
           " and node_outputs(step.node)[record.output_nr][1] == columns.dtype", "", "tests/test_by_node.py"),
    Mutant("runtime: fields of a graph on memory that is there", f"{GEN}/runtime/memory.py",
           "torch.is_grad_enabled() or inside_functorch() else Room", "inside_functorch() else Room", "tests/test_differentiable.py"),
    Mutant("runtime: moments that cancel", f"{GEN}/runtime/moments.py", "spare.amin().item() >= 0", "spare.amin().item() > -1e9",
           "tests/test_moments.py"),
    Mutant("runtime: a sum that a hook has changed", f"{GEN}/runtime/uses.py", "version(self.gradient) == self.version", "True",
           "tests/test_moments.py"),
    Mutant("runtime: moments in the place of those that are asked for", f"{GEN}/runtime/moments.py",
           "squares if spent else None", "squares", "tests/test_moments.py"),
    Mutant("runtime: moments of one sample less", f"{GEN}/runtime/moments.py", "-1 / samples", "-1 / (samples - 1)",
           "tests/test_moments.py"),
    Mutant("runtime: no gradient of the blocks", f"{GEN}/runtime/blocks.py", "        if reduction.over == \"deviations\":\n",
           "        if name == SUM:\n            continue\n        if reduction.over == \"deviations\":\n", "tests/test_spared.py"),
    Mutant("runtime: autograd computes what it is given", f"{GEN}/runtime/spared.py", "(True, False, False))[0]", "(True, True, False))[0]",
           "tests/test_spared.py"),
    Mutant("runtime: a mean for a bias's gradient", f"{GEN}/runtime/spared.py", "self.delta.sum(places)", "self.delta.mean(places)",
           "tests/test_spared.py"),
    Mutant("runtime: what others hold is written", f"{GEN}/runtime/sweep.py", "and not held_elsewhere(own)",
           "and (held_elsewhere(own) or True)",
           "tests/test_written.py"),
    Mutant("runtime: parts of a sum of Gram matrices", f"{GEN}/runtime/symmetric.py", "reduce(add, (_of_rows",
           "reduce(lambda a, b: a, (_of_rows",
           "tests/test_matmul.py"),
    Mutant("runtime: a product that is not divided", f"{GEN}/runtime/matmul.py", "alpha=1 / over", "alpha=1", "tests/test_matmul.py"),
    Mutant("runtime: a strip that is not divided", f"{GEN}/runtime/symmetric.py", "strip.div_(over)", "strip", "tests/test_matmul.py"),
    Mutant("runtime: draws are not averaged", f"{GEN}/runtime/curvature.py", "self.scale / draws", "self.scale",
           "tests/test_monte_carlo.py"),
    Mutant("runtime: a single draw against its weights", f"{GEN}/runtime/sampling.py", "torch.div(weights, times, out=times).argmax(-1)",
           "torch.div(times, weights, out=times).argmax(-1)", "tests/test_monte_carlo.py"),
    Mutant("runtime: parts are added for all", f"{GEN}/runtime/demand.py", "not (extension.additive and alike)", "not alike",
           "tests/test_diagonals.py"),
    Mutant("runtime: residuals are taken from who asks for these alone", f"{GEN}/runtime/demand.py", "if any(parts) and", "if parts[0] and",
           "tests/test_diagonals.py"),
    Mutant("runtime: diagonals without their signs", f"{GEN}/runtime/diagonals.py", "(factor.square() * sign.reshape",
           "(factor.square() * sign.abs().reshape", "tests/test_diagonals.py"),
    Mutant("runtime: the last diagonal alone", f"{GEN}/runtime/diagonals.py", "self._found[call] + diagonal if call", "diagonal if call",
           "tests/test_diagonals.py"),
    Mutant("runtime: taps of two places apart", f"{GEN}/runtime/place_gram.py", "(..., *along, *along)", "(..., *along, *along[::-1])",
           "tests/test_convolutions.py"),
    Mutant("runtime: borders of displaced products", f"{GEN}/runtime/window_gram.py", "for e in (0, extent)}", "for e in (0, extent - 1)}",
           "tests/test_convolutions.py"),
    Mutant("runtime: an axis moves with the batch", f"{GEN}/runtime/torch_private.py", "return pair[1 - pair.index(axis)]",
           "return pair[pair.index(axis)]",
           "tests/test_axes_of_nodes.py"),
    Mutant("runtime: blocks skip the last samples", f"{GEN}/runtime/cost.py", "for sample in range(0, max(samples, 1), long)",
           "for sample in range(0, max(samples, 1) - long + 1, long)", "tests/test_programs.py"),
]  # fmt: skip


def killed(mutant: Mutant) -> tuple[bool, str]:
    """Whether the generator or a test fails, and on what."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, root, ignore=ignored)
        path = root / mutant.file
        if (count := mutant.occurrences(root)) != 1:
            return False, f"{mutant.old!r} occurs {count} times in {mutant.file}"
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        paths = os.pathsep.join(str(root / part) for part in ("generated", "gen", "tests"))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        made = _run(["-m", "satchel_gen", "generate"], root, environment)
        if made.returncode:
            return True, "refused by the generator: " + _last(made.stdout)
        tested = _run(["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.tests], root, environment)
        return tested.returncode == 1, _last(
            "\n".join(l for l in tested.stdout.splitlines() if l.startswith("FAILED")) or tested.stdout
        )


def _run(arguments: list[str], root: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:110] if lines else "no output"


def main(selection: str = "") -> int:
    chosen = [mutant for mutant in MUTANTS if selection in mutant.name]
    console, survivors = Console(width=200), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (dead, reason) in zip(chosen, pool.map(killed, chosen), strict=True):
            console.print("[green]killed[/]  " if dead else "[bold red]SURVIVED[/]", f"{mutant.name}: {escape(reason)}")
            survivors += not dead
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
