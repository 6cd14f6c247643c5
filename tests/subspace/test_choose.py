import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterbank.errors import BankError
from adapterbank.subspace.choose import choose_k, explained, sweep_k

SPECTRA = st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True))
)


@given(spectrum=SPECTRA, target=st.floats(0.01, 1.0))
def test_the_share_rule_takes_the_smallest_k_that_reaches_it(spectrum, target):
    # E15: the paper's wording is singular values; energy has them squared
    for power, rule in ((1, "share"), (2, "energy")):
        shares = explained(spectrum, power=power)
        k = choose_k(spectrum, **{rule: target})
        assert shares[k - 1] >= target - 1e-9
        assert k == 1 or shares[k - 2] < target


def test_singular_values_and_energy_differ():
    # E15
    spectrum = torch.tensor([3.0, 1.0, 1.0, 1.0])
    assert choose_k(spectrum, share=0.75) == 3
    assert choose_k(spectrum, energy=0.75) == 1


def test_each_factor_of_each_layer_may_have_its_own_k():
    # E17: the rule is one, the spectra decide
    spectra = {"0.A": torch.tensor([1.0, 0.0]), "0.B": torch.ones(8), "1.A": torch.ones(4)}
    assert {name: choose_k(s, share=0.5) for name, s in spectra.items()} == {"0.A": 1, "0.B": 4, "1.A": 2}
    assert all(choose_k(s, k=2) == 2 for s in spectra.values())


def test_the_energy_of_the_leading_sixteen_measures_diversity():
    # E18, the figure 3 analogue: 16 of 32 equal directions hold half
    assert float(explained(torch.ones(32))[15]) == pytest.approx(0.5)


def test_a_zero_spectrum_is_explained():
    assert choose_k(torch.zeros(3), energy=0.9) == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "exactly one"),
        ({"k": 1, "share": 0.5}, "exactly one"),
        ({"k": 4}, r"k=4 is outside \[1, 3\]"),
        ({"share": 0.0}, r"in \(0, 1\], not 0.0"),
        ({"energy": 1.5}, r"in \(0, 1\], not 1.5"),
    ],
)
def test_a_rule_that_cannot_be_met_is_refused(rules, message):
    with pytest.raises(BankError, match=message):
        choose_k(torch.ones(3), **rules)


def test_the_sweep_picks_the_smallest_k_near_the_best():
    # E16
    scores = {1: 0.5, 2: 0.88, 4: 0.9, 8: 0.89}
    sweep = sweep_k(scores.__getitem__, [8, 4, 2, 1, 2], tolerance=0.03)
    assert sweep.scores == tuple(scores.items())
    assert (sweep.k, sweep.best) == (2, 0.9)
    assert sweep_k(scores.__getitem__, [8, 4]).k == 4
    with pytest.raises(BankError, match="no k to try"):
        sweep_k(scores.__getitem__, [])
