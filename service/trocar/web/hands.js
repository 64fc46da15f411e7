/** Fingers, mouse and keyboard on the picture: taps and boxes, in the picture's own pixels. */

/** A gloved finger trembles: less than this is a tap, CSS pixels. */
const DRAG_PX = 14;
/** One step of the keyboard's cross, share of the picture's width. */
const STRIDE = 0.03;
const FINE_STRIDE = 0.005;

export class Hands {
  #from = null;
  #box = null;
  #cross = null;
  #shownAtDown = null;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{shown: () => any, onTap: (shown: any, x: number, y: number, atMs: number) => void,
   *   onBox: (shown: any, box: number[], atMs: number) => void, onChange: () => void}} hooks `shown` is the
   *   picture on the screen, with its `id`, `width` and `height`
   */
  constructor(canvas, hooks) {
    this.canvas = canvas;
    this.hooks = hooks;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", () => this.#end());
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("blur", () => this.#setCross(null));
  }

  /** What to draw, in canvas pixels; null for nothing. */
  get marks() {
    return this.#box || this.#cross ? { box: this.#box, cross: this.#cross } : null;
  }

  #place(event) {
    const area = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / area.width;
    return [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
  }

  #down(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#from = { client: [event.clientX, event.clientY], place: this.#place(event) };
    // The picture that the finger was aimed at; a newer one is shown when it lifts.
    this.#shownAtDown = this.hooks.shown();
    this.#setCross(null);
  }

  #move(event) {
    if (this.#from === null || !event.isPrimary) return;
    const [x, y] = this.#from.client;
    const isDrag = Math.hypot(event.clientX - x, event.clientY - y) >= DRAG_PX;
    if (!isDrag && this.#box === null) return;
    const [fromX, fromY] = this.#from.place;
    const [toX, toY] = this.#place(event);
    this.#box = [Math.min(fromX, toX), Math.min(fromY, toY), Math.max(fromX, toX), Math.max(fromY, toY)];
    this.hooks.onChange();
  }

  #up(event) {
    if (this.#from === null || !event.isPrimary) return;
    const shown = this.#shownAtDown;
    const [x, y] = this.#from.place;
    const box = this.#box;
    this.#end();
    if (!shown) return;
    if (box === null) this.hooks.onTap(shown, ...this.#toSource(shown, x, y), event.timeStamp);
    else this.#finishBox(shown, box, event.timeStamp);
  }

  #finishBox(shown, box, atMs) {
    const [left, top] = this.#toSource(shown, box[0], box[1]);
    const [right, bottom] = this.#toSource(shown, box[2], box[3]);
    if (right - left >= 2 && bottom - top >= 2) this.hooks.onBox(shown, [left, top, right, bottom], atMs);
  }

  #end() {
    this.#from = this.#box = this.#shownAtDown = null;
    this.hooks.onChange();
  }

  #toSource(shown, x, y) {
    const scale = shown.width / this.canvas.width;
    const most = (value, edge) => Math.max(0, Math.min(value, edge - 0.01));
    return [most(x * scale, shown.width), most(y * scale, shown.height)];
  }

  #press(event) {
    const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const direction = directions[event.key];
    const { width, height } = this.canvas;
    if (direction) {
      const stride = (event.shiftKey ? FINE_STRIDE : STRIDE) * width;
      const [x, y] = this.#cross ?? [width / 2, height / 2];
      const clamp = (value, most) => Math.max(0, Math.min(value, most - 1));
      this.#setCross([clamp(x + direction[0] * stride, width), clamp(y + direction[1] * stride, height)]);
    } else if (event.key === "Enter") {
      if (event.repeat) return;
      const shown = this.hooks.shown();
      if (this.#cross === null) this.#setCross([width / 2, height / 2]);
      else if (shown) this.hooks.onTap(shown, ...this.#toSource(shown, ...this.#cross), event.timeStamp);
    } else return;
    event.preventDefault();
  }

  #setCross(cross) {
    if (this.#cross === cross) return;
    this.#cross = cross;
    this.hooks.onChange();
  }
}
