/** The surgeon's screen: joins line, sources, picture, objects and hands. */

import { Hands } from "./hands.js";
import { isNear } from "./masks.js";
import { Objects } from "./objects.js";
import { drawHands, drawOverlay, readObject, readResult } from "./overlay.js";
import { Presenter } from "./presenter.js";
import { canDecode, canEncode, Feed, openCamera, openFile, release, SourceFailure } from "./sources.js";
import { Viewer } from "./viewer.js";
import { Line, MOST_UNSENT_BYTES } from "./wire.js";

const NOTICE_MS = 6000;
/** Without a new picture for so long, nobody may take the old one for a live one. */
const STALE_MS = 1000;
const WATCH_MS = 250;
/** How near a tap must be to an object to mean it, CSS pixels. */
const TAP_REACH_PX = 8;
const RATE_WINDOW_MS = 2000;
const LARGEST_CANVAS_PX = 1920;

const byId = (id) => document.getElementById(id);
const canvas = byId("picture");
const context = canvas.getContext("2d", { alpha: false });
const inset = byId("inset");
const insetContext = inset.getContext("2d", { alpha: false });

/** What runs now; null while a source is being chosen. */
let show = null;
/** The picture on the screen with its own result; what is frozen stays here. */
let shown = null;
let isFrozen = false;
/** "correct", "negative" or null. */
let mode = null;
let wish = null;
let line = null;
let sources = [];
let sequence = 0;
const asked = new Map();
const firstMasks = new Map();
const shownAt = [];
const latencies = [];
let lastPictureMs = 0;
let firstMaskMs = null;
let noticeTimer = 0;
let needsRedraw = false;

const objects = new Objects(byId("list"), { onSelect: () => updateTools(), onNews: (text) => (byId("news").textContent = text) });
const presenter = new Presenter(present);
const hands = new Hands(canvas, { shown: () => shown, onTap: tap, onBox: drawBox, onChange: () => (needsRedraw = true) });

// --- the gateway's words ---------------------------------------------------------------------------------

const takers = {
  hello(header) {
    objects.colors = header.colors;
    presenter.holdMs = header.hold_ms;
    sources = header.sources;
    renderSources();
    byId("choose-title").textContent = "What should be tracked?";
    if (wish) start(wish, true);
    else if (document.body.dataset.state === "choose") tellTrouble("");
  },
  busy() {
    line.close();
    leave("This screen is open in another tab or on another device. Close it there, or take over.", takeOver);
  },
  taken() {
    line.close();
    leave("Another tab or device has taken over. Take it back only after asking there.", takeOver);
  },
  preparing(header) {
    const share = header.done / header.total;
    byId("progress").hidden = byId("preparing").hidden = false;
    byId("progress").value = share;
    byId("preparing").textContent = `Preparing the built-in operation, once: ${Math.round(share * 100)}%`;
  },
  ready: (header) => play(header),
  frame: (header, blob) => show?.viewer?.take({ id: header.id, key: header.key, capturedMs: header.due + line.clockOffsetMs }, blob),
  result(header, blob) {
    if (!show) return;
    show.feed?.settle([header.id, ...header.dropped]);
    show.dropped = header.dropped_total;
    presenter.settle(readResult(header, blob), performance.now());
  },
  accepted: (header, blob) => takeAccepted(header, blob),
  rejected: (header) => takeRejected(header),
  keyframe: () => show?.feed?.requestKeyframe(),
  warning(header) {
    if (!show || header.reason === "page") {
      notify(header.message);
      return;
    }
    // Damage shows in the picture itself: results are dimmed and named until the next keyframe. The rest is
    // for the quiet line.
    show.lost += header.lost.length;
    show.feed?.settle(header.lost);
  },
  link(header) {
    if (!show) return;
    show.link = header;
    presenter.isTracking = header.up;
    if (show.feed) {
      show.feed.isLive = header.up;
      show.feed.restart();
    }
    if (header.up) {
      notify("");
      return;
    }
    for (const [id] of firstMasks) firstMasks.delete(id);
    notify("No tracking server: live picture without overlay, trying again.", true);
  },
  ended(header) {
    finish(header.message);
  },
  failed(header) {
    leave(header.message);
  },
  recording: (header) => takeRecording(header),
};

