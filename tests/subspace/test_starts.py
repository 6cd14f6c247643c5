import pytest
import torch

from adapterbank.errors import BankError
from adapterbank.subspace.starts import connected, same_start


def trained_from(seed, r=3, d=60, steps=0.2, task=0):
    start = torch.randn(r, d, generator=torch.Generator().manual_seed(seed))
    return start + steps * torch.randn(r, d, generator=torch.Generator().manual_seed(1000 + 7 * seed + task))


def test_adapters_of_one_seed_are_grouped_and_private_seeds_are_not():
    factors = [trained_from(seed, task=i) for i, seed in enumerate([5, 1, 5, 2, 1, 5])]
    report = same_start(factors)
    assert report.groups == ((0, 2, 5), (1, 4))
    assert report.cosines[0, 2] > 0.9
    assert report.cosines[0, 1].abs() < 0.3


def test_ranks_may_differ_because_an_initialisation_fills_row_by_row():
    report = same_start([trained_from(5, r=6, steps=0)[:4], trained_from(5, r=6, steps=0)])
    assert report.groups == ((0, 1),)
    assert report.mean_cosine == pytest.approx(1, abs=1e-5)


def test_a_shared_subspace_overlaps_without_being_one_start():
    # random gauges of one row space: it's the rows in order that tell a seed from a subspace
    rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    factors = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) @ rows for i in range(5)]
    report = same_start(factors)
    assert report.groups == ()
    assert report.mean_overlap == pytest.approx(1, abs=1e-3)


def test_the_null_is_the_overlap_of_random_row_spaces():
    factors = [
        torch.randn(r, 40, generator=torch.Generator().manual_seed(10 * i + r)) for i in range(8) for r in (2, 6)
    ]
    report = same_start(factors)
    assert report.mean_overlap == pytest.approx(report.null_overlap, rel=0.1)


def test_a_zero_factor_is_like_nothing():
    report = same_start([torch.zeros(2, 9), torch.zeros(2, 9), torch.randn(2, 9)])
    assert report.groups == ()
    assert report.overlaps[0, 1] == 0


def test_one_adapter_has_no_pairs_and_none_is_refused():
    assert same_start([torch.randn(2, 9)]).mean_cosine == 0
    with pytest.raises(BankError, match="no A factors"):
        same_start([])


def test_chains_of_pairs_make_one_group():
    linked = torch.eye(5, dtype=torch.bool)
    for i, j in ((3, 1), (1, 4)):
        linked[i, j] = linked[j, i] = True
    assert connected(linked) == ((1, 3, 4),)
