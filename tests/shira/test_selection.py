import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterbank.errors import AdapterBankError
from adapterbank.shira import selection
from adapterbank.shira.selection import largest


def sorted_out(scores, count):
    """The same by sorting: stable, so of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


@given(
    # few values, so that there are ties; tiny and huge ones, so that there are many buckets
    values=st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 0.5, 0.50001, 1.0, 3.0, 3e38]), min_size=1, max_size=60),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_largest_are_those_that_a_sort_finds(values, share, dtype):
    scores = torch.tensor(values, dtype=dtype)
    count = max(1, round(share * len(values)))
    assert largest(lambda where: scores[where], len(scores), count).tolist() == sorted_out(scores, count).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 1000, 10**6])
def test_chunks_make_no_difference(dtype, chunk, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", chunk)
    scores = torch.randn(997, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    for count in (1, 10, 500, 996, 997):
        assert torch.equal(largest(lambda where: scores[where], 997, count), sorted_out(scores, count))


def test_no_more_than_a_chunk_is_asked_for_at_a_time():
    asked, scores = [], torch.rand(3 * selection.CHUNK + 5)

    def some(where):
        asked.append(len(scores[where]))
        return scores[where]

    largest(some, len(scores), 100)
    assert max(asked) == selection.CHUNK and sum(asked) == 3 * len(scores)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad):
    scores = torch.rand(10)
    scores[7] = bad
    with pytest.raises(AdapterBankError, match="holds nan or inf"):
        largest(lambda where: scores[where], 10, 2)
