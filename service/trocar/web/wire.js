/** Envelopes between the page and its gateway, and the line that carries them. See envelope.py. */

const RETRY_MS = 700;
const PING_MS = 2000;
/** More than that unsent means that the network is too slow for the picture. */
export const MOST_UNSENT_BYTES = 400_000;

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/**
 * Write an envelope.
 * @param {object} header
 * @param {Uint8Array} [blob]
 * @returns {Uint8Array}
 */
export function pack(header, blob = new Uint8Array()) {
  const text = encoder.encode(JSON.stringify(header));
  const envelope = new Uint8Array(4 + text.length + blob.length);
  new DataView(envelope.buffer).setUint32(0, text.length, true);
  envelope.set(text, 4);
  envelope.set(blob, 4 + text.length);
  return envelope;
}

/**
 * Read an envelope; the blob shares its memory.
 * @param {ArrayBuffer} buffer
 * @returns {{header: any, blob: Uint8Array}}
 */
export function unpack(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, size)));
  return { header, blob: new Uint8Array(buffer, 4 + size) };
}

/** A WebSocket that comes back by itself, and knows how far the gateway's clock is from ours. */
export class Line {
  #socket = null;
  #shortestTrip = Infinity;
  /** Closed on purpose, until `retry`. */
  isClosed = false;
  /** Add to the gateway's milliseconds to get ours; exact to half of the shortest round trip. */
  clockOffsetMs = 0;

  /**
   * @param {object} hello first message of every connection
   * @param {{onMessage: (header: any, blob: Uint8Array) => void, onDown: () => void}} hooks
   */
  constructor(hello, hooks) {
    this.hello = hello;
    this.hooks = hooks;
    this.#connect({});
    setInterval(() => this.send({ type: "ping", t: performance.now() }), PING_MS);
  }

  get isUp() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  get unsentBytes() {
    return this.#socket?.bufferedAmount ?? 0;
  }

  /** @returns {boolean} whether it went out */
  send(header, blob) {
    if (!this.isUp) return false;
    this.#socket.send(pack(header, blob));
    return true;
  }

  /** Stay away until `retry`: another tab has the gateway. */
  close() {
    this.isClosed = true;
    this.#socket?.close();
  }

  /** Connect again, with more in the hello, such as `takeover`. */
  retry(more = {}) {
    this.isClosed = false;
    this.#connect(more);
  }

  #connect(more) {
    const address = new URL("/gateway", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      socket.send(pack({ type: "hello", ...this.hello, ...more }));
      this.#shortestTrip = Infinity;
      for (let i = 0; i < 3; i++) this.send({ type: "ping", t: performance.now() });
    };
    socket.onmessage = (event) => this.#take(event.data);
    socket.onclose = () => {
      if (socket !== this.#socket) return;
      this.hooks.onDown();
      if (!this.isClosed) setTimeout(() => this.isClosed || this.#connect({}), RETRY_MS);
    };
    this.#socket = socket;
  }

  #take(data) {
    const { header, blob } = unpack(data);
    if (header.type !== "pong") {
      this.hooks.onMessage(header, blob);
      return;
    }
    const now = performance.now();
    if (now - header.t < this.#shortestTrip) {
      this.#shortestTrip = now - header.t;
      this.clockOffsetMs = (header.t + now) / 2 - header.now;
    }
  }
}
