"""Products of half-precision factors in float32: where torch has them, and what the loss gains."""

import pytest
import torch

from npd.models import lm_head
from npd.models.kernels.products import accepts, has_wide_products
from npd.models.lm_head import Head
from npd.train import chunked
from npd.train.chunked import _add_product
from test_loss import make_case, run

BF16 = torch.bfloat16


@pytest.fixture
def asked_afresh():
    accepts.cache_clear()
    yield
    accepts.cache_clear()


def test_torch_takes_the_argument_where_it_has_a_kernel(asked_afresh):
    """The installed torch knows the signature (on `meta`, as on CUDA), and has no kernel on CPU."""
    assert accepts(torch.device("meta"), BF16)
    assert not accepts(torch.device("cpu"), BF16)
    assert not has_wide_products(torch.zeros(2, 2, dtype=BF16))
    assert not has_wide_products(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_a_torch_without_the_argument_is_no_error(asked_afresh, monkeypatch, name):
    def refuse(*_, **__):
        raise TypeError(f"{name}() got an unexpected keyword argument 'out_dtype'")

    monkeypatch.setattr(torch, name, refuse)
    assert not accepts(torch.device("meta"), BF16)


def test_a_full_device_does_not_decide(asked_afresh, monkeypatch):
    """What failed for lack of memory is asked again."""
    with monkeypatch.context() as patched:
        error = torch.OutOfMemoryError("CUDA out of memory")
        patched.setattr(torch, "mm", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(torch.OutOfMemoryError):
            accepts(torch.device("meta"), BF16)
    assert accepts(torch.device("meta"), BF16)


def test_the_heads_gradient_is_added_up_without_rounding(monkeypatch):
    """With a product that torch has on CUDA only, in its place one of the same meaning."""

    def addmm(total, left, right, *, out_dtype, out):
        assert total is out
        assert total.dtype == out_dtype == torch.float32
        assert left.dtype == right.dtype == BF16
        return out.add_(left.float() @ right.float())

    def error():
        torch.manual_seed(0)
        total, exact = torch.zeros(300, 64), torch.zeros(300, 64, dtype=torch.float64)
        for _ in range(8):
            slopes, states = torch.randn(50, 300, dtype=BF16), torch.randn(50, 64, dtype=BF16)
            _add_product(total, slopes, states)
            exact += slopes.double().t() @ states.double()
        return ((total.double() - exact).norm() / exact.norm()).item()

    case = make_case(200, 1003, 5, dtype=BF16)
    plain, plain_error = run(*case, chunk=16), error()
    monkeypatch.setattr(chunked, "has_wide_products", lambda factor: factor.dtype == BF16)
    monkeypatch.setattr(torch, "addmm", addmm)
    wide = run(*case, chunk=16)
    assert torch.equal(wide[0], plain[0])
    assert torch.equal(wide[1], plain[1])
    torch.testing.assert_close(wide[2], plain[2], atol=1e-3, rtol=2e-2)
    assert not torch.equal(wide[2], plain[2])
    assert error() < 1e-5 < 1e-3 < plain_error


def test_the_scorers_logits_are_not_rounded_on_their_way_to_float32(monkeypatch):
    """In place of CUDA's product one of the same meaning; a gradient takes the plain way."""

    def mm(left, right, *, out_dtype):
        assert left.dtype == right.dtype == BF16
        return left.to(out_dtype) @ right.to(out_dtype)

    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 64, dtype=BF16)
    head = Head(torch.randn(300, 64, dtype=BF16), torch.randn(300, dtype=BF16), 0.5, 30.0)
    exact = Head(head.weight.double(), head.bias.double(), 0.5, 30.0).logits(hidden.double())
    plain = head.logits(hidden)
    monkeypatch.setattr(lm_head, "has_wide_products", lambda factor: factor.dtype == BF16)
    monkeypatch.setattr(torch, "mm", mm)
    assert torch.equal(head.logits(hidden), plain), "with gradients"
    with torch.no_grad():
        wide = head.logits(hidden)
    assert wide.shape == plain.shape
    assert wide.dtype == torch.float32
    assert (wide - exact).abs().max() < 1e-4 < 1e-2 < (plain - exact).abs().max()


def test_code_that_is_compiled_has_its_own_way(monkeypatch):
    """torch.compile does not know the argument, so what it traces does not use it."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not has_wide_products(torch.zeros(2, 2, dtype=BF16, device="meta"))