function takeMessage(header, blob) {
  takers[header.type]?.(header, blob);
}

function loseLine() {
  presenter.isTracking = false;
  if (!show) return;
  show.link = null;
  if (show.feed) show.feed.isLive = false;
  setRecording(false);
  notify("The connection to the gateway is lost: live picture without overlay, trying again.", true);
}

// --- choosing and leaving a source -----------------------------------------------------------------------

const LOCAL_SOURCES = [
  { id: "page", kind: "webcam", label: "Camera or capture card" },
  { id: "page", kind: "upload", label: "Video file" },
];
const KINDS = {
  operation: "Synthetic: to see how it works",
  file: "File on the gateway",
  camera: "Network camera",
  webcam: "Plugged into this device",
  upload: "From this device",
};

function renderSources() {
  const list = byId("sources");
  list.replaceChildren();
  for (const source of [...sources, ...LOCAL_SOURCES]) {
    addChoice(list, source.label, KINDS[source.kind], () => choose(source));
  }
}

function addChoice(list, label, detail, onClick) {
  const button = document.createElement("button");
  button.type = "button";
  const name = document.createElement("b");
  name.textContent = label;
  const more = document.createElement("span");
  more.textContent = detail;
  button.append(name, more);
  button.addEventListener("click", onClick);
  const item = document.createElement("li");
  item.append(button);
  list.append(item);
  return button;
}

async function choose(source) {
  if (source.kind === "upload") {
    byId("file").click();
    return;
  }
  if (source.kind !== "webcam") {
    start({ ...source, video: null }, false);
    return;
  }
  setState("starting");
  await withVideo(source, openCamera());
}

async function withVideo(source, opening) {
  tellTrouble("");
  try {
    start({ ...source, video: await opening }, false);
  } catch (error) {
    if (!(error instanceof SourceFailure)) throw error;
    leave(error.message);
  }
}

/** Ask the gateway for a source; `wish` is what is asked again when the line comes back. */
async function start(source, isResumed) {
  wish = source;
  if (!isResumed) {
    objects.clear();
    setState("starting");
  }
  tellTrouble("");
  const codec = (await canEncode()) ? "h264" : "jpeg";
  const isSent = line.send({ type: "start", source: source.id, label: source.label, codec, resume: isResumed });
  if (!isSent) leave("The gateway does not answer: see whether trocar ui still runs.");
}

function play(ready) {
  if (!wish) return;
  stopShow();
  const onFrame = (frame) => {
    if (show && ready === show.ready) presenter.offer(frame);
    else frame.picture.close();
  };
  show = { ready, link: null, dropped: 0, lost: 0, feed: null, viewer: null, endedMessage: "" };
  if (wish.video) {
    show.feed = new Feed(wish.video, { codec: ready.codec, firstFrame: ready.first_frame, line, onFrame, onEnd: finish });
  } else {
    show.viewer = new Viewer({ codec: ready.codec, onFrame });
  }
  for (const id of ready.objects) objects.add(id);
  lastPictureMs = performance.now();
  setState("live");
  updateTools();
  canvas.focus({ preventScroll: true });
}

/** The source came to its end: its last picture stays, veiled. */
function finish(message) {
  if (!show) return;
  show.endedMessage = message;
  setRecording(false);
}

function stopShow() {
  show?.viewer?.stop();
  show?.feed?.stop();
  show = null;
  presenter.reset();
  presenter.isTracking = false;
  asked.clear();
  firstMasks.clear();
  unfreeze();
}

/** Back to the choice of sources, with a sentence that says why. */
function leave(reason = "", remedy = null) {
  stopShow();
  if (wish?.video) release(wish.video);
  wish = null;
  shown?.frame.picture.close();
  shown = null;
  // Not one picture of this source may be taken for one of the next.
  canvas.width = canvas.height = 0;
  byId("veil").hidden = true;
  objects.clear();
  notify("");
  line.send({ type: "stop" });
  setState("choose");
  tellTrouble(reason);
  renderSources();
  byId("choose-title").textContent = remedy ? "In use" : "What should be tracked?";
  if (remedy) {
    byId("sources").replaceChildren();
    addChoice(byId("sources"), "Take over", "The other screen stops", remedy);
  }
}

