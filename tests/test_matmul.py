"""Products of matrices by whichever library is faster: the same numbers as torch's."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from satchel.runtime import symmetric, torch_private
from satchel.runtime.matmul import matmul, onednn_speed
from satchel.runtime.symmetric import gram

#: Rows, inner and columns: too small for oneDNN, thin, and large enough even where both operands are copied.
SIZES = [(3, 4, 5), (300, 128, 2), (130, 200, 150), (0, 4, 5), (7, 0, 5)]


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True, params=[0.85, 1.1, 2.0])
def speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How many times as fast as MKL oneDNN is taken to be."""
    monkeypatch.setattr("satchel.runtime.matmul.onednn_speed", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("M,K,L", SIZES)
def test_matmul(M: int, K: int, L: int, transposed: tuple[bool, bool], dtype: torch.dtype) -> None:
    left = drawn(K, M, dtype=dtype).mT if transposed[0] else drawn(M, K, dtype=dtype)
    right = drawn(L, K, dtype=dtype).mT if transposed[1] else drawn(K, L, dtype=dtype)
    expected = (left.double() @ right.double()).to(dtype)
    torch.testing.assert_close(matmul(left, right), expected, rtol=1e-4, atol=1e-4 * max(1, K) ** 0.5)
    if M and not transposed[0]:
        torch.testing.assert_close(matmul(left.unflatten(0, (1, 1, M)), right)[0, 0], matmul(left, right))


def test_large_products_are_onednns(speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless MKL is faster, they are differentiated, or must be copied for it while MKL is nearly as fast."""
    calls = []
    original = torch_private.product
    monkeypatch.setattr("satchel.runtime.matmul.product", lambda *given: calls.append(1) or original(*given))
    left, right = drawn(130, 200, dtype=torch.float32), drawn(200, 150, dtype=torch.float32)
    matmul(left, right.mT.contiguous().mT)
    assert len(calls) == (speed > 1 and torch_private.has_product(left, right))
    calls.clear()
    matmul(left, right)
    assert len(calls) == (speed == 2 and torch_private.has_product(left, right))
    calls.clear()
    matmul(left, right.requires_grad_()).sum().backward()
    assert not calls
    torch.testing.assert_close(right.grad, left.sum(0)[:, None].expand(200, 150), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K,D", [(5, 3), (40, 300), (300, 300), (300, 257), (0, 300)])
def test_gram(K: int, D: int, dtype: torch.dtype, speed: float) -> None:
    """Narrow, at once, and in strips, the last of which may be short."""
    rows = drawn(K, D, dtype=dtype)
    expected = (rows.double().mT @ rows.double() / 7).to(dtype)
    torch.testing.assert_close(gram(rows, 7), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gram(rows, 7), gram(rows, 7).mT, rtol=1e-4, atol=1e-4)
    place = torch.full((D, D), torch.nan, dtype=dtype)
    torch.testing.assert_close(gram(rows, 7, place), expected, rtol=1e-4, atol=1e-4)
    assert D < 2 * symmetric._STRIP or speed == 2.0 or not place.isnan().any(), "what is large is computed there"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    "lead,kept", [((2, 3), (2, 5)), ((4,), (1, 5)), ((1, 7), (5,)), ((0, 3), (2, 5)), ((300,), (70,))]
)
def test_summed_gram(
    lead: tuple[int, ...], kept: tuple[int, ...], at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix or several, at once and in parts, contiguous or not."""
    monkeypatch.setattr(symmetric, "_TOGETHER", at_once)
    tensor = drawn(*lead, *kept, 6, dtype=dtype)
    expected = torch.einsum("n...dk,n...ek->...de", *[tensor.double().flatten(0, len(lead) - 1)] * 2).to(dtype)
    torch.testing.assert_close(symmetric.summed_gram(tensor, len(lead)), expected, rtol=1e-4, atol=1e-4)
    strided = tensor.mT.contiguous().mT
    torch.testing.assert_close(symmetric.summed_gram(strided, len(lead)), expected, rtol=1e-4, atol=1e-4)


def test_products_of_columns_and_rows() -> None:
    """Where the inner extent is 1, also written to a place."""
    left, right = drawn(2, 3, 4, 1, dtype=torch.float64), drawn(3, 1, 5, dtype=torch.float64)
    out = torch.zeros(2, 4, 4, 5, dtype=torch.float64)
    found = matmul(left, right, out=out[:, 1:])
    torch.testing.assert_close(found, left @ right)
    torch.testing.assert_close(out[:, 1:], left @ right)
    assert not out[:, 0].any()


def test_products_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """[1, N, R, O]ᵀ [N, R, I], also written to where it is told, as those of two columns are, together or one by one."""
    factor, images = drawn(2, 3, 4, 5, dtype=torch.float64), drawn(3, 4, 6, dtype=torch.float64)
    want = torch.einsum("vnro,nri->vnoi", factor, images)
    torch.testing.assert_close(matmul(factor.mT, images), want)
    torch.testing.assert_close(matmul(factor[:1].mT, images), want[:1])
    out = torch.empty_like(want[:1])
    assert matmul(factor[:1].mT, images, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, want[:1])
    for apart in (1, 1 << 16):
        monkeypatch.setattr("satchel.runtime.matmul._APART", apart)
        wide = torch.full((3, *want.shape[1:]), torch.nan, dtype=torch.float64)
        assert matmul(factor.mT, images, out=wide[1:]).data_ptr() == wide[1:].data_ptr()
        torch.testing.assert_close(wide[1:], want)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


#: The one that is measured, not the fixture's.
MEASURED = onednn_speed


def test_what_is_measured_is_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products of float32 on the CPU, whatever tensors are by default."""
    has = torch_private.has_product(torch.ones(2, 2))
    with default(torch.float64), torch.device("meta"):
        assert (MEASURED.__wrapped__() > 0) == has
    monkeypatch.setattr("satchel.runtime.matmul.has_product", lambda *given: False)
    assert MEASURED.__wrapped__() == 0
