import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.shira import masks, sampling

WAYS = {
    "kernel": lambda *a: sampling._by_kernel(sampling._compiled(), *a),
    "gathered": sampling._gathered,
    "sliced": sampling._sliced,
}
ways = pytest.mark.parametrize("way", WAYS)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@ways
@settings(deadline=None)  # the first call compiles
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99))
def test_every_way_gives_the_dense_gradient_at_the_positions(way, tokens, d_out, d_in, density, seed):
    g, x = drawn(tokens, d_out, seed=seed), drawn(tokens, d_in, seed=seed + 1)
    positions = masks.rand((d_out, d_in), density, seed=seed)
    expected = (g.double().T @ x.double()).flatten()[positions.long()]
    torch.testing.assert_close(WAYS[way](g, x, positions).double(), expected, rtol=1e-4, atol=1e-4)


@ways
def test_slices_end_where_rows_end(way, monkeypatch):
    monkeypatch.setattr(sampling, "SLICE_BYTES", 4 * 50 * 7)  # seven rows of 50
    g, x = drawn(10, 33), drawn(10, 50, seed=1)
    positions = masks.rand((33, 50), 0.2)
    expected = (g.T @ x).flatten()[positions.long()]
    torch.testing.assert_close(WAYS[way](g, x, positions), expected, rtol=1e-4, atol=1e-4)


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(way, dtype):
    g, x = drawn(200, 20).to(dtype), drawn(200, 30, seed=1).to(dtype)
    positions = masks.rand((20, 30), 0.2)
    expected = (g.float().T @ x.float()).flatten()[positions.long()]
    with torch.autocast("cpu", torch.bfloat16):  # a backward inside of it too
        found = WAYS[way](g, x, positions)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [10, 1000])
def test_without_a_compiler_the_result_is_the_same(monkeypatch, tokens):
    g, x, positions = drawn(tokens, 20), drawn(tokens, 30, seed=1), masks.rand((20, 30), 0.2)
    with_it = sampling.sampled_gradient(g, x, positions)
    monkeypatch.setattr(sampling, "_compiled", lambda: None)
    torch.testing.assert_close(with_it, sampling.sampled_gradient(g, x, positions), rtol=1e-4, atol=1e-3)


def test_wide_positions_are_taken_too():
    g, x = drawn(5, 20), drawn(5, 30, seed=1)
    positions = masks.rand((20, 30), 0.2).long()
    expected = (g.T @ x).flatten()[positions]
    torch.testing.assert_close(sampling.sampled_gradient(g, x, positions), expected, rtol=1e-4, atol=1e-4)