function takeOver() {
  line.retry({ takeover: true });
}

function setState(state) {
  document.body.dataset.state = state;
  byId("progress").hidden = byId("preparing").hidden = true;
  if (state === "starting") {
    byId("preparing").hidden = false;
    byId("preparing").textContent = "Opening the source";
  }
  // What lies under the choice is out of reach, for a keyboard too.
  document.querySelector("main").inert = state !== "live";
}

function tellTrouble(text) {
  byId("trouble").hidden = !text;
  byId("trouble").textContent = text;
}

// --- the picture -----------------------------------------------------------------------------------------

/** Takes over the frame that the presenter chose. */
function present(frame, result) {
  const now = performance.now();
  lastPictureMs = now;
  shownAt.push(now);
  while (shownAt[0] < now - RATE_WINDOW_MS) shownAt.shift();
  if (result) {
    latencies.push(now - frame.capturedMs);
    if (latencies.length > 60) latencies.shift();
    objects.note(result, now);
  }
  const next = { id: frame.id, frame, result, width: frame.width, height: frame.height };
  if (isFrozen) {
    drawInto(insetContext, next, true);
    frame.picture.close();
  } else {
    shown?.frame.picture.close();
    shown = next;
    redraw();
  }
  objects.render(result, now);
  reportFirstMasks(result, now);
  const detail = { frame: frame.id, overlay: result?.id ?? null, latencyMs: now - frame.capturedMs, objects: result?.objects.length ?? 0 };
  (isFrozen ? inset : canvas).dispatchEvent(new CustomEvent("trocar:shown", { detail, bubbles: true }));
}

function redraw() {
  needsRedraw = false;
  if (!shown) return;
  fitCanvas();
  drawInto(context, shown, false);
  if (hands.marks) drawHands(context, hands.marks);
}

/** Picture and overlay go onto one canvas in one go: no screen can show the one without the other. */
function drawInto(target, picture, isSmall) {
  target.drawImage(picture.frame.picture, 0, 0, target.canvas.width, target.canvas.height);
  drawOverlay(target, picture, objects.known, { selected: objects.selected, now: performance.now(), isSmall });
}

function fitCanvas() {
  const stage = byId("stage").getBoundingClientRect();
  const fit = Math.min(stage.width / shown.width, stage.height / shown.height);
  const [width, height] = [shown.width * fit, shown.height * fit];
  const density = Math.min(window.devicePixelRatio, Math.max(1, LARGEST_CANVAS_PX / width));
  const pixels = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width === pixels[0] && canvas.height === pixels[1]) return;
  [canvas.width, canvas.height] = pixels;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  inset.height = Math.round((inset.width * shown.height) / shown.width);
}

function reportFirstMasks(result, now) {
  for (const one of result?.objects ?? []) {
    if (!one.outline || !firstMasks.has(one.id)) continue;
    firstMaskMs = now - firstMasks.get(one.id);
    firstMasks.delete(one.id);
    canvas.dispatchEvent(new CustomEvent("trocar:first-mask", { detail: { object: one.id, ms: firstMaskMs }, bubbles: true }));
  }
}

function repaint() {
  if (show) presenter.tick(performance.now());
  if (needsRedraw) redraw();
  requestAnimationFrame(repaint);
}

function freeze() {
  if (isFrozen) {
    unfreeze();
    return;
  }
  if (!shown) return;
  isFrozen = true;
  inset.hidden = false;
  line.send({ type: "pin", frame: shown.id });
  updateTools();
}

function unfreeze() {
  isFrozen = false;
  inset.hidden = true;
  updateTools();
}

// --- prompts ---------------------------------------------------------------------------------------------

function tap(picture, x, y, atMs) {
  if (!canPrompt()) return;
  if (mode !== null && objects.selected !== null) {
    const label = mode === "correct" ? 1 : 0;
    promptObject(picture, objects.selected, { points: [[x, y, label]] }, atMs);
    return;
  }
  const hit = findObject(picture, x, y);
  if (hit !== null) objects.select(objects.selected === hit ? null : hit);
  else promptNew(picture, { points: [[x, y, 1]] }, atMs);
}

