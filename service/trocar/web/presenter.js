/**
 * Which picture to show, and whether with an overlay: the one rule of this page.
 *
 * A picture waits for its own result, for at most as long as the gateway says (150 ms). A result that comes later is never drawn: the
 * picture goes on without overlay. While results keep coming too late, or there is no server, pictures do not
 * wait at all. What is shown only ever moves forward.
 */

/** Pictures that wait; a page in the background would pile them up. */
const MOST_WAITING = 16;
/** Results in a row that come too late before pictures stop waiting, and in time before they wait again. */
const LATE_IN_A_ROW = 4;
const TIMELY_IN_A_ROW = 5;
const REMEMBERED = 180;

/**
 * @typedef {object} Frame
 * @property {number} id
 * @property {CanvasImageSource & {close(): void}} picture
 * @property {number} width source pixels
 * @property {number} height source pixels
 * @property {number} arrivedMs when this page had the picture, performance.now()
 * @property {number} capturedMs when it was taken or due
 * @property {boolean} isSent whether a result can come
 */

export class Presenter {
  #waiting = [];
  #results = new Map();
  #arrivals = new Map();
  #late = 0;
  #timely = 0;
  #lastShownId = -1;
  #isTracking = false;
  /** Results keep coming too late. */
  isBehind = false;
  /** How old the last result was when it came, ms. */
  resultAgeMs = 0;
  /** Pictures that were shown without overlay although they were sent. */
  lateFrames = 0;

  /** How long a picture waits, ms. */
  holdMs = 150;

  /** @param {(frame: Frame, result: object | null) => void} onShow takes over the frame, and closes it */
  constructor(onShow) {
    this.onShow = onShow;
  }

  /** Whether results can come at all. */
  set isTracking(isTracking) {
    this.#isTracking = isTracking;
    if (!isTracking) this.#late = this.#timely = 0;
    this.isBehind = false;
  }

  get isTracking() {
    return this.#isTracking;
  }

  /** Begin anew, with another source. */
  reset() {
    for (const frame of this.#waiting) frame.picture.close();
    this.#waiting = [];
    this.#results.clear();
    this.#arrivals.clear();
    this.#lastShownId = -1;
    this.isBehind = false;
    this.#late = this.#timely = this.lateFrames = 0;
  }

  /** @param {Frame} frame */
  offer(frame) {
    if (frame.id <= this.#lastShownId) {
      frame.picture.close();
      return;
    }
    // One that never went out only fills in while there is no overlay anyway.
    if (!frame.isSent && this.#waitMs > 0) {
      frame.picture.close();
      return;
    }
    this.#arrivals.set(frame.id, frame.arrivedMs);
    if (this.#arrivals.size > REMEMBERED) this.#arrivals.delete(this.#arrivals.keys().next().value);
    this.#waiting.push(frame);
    while (this.#waiting.length > MOST_WAITING) this.#waiting.shift().picture.close();
  }

  /** Take a result; one for a picture that was shown already only tells how late the server is. */
  settle(result, now) {
    const arrived = this.#arrivals.get(result.id);
    if (arrived !== undefined) this.#judge(now - arrived);
    if (result.id <= this.#lastShownId) return;
    this.#results.set(result.id, result);
    while (this.#results.size > REMEMBERED) this.#results.delete(this.#results.keys().next().value);
  }

  /** Show what is due; call it before every repaint. */
  tick(now) {
    const wait = this.#waitMs;
    let chosen = null;
    for (const frame of this.#waiting) {
      const age = now - frame.arrivedMs;
      const hasResult = this.#isTracking && age <= this.holdMs && this.#results.has(frame.id);
      if (hasResult || age >= wait) chosen = frame;
    }
    if (chosen === null) return;
    this.#waiting = this.#waiting.filter((frame) => {
      if (frame.id < chosen.id) frame.picture.close();
      return frame.id > chosen.id;
    });
    this.#show(chosen, now);
  }

  get #waitMs() {
    return this.#isTracking && !this.isBehind ? this.holdMs : 0;
  }

  #show(frame, now) {
    const isInTime = this.#isTracking && !this.isBehind && now - frame.arrivedMs <= this.holdMs;
    const result = (isInTime && this.#results.get(frame.id)) || null;
    if (result === null && frame.isSent && this.#isTracking) {
      this.lateFrames += 1;
      // A server that says nothing at all is late, too. While nothing waits, only results can tell.
      if (!this.isBehind && !this.#results.size) this.#judge(Infinity);
    }
    this.#lastShownId = frame.id;
    for (const id of this.#results.keys()) if (id <= frame.id) this.#results.delete(id);
    this.onShow(frame, result);
  }

  #judge(age) {
    if (Number.isFinite(age)) this.resultAgeMs = age;
    if (age > this.holdMs) {
      this.#timely = 0;
      if (++this.#late >= LATE_IN_A_ROW) this.isBehind = true;
    } else {
      this.#late = 0;
      if (++this.#timely >= TIMELY_IN_A_ROW) this.isBehind = false;
    }
  }
}
