/** Pictures of this machine's camera or file, coded for the gateway. */

import { MOST_UNSENT_BYTES } from "./wire.js";

const KEYFRAME_EVERY = 30;
const BITS_PER_PIXEL = 0.15;
const ASSUMED_RATE = 30;
const JPEG_QUALITY = 0.8;
/** Sent and not answered: more only wait, and come too late. */
const MOST_UNANSWERED = 8;
/** After so long nobody answers any more. */
const FORGET_MS = 2000;
const MOST_ENCODING = 2;
/** How long a file may take until it shows that it is a video. */
const OPEN_TIMEOUT_MS = 8000;

/** Something that a person can act on; its message is shown as it is. */
export class SourceFailure extends Error {}

/** @returns {Promise<boolean>} whether this browser codes H.264 as the server wants it */
export async function canEncode() {
  if (typeof VideoEncoder === "undefined") return false;
  const supported = await VideoEncoder.isConfigSupported(makeConfig(1280, 720)).catch(() => null);
  return Boolean(supported?.supported);
}

/** @returns {Promise<boolean>} whether it decodes what the gateway's sources send */
export async function canDecode() {
  if (typeof VideoDecoder === "undefined") return false;
  const supported = await VideoDecoder.isConfigSupported({ codec: "avc1.42E01F" }).catch(() => null);
  return Boolean(supported?.supported);
}

/** @returns {Promise<HTMLVideoElement>} playing */
export async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new SourceFailure("This browser gives a page its camera over https only: open the https address of trocar ui (--self-signed).");
  }
  const wanted = { width: { ideal: 1280 }, height: { ideal: 720 }, frameRate: { ideal: 30 } };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
  } catch (error) {
    throw new SourceFailure(describeCameraError(error));
  }
  const video = document.createElement("video");
  video.srcObject = stream;
  return play(video, "The camera gives no picture: unplug it, plug it in, and choose it again.");
}

function describeCameraError(error) {
  switch (error.name) {
    case "NotAllowedError":
      return "The browser may not use the camera: allow it in the address bar, then choose the camera again.";
    case "NotFoundError":
      return "There is no camera or capture card: plug one in, then choose it again.";
    case "NotReadableError":
      return "The camera is in use by another program: close that, then choose the camera again.";
    default:
      return `The camera does not open (${error.name}): plug it in again, then choose it again.`;
  }
}

/** @returns {Promise<HTMLVideoElement>} playing */
export function openFile(file) {
  const video = document.createElement("video");
  video.src = URL.createObjectURL(file);
  return play(
    video,
    `${file.name} is no video that this browser plays: choose an MP4 with H.264, or start trocar ui with --source FILE.`,
  );
}

async function play(video, failure) {
  video.muted = true;
  video.playsInline = true;
  const opened = new Promise((resolve, reject) => {
    const fail = () => reject(new SourceFailure(failure));
    video.onerror = fail;
    video.onloadeddata = () => (video.videoWidth ? resolve() : fail());
    setTimeout(fail, OPEN_TIMEOUT_MS);
  });
  try {
    await opened;
    await video.play();
  } catch (error) {
    release(video);
    throw error instanceof SourceFailure ? error : new SourceFailure(failure);
  }
  video.onerror = null;
  return video;
}

export function release(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  if (video.src) URL.revokeObjectURL(video.src);
  video.removeAttribute("src");
  video.srcObject = null;
}

function makeConfig(width, height) {
  const blocks = Math.ceil(width / 16) * Math.ceil(height / 16);
  // Constrained baseline has no B-frames. Levels 3.1, 4.0 and 5.1 by macroblocks (ITU-T H.264, table A-1).
  const level = blocks <= 3600 ? "1F" : blocks <= 8192 ? "28" : "33";
  return {
    codec: `avc1.42E0${level}`,
    width,
    height,
    bitrate: Math.round(width * height * ASSUMED_RATE * BITS_PER_PIXEL),
    framerate: ASSUMED_RATE,
    latencyMode: "realtime",
    avc: { format: "annexb" },
  };
}

/** Takes the pictures of a playing video one by one, shows them, and sends them while a server listens. */
export class Feed {
  #encoder = null;
  #size = "";
  #unanswered = new Map();
  #isStopped = false;
  #wantsKeyframe = true;
  #sinceKeyframe = 0;
  #lastPts = -1;
  #pts = new Map();
  #unsent = 0;
  #isBusy = false;
  /** A server takes frames. */
  isLive = false;
  /** Pictures that were not sent since coding or network could not follow. */
  skipped = 0;

