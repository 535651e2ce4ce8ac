"""Dense references for the features: plain autograd in float64, nothing of the package under test.

Notation: N samples; g_n = gradient of sample n's contribution to the *total* loss (reduction and weights included); f_n = all that the
network outputs for sample n, flattened to F numbers; T_n = ∂f_n/∂θ; H_n = ∂²L/∂f_n² at the data. A Linear layer's output has R positions
per sample: the product of its extra axes, and all uses of one parameter one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import structure

Outputs = tuple[Tensor, ...]
Contributions = Callable[..., Tensor]


def contributions(
    criterion: nn.Module, target: Tensor, weight: float = 1.0, more: Sequence[Tensor] = ()
) -> Contributions:
    """Output → [N], sample n's contribution to ``weight * criterion(output, target, *more)``: its share of the terms' sum."""
    reduced = copy.deepcopy(criterion).double()
    plain = copy.copy(reduced)
    plain.reduction = "none"  # type: ignore[assignment]
    given = [t.double() if t.is_floating_point() else t for t in (target, *more)]

    def per_sample(output: Tensor) -> Tensor:
        terms = plain(output, *given)
        share = 1.0
        if criterion.reduction != "sum":  # 1 / what the reduction divides by
            with torch.no_grad():
                share = reduced(output, *given) / terms.sum()
        return weight * share * terms.reshape(len(terms), -1).sum(1)

    return per_sample


def jacobian(values: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """∂values/∂variable, one backward per entry of ``values`` [K]: [K, *variable] for each variable."""
    if not (values.requires_grad and variables):
        return [values.new_zeros(values.numel(), *v.shape) for v in variables]
    rows = [
        torch.autograd.grad(value, variables, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in values.flatten().unbind()
    ]
    return [torch.stack(column).detach() for column in zip(*rows, strict=True)]


def own_sample(dense: Tensor) -> Tensor:
    """[N, K, N, *x] → [N, K, *x]: the blocks of each sample with itself; all others must vanish."""
    N = len(dense)
    own = torch.stack([dense[n, :, n] for n in range(N)])
    assert dense.abs().sum() - own.abs().sum() <= 1e-12 * dense.abs().sum(), "the network mixes samples"
    return own


class Use(NamedTuple):
    """One call of a module with parameters: its input and a zero added to its output, whose gradient is the cotangent there."""

    module: nn.Module
    input: Tensor
    probe: Tensor
    options: Mapping[str, Any]


def has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def run_with_probes(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Outputs, list[Use]]:
    uses: list[Use] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], options: Mapping[str, Any], output: Any) -> Tensor | None:
        if not args or not isinstance(output, Tensor):  # made of operations that have no place of their own
            return None
        probe = torch.zeros_like(output, requires_grad=True)
        uses.append(Use(module, args[0].detach().clone(), probe, options))
        return output + probe

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in model.modules() if has_parameters(m)]
    outputs = model(*(x.clone() for x in inputs))
    for handle in handles:
        handle.remove()
    return (outputs if isinstance(outputs, tuple) else (outputs,)), uses


def twice_differentiable_bag(bag: nn.EmbeddingBag, x: Tensor) -> Tensor:
    """torch has no second derivative of its own."""
    rows = nn.functional.embedding(x, bag.weight)
    return rows.mean(1) if bag.mode == "mean" else rows.sum(1)


class Reference:
    """All features of every trainable parameter of ``model`` on one batch.

    losses: one function per output of the model, giving the contributions [N] of the samples (see ``contributions``).
    unit: u with ∇ℓ_n = u·g_n, for ``scaling="table5"``: N for a mean-reduced loss, 1 for a summed one.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], losses: Sequence[Contributions], unit: float = 1.0):
        self.model = copy.deepcopy(model).double()
        for bag in (m for m in self.model.modules() if isinstance(m, nn.EmbeddingBag)):
            bag.forward = partial(twice_differentiable_bag, bag)
        self.inputs = [x.detach().double() if x.is_floating_point() else x for x in inputs]
        self.losses, self.unit, self.N = losses, unit, len(inputs[0])
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.outputs, self.uses = run_with_probes(self.model, self.inputs)

    # --- what the features are made of ---------------------------------------------------------------------------

    def terms(self, outputs: Iterable[Tensor]) -> Tensor:
        return torch.stack([loss(f) for loss, f in zip(self.losses, outputs, strict=True)]).sum(0)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """g_n: [N, *p]."""
        return dict(zip(self.parameters, jacobian(self.terms(self.outputs), self._tensors), strict=True))

    @cached_property
    def curvature(self) -> Tensor:
        """H: [N, F, F]."""
        leaves = [f.detach().requires_grad_() for f in self.outputs]
        slopes = torch.autograd.grad(self.terms(leaves).sum(), leaves, create_graph=True, materialize_grads=True)
        blocks = jacobian(torch.cat([s.reshape(self.N, -1) for s in slopes], 1), leaves)
        dense = torch.cat([b.reshape(*b.shape[:1], self.N, -1) for b in blocks], 2)
        return own_sample(dense.reshape(self.N, -1, *dense.shape[1:]))

    @cached_property
    def _jacobians(self) -> list[Tensor]:
        flat = torch.cat([f.reshape(self.N, -1) for f in self.outputs], 1)
        dense = jacobian(flat, [*self._tensors, *(use.probe for use in self.uses)])
        return [d.reshape(*flat.shape, *d.shape[1:]) for d in dense]

    @property
    def _tensors(self) -> list[Tensor]:
        return list(self.parameters.values())

    @cached_property
    def jacobians(self) -> dict[str, Tensor]:
        """T: [N, F, *p]."""
        return dict(zip(self.parameters, self._jacobians, strict=False))

    def uses_of(self, parameter: str) -> list[int]:
        tensor = self.parameters[parameter]
        return [k for k, use in enumerate(self.uses) if any(p is tensor for p in use.module.parameters())]

    def name_of(self, parameter: str) -> str:
        """What its modules call it."""
        return parameter.rpartition(".")[2]

    def cotangents(self, parameter: str) -> Tensor:
        """∂f_n/∂(output of its layers): [N, F, R, G, O], see ``structure``."""
        name, probes = self.name_of(parameter), self._jacobians[len(self.parameters) :]
        own = [(self.uses[k].module, own_sample(probes[k])) for k in self.uses_of(parameter)]
        return torch.cat([structure.by_position(module, name, t, 2) for module, t in own], 2)

    def activations(self, parameter: str) -> Tensor:
        """What its layers multiply it with: [N, R, G, I]."""
        uses = [self.uses[k] for k in self.uses_of(parameter)]
        return torch.cat([structure.patches(use.module, use.input, use.options) for use in uses], 1)

    @cached_property
    def averaged(self) -> dict[tuple[int, int], Tensor]:
        """KFRA's averaged curvature between the outputs of two uses: [F, F′]."""
        modules, blocks = KFRARecursion(self.model, self.inputs).run_backward(self.curvature.sum(0))
        assert modules == [use.module for use in self.uses]
        return blocks

    # --- first order ---------------------------------------------------------------------------------------------

    def BatchGrad(self, p: str, subsampling: Sequence[int] | None = None) -> Tensor:
        return self.gradients[p] if subsampling is None else self.gradients[p][list(subsampling)]

    def BatchL2Grad(self, p: str) -> Tensor:
        return self.gradients[p].reshape(self.N, -1).square().sum(1)

    def SumGradSquared(self, p: str) -> Tensor:
        return self.gradients[p].square().sum(0)

    def Variance(self, p: str) -> Tensor:
        g = self.gradients[p]
        return (g - g.mean(0)).square().mean(0)

    # --- second order: contractions with a curvature of the loss, [N, F, F] ---------------------------------------

    def is_kronecker(self, p: str) -> bool:
        return all(structure.is_kronecker(self.uses[k].module, self.name_of(p)) for k in self.uses_of(p))

    def approximation(self, p: str, given: str | None) -> str:
        """Layers over any positions take them for samples of their own; all others are BackPACK's, unless said otherwise."""
        over_positions = all(isinstance(self.uses[k].module, (nn.Linear, *structure.TABLES)) for k in self.uses_of(p))
        return given or ("expand" if over_positions else "backpack")

    def DiagGGNExact(self, p: str, curvature: Tensor | None = None) -> Tensor:
        T = self.jacobians[p].flatten(2)
        H = self.curvature if curvature is None else curvature
        return torch.einsum("nfp,nfg,ngp->p", T, H, T).reshape(self.parameters[p].shape)

    DiagGGNMC = DiagGGNExact

    def SqrtGGNExact(self, p: str, curvature: Tensor | None = None, subsampling: Sequence[int] | None = None) -> Tensor:
        """T_nᵀ H_n T_n [N, P, P]: what the square root is the root of. The root itself is only fixed up to a rotation."""
        T = self.jacobians[p].flatten(2)
        H = self.curvature if curvature is None else curvature
        dense = torch.einsum("nfp,nfg,ngq->npq", T, H, T)
        return dense if subsampling is None else dense[list(subsampling)]

    SqrtGGNMC = SqrtGGNExact

    def BatchDiagGGNExact(self, p: str, curvature: Tensor | None = None) -> Tensor:
        return self.SqrtGGNExact(p, curvature).diagonal(0, 1, 2).reshape(self.N, *self.parameters[p].shape)

    BatchDiagGGNMC = BatchDiagGGNExact

    def BatchDiagHessian(self, p: str) -> Tensor:
        return torch.stack([self._hessian_diagonal(p, term) for term in self.terms(self.outputs)])

    def DiagHessian(self, p: str) -> Tensor:
        return self._hessian_diagonal(p, self.terms(self.outputs).sum())

    def _hessian_diagonal(self, p: str, value: Tensor) -> Tensor:
        tensor = self.parameters[p]
        (slope,) = torch.autograd.grad(value, [tensor], create_graph=True, materialize_grads=True)
        (dense,) = jacobian(slope, [tensor])
        return dense.reshape(tensor.numel(), -1).diagonal().reshape(tensor.shape)

    def KFLR(self, p: str, curvature: Tensor | None = None, approximation: str | None = None) -> list[Tensor]:
        if not self.is_kronecker(p):
            return [self.SqrtGGNExact(p, curvature).sum(0)]
        approximation = self.approximation(p, approximation)
        T = self.cotangents(p)
        T = T if approximation == "expand" else T.sum(2, keepdim=True)
        H = self.curvature if curvature is None else curvature
        return self.factors(p, torch.einsum("nfrgo,nfh,nhrgq->goq", T, H, T), approximation)

    KFAC = KFLR

    def KFRA(self, p: str) -> list[Tensor]:
        pairs = [(k, l) for k in self.uses_of(p) for l in self.uses_of(p) if (k, l) in self.averaged]
        if not self.is_kronecker(p):
            J = {k: self.module_jacobian(k, p) for pair in pairs for k in pair}
            found = [torch.einsum("nfp,fg,ngq->pq", J[k], self.averaged[k, l], J[l]) / self.N for k, l in pairs]
            return [torch.stack(found).sum(0)]
        blocks = [self.summed_over_positions(p, k, l) for k, l in pairs]
        return self.factors(p, torch.stack(blocks).sum(0), "backpack")

    def summed_over_positions(self, p: str, k: int, l: int) -> Tensor:
        """Ḡ between two uses, [F, F′] → [G, O, O]."""
        name, (upper, _, one, _), (lower, _, other, _) = self.name_of(p), self.uses[k], self.uses[l]
        columns = self.averaged[k, l].reshape(-1, *other.shape[1:])
        columns = structure.by_position(lower, name, columns, 1).sum(1).flatten(1)
        rows = structure.by_position(upper, name, columns.T.reshape(-1, *one.shape[1:]), 1).sum(1)  # [G O′, G, O]
        return rows.unflatten(0, (rows.shape[1], -1)).diagonal(0, 0, 2).permute(2, 1, 0)

    def factors(self, p: str, B: Tensor, approximation: str) -> list[Tensor]:
        """B [G, O, O] and A [G, I, I]; of one group without its axis."""
        found = [B] if self.name_of(p) == "bias" else [B, self.input_factor(p, approximation)]
        return [factor[0] if len(factor) == 1 and not self.is_grouped(p) else factor for factor in found]

    def is_grouped(self, p: str) -> bool:
        return any(structure.groups(self.uses[k].module, self.name_of(p)) > 1 for k in self.uses_of(p))

    def module_jacobian(self, k: int, p: str) -> Tensor:
        """∂(output of a use)/∂p: [N, F, P]."""
        use = self.uses[k]
        output = use.module(use.input, **use.options)
        (dense,) = jacobian(output, [self.parameters[p]])
        return dense.reshape(self.N, output[0].numel(), -1)

    def input_factor(self, p: str, approximation: str) -> Tensor:
        """A: [G, I, I]."""
        a = self.activations(p)
        if approximation == "reduce":
            a = a.mean(1, keepdim=True)
        per_batch = torch.einsum("nrgi,nrgj->gij", a, a) / self.N
        return per_batch / a.shape[1] if approximation == "expand" else per_batch

    # --- the fields ----------------------------------------------------------------------------------------------

    def field(self, feature: str, p: str, scaling: str = "backpack", **options: Any) -> Tensor | list[Tensor]:
        """The value of class ``feature``'s field on parameter ``p``."""
        value = getattr(self, feature)(p, **options)
        if scaling == "table5":
            return self.as_table5(feature, value)
        return value

    def as_table5(self, feature: str, value: Any) -> Any:
        """The cheat sheet's scaling, of the gradients ∇ℓ_n = u·g_n; what it calls (1/N) G for the curvatures."""
        u, N = self.unit, self.N
        factor: Mapping[str, float] = {
            "SumGradSquared": u * u / N,
            "Variance": u * u,
        }  # of a root: of what it squares to
        if feature == "BatchL2Grad":
            return value.sqrt() * u / N
        if isinstance(value, list):
            return [value[0] * u / N, *value[1:]]
        return value * factor.get(feature, u / N)


