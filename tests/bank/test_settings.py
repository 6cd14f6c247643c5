import pytest

from adapterbank.bank.settings import DEFAULT_MAX_ERROR, FitSettings, parse_bytes
from adapterbank.errors import BankError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 4.0, "budget": 1000}, "one target, not ratio and budget"),
        ({"ratio": 4.0, "max_error": 0.1}, "one target, not ratio and max_error"),
        ({"ratio": 0.0}, "ratio must be a positive number"),
        ({"ratio": float("nan")}, "ratio must be a positive number"),
        ({"max_error": -1.0}, "max_error must be a positive number"),
        ({"max_error": float("inf")}, "max_error must be a positive number"),
        ({"budget": -5}, "budget must be a positive number"),
        ({"k": 0}, "k must be at least 1"),
        ({"method": "pca"}, "method 'pca' is unknown; choose one of product, eigenlora, flat"),
        ({"method": "eigenlora"}, "needs k, ratio or budget"),
        ({"method": "flat", "max_error": 0.1}, "does not fit to an error"),
        ({"method": "eigenlora", "k": 3, "ratio": 4.0}, "leave out ratio"),
        ({"k": 3, "ratio": 4.0, "quantize": False}, "leave out ratio"),
    ],
)
def test_contradictions_are_refused_in_words(arguments, message):
    with pytest.raises(BankError, match=message):
        FitSettings(**arguments)


def test_without_any_target_the_default_error_is_kept():
    assert FitSettings().error == DEFAULT_MAX_ERROR
    assert FitSettings(k=3).error is None
    assert FitSettings(ratio=8.0).error is None
    assert FitSettings(max_error=0.2, k=3).error == 0.2


@pytest.mark.parametrize(
    ("arguments", "coding"),
    [
        ({}, "predictive"),
        ({"ratio": 8.0}, "predictive"),
        ({"k": 3, "ratio": 8.0}, "predictive"),
        ({"k": 3}, "int16"),
        ({"k": 3, "quantize": False}, "float32"),
        ({"quantize": False}, "float32"),
        ({"method": "eigenlora", "k": 3}, "int16"),
        ({"method": "flat", "ratio": 3.0, "quantize": False}, "float32"),
    ],
)
def test_the_coding_follows_from_what_is_asked(arguments, coding):
    assert FitSettings(**arguments).coding == coding


@pytest.mark.parametrize("arguments", [{}, {"ratio": 8.0, "seed": 3}, {"method": "flat", "k": 2, "mean": "drop"}])
def test_what_was_asked_survives_the_index(arguments):
    settings = FitSettings(**arguments)
    assert settings.to_json() == arguments
    assert FitSettings(**settings.to_json()) == settings


def test_a_ratio_is_of_four_bytes_a_value():
    assert FitSettings(ratio=8.0).bytes(1000) == 500
    assert FitSettings(budget=77).bytes(1000) == 77
    assert FitSettings().bytes(1000) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20MB", 20_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("7", 7),
        (7, 7),
        ("10k", 10_000),
        (" .5M ", 500_000),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3", "3XB", "1e6", "0", "0.1", "nan", "1,5MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BankError, match="is no size in bytes"):
        parse_bytes(text)
