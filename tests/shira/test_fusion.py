import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import AdapterError
from adapterbank.shira import fusion, masks
from adapterbank.shira.delta import SparseDelta, SparseUpdate
from adapterbank.shira.fusion import awom, awor, distances, fuse, interference, overlaps
from sparse import Net, make_delta


def update(positions, shape, seed=0):
    values = torch.randn(len(positions), generator=torch.Generator().manual_seed(seed))
    return SparseUpdate(positions=positions, values=values, shape=shape)


def dense(delta, name="body.q.weight"):
    return delta.updates[name].dense()


# --- fusing -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.floats(0.05, 1.0))
def test_the_sum_is_the_sum_of_the_dense_updates(strengths, density):
    deltas = {f"a{i}": make_delta(Net(), seed=i, density=density) for i in range(len(strengths))}
    fused = fuse(deltas, weights={f"a{i}": s for i, s in enumerate(strengths)})
    expected = sum(s * dense(deltas[f"a{i}"]) for i, s in enumerate(strengths))
    torch.testing.assert_close(dense(fused), expected, rtol=1e-5, atol=1e-6)


def test_disjoint_adapters_fuse_in_any_order_and_can_be_told_apart():
    weight = Net().body["q"].weight
    parts = [masks.wm(weight, 0.1, part=j) for j in range(3)]
    deltas = {f"a{j}": SparseDelta(name="a", updates={"body.q.weight": update(p, (40, 40), j)})
              for j, p in enumerate(parts)}  # fmt: skip
    fused = fuse(deltas)
    assert torch.equal(dense(fused), dense(fuse(dict(reversed(deltas.items())))))
    assert torch.equal(
        dense(fused), dense(fuse({"two": fuse({k: deltas[k] for k in ("a0", "a1")}), "a2": deltas["a2"]}))
    )
    assert fused.nnz == sum(map(len, parts))
    for j, positions in enumerate(parts):
        assert torch.equal(dense(fused).flatten()[positions.long()], deltas[f"a{j}"].updates["body.q.weight"].values)


@pytest.mark.parametrize("overlap", fusion.OVERLAPS)
def test_what_a_shared_position_gets(overlap):
    one = SparseUpdate(positions=torch.tensor([0, 2, 3]), values=torch.tensor([1.0, -5.0, 2.0]), shape=(2, 3))
    two = SparseUpdate(positions=torch.tensor([2, 3, 5]), values=torch.tensor([3.0, 2.5, 4.0]), shape=(2, 3))
    fused = fuse({n: SparseDelta(name=n, updates={"w": u}) for n, u in (("one", one), ("two", two))}, overlap=overlap)
    expected = {"sum": [-2.0, 4.5], "mean": [-1.0, 2.25], "last": [3.0, 2.5], "largest": [-5.0, 2.5]}[overlap]
    assert fused.updates["w"].positions.tolist() == [0, 2, 3, 5]
    assert fused.updates["w"].values.tolist() == [1.0, *expected, 4.0]


def test_adapters_of_other_layers_go_side_by_side():
    one, two = (make_delta(Net(), only=(n,)) for n in ("first.weight", "body.q.weight"))
    fused = fuse({"one": one, "two": two})
    assert list(fused.updates) == ["body.q.weight", "first.weight"]
    assert torch.equal(dense(fused, "first.weight"), dense(one, "first.weight"))


def test_what_does_not_go_together_is_refused():
    one = make_delta(Net(), base="org/a")
    with pytest.raises(AdapterError, match="different base models: org/a, org/b"):
        fuse({"one": one, "two": replace(one, base="org/b")})
    with pytest.raises(AdapterError, match="weights has 'three'; the adapters are one, two"):
        fuse({"one": one, "two": one}, weights={"three": 1.0})
    with pytest.raises(AdapterError, match="nothing to fuse"):
        fuse({})
    with pytest.raises(AdapterError, match=r"w has different shapes: \(2, 2\), \(2, 3\)"):
        fuse({str(n): SparseDelta(name="a", updates={"w": update(torch.tensor([1]), (2, n))}) for n in (2, 3)})
    with pytest.raises(AdapterError, match="overlap='max' is unknown"):
        fuse({"one": one}, overlap="max")
    with pytest.raises(AdapterError, match="the weight of 'one' is nan; give a finite number"):
        fuse({"one": one}, weights={"one": math.nan})


def test_a_fused_adapter_knows_its_base_where_one_adapter_has_all_the_positions():
    one, two = make_delta(Net(), seed=0), make_delta(Net(), seed=1, only=("first.weight",))
    alone, both = fuse({"one": one}), fuse({"one": one, "two": two})
    assert both.updates["first.weight"].fingerprint is None
    assert both.updates["body.q.weight"].fingerprint == one.updates["body.q.weight"].fingerprint
    for fused in (alone, both, fuse({"one": one, "same": one})):
        fused.apply_(Net())
        with pytest.raises(AdapterError, match=r"body\.q\.weight has other values than the base model"):
            fused.apply_(Net(seed=1))


# --- interference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [256, 512])
def test_random_masks_have_the_expected_orthogonality(size):
    # each entry of S1^T S2 is zero unless one of n rows holds both: (1 - p^2)^n
    density, found = 0.01, []
    for seed in range(3):
        pair = [update(masks.rand((size, size), density, seed=2 * seed + i), (size, size), i) for i in range(2)]
        found.append(awor(*pair))
    assert sum(found) / 3 == pytest.approx((1 - density**2) ** size, abs=0.005)