function drawBox(picture, box, atMs) {
  if (!canPrompt()) return;
  if (mode !== null && objects.selected !== null) {
    promptObject(picture, objects.selected, { box, mode: "replace" }, atMs);
  } else promptNew(picture, { box }, atMs);
}

function canPrompt() {
  if (show?.link?.up && !show.endedMessage) return true;
  notify(show?.endedMessage ? "The source has ended: choose one again." : "There is no tracking server now: tap again once tracking is back.");
  return false;
}

/** The topmost object near a place of a picture, source pixels; null for none. */
function findObject(picture, x, y) {
  const { result, width } = picture;
  const reach = (TAP_REACH_PX * width) / canvas.getBoundingClientRect().width;
  for (const one of [...(result?.objects ?? [])].reverse()) {
    const object = objects.known.get(one.id);
    if (one.patch && object && !object.isHidden && isNear(one.patch, x, y, reach)) return one.id;
  }
  return null;
}

function promptNew(picture, prompt, atMs) {
  const id = objects.takeId();
  if (id === null) {
    notify("There is no number left for another object: remove one first.");
    return;
  }
  objects.add(id);
  const step = { objectId: id, take: () => removeObject(id, false) };
  objects.push(step);
  firstMasks.set(id, atMs);
  ask(picture.id, id, prompt, { isNew: true, step });
  objects.select(id);
}

function promptObject(picture, id, prompt, atMs) {
  const before = picture.result?.objects.find((one) => one.id === id && one.outline);
  const step = before && {
    objectId: id,
    take: () => ask(picture.id, id, { maskOf: before, mode: "replace" }, {}),
  };
  if (step) objects.push(step);
  firstMasks.set(id, atMs);
  ask(picture.id, id, prompt, { step });
}

/** Send a prompt that was drawn on a frame. */
function ask(frame, object, prompt, purpose) {
  const { maskOf, ...fields } = prompt;
  const header = { type: "prompt", seq: ++sequence, frame, object, ...fields };
  if (maskOf) header.mask = { width: maskOf.mask.width, height: maskOf.mask.height, encoding: maskOf.mask.encoding };
  asked.set(sequence, purpose);
  line.send(header, maskOf?.mask.data);
  updateTools();
}

function takeAccepted(header, blob) {
  asked.delete(header.seq);
  objects.add(header.object.id);
  // Its own picture may still be on the screen, frozen or not yet followed by another.
  if (!shown || shown.id !== header.frame) return;
  const one = readObject(header.object, blob);
  const others = (shown.result?.objects ?? []).filter((other) => other.id !== one.id);
  shown.result = { ...(shown.result ?? { id: shown.id, trusted: true }), objects: [...others, one] };
  objects.note(shown.result, performance.now());
  reportFirstMasks(shown.result, performance.now());
  redraw();
}

const REJECTIONS = {
  unknown_frame: "That picture is too old for the tracker: tap again on the live picture.",
  capacity: "There is no room for another object: remove one first.",
  not_connected: "There is no tracking server now: tap again once tracking is back.",
};

function takeRejected(header) {
  const purpose = asked.get(header.seq);
  asked.delete(header.seq);
  firstMasks.delete(header.object);
  if (purpose?.step) objects.drop(purpose.step);
  if (purpose?.isNew) objects.remove(header.object);
  if (header.seq < 0) notify(`${objects.nameOf(header.object)} could not be found again: tap it.`);
  else notify(REJECTIONS[header.reason] ?? header.message);
  updateTools();
}

function removeObject(id, canTakeBack) {
  const object = objects.known.get(id);
  if (!object) return;
  line.send({ type: "remove", object: id });
  objects.remove(id);
  firstMasks.delete(id);
  if (canTakeBack && object.lastMask) {
    const { frame, mask } = object.lastMask;
    objects.push({
      objectId: id,
      take: () => {
        objects.add(id);
        Object.assign(objects.known.get(id), { name: object.name, isHidden: object.isHidden });
        const step = { objectId: id, take: () => removeObject(id, true) };
        ask(frame, id, { maskOf: { mask } }, { isNew: true, step });
      },
    });
  }
  setMode(null);
  needsRedraw = true;
}

function hideObject(id) {
  const object = objects.known.get(id);
  if (!object) return;
  const flip = () => {
    object.isHidden = !object.isHidden;
    needsRedraw = true;
    updateTools();
  };
  flip();
  objects.push({ objectId: id, take: flip });
  updateTools();
}

