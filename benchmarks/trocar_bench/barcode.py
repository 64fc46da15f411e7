"""Numbers in the upper corners of a picture, so that a program can read off a screen which one it is.

They are small, since a tracker sees them too: bars along whole edges were taken for instruments. An overlay
may cover some cells. Each bit is a dark and a bright cell, one over the other: whatever darkens both, or
brightens both, leaves no bit at all. What is not plainly one number is unreadable; one readable corner is
enough, two that disagree are none.
"""

from trocar_engines.masklets import UInt8Array

BITS = 10
"""In two rows: the bits, the lowest on the left, and under each its opposite."""
LARGEST_NUMBER = (1 << BITS) - 1
CELL_SHARE = 1 / 45
"""Side of a cell, of the picture's height: 16 pixels of 720."""
PURE_SHARE = 0.8
"""Of the pixels in the middle of a cell, so many must agree."""
UNREADABLE = -1

READ_FROM_CANVAS = f"""
(canvas) => {{
  const {{ width, height }} = canvas;
  const context = canvas.getContext("2d");
  const side = height * {CELL_SHARE};
  const inner = Math.max(1, Math.floor(side / 2));
  const read = (left) => {{
    const area = [Math.ceil({BITS} * side), Math.ceil(2 * side)];
    const pixels = context.getImageData(left, 0, ...area).data;
    const readCell = (column, row) => {{
      const [fromX, fromY] = [(column + 0.25) * side, (row + 0.25) * side].map(Math.floor);
      let bright = 0;
      for (let y = fromY; y < fromY + inner; y++) {{
        for (let x = fromX; x < fromX + inner; x++) bright += pixels[4 * (y * area[0] + x) + 1] > 127;
      }}
      const share = bright / (inner * inner);
      return share >= {PURE_SHARE} ? 1 : share <= 1 - {PURE_SHARE} ? 0 : NaN;
    }};
    let number = 0;
    for (let bit = 0; bit < {BITS}; bit++) {{
      const value = readCell(bit, 0);
      if (value + readCell(bit, 1) !== 1) return {UNREADABLE};
      number += value << bit;
    }}
    return number;
  }};
  const numbers = new Set([read(0), read(Math.round(width - {BITS} * side))]);
  numbers.delete({UNREADABLE});
  return numbers.size === 1 ? [...numbers][0] : {UNREADABLE};
}}
"""
"""JavaScript: a function of a canvas that shows the whole picture, returning its number; -1 for none."""


def stamp(rgb: UInt8Array, number: int) -> UInt8Array:
    """Write a number onto a copy of a picture.

    Args:
        rgb: uint8 [H, W, 3], H at least 180, W at least H.
        number: 0 to 1023.
    """
    assert 0 <= number <= LARGEST_NUMBER
    height, width = rgb.shape[:2]
    edges = [round(cell * height * CELL_SHARE) for cell in range(BITS + 1)]
    stamped = rgb.copy()
    for left in (0, width - edges[-1]):
        for bit in range(BITS):
            columns = slice(left + edges[bit], left + edges[bit + 1])
            value = 255 * (number >> bit & 1)
            stamped[: edges[1], columns] = value
            stamped[edges[1] : edges[2], columns] = 255 - value
    return stamped