def test_struct_masks_of_other_offsets_keep_the_bound_and_equal_ones_do_not():
    size, density = 256, 0.02
    pair = [update(masks.struct((size, size), density, offset=o), (size, size), o) for o in (0, 5)]
    rows = [len(u.positions) / size**2 for u in pair]
    # lemma 4.5: I + S2 + S1^T is all that is left, so at most these entries are not zero
    assert 1 - awor(*pair) <= 1 / size + sum(rows)
    assert awor(pair[0], update(pair[0].positions, (size, size), 9)) == 0.0


def test_without_common_rows_there_is_no_cross_term():
    one = update(torch.arange(0, 20), (4, 10))
    two = update(torch.arange(20, 40), (4, 10), 1)
    assert awom(one, two) == 0.0 and awom(one, two, order="spectral") == 0.0 and awor(one, two) == 1.0


@pytest.mark.parametrize("size", [128, 256])
def test_struct_masks_of_other_offsets_are_more_orthogonal_than_wm_ones_and_those_than_loras(size):
    # S35: the order of figures 4 and 9; in expectation parts of one ranking overlap no less than one mask with itself
    density, rank = 0.02, 4
    found = dict.fromkeys(("struct", "wm", "wm, own part", "lora"), 0.0)
    for seed in range(5):
        seeded = torch.Generator().manual_seed(seed)
        weight = torch.randn(size, size, generator=seeded)
        masked = {
            "struct": [masks.struct((size, size), density, offset=o) for o in (0, 3)],
            "wm": [masks.wm(weight, density)] * 2,
            "wm, own part": [masks.wm(weight, density, part=part) for part in (0, 1)],
        }
        pairs = {name: [update(p, (size, size), i) for i, p in enumerate(both)] for name, both in masked.items()}
        factors = torch.randn(2, size, rank, generator=seeded), torch.randn(2, rank, size, generator=seeded)
        pairs["lora"] = [SparseDelta.from_dense({"w": m}, 1.0)[0].updates["w"] for m in factors[0] @ factors[1]]
        for name, pair in pairs.items():
            found[name] += awor(*pair) / 5
    assert found["struct"] > found["wm"] > 0.8 and found["lora"] == 0
    assert found["wm"] == pytest.approx(found["wm, own part"], abs=0.01)


def test_a_dense_pair_has_the_norm_of_its_product_and_no_zeros():
    one, two = (update(torch.arange(400), (20, 20), seed) for seed in range(2))
    product = one.dense().T @ two.dense()
    assert awom(one, two) == pytest.approx(float(product.norm()), rel=1e-5)
    assert awom(one, two, order="spectral") == pytest.approx(float(torch.linalg.matrix_norm(product, ord=2)), rel=1e-5)
    assert awor(one, two) == 0.0


@pytest.mark.parametrize("columns_at_once", [1, 7, 30])
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_blocks_give_what_the_whole_product_does(monkeypatch, columns_at_once, density):
    shape = (50, 30)
    monkeypatch.setattr(fusion, "BLOCK_BYTES", 4 * sum(shape) * columns_at_once)
    one, two = (update(masks.rand(shape, density, seed=seed), shape, seed) for seed in range(2))
    product = one.dense().T @ two.dense()
    assert awom(one, two) == pytest.approx(float(product.norm()), rel=1e-5)
    assert awom(one, two, order="spectral") == pytest.approx(float(torch.linalg.matrix_norm(product, ord=2)), rel=1e-5)
    assert awor(one, two) == int((product == 0).sum()) / product.numel()


def test_what_cancels_to_zero_counts_as_zero():
    # the columns' product is 1 * 1 + 1 * -1, though both rows hold both
    one, two = (
        SparseUpdate(positions=torch.tensor([0, 2]), values=torch.tensor([1.0, s]), shape=(2, 2)) for s in (1, -1)
    )
    assert awor(one, two) == 1.0 and awom(one, two) == 0.0


def test_interference_of_adapters_is_that_of_their_layers_together():
    one, two = make_delta(Net(), seed=0), make_delta(Net(), seed=1)
    found = interference(one, two)
    names = ("first.weight", "body.q.weight")
    assert found.awom == pytest.approx(math.hypot(*(awom(one.updates[n], two.updates[n]) for n in names)), rel=1e-5)
    apart = sum(float((dense(one, n) - dense(two, n)).square().sum()) for n in names)
    assert found.distance == pytest.approx(apart**0.5, rel=1e-5)
    same = interference(one, one)
    assert (same.overlap, same.distance) == (1.0, 0.0)
    nothing = interference(make_delta(Net(), only=("first.weight",)), make_delta(Net(), only=("body.q.weight",)))
    assert (nothing.overlap, nothing.awom, nothing.awor) == (0.0, 0.0, 1.0)


def test_overlaps_are_those_of_the_pairs():
    deltas = {f"a{i}": make_delta(Net(), seed=i) for i in range(3)}
    found = overlaps(deltas)
    assert all(found[a][b] == found[b][a] == interference(deltas[a], deltas[b]).overlap for a in found for b in found)
    assert all(found[a][a] == 1 for a in found)


def test_distances_are_symmetric_and_from_the_base_the_norms():
    deltas = {f"a{i}": make_delta(Net(), seed=i) for i in range(3)}
    found = distances(deltas)
    assert all(found[a][b] == found[b][a] for a in found for b in found)
    assert all(found[a][a] == 0 for a in found)
    norm = sum(float(u.values.square().sum()) for u in deltas["a1"].updates.values()) ** 0.5
    assert found["base"]["a1"] == pytest.approx(norm, rel=1e-5)
    with pytest.raises(AdapterError, match="an adapter is called 'base'"):
        distances({"base": deltas["a0"]})