function renameObject(id) {
  const object = objects.known.get(id);
  const dialog = byId("naming");
  byId("name").value = object.name;
  byId("naming-title").textContent = `Name of object ${id}`;
  dialog.returnValue = "cancel";
  dialog.onclose = () => {
    const name = byId("name").value.trim();
    if (dialog.returnValue === "ok" && name !== object.name) {
      const former = object.name;
      giveName(id, object, name);
      objects.push({ objectId: id, take: () => giveName(id, object, former) });
    }
    canvas.focus({ preventScroll: true });
  };
  dialog.showModal();
}

function giveName(id, object, name) {
  object.name = name;
  line.send({ type: "rename", object: id, name });
  updateTools();
  needsRedraw = true;
}

// --- tools -----------------------------------------------------------------------------------------------

function setMode(next) {
  mode = mode === next ? null : next;
  updateTools();
}

function updateTools() {
  const id = objects.selected;
  if (id === null) mode = null;
  const object = objects.known.get(id);
  for (const name of ["correct", "negative", "hide", "rename", "remove"]) byId(name).disabled = id === null;
  byId("undo").disabled = !objects.canUndo;
  byId("correct").setAttribute("aria-pressed", String(mode === "correct"));
  byId("negative").setAttribute("aria-pressed", String(mode === "negative"));
  byId("freeze").setAttribute("aria-pressed", String(isFrozen));
  byId("freeze").querySelector("span").textContent = isFrozen ? "Go live" : "Freeze";
  byId("hide").querySelector("span").textContent = object?.isHidden ? "Draw" : "Hide";
  const words = [];
  if (isFrozen) words.push("FROZEN PICTURE");
  if (mode === "correct") words.push(`Tap what belongs to ${objects.nameOf(id)}`);
  if (mode === "negative") words.push(`Tap what is not ${objects.nameOf(id)}`);
  byId("mode").hidden = words.length === 0;
  byId("mode").textContent = words.join(" · ");
  byId("hint").hidden = objects.known.size > 1;
  needsRedraw = true;
}

const actions = {
  freeze,
  correct: () => objects.selected !== null && setMode("correct"),
  negative: () => objects.selected !== null && setMode("negative"),
  undo: () => {
    objects.undo();
    updateTools();
  },
  hide: () => objects.selected !== null && hideObject(objects.selected),
  rename: () => objects.selected !== null && renameObject(objects.selected),
  remove: () => objects.selected !== null && removeObject(objects.selected, true),
  record: () => setRecording(byId("record").getAttribute("aria-pressed") !== "true"),
  leave: () => leave(),
};
const KEYS = { " ": "freeze", c: "correct", n: "negative", u: "undo", h: "hide", r: "rename", Delete: "remove", e: "record" };

byId("name-cancel").addEventListener("click", () => byId("naming").close("cancel"));
for (const [name, act] of Object.entries(actions)) byId(name).addEventListener("click", act);

document.addEventListener("keydown", (event) => {
  if (document.body.dataset.state !== "live" || byId("naming").open || event.altKey || event.metaKey) return;
  const isOnButton = event.target instanceof HTMLButtonElement;
  const name = event.ctrlKey ? { z: "undo" }[event.key] : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (event.key === "Escape") {
    if (mode !== null) setMode(null);
    else if (isFrozen) unfreeze();
    else objects.select(null);
  } else if (/^[1-9]$/.test(event.key) && objects.known.has(Number(event.key))) objects.select(Number(event.key));
  else if (name && !(isOnButton && event.key === " ")) actions[name]();
  else return;
  event.preventDefault();
});

byId("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  setState("starting");
  await withVideo({ ...LOCAL_SOURCES[1], label: file.name }, openFile(file));
});

// --- take-away -------------------------------------------------------------------------------------------

function setRecording(isOn) {
  const button = byId("record");
  if ((button.getAttribute("aria-pressed") === "true") === isOn || (isOn && !show?.link?.up)) return;
  button.setAttribute("aria-pressed", String(isOn));
  button.querySelector("span").textContent = isOn ? "Stop" : "Record";
  line.send({ type: "record", on: isOn });
}