  /**
   * @param {HTMLVideoElement} video
   * @param {{codec: string, firstFrame: number, line: import("./wire.js").Line,
   *   onFrame: (frame: import("./presenter.js").Frame) => void, onEnd: (message: string) => void}} options
   */
  constructor(video, options) {
    this.video = video;
    this.options = options;
    this.nextId = options.firstFrame;
    this.video.onended = () => options.onEnd("The file has ended.");
    for (const track of video.srcObject?.getTracks() ?? []) {
      track.onended = () => options.onEnd("The camera was unplugged: plug it in, then choose it again.");
    }
    this.#await();
  }

  /** The video plays on, for another feed. */
  stop() {
    this.#isStopped = true;
    this.video.onended = null;
    if (this.#encoder?.state === "configured") this.#encoder.close();
  }

  requestKeyframe() {
    this.#wantsKeyframe = true;
  }

  /** The server accounted for these frames. */
  settle(ids) {
    for (const id of ids) this.#unanswered.delete(id);
  }

  /** A server took over; nobody answers what the one before was sent. */
  restart() {
    this.#unanswered.clear();
    this.#wantsKeyframe = true;
  }

  #await() {
    this.video.requestVideoFrameCallback((now, metadata) => {
      if (this.#isStopped) return;
      this.#take(metadata.captureTime ?? performance.now());
      this.#await();
    });
  }

  #take(capturedMs) {
    const arrivedMs = performance.now();
    const { videoWidth: width, videoHeight: height } = this.video;
    if (!width) return;
    const canSend = this.isLive && this.#hasRoom();
    if (this.isLive && !canSend) this.skipped += 1;
    // A picture that does not go out takes a place between two numbers: it can be shown, never be answered.
    this.#unsent = canSend ? 0 : this.#unsent + 1;
    const id = canSend ? this.nextId++ : this.nextId - 1 / (1 + this.#unsent);
    const picture = grab(this.video, id);
    if (canSend) {
      this.#unanswered.set(id, arrivedMs);
      this.#send(picture, id, width, height, arrivedMs);
    }
    this.options.onFrame({ id, picture, width, height, arrivedMs, capturedMs, isSent: canSend });
  }

  #hasRoom() {
    if (this.options.line.unsentBytes > MOST_UNSENT_BYTES || this.#isBusy) return false;
    const [[oldest, sentMs] = []] = this.#unanswered;
    if (performance.now() - sentMs > FORGET_MS) this.#unanswered.delete(oldest);
    if (this.#unanswered.size >= MOST_UNANSWERED) return false;
    return !this.#encoder || this.#encoder.encodeQueueSize < MOST_ENCODING;
  }

  #send(picture, id, width, height, arrivedMs) {
    const pts = Math.max(this.#lastPts + 1, Math.round(arrivedMs));
    this.#lastPts = pts;
    if (this.options.codec === "jpeg") this.#sendJpeg(id, pts, width, height);
    else this.#encode(picture, id, pts, width, height);
  }

  #encode(picture, id, pts, width, height) {
    if (this.#size !== `${width}x${height}`) this.#openEncoder(width, height);
    const keyFrame = this.#wantsKeyframe || this.#sinceKeyframe >= KEYFRAME_EVERY;
    this.#wantsKeyframe = false;
    this.#sinceKeyframe = keyFrame ? 1 : this.#sinceKeyframe + 1;
    this.#pts.set(id * 1000, { id, pts });
    this.#encoder.encode(picture, { keyFrame });
  }

  #openEncoder(width, height) {
    if (this.#encoder?.state === "configured") this.#encoder.close();
    this.#size = `${width}x${height}`;
    this.#wantsKeyframe = true;
    this.#encoder = new VideoEncoder({
      output: (chunk) => {
        const { id, pts } = this.#pts.get(chunk.timestamp);
        this.#pts.delete(chunk.timestamp);
        const data = new Uint8Array(chunk.byteLength);
        chunk.copyTo(data);
        this.options.line.send({ type: "frame", id, pts, key: chunk.type === "key" }, data);
      },
      error: (error) => this.options.onEnd(`This browser cannot code ${width}x${height} pictures (${error.message}): choose a smaller one.`),
    });
    // H.264 codes pairs of rows and columns; the odd one at the edge is cut off.
    this.#encoder.configure(makeConfig(width - (width % 2), height - (height % 2)));
  }

  async #sendJpeg(id, pts, width, height) {
    this.#isBusy = true;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").drawImage(this.video, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: JPEG_QUALITY });
    const data = new Uint8Array(await blob.arrayBuffer());
    this.#isBusy = false;
    this.options.line.send({ type: "frame", id, pts, key: true }, data);
  }
}

/** The video's present picture; the timestamp tells the coder which one it is. */
function grab(video, id) {
  if (typeof VideoFrame !== "undefined") return new VideoFrame(video, { timestamp: Math.round(id * 1000) });
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  return canvas.transferToImageBitmap();
}
