"""Masks and comparisons of sparse adapters as SVG: one text, without a drawing library or further files."""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapterbank.errors import AdapterBankError

Shape = tuple[int, int]
Matrix = Mapping[str, Mapping[str, float]]
Pixels = float | int

CELLS = 128
"""Rows and columns that a mask is drawn with at most."""
SIDE, LEAST_SIDE = 256, 32
"""Pixels: a mask's longer side, and its shorter one at least."""
CELL = 60
"""Pixels of a matrix's cell."""
MARGIN, LINE, LETTER = 24, 18, 7
"""Pixels: around everything, of a line, of a letter at most."""
ACROSS = 4
"""Panels side by side."""
LONGEST = 36
"""Letters of a name that are shown."""
PAPER, INK, MUTED, FRAME = "#ffffff", "#1f2430", "#6b7280", "#c8ccd4"
FULL = (194, 65, 12)
"""Of the largest value, in red, green and blue; zero is paper."""
FAINTEST = 0.15
"""Share of that colour that the smallest value above zero has: it must be seen."""


@dataclass(frozen=True, kw_only=True)
class _Panel:
    width: Pixels
    height: Pixels
    body: str
    """SVG, from (0, 0) on."""


def draw_masks(
    masks: Mapping[str, Int[Tensor, " _"]], shape: Shape | Mapping[str, Shape], *, title: str = "Masks"
) -> str:
    """Draw masks side by side, each as up to 128 x 128 cells: the darker, the more of a cell's weights are changed.

    Args:
        masks: Flat positions by name, as of ``adapterbank.shira.masks`` or a ``SparseUpdate``.
        shape: Of the layer; where it isn't one, by the masks' names.
        title: Stands above.

    Returns:
        An SVG with a background of its own, for light and dark pages.

    Raises:
        AdapterBankError: If there is no mask, a shape is missing, or positions lie outside of it.
    """
    shares = {}
    for name, positions in masks.items():
        of = shape.get(name) if isinstance(shape, Mapping) else shape
        if of is None:
            raise AdapterBankError(f"mask {name!r}: the shape of its layer is missing")
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < of[0] * of[1]:
            raise AdapterBankError(f"mask {name!r}: positions lie outside of {of}; give the shape of its layer")
        shares[name] = _shares(positions, of), len(positions), of
    most = max((float(found.max()) for found, _, _ in shares.values()), default=0.0)
    panels = [_mask(name, *found, most) for name, found in shares.items()]
    return _page(title, panels, f"White: no weight is changed. Darkest: {most:.2g} of a cell's weights.")


def draw_matrices(matrices: Mapping[str, Matrix], *, title: str = "Adapters") -> str:
    """Draw comparisons of adapters side by side, with their numbers.

    Args:
        matrices: Square ones by what they show, e.g. ``{"distance": distances(deltas), "overlap": overlaps(deltas)}``.
        title: Stands above.

    Returns:
        An SVG with a background of its own, for light and dark pages.

    Raises:
        AdapterBankError: If there is no matrix, or one isn't square.
    """
    for name, matrix in matrices.items():
        if not matrix or any(row.keys() != matrix.keys() for row in matrix.values()):
            raise AdapterBankError(f"matrix {name!r} isn't square; give a value for every pair of names")
    panels = [_matrix(name, matrix) for name, matrix in matrices.items()]
    return _page(title, panels, "White: zero. Darkest: the largest value beside the diagonal.")


def _page(title: str, panels: Sequence[_Panel], note: str) -> str:
    if not panels:
        raise AdapterBankError("there is nothing to draw; give at least one")
    rows = [panels[i : i + ACROSS] for i in range(0, len(panels), ACROSS)]
    width = max(sum(panel.width + MARGIN for panel in row) for row in rows)
    width = MARGIN + max(width, LETTER * max(len(title), len(note)) + MARGIN)
    parts, y = [_text(MARGIN, MARGIN + 8, title, size=15, weight="bold")], 2.0 * MARGIN + 8
    for row in rows:
        x = float(MARGIN)
        for panel in row:
            parts.append(f'<g transform="translate({x:g} {y:g})">{panel.body}</g>')
            x += panel.width + MARGIN
        y += max(panel.height for panel in row) + MARGIN
    parts.append(_text(MARGIN, y, note, size=11, color=MUTED))
    height = y + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} '
        f'{height:g}" font-family="system-ui, sans-serif" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(
    x: Pixels, y: Pixels, text: str, *, size: int = 12, color: str = INK, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}">'
        f"{escape(text)}</text>"
    )