function takeRecording(header) {
  switch (header.state) {
    case "writing":
      notify(`Writing the recording: ${Math.round((100 * header.done) / header.total)}%`);
      break;
    case "failed":
      notify(header.message);
      break;
    case "ready": {
      notify(`The recording is ready: ${header.frames} frames, masks, COCO JSON and video.`);
      const link = document.createElement("a");
      link.href = header.url;
      link.download = "trocar.zip";
      link.click();
      break;
    }
    default:
  }
}

// --- what can be trusted ---------------------------------------------------------------------------------

/** Tell something; it goes by itself unless it `lasts`. */
function notify(text, lasts = false) {
  const notice = byId("notice");
  clearTimeout(noticeTimer);
  notice.hidden = !text;
  notice.textContent = text;
  if (text && !lasts) noticeTimer = setTimeout(() => notify(""), NOTICE_MS);
}

function watch() {
  if (!show) {
    if (line.isUp) setLine(["Connected"], false);
    else setLine([line.isClosed ? "In use elsewhere" : "No connection to the gateway, trying again"], true);
    return;
  }
  const now = performance.now();
  const silentMs = now - lastPictureMs;
  const veil = show.endedMessage || (silentMs > STALE_MS ? `No live picture for ${Math.round(silentMs / 1000)} s` : "");
  byId("veil").hidden = !veil;
  byId("veil").textContent = veil;
  if (shown && !shown.result && show.link?.up && presenter.isBehind && byId("notice").hidden) {
    const late = presenter.resultAgeMs ? `is ${Math.round(presenter.resultAgeMs)} ms behind` : "has not begun";
    notify(`Tracking ${late}: live picture without overlay.`);
  }
  if (show.feed && line.unsentBytes > MOST_UNSENT_BYTES) {
    notify("The network is slow and pictures go untracked: use a cable, or go nearer to the antenna.");
  }
  if (silentMs > STALE_MS) objects.render(null, now);
  setLine(...describeTrust(now, silentMs));
}

function describeTrust(now, silentMs) {
  if (!show.link) return [[line.isUp ? "Connecting to the tracking server" : "No connection to the gateway"], true];
  if (!show.link.up) return [["No tracking server", show.link.message], true];
  const rate = shownAt.filter((at) => at > now - RATE_WINDOW_MS).length / (RATE_WINDOW_MS / 1000);
  const sorted = [...latencies].sort((a, b) => a - b);
  const words = [`${Math.round(rate)} frames/s`];
  if (sorted.length) words.push(`${Math.round(sorted[sorted.length >> 1])} ms behind`);
  words.push(`${show.dropped + (show.feed?.skipped ?? 0)} dropped`);
  if (presenter.lateFrames) words.push(`${presenter.lateFrames} late`);
  if (show.lost) words.push(`${show.lost} lost`);
  if (show.viewer?.failures) words.push(`${show.viewer.failures} not decoded`);
  if (firstMaskMs !== null) words.push(`tap to mask ${Math.round(firstMaskMs)} ms`);
  words.push(`${show.link.model} on ${show.link.runtime}`);
  const isTroubled = presenter.isBehind || silentMs > STALE_MS || (shown?.result && !shown.result.trusted);
  return [words, Boolean(isTroubled)];
}

/** A line may break between its words, such as "0 dropped", never within one that fits. */
function setLine(words, isTroubled) {
  const element = byId("line");
  const parts = words.map((word, index) => (index < words.length - 1 ? `${word} ·` : word));
  if (element.textContent !== parts.join(" ")) {
    element.replaceChildren(
      ...parts.flatMap((part) => {
        const span = document.createElement("span");
        span.textContent = part;
        return [span, " "];
      }),
    );
    element.lastChild.remove();
  }
  element.classList.toggle("warn", isTroubled);
}

new ResizeObserver(() => (needsRedraw = true)).observe(byId("stage"));
setState("choose");
// By this the gateway knows the page again when its line broke; a reload is another page.
const tab = [...crypto.getRandomValues(new Uint32Array(4))].join("-");
line = new Line({ h264: await canDecode(), tab }, { onMessage: takeMessage, onDown: loseLine });
setInterval(watch, WATCH_MS);
requestAnimationFrame(repaint);
