import math

import pytest
import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.errors import AdapterBankError
from families import CORRUPTIONS, Family, corrupt, make_family

SMALL = {"n": 2, "hidden": 24, "layers": 2, "rank": 3, "shared_rank": 4, "seed": 5}


def updates(directories):
    adapters = [LoraAdapter.load(directory) for directory in directories]
    return [{module: adapter.factors(module).update() for module in adapter.modules} for adapter in adapters]


@pytest.mark.parametrize(
    "fields",
    [{"gauge": "scale"}, {"gauge": "orthogonal"}, {"gauge": "random"}, {"alpha": 7.5}, {"rslora": True}],
    ids=str,
)
def test_the_update_does_not_depend_on_how_it_is_stored(tmp_path, fields):
    plain = updates(make_family(tmp_path / "a", Family(**SMALL)))
    other = updates(make_family(tmp_path / "b", **SMALL, **fields))
    for left, right in zip(plain, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-7)


def test_without_noise_a_cluster_shares_one_subspace(tmp_path):
    many = updates(make_family(tmp_path, **SMALL | {"n": 6}, noise=0.0))
    rows = torch.cat([update["model.layers.0.self_attn.q_proj"] for update in many])
    assert torch.linalg.matrix_rank(rows, rtol=1e-4) == 4


def test_settings_show_in_the_files(tmp_path):
    directories = make_family(
        tmp_path,
        **SMALL | {"n": 8},
        ranks=(2, 5),
        drop_layers=0.5,
        classifier=3,
        dtype="bfloat16",
        d_out=16,
        alphas=(1, 2),
    )
    adapters = [LoraAdapter.load(directory) for directory in directories]
    assert {adapter.rank for adapter in adapters} == {2, 5}
    assert {adapter.alpha for adapter in adapters} == {1, 2}
    assert {len(adapter.modules) for adapter in adapters} == {2, 4}
    assert adapters[0].extra("score.weight").shape == (3, 24)
    assert adapters[0].extra("score.weight").dtype == torch.bfloat16
    assert {shape.d_out for shape in adapters[0].modules.values()} == {16}
    norms = [sum(u.square().sum() for u in update.values()) for update in updates(make_family(tmp_path / "s", **SMALL))]
    assert math.isclose(norms[0], norms[1], rel_tol=1e-4)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_damage_is_noticed_or_legal(adapter_dirs, tmp_path, kind):
    # another base and a zero update are legal for one adapter alone
    legal = kind in ("shape", "base", "zero")
    try:
        updates([corrupt(adapter_dirs[0], kind, tmp_path / kind)])
    except AdapterBankError as error:
        assert not legal
        assert str(error).startswith(f"adapter '{kind}'")
    else:
        assert legal
