/** Masks from the wire to outlines. Coding: trocar.v1, MaskEncoding. */

/** Every so many edge steps one corner of the drawn outline. */
const STEP = 6;
/**
 * Share of the picture's width over which a corner is averaged, to either side. The network sees cells of 1/64
 * of the width, so that a straight shaft comes out wavy; this takes most of the waves out and rounds tips by a
 * few pixels. What is counted, recorded and taken away is the mask itself.
 */
const SMOOTH_SHARE = 1 / 100;
/** An object so near to the edge of the picture, share of its width, comes in there. */
const ENTRY_SHARE = 0.02;

/**
 * Pixels of a mask inside its box.
 * @param {Uint8Array} data coded pixels
 * @param {{width: number, height: number, encoding: string}} mask
 * @param {number[]} box x_min, y_min, x_max, y_max in mask pixels, whole numbers
 * @returns {{left: number, top: number, width: number, height: number, pixels: Uint8Array}}
 */
export function decodeMask(data, mask, box) {
  const left = Math.max(0, Math.floor(box[0]));
  const top = Math.max(0, Math.floor(box[1]));
  const width = Math.min(mask.width, Math.ceil(box[2])) - left;
  const height = Math.min(mask.height, Math.ceil(box[3])) - top;
  const patch = { left, top, width, height, pixels: new Uint8Array(width * height) };
  if (mask.encoding === "packed_bits") unpackBits(data, mask.width, patch);
  else unpackRuns(data, mask.width, patch);
  return patch;
}

function unpackRuns(data, maskWidth, patch) {
  let position = 0;
  let isObject = false;
  for (let at = 0; at < data.length; ) {
    let run = 0;
    let factor = 1;
    let octet;
    do {
      octet = data[at++];
      run += (octet & 0x7f) * factor;
      factor *= 128;
    } while (octet & 0x80 && at < data.length);
    if (isObject) fillRun(position, position + run, maskWidth, patch);
    position += run;
    isObject = !isObject;
  }
}

function fillRun(start, end, maskWidth, patch) {
  for (let y = Math.floor(start / maskWidth); y * maskWidth < end; y++) {
    const row = y - patch.top;
    if (row < 0 || row >= patch.height) continue;
    const from = Math.max(0, start - y * maskWidth - patch.left);
    const to = Math.min(patch.width, end - y * maskWidth - patch.left);
    if (to > from) patch.pixels.fill(1, row * patch.width + from, row * patch.width + to);
  }
}

function unpackBits(data, maskWidth, patch) {
  for (let y = 0; y < patch.height; y++) {
    for (let x = 0; x < patch.width; x++) {
      const bit = (y + patch.top) * maskWidth + x + patch.left;
      patch.pixels[y * patch.width + x] = (data[bit >> 3] >> (7 - (bit & 7))) & 1;
    }
  }
}

/**
 * Whether a mask has a pixel near a place.
 * @param {{left: number, top: number, width: number, height: number, pixels: Uint8Array}} patch
 * @param {number} reach how near, mask pixels
 */
export function isNear(patch, x, y, reach) {
  const fromX = Math.max(0, Math.floor(x - reach) - patch.left);
  const toX = Math.min(patch.width - 1, Math.floor(x + reach) - patch.left);
  const fromY = Math.max(0, Math.floor(y - reach) - patch.top);
  const toY = Math.min(patch.height - 1, Math.floor(y + reach) - patch.top);
  for (let row = fromY; row <= toY; row++) {
    for (let column = fromX; column <= toX; column++) {
      if (patch.pixels[row * patch.width + column]) return true;
    }
  }
  return false;
}

/**
 * Closed outlines around the pixels of a mask and around its holes, in mask pixels; `maskWidth` of the whole.
 * @returns {Path2D}
 */
export function traceOutline(patch, maskWidth) {
  const path = new Path2D();
  const reach = Math.round(maskWidth * SMOOTH_SHARE);
  for (const corners of traceCorners(patch)) addSmoothed(path, corners, reach);
  return path;
}

/**
 * Where a label disturbs least: where an instrument comes into the picture, far from its tip; over the highest
 * place of what touches no edge of the picture.
 * @param {{width: number, height: number}} mask the whole one
 * @returns {{x: number, y: number, isEntry: boolean}}
 */
export function findLabelPlace(patch, mask) {
  const { left, top, width, height } = patch;
  const right = left + width;
  const bottom = top + height;
  const edges = [
    { distance: mask.height - bottom, row: height - 1, y: bottom },
    { distance: left, column: 0, x: left },
    { distance: mask.width - right, column: width - 1, x: right },
    { distance: top, row: 0, y: top },
  ];
  const reach = mask.width * ENTRY_SHARE;
  const entry = edges.find((edge) => edge.distance <= reach) ?? edges[3];
  const isEntry = entry.distance <= reach;
  if (entry.row !== undefined) return { x: left + findMiddle(patch, entry.row * width, 1, width), y: entry.y, isEntry };
  return { x: entry.x, y: top + findMiddle(patch, entry.column, width, height), isEntry };
}

/** Middle of the first and last pixel of the object along a row or a column. */
function findMiddle({ pixels }, start, stride, count) {
  let first = -1;
  let last = 0;
  for (let i = 0; i < count; i++) {
    if (!pixels[start + i * stride]) continue;
    if (first < 0) first = i;
    last = i;
  }
  return (Math.max(0, first) + last + 1) / 2;
}

/**
 * Corners of unit steps along the edges between pixels, the object on the right hand.
 * @returns {number[][]} x, y, x, y, ... of each closed outline
 */
export function traceCorners({ left, top, width, height, pixels }) {
  const isIn = (x, y) => x >= 0 && y >= 0 && x < width && y < height && pixels[y * width + x] === 1;
  // Every outline runs east somewhere, above a pixel of the object: those steps mark what was traced.
  const isTraced = new Uint8Array(width * height);
  const outlines = [];
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      if (!isIn(column, row) || isIn(column, row - 1) || isTraced[row * width + column]) continue;
      const corners = [];
      let x = column;
      let y = row;
      let dx = 1;
      let dy = 0;
      do {
        if (dx === 1) isTraced[y * width + x] = 1;
        corners.push(x + left, y + top);
        x += dx;
        y += dy;
        // The two pixels ahead: on the left hand and on the right.
        const aheadX = x + (dx - 1) / 2;
        const aheadY = y + (dy - 1) / 2;
        if (isIn(aheadX + dy / 2, aheadY - dx / 2)) [dx, dy] = [dy, -dx];
        else if (!isIn(aheadX - dy / 2, aheadY + dx / 2)) [dx, dy] = [-dy, dx];
      } while (x !== column || y !== row || dx !== 1);
      outlines.push(corners);
    }
  }
  return outlines;
}

function addSmoothed(path, corners, most) {
  const count = corners.length / 2;
  // Of something small, no more than an eighth of the way round.
  const reach = Math.min(most, Math.floor(count / 16));
  const step = reach ? STEP : 1;
  for (let i = 0; i < count; i += step) {
    let x = 0;
    let y = 0;
    for (let j = i - reach; j <= i + reach; j++) {
      const k = ((j + count) % count) * 2;
      x += corners[k];
      y += corners[k + 1];
    }
    const size = 2 * reach + 1;
    if (i === 0) path.moveTo(x / size, y / size);
    else path.lineTo(x / size, y / size);
  }
  path.closePath();
}
