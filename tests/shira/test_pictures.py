import base64
import re
import xml.etree.ElementTree as ElementTree
import zlib

import pytest
import torch

from adapterbank.errors import AdapterBankError
from adapterbank.shira import masks, pictures
from adapterbank.shira.fusion import distances, overlaps
from adapterbank.shira.pictures import draw_masks, draw_matrices
from sparse import Net, make_delta

SVG = "{http://www.w3.org/2000/svg}"


def levels_in(svg):
    """Palette entries of every image, ``(down, across)``."""
    found = []
    for data in re.findall(r"base64,([^\"]+)", svg):
        png = base64.b64decode(data)
        across, down = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
        start = png.index(b"IDAT")
        size = int.from_bytes(png[start - 4 : start], "big")
        lines = torch.frombuffer(bytearray(zlib.decompress(png[start + 4 : start + 4 + size])), dtype=torch.uint8)
        found.append(lines.view(down, across + 1)[:, 1:])
    return found


def texts_in(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (1, 8)], ids=str)
def test_a_small_layer_is_drawn_weight_by_weight(shape):
    positions = masks.rand(shape, 0.2)
    (levels,) = levels_in(draw_masks({"rand": positions}, shape))
    times = len(levels) // shape[0]
    expected = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    expected[positions.long()] = True
    expected = expected.view(shape).repeat_interleave(times, 0).repeat_interleave(times, 1)
    assert torch.equal(levels, 255 * expected.to(torch.uint8))


@pytest.mark.parametrize("shape", [(300, 200), (1000, 40), (128, 129)], ids=str)
def test_cells_count_every_weight_once(shape):
    everything = torch.arange(shape[0] * shape[1])
    found = pictures._shares(everything, shape)
    assert found.shape == (min(shape[0], pictures.CELLS), min(shape[1], pictures.CELLS))
    assert torch.equal(found, torch.ones_like(found))
    # the first weight is a cell's, however many share it
    assert pictures._shares(everything[:1], shape).count_nonzero() == 1


def test_one_weight_of_a_large_layer_is_still_seen_beside_a_full_cell():
    shape = (2048, 2048)
    cell = (torch.arange(16)[:, None] * 2048 + torch.arange(16)).flatten()
    one, full = levels_in(draw_masks({"one": torch.tensor([700]), "full": cell}, shape))
    assert one.unique().tolist() == [0, 1] and full.unique().tolist() == [0, 255]
    assert pictures._color(1 / 255) != pictures._color(0.0) == pictures.PAPER


def test_names_shapes_and_counts_stand_beside_the_masks():
    shapes = {"<q>": (20, 30), "v": (1200, 10)}
    svg = draw_masks(
        {"<q>": masks.rand((20, 30), 0.1), "v": torch.tensor([], dtype=torch.int32)}, shapes, title="a & b"
    )
    found = texts_in(svg)
    assert {"a & b", "<q>", "20 × 30, 60 values, 10.00%", "v", "1,200 × 10, 0 values, 0.00%"} <= set(found)


def test_what_can_not_be_drawn_is_refused():
    with pytest.raises(AdapterBankError, match="nothing to draw"):
        draw_masks({}, (3, 3))
    with pytest.raises(AdapterBankError, match="mask 'v': the shape of its layer is missing"):
        draw_masks({"v": torch.tensor([1])}, {"q": (3, 3)})
    with pytest.raises(AdapterBankError, match=r"mask 'v': positions lie outside of \(3, 3\)"):
        draw_masks({"v": torch.tensor([9])}, (3, 3))
    with pytest.raises(AdapterBankError, match="nothing to draw"):
        draw_matrices({})
    with pytest.raises(AdapterBankError, match="matrix 'd' isn't square"):
        draw_matrices({"d": {"a": {"a": 1.0}, "b": {"a": 1.0}}})


# --- matrices ---------------------------------------------------------------------------------------------------------


def test_a_matrix_shows_its_numbers_and_its_largest_in_full_colour():
    svg = draw_matrices({"distance": {"a": {"a": 0.0, "b": 12.345}, "b": {"a": 0.00123, "b": 0.0}}})
    assert {"distance", "1  a", "2  b", "12.3", "0.0012", "0"} <= set(texts_in(svg))
    squares = [rect.get("fill") for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")][1:]
    assert squares == [pictures.PAPER, pictures._color(1.0), pictures._color(0.0001), pictures.PAPER]


def test_comparisons_of_adapters_are_drawn_side_by_side():
    deltas = {f"a{i}": make_delta(Net(), seed=i) for i in range(3)}
    svg = draw_matrices({"distance": distances(deltas), "overlap": overlaps(deltas)})
    assert len(list(ElementTree.fromstring(svg).iter(f"{SVG}g"))) == 2
    assert {"1  base", "4  a2", "3  a2"} <= set(texts_in(svg))
