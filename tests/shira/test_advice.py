import pytest
import torch

from adapterbank.errors import AdapterBankError
from adapterbank.shira import masks
from adapterbank.shira.advice import CROWDED, crowding, room
from adapterbank.shira.fusion import overlaps
from sparse import Net, make_delta

SHAPES = [(64, 64), (30, 40), (64, 64)]


def test_the_room_is_what_masks_allow_in_every_layer():
    density = 0.05
    found = room(SHAPES, density)
    for shape in SHAPES:
        masks.struct(shape, density, offset=found.offsets - 1)
        masks.wm(torch.randn(shape), density, part=found.parts - 1)
    with pytest.raises(AdapterBankError, match="is outside"):
        [masks.struct(shape, density, offset=found.offsets) for shape in SHAPES]
    with pytest.raises(AdapterBankError, match=f"has no {found.parts + 1} parts"):
        [masks.wm(torch.randn(shape), density, part=found.parts) for shape in SHAPES]


def test_the_advice_names_what_has_room_for_all():
    found = room([(512, 512)], 0.01)  # four rows of 512, a hundred parts
    assert (found.parts, found.offsets) == (100, 128)
    assert "want a part or an offset of their own" in found.advice(100)
    assert "want an offset of their own" in found.advice(101)
    crowded = found.advice(129)
    assert "129 adapters don't fit side by side" in crowded and "a density below 1/129" in crowded
    assert room([(512, 512)], 1 / 130).parts >= 129
    with pytest.raises(AdapterBankError, match="adapters=0 is no family"):
        found.advice(0)
    with pytest.raises(AdapterBankError, match="there are no layers"):
        room([], 0.01)


def test_only_adapters_on_the_same_weights_are_told_so():
    apart = {f"a{i}": make_delta(Net(), seed=i) for i in range(3)}
    assert crowding(overlaps(apart)) is None
    same = {**apart, "twin": make_delta(Net(), seed=2)}
    told = crowding(overlaps(same))
    assert told is not None and told.startswith("a2 and twin share 100% of their positions")
    assert crowding({"a": {"a": 1.0, "b": CROWDED}, "b": {"b": 1.0, "a": CROWDED}}) is None
