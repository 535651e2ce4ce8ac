"""torch.nn.GELU (Hendrycks & Gimpel, 2016): z Φ(z), and its approximation by tanh."""

from sympy import Rational, erf, pi, sqrt, tanh

from satchel_gen.definitions import Example, activation, z

GELU = activation("GELU", z * (1 + erf(z / sqrt(2))) / 2, when={"approximate": "none"})

GELU_TANH = activation(
    "GELUTanh",
    z * (1 + tanh(sqrt(2 / pi) * (z + Rational(44715, 1000000) * z**3))) / 2,
    module="torch.nn.GELU",
    when={"approximate": "tanh"},
    examples=(Example((3,), {"approximate": "tanh"}),),
)