def _name(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"  # layers differ at the end


def _color(level: float) -> str:
    """From paper at 0 to full at 1."""
    share = FAINTEST + (1 - FAINTEST) * level if level > 0 else 0.0
    return "#" + "".join(f"{round(255 + share * (full - 255)):02x}" for full in FULL)


# --- masks ------------------------------------------------------------------------------------------------------------


def _shares(positions: Int[Tensor, " _"], shape: Shape) -> Float[Tensor, "down across"]:
    """Changed weights over all weights of each cell."""
    rows, columns = shape
    down, across = min(rows, CELLS), min(columns, CELLS)
    row = positions.long() // columns
    cell = (row * down // rows) * across + (positions.long() - row * columns) * across // columns
    heights, widths = (
        torch.bincount(torch.arange(size) * cells // size) for size, cells in ((rows, down), (columns, across))
    )
    return torch.bincount(cell.cpu(), minlength=down * across).view(down, across) / (heights[:, None] * widths)


def _mask(name: str, shares: Float[Tensor, "down across"], count: int, shape: Shape, most: float) -> _Panel:
    rows, columns = shape
    scale = SIDE / max(shape)
    width, height = max(LEAST_SIDE, scale * columns), max(LEAST_SIDE, scale * rows)
    shown = _name(name)
    told = f"{rows:,} × {columns:,}, {count:,} values, {count / (rows * columns):.2%}"
    image = base64.b64encode(_png(shares / most if most else shares)).decode()
    body = (
        _text(0, 12, shown, weight="bold") + _text(0, 12 + LINE, told, size=11, color=MUTED) +
        f'<image x="0" y="{2 * LINE + 4}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{image}"/>'
        f'<rect x="0" y="{2 * LINE + 4}" width="{width:g}" height="{height:g}" fill="none" stroke="{FRAME}"/>'
    )  # fmt: skip
    return _Panel(width=max(width, LETTER * max(len(shown), len(told))), height=height + 2 * LINE + 4, body=body)


def _png(levels: Float[Tensor, "down across"]) -> bytes:
    """An image of levels from 0 to 1."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    times = max(1, 2 * SIDE // max(levels.shape))  # or viewers would blur the cells into each other
    levels = levels.repeat_interleave(times, 0).repeat_interleave(times, 1)
    down, across = levels.shape
    palette = bytes.fromhex("".join(_color(i / 255)[1:] for i in range(256)))
    # rounded up: what is above zero stays above it
    lines = b"".join(b"\0" + bytes(row) for row in (255 * levels).ceil().to(torch.uint8).tolist())
    header = struct.pack(">2I5B", across, down, 8, 3, 0, 0, 0)  # 8 bits a pixel, by palette
    parts = (b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# --- matrices ---------------------------------------------------------------------------------------------------------


def _matrix(title: str, matrix: Matrix) -> _Panel:
    names = list(matrix)
    left = LETTER * max(len(_name(name)) for name in names) + 3 * LETTER
    most = max((matrix[one][other] for one in names for other in names if one != other), default=0.0)
    parts, top = [_text(0, 12, title, weight="bold")], 2 * LINE + 4
    for i, one in enumerate(names):
        parts.append(_text(0, top + (i + 0.5) * CELL + 4, f"{i + 1}  {_name(one)}"))
        parts.append(_text(left + (i + 0.5) * CELL, top - 6, str(i + 1), anchor="middle"))
        for j, other in enumerate(names):
            level = 0.0 if i == j or not most else min(1.0, max(0.0, matrix[one][other] / most))
            x, y = left + j * CELL, top + i * CELL
            color = MUTED if i == j else PAPER if level > 0.6 else INK
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{_color(level)}" stroke="{FRAME}"/>'
            )
            parts.append(
                _text(x + CELL / 2, y + CELL / 2 + 4, _number(matrix[one][other]), color=color, anchor="middle")
            )
    width = max(left + CELL * len(names), LETTER * len(title))
    return _Panel(width=width, height=top + CELL * len(names), body="".join(parts))


def _number(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3g}"
