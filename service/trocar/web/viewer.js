/** Pictures that the gateway sends: H.264 through WebCodecs, or JPEG. */

const MOST_DECODING = 24;

export class Viewer {
  #decoder = null;
  #awaitsKeyframe = true;
  #facts = new Map();
  /** Packets that gave no picture. */
  failures = 0;

  /**
   * @param {{codec: string, onFrame: (frame: import("./presenter.js").Frame) => void}} options
   */
  constructor(options) {
    this.options = options;
  }

  stop() {
    if (this.#decoder?.state === "configured") this.#decoder.close();
    this.#decoder = null;
  }

  /** @param {{id: number, key: boolean, capturedMs: number}} facts */
  take(facts, payload) {
    facts.arrivedMs = performance.now();
    if (this.options.codec === "jpeg") this.#takeJpeg(facts, payload);
    else this.#takePacket(facts, payload);
  }

  async #takeJpeg(facts, payload) {
    const picture = await createImageBitmap(new Blob([payload], { type: "image/jpeg" })).catch(() => null);
    if (picture === null) this.failures += 1;
    else this.#hand(facts, picture, picture.width, picture.height);
  }

  #takePacket(facts, payload) {
    if (this.#awaitsKeyframe && !facts.key) return;
    if (this.#decoder === null) {
      const codec = findCodec(payload);
      if (codec === null) return;
      this.#open(codec);
    }
    if (this.#decoder.decodeQueueSize > MOST_DECODING && !facts.key) {
      this.#awaitsKeyframe = true;
      return;
    }
    this.#awaitsKeyframe = false;
    this.#facts.set(facts.id * 1000, facts);
    this.#decoder.decode(
      new EncodedVideoChunk({ type: facts.key ? "key" : "delta", timestamp: facts.id * 1000, data: payload }),
    );
  }

  #open(codec) {
    this.#decoder = new VideoDecoder({
      output: (picture) => {
        const facts = this.#facts.get(picture.timestamp);
        this.#facts.delete(picture.timestamp);
        this.#hand(facts, picture, picture.displayWidth, picture.displayHeight);
      },
      error: () => {
        // The decoder is gone: a new one begins with the next keyframe.
        this.failures += 1;
        this.#facts.clear();
        this.#decoder = null;
        this.#awaitsKeyframe = true;
      },
    });
    this.#decoder.configure({ codec, optimizeForLatency: true });
  }

  #hand(facts, picture, width, height) {
    const { id, arrivedMs, capturedMs } = facts;
    this.options.onFrame({ id, picture, width, height, arrivedMs, capturedMs, isSent: true });
  }
}

/** The codec's name from the sequence parameter set (ITU-T H.264, 7.3.2.1), which begins a keyframe. */
function findCodec(payload) {
  for (let i = 0; i + 6 < payload.length; i++) {
    const isStart = payload[i] === 0 && payload[i + 1] === 0 && payload[i + 2] === 1;
    if (!isStart || (payload[i + 3] & 0x1f) !== 7) continue;
    const octets = [...payload.subarray(i + 4, i + 7)];
    return `avc1.${octets.map((octet) => octet.toString(16).padStart(2, "0")).join("")}`;
  }
  return null;
}
