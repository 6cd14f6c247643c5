import pytest
import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.demo.curves import Point, baseline_curves, rms
from adapterbank.demo.plots import _mean, draw_rate_distortion, draw_spectrum


@pytest.fixture
def adapters(adapter_dirs):
    return [LoraAdapter.load(folder) for folder in adapter_dirs]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_spectrum_is_a_picture(adapters, tmp_path):
    assert is_png(draw_spectrum(adapters, tmp_path / "new" / "spectrum.png"))


def test_rate_distortion_is_a_picture(adapters, tmp_path):
    bank = [Point(setting="ratio=8", ratio=8.0, error=0.1), Point(setting="ratio=4", ratio=4.0, error=0.01)]
    assert is_png(draw_rate_distortion(bank, baseline_curves(adapters), tmp_path / "rate.png"))


def test_a_shorter_spectrum_explains_everything_beyond_its_end():
    mean = _mean([torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.2, 0.9])])
    torch.testing.assert_close(mean, torch.tensor([0.3, 0.6, 0.95]))


def test_more_bytes_never_hurt_a_baseline(adapters):
    for points in baseline_curves(adapters).values():
        by_ratio = sorted(points, key=lambda point: point.ratio)
        assert [p.error for p in by_ratio] == sorted(p.error for p in by_ratio)


def test_the_full_rank_svd_in_16_bits_costs_half_and_loses_rounding_only(adapters):
    full = baseline_curves(adapters)["SVD, 16 bits"][-1]
    assert full.ratio == 2.0 and full.error < 1e-3


def test_the_mean_of_errors_is_quadratic():
    assert rms([3.0, 4.0]) == pytest.approx(12.5**0.5)
