import copy

import pytest
import torch

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank
from adapterbank.errors import BankError


def is_orthonormal(rows):
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def same(one, other):
    assert one.fingerprint == other.fingerprint
    for name, basis in one.modules.items():
        assert torch.equal(basis.V, other.modules[name].V)
        assert torch.equal(basis.U, other.modules[name].U)


@pytest.fixture
def bank_dir(fine_dir):
    """Directions are derived from members of full rank."""
    return fine_dir


@pytest.fixture
def stored(planted):
    """A bank that stores six directions a side."""
    return Bank.fit(planted, k=6)


def test_stored_directions_come_first_and_are_made_orthonormal(stored):
    basis = stored.basis(4)
    assert basis.members == 0
    for module, coded in zip(stored.index.modules, stored.bases, strict=True):
        found = basis.modules[module.name]
        assert found.stored == (4, 4)
        assert is_orthonormal(found.V)
        assert is_orthonormal(found.U.T)
        torch.testing.assert_close(found.V, coded.side_in.rows[:4], rtol=0, atol=1e-3)


def test_missing_directions_are_derived(bank):
    basis = bank.basis(8)
    assert basis.members == len(bank)
    for found in basis.modules.values():
        assert found.k == (8, 8)
        assert found.sizes == (64, 64)
        assert is_orthonormal(found.V)
        assert is_orthonormal(found.U.T)


def test_a_derived_basis_holds_a_planted_family(planted, bank):
    # six directions were planted, with noise of a tenth: they explain all but about that
    basis = bank.basis(6)
    for adapter in map(LoraAdapter.load, planted):
        for module in adapter.modules:
            dW, b = adapter.factors(module).update(), basis.modules[module]
            assert (dW - b.U @ (b.U.T @ dW @ b.V.T) @ b.V).norm() < 0.3 * dW.norm()


def test_the_same_bank_gives_the_same_basis_again(bank, bank_dir):
    same(bank.basis(8), Bank.load(bank_dir).basis(8))
    assert bank.basis(8) is bank.basis(8)
    assert copy.deepcopy(bank.basis(8)) is bank.basis(8)


def test_other_recipes_have_other_fingerprints(bank):
    assert len({bank.basis(k).fingerprint for k in (5, 6, 7)}) == 3


def test_members_that_came_later_change_nothing(bank, later):
    before = bank.basis(8)
    bank.add(later)
    assert bank.basis(8).fingerprint != before.fingerprint
    same(bank.basis(8, members=10), before)


def test_members_that_are_gone_are_missed(bank):
    bank.remove(bank.names[-1])
    with pytest.raises(BankError, match="10 members, this bank has 9: it is another bank, or members were removed"):
        bank.basis(8, members=10)


def test_a_name_means_nothing(bank):
    before = bank.basis(8)
    bank.rename(bank.names[0], "another")
    same(bank.basis(8), before)


def test_by_default_each_module_gives_what_it_has(planted):
    few = Bank.fit(planted[:2], max_error=0.001)  # two of rank 4
    assert {b.k for b in few.basis().modules.values()} == {(8, 8)}
    with pytest.raises(BankError, match=r"q_proj on its input side can't give k=9 directions: .* rank 8 together"):
        few.basis(9)


def test_no_layer_has_more_directions_than_features():
    narrow = [
        LoraAdapter.from_factors(
            f"a{i}", {"layers.0.head": LoraFactors(A=torch.randn(4, 12), B=torch.randn(3, 4), scale=1.0)}, base="b"
        )
        for i in range(4)
    ]
    basis = Bank.fit(narrow, max_error=0.1).basis(10).modules["layers.0.head"]
    assert basis.k == (10, 3)


def test_a_number_of_directions_is_not_negative(bank):
    with pytest.raises(BankError, match="k=-1 is no number of directions"):
        bank.basis(-1)


def test_without_directions_any_bank_is_as_good_as_another(bank, planted):
    none = bank.basis(0)
    assert all(basis.k == (0, 0) for basis in none.modules.values())
    other = Bank.fit(planted[:3], k=4)
    assert other.basis(0).fingerprint == none.fingerprint
    assert other.basis(4).fingerprint != bank.basis(4).fingerprint


def test_the_papers_banks_give_their_means_too(planted):
    centred = Bank.fit(planted, method="eigenlora", k=6, quantize=False).basis(6)
    basis = next(iter(centred.modules.values()))
    assert basis.mean_in.shape == (64,)
    assert basis.mean_out.shape == (64,)
    assert is_orthonormal(basis.V)


def test_flat_banks_give_directions_that_are_whole_factors(planted):
    flat = Bank.fit(planted, method="flat", k=3, quantize=False)
    basis = next(iter(flat.basis(3).modules.values()))
    assert (basis.fold, basis.k, basis.sizes) == (4, (3, 3), (64, 64))
    with pytest.raises(BankError, match="fit the bank with a larger k"):
        flat.basis(4)


# --- is it the basis that was trained on? -----------------------------------------------------------------------------


def test_the_probe_notices_one_turned_direction(bank):
    basis = bank.basis(8)
    basis.check(basis.fingerprint, basis.probe, "the task")
    turned = copy.copy(next(iter(basis.modules.values())))
    V = turned.V.clone()
    V[0], V[1] = 0.99 * V[0] + 0.14 * V[1], 0.99 * V[1] - 0.14 * V[0]
    object.__setattr__(turned, "V", V)
    other = type(basis)(
        modules={**basis.modules, next(iter(basis.modules)): turned}, k=8, members=10, fingerprint=basis.fingerprint
    )
    with pytest.raises(BankError, match=r"the task was trained on .* arithmetic derives differently"):
        other.check(basis.fingerprint, basis.probe, "the task")


def test_another_fingerprint_is_named(bank):
    with pytest.raises(BankError, match="trained on the basis abc, this bank's is"):
        bank.basis(8).check("abc", None, "the task")
