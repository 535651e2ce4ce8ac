"""torch.nn.SELU (Klambauer et al., 2017), with the constants of its fixed point."""

from sympy import Float, Piecewise, exp

from satchel_gen.definitions import activation, z

ALPHA, SCALE = Float("1.6732632423543772848170429916717"), Float("1.0507009873554804934193349852946")

SELU = activation("SELU", Piecewise((SCALE * z, z > 0), (SCALE * ALPHA * (exp(z) - 1), True)))
