"""Every way to fail. Each message says where (layer, parameter, feature), why, and what to do about it.

A class derives from `SatchelError` and from the builtin that a caller would catch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SatchelError(Exception):
    """Base of all errors of this package."""

    def __init__(self, where: str, reason: str, remedy: str) -> None:
        super().__init__(f"{where}: {reason}. {remedy}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "no feature"


# ---------------------------------------------------------------------------------------------------- the call itself


class NotAnExtension(SatchelError, ValueError):
    def __init__(self, given: object) -> None:
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        remedy = (
            f"Write {name}(), with parentheses"
            if isinstance(given, type)
            else "Pass features from the extensions module"
        )
        kind = "a class" if isinstance(given, type) else "not a feature"
        super().__init__("backpack", f"expects instances of features, but {name} is {kind}", remedy)


class NotAModule(SatchelError, TypeError):
    def __init__(self, given: object) -> None:
        super().__init__(
            "extend", f"expects a torch.nn.Module, got {type(given).__name__}", "Pass the model or the loss module"
        )


class NothingReached(SatchelError, RuntimeError):
    def __init__(self, features: Iterable[str]) -> None:
        super().__init__(
            _listed(features),
            "the context ended without a backward through an extended module, so no field was computed",
            "Call extend(model) before the forward pass, run it outside disable(), torch.no_grad and torch.compile, and call"
            " backward inside the context",
        )


class LossNotExtended(SatchelError, RuntimeError):
    def __init__(self, layer: str, parameter: str, features: Iterable[str], losses: Sequence[str]) -> None:
        super().__init__(
            f"{layer}, parameter {parameter!r}, {_listed(features)}",
            "curvature starts at the loss, but this backward reaches the parameter without passing an extended loss",
            f"Use extend() on a loss module ({', '.join(losses)}) and call backward on its value",
        )


class LossIncomplete(SatchelError, NotImplementedError):
    def __init__(self, loss: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{loss}, {_listed(features)}",
            "what the loss module got as input receives a gradient from elsewhere, too, whose curvature is unknown",
            "Use extend() on every loss, and write penalties on outputs as loss modules that have a definition",
        )


class UnitUnknown(SatchelError, RuntimeError):
    def __init__(self, parameter: str, feature: str) -> None:
        super().__init__(
            f"parameter {parameter!r}, {feature}",
            'scaling="table5" needs the reduction of the loss, but no extended loss, or losses of different reductions, were seen',
            'Use extend() on the loss module, or scaling="backpack"',
        )


class SubsamplingOutOfRange(SatchelError, IndexError):
    def __init__(self, feature: str, index: int, samples: int) -> None:
        super().__init__(
            feature, f"subsampling names sample {index}, but the batch has {samples}", f"Use indices below {samples}"
        )


# ------------------------------------------------------------------------------------------------- modules and nodes


def _how_to_add(supported: Sequence[str]) -> str:
    return (
        f"Supported layers: {', '.join(supported)}. To add one, write its formula in definitions/layers and run"
        " `make generate`; to leave its parameters out, set requires_grad to False or pass strict=False to backpack"
    )


class UnsupportedModule(SatchelError, NotImplementedError):
    def __init__(
        self, module: str, parameter: str, node: str, features: Iterable[str], supported: Sequence[str]
    ) -> None:
        hint = (
            " (compiled by torch.compile, which is not supported: use the plain model here)"
            if "Compiled" in node
            else ""
        )
        super().__init__(
            f"{module}, parameter {parameter!r}, {_listed(features)}",
            f"the parameter is used by {node}{hint}, which belongs to no layer with a definition",
            _how_to_add(supported),
        )


class SparseGradient(SatchelError, NotImplementedError):
    def __init__(self, where: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{where}, {_listed(features)}",
            "its gradient is sparse, and quantities of individual samples are dense",
            "Use sparse=False",
        )


class UnsupportedOption(SatchelError, NotImplementedError):
    def __init__(
        self,
        where: str,
        option: str,
        value: object,
        supported: Sequence[object],
        features: Iterable[str],
        reason: str = "",
    ) -> None:
        super().__init__(
            f"{where}, {_listed(features)}",
            f"the definition does not cover {option}={value!r}" + (f": {reason}" if reason else ""),
            f"Supported: {', '.join(map(repr, supported))}",
        )


class NotTwiceDifferentiable(SatchelError, NotImplementedError):
    def __init__(self, node: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{node}, {_listed(features)}",
            "autograd cannot differentiate the backward of this operation, so its second derivative is unknown",
            "Use an operation or backend that it can (for attention, sdpa_kernel(SDPBackend.MATH)), a module that has a definition,"
            " or a GGN feature such as DiagGGNExact",
        )


class NodeFailed(SatchelError, RuntimeError):
    def __init__(self, node: str) -> None:
        super().__init__(
            node,
            "calling its backward ahead of autograd failed (the error above says why)",
            "If the graph was freed by an earlier backward, pass retain_graph=True there; otherwise use a module that has a"
            " definition",
        )


class CheckpointedRegion(SatchelError, NotImplementedError):
    def __init__(self, where: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{where}, {_listed(features)}",
            "a region under torch.utils.checkpoint recomputes its tensors only once, so curvature cannot be passed through it",
            "Turn checkpointing off for this backward, or bound memory by settings(memory_limit=…)",
        )


class Overwritten(SatchelError, RuntimeError):
    def __init__(self, layer: str, tensor: str) -> None:
        super().__init__(
            layer,
            f"its {tensor} was changed in place after the forward pass",
            "Use the out-of-place form of the operation (inplace=False), and update parameters after the backward",
        )


class GraphFreed(SatchelError, RuntimeError):
    def __init__(self, layer: str) -> None:
        super().__init__(
            layer,
            "an earlier backward has freed what the forward pass saved",
            "Pass retain_graph=True to the earlier backward, or run the forward pass again",
        )


# ------------------------------------------------------------------------------------------------------------ samples


class BatchAxisLost(SatchelError, ValueError):
    def __init__(self, where: str, shape: Sequence[int], samples: int | None) -> None:
        expected = (
            "a batch axis" if samples is None else f"the batch axis of the rest of the network ({samples} samples)"
        )
        super().__init__(
            where,
            f"shape {tuple(shape)} does not start with {expected}",
            "Keep the batch as the first axis of every layer; for a loss over positions use [N, C, positions] instead of"
            " flattening them into the batch",
        )


class SamplesMixed(SatchelError, ValueError):
    def __init__(self, node: str) -> None:
        super().__init__(
            node,
            "mixes the samples of the batch (or moves the batch axis), so a sample has no gradient or curvature of its own",
            "For batch normalisation use eval() (frozen statistics) or GroupNorm; keep the batch as the first axis",
        )


# ---------------------------------------------------------------------------------------------------------- parameters


class SequentialReuse(SatchelError, NotImplementedError):
    def __init__(self, layer: str, parameter: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{layer}, parameter {parameter!r}, {_listed(features)}",
            "the parameter is used twice in sequence, so the Hessian holds a term ∂²y/∂θ∂x that the layer's rules do not give",
            "Use a GGN feature such as DiagGGNExact, or separate parameters",
        )


class SharedByKinds(SatchelError, NotImplementedError):
    def __init__(self, layers: Iterable[str], parameter: str, quantity: str, features: Sequence[str] = ()) -> None:
        super().__init__(
            ", ".join([_listed(layers), f"parameter {parameter!r}", *features]),
            f"the parameter is shared in a way for which {quantity} is not defined (different kinds of layers, or no shared axis)",
            "Use a feature made of individual gradients or diagonals, or separate parameters",
        )


class FieldMissing(SatchelError, RuntimeError):
    def __init__(self, layer: str, parameter: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{layer}, parameter {parameter!r}",
            f"the backward ended without the quantities that {_listed(features)} need",
            "Check that every use of the parameter gets a gradient from the loss",
        )


class MemoryLimit(SatchelError, MemoryError):
    def __init__(self, features: Iterable[str], where: str, needed: int, limit: int) -> None:
        super().__init__(
            f"{where}, {_listed(features)}",
            f"needs about {needed:,} bytes, above the memory limit of {limit:,}",
            "Raise settings(memory_limit=…), use a smaller batch, or a feature with fewer columns such as KFAC or DiagGGNMC",
        )


class NotEnoughMemory(SatchelError, MemoryError):
    def __init__(self, features: Iterable[str], where: str, needed: int, available: int) -> None:
        super().__init__(
            f"{where}, {_listed(features)}",
            f"needs {needed:,} bytes at the least, the most of them here, and {available:,} are available",
            "Use a smaller batch or subsampling, or a feature with one value per parameter such as Variance or DiagGGNMC;"
            " settings(memory_limit=…) leaves this check out",
        )


# ---------------------------------------------------------------------------------------------------------------- loss


class NegativeScale(SatchelError, ValueError):
    def __init__(self, loss: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{loss}, {_listed(features)}",
            "the gradient that arrives at the loss is negative or not finite; curvature of a negative multiple has no square root",
            "Scale the loss by a positive, finite number (a GradScaler may have overflowed)",
        )


class TargetRefused(SatchelError, ValueError):
    def __init__(self, loss: str, reason: str) -> None:
        super().__init__(loss, reason, "Fix the targets, or use a loss whose definition covers them")


class NoLikelihood(SatchelError, NotImplementedError):
    def __init__(self, loss: str, features: Iterable[str], reason: str) -> None:
        super().__init__(
            f"{loss}, {_listed(features)}",
            f"the loss is not the negative log-likelihood of a distribution that targets can be drawn from: {reason}",
            "Use a feature of the exact curvature, such as DiagGGNExact or KFLR",
        )


class NegativeCurvature(SatchelError, ValueError):
    def __init__(self, loss: str, features: Iterable[str]) -> None:
        super().__init__(
            f"{loss}, {_listed(features)}",
            "at these targets and weights the loss is not convex in its input; negative curvature has no square root",
            "Use weights that are not negative, and targets in the range that the loss is made for",
        )


class OperandDifferentiated(SatchelError, NotImplementedError):
    def __init__(self, loss: str, tensors: Sequence[str], features: Iterable[str]) -> None:
        super().__init__(
            f"{loss}, {_listed(features)}",
            f"its {' and '.join(map(repr, tensors))} requires a gradient, too; curvature is that in the input alone",
            "Pass it detached, or use a first-order feature",
        )