class KFRARecursion(fx.Interpreter):
    """KFRA on a traced graph of modules and functions, node by node: Ḡ_x = 1/N Σ_n J_nᵀ Ḡ_y J_n.

    Between a fan-out and its join several values carry curvature: Ḡ is then one joint matrix over all of them, kept as blocks.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]):
        root = nn.Sequential(model) if isinstance(model, nn.Linear) else model  # keep Linear a node
        super().__init__(fx.symbolic_trace(root), garbage_collect_values=False)
        self.N = len(inputs[0])
        self.run(*inputs)

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[Any, Any]:
        return tree_map_only(Tensor, Tensor.clone, super().fetch_args_kwargs_from_env(node))  # in-place modules

    def width(self, node: fx.Node) -> int:
        return sum(t.numel() for t in floating(self.env[node])) // self.N

    def node_jacobians(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """∂(value of the node)/∂(value of an argument) for each sample: [N, width, width of the argument]."""
        arguments = [a for a in node.all_input_nodes if a.op != "get_attr" and floating(self.env[a])]
        before = dict(self.env)
        leaves = {a: tree_map_only(Tensor, as_leaf, self.env[a]) for a in arguments}
        self.env.update(leaves)
        value = torch.cat([t.reshape(self.N, -1) for t in floating(super().run_node(node))], 1)
        self.env = before
        flat = [t for a in arguments for t in floating(leaves[a])]
        dense = iter([d.movedim(0, 1) for d in jacobian(value.sum(0), flat)])  # samples do not mix: see `own_sample`
        return {
            a: torch.cat([next(dense).reshape(*value.shape, -1) for _ in floating(leaves[a])], 2) for a in arguments
        }

    def run_backward(self, seed: Tensor) -> tuple[list[nn.Module], dict[tuple[int, int], Tensor]]:
        """seed: Σ_n H_n over the outputs [F, F] → the calls with parameters in forward order, and Ḡ between their outputs."""
        *body, output = self.graph.nodes
        (value,) = output.args
        ends = value if isinstance(value, tuple) else (value,)
        modules = {node: self.fetch_attr(node.target) for node in body if node.op == "call_module"}
        calls = [node for node, module in modules.items() if has_parameters(module)]
        # Between live values: nodes, and numbers for the outputs of the calls, which are kept to the end.
        G: dict[tuple[Any, Any], Tensor] = {}

        def add(a: Any, b: Any, block: Tensor) -> None:
            G[a, b] = G[a, b] + block if (a, b) in G else block

        sizes = [self.width(end) for end in ends]
        for a, rows in zip(ends, seed.split(sizes), strict=True):
            for b, block in zip(ends, rows.split(sizes, 1), strict=True):
                add(a, b, block)

        for y in reversed(body):
            own = G.get((y, y))
            if own is None:
                continue
            if y in calls:
                k = calls.index(y)
                for b, block in [(b, block) for (a, b), block in G.items() if a is y]:
                    add(k, b, block)
                    add(b, k, block.T)
                add(k, k, own)
            others = {b: block for (a, b), block in G.items() if a is y and b is not y}
            for pair in [pair for pair in G if y in pair]:
                del G[pair]
            if y.op == "placeholder":
                continue
            J = self.node_jacobians(y)
            for x, J_x in J.items():
                for b, block in others.items():
                    one_sided = J_x.mean(0).T @ block
                    add(x, b, one_sided)
                    add(b, x, one_sided.T)
                for z, J_z in J.items():
                    add(x, z, torch.einsum("nyx,yw,nwz->xz", J_x, own, J_z) / self.N)
        return [modules[call] for call in calls], {
            (a, b): block for (a, b), block in G.items() if isinstance(a, int) and isinstance(b, int)
        }


def floating(value: Any) -> list[Tensor]:
    """The tensors that carry curvature: an operation may return indices, too."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
