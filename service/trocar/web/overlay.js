/**
 * What is drawn over the picture. Every mark is light on dark, so that one of the two stands out on wet
 * highlights, red tissue and grey steel alike. State is told by line style and by words, never by colour alone.
 */

import { decodeMask, findLabelPlace, traceOutline } from "./masks.js";

const TINT = 0.26;
const UNTRUSTED_ALPHA = 0.4;
/** Below this certainty the label says "unsure". */
export const DOUBT = 0.6;
const PLATE = "rgba(8, 11, 15, 0.86)";
const TEXT = "#edf2f6";
const FONT = '650 {}px system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';

/**
 * Decode a result's masks once: `patch`, `outline` and `labelPlace` of each object that is seen.
 * @param {any} result header of the gateway's message
 * @param {Uint8Array} blob masks one after another
 */
export function readResult(result, blob) {
  let at = 0;
  for (const object of result.objects) {
    readObject(object, blob.subarray(at, at + object.mask.bytes));
    at += object.mask.bytes;
  }
  return result;
}

/** The same for one object. */
export function readObject(object, data) {
  object.mask.data = data;
  if (object.box === null || data.length === 0) return object;
  object.patch = decodeMask(data, object.mask, object.box);
  object.outline = traceOutline(object.patch, object.mask.width);
  object.labelPlace = findLabelPlace(object.patch, object.mask);
  return object;
}

/**
 * @param {CanvasRenderingContext2D} context of a canvas that shows the whole picture
 * @param {{result: any | null, width: number, height: number}} shown the picture's size and its own result
 * @param {Map<number, any>} objects what the page knows of each
 * @param {{selected: number | null, now: number, isSmall: boolean}} look
 */
export function drawOverlay(context, shown, objects, look) {
  const { result, width } = shown;
  if (result === null) return;
  const scale = context.canvas.width / width;
  // About 1/28 of the picture's height: legible at 2 m on any screen that fills a field of view.
  const size = Math.max(15, Math.round(context.canvas.height / 26));
  const tracked = result.objects.filter((one) => objects.has(one.id) && !objects.get(one.id).isHidden);
  context.save();
  context.globalAlpha = result.trusted ? 1 : UNTRUSTED_ALPHA;
  for (const one of tracked) drawShape(context, one, objects.get(one.id), scale, size, look);
  context.globalAlpha = 1;
  if (!look.isSmall) {
    const taken = [];
    for (const one of tracked) drawLabel(context, one, objects.get(one.id), result, scale, size, taken, look);
  }
  context.restore();
}

function drawShape(context, one, object, scale, size, look) {
  const isSelected = look.selected === one.id;
  const line = Math.max(2, size / 7) * (isSelected ? 1.5 : 1);
  context.save();
  context.lineJoin = context.lineCap = "round";
  if (one.outline) {
    context.scale(scale, scale);
    const alpha = context.globalAlpha;
    context.globalAlpha = alpha * TINT;
    context.fillStyle = object.color;
    context.fill(one.outline, "evenodd");
    context.globalAlpha = alpha;
    strokeTwice(context, one.outline, object.color, line / scale);
  } else if (object.lastBox) {
    // Where it was, not where it is: its box, never its shape.
    const [left, top, right, bottom] = object.lastBox.map((edge) => edge * scale);
    const path = new Path2D();
    path.roundRect(left, top, right - left, bottom - top, size / 2);
    context.setLineDash(one.state === "lost" ? [1, line * 4] : [line * 5, line * 4]);
    strokeTwice(context, path, object.color, line);
  }
  context.restore();
}

function strokeTwice(context, path, color, line) {
  context.strokeStyle = "rgba(0, 0, 0, 0.85)";
  context.lineWidth = line * 2;
  context.stroke(path);
  context.strokeStyle = color;
  context.lineWidth = line;
  context.stroke(path);
}

/** Text of a label: number, name, and what can be trusted. */
export function describe(one, object, isTrusted, now) {
  const name = `${one.id} ${object.name || className(one)}`.trim();
  if (one.state !== "visible") {
    const seconds = object.seenMs === null ? "" : ` ${Math.max(0, (now - object.seenMs) / 1000).toFixed(0)} s`;
    return `${name} · ${one.state === "lost" ? "lost" : "hidden"}${seconds}`;
  }
  const percent = `${Math.round(one.score * 100)}%`;
  if (!isTrusted) return `${name} · not trusted`;
  return one.score < DOUBT ? `${name} · unsure ${percent}` : `${name} · ${percent}`;
}

export function className(one) {
  return one.class === "unknown" ? "" : one.class.replaceAll("_", " ");
}

function drawLabel(context, one, object, result, scale, size, taken, look) {
  const box = object.lastBox;
  if (!one.outline && !box) return;
  const place = one.outline ? one.labelPlace : { x: (box[0] + box[2]) / 2, y: box[1], isEntry: false };
  const text = describe(one, object, result.trusted, look.now);
  context.font = FONT.replace("{}", size);
  const padding = Math.round(size * 0.38);
  const width = Math.ceil(context.measureText(text).width) + 3 * padding;
  const height = Math.round(size * 1.5);
  const { width: right, height: bottom } = context.canvas;
  const left = clamp(place.x * scale - width / 2, 0, right - width);
  const above = place.isEntry ? height / 2 : height + size / 2;
  let top = clamp(place.y * scale - above, 0, bottom - height);
  // Two labels never cover each other: the later one moves up.
  for (const other of taken) {
    const overlaps = left < other.left + other.width && other.left < left + width;
    if (overlaps && top < other.top + height && other.top < top + height) top = other.top - height - 2;
  }
  taken.push({ left, top, width });
  context.fillStyle = PLATE;
  context.beginPath();
  context.roundRect(left, top, width, height, size / 4);
  context.fill();
  context.fillStyle = object.color;
  context.fillRect(left, top, padding, height);
  context.fillStyle = TEXT;
  context.textBaseline = "middle";
  context.fillText(text, left + 2 * padding, top + height / 2 + 1);
}

/** A box that is being drawn, or the keyboard's cross; in canvas pixels. */
export function drawHands(context, { box, cross }) {
  const path = new Path2D();
  if (box) path.rect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  if (cross) {
    const [x, y] = cross;
    for (const [from, to] of [[8, 34], [-34, -8]]) {
      path.moveTo(x + from, y);
      path.lineTo(x + to, y);
      path.moveTo(x, y + from);
      path.lineTo(x, y + to);
    }
  }
  strokeTwice(context, path, "#ffffff", 3);
}

function clamp(value, least, most) {
  return Math.max(least, Math.min(value, most));
}
