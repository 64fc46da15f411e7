/** What the page knows of the objects: names, what is hidden, where each was last seen, what can be undone. */

import { describe, DOUBT } from "./overlay.js";

const LARGEST_ID = 255;
/** What can be taken back. */
const MOST_STEPS = 50;
const STATE_WORDS = { visible: "visible", occluded: "hidden", lost: "lost" };

/**
 * @typedef {object} Known
 * @property {string} name given by a person; empty for none
 * @property {string} color
 * @property {boolean} isHidden
 * @property {number | null} seenMs when it was last shown visible, performance.now()
 * @property {number[] | null} lastBox there, source pixels
 * @property {{frame: number, mask: any} | null} lastMask there
 * @property {string} state
 */

export class Objects {
  #colors = ["#ffffff"];
  #nextId = 1;
  #removed = new Set();
  #steps = [];
  #rows = new Map();
  /** @type {Map<number, Known>} */
  known = new Map();
  selected = null;

  /**
   * @param {HTMLUListElement} list
   * @param {{onSelect: (id: number) => void, onNews: (text: string) => void}} hooks
   */
  constructor(list, hooks) {
    this.list = list;
    this.hooks = hooks;
  }

  /** @param {number[][]} colors RGB, in the order of ids: those of every picture that Trocar writes */
  set colors(colors) {
    this.#colors = colors.map(([red, green, blue]) => `rgb(${red}, ${green}, ${blue})`);
  }

  clear() {
    this.known.clear();
    this.#removed.clear();
    this.#steps = [];
    this.#nextId = 1;
    this.select(null);
    this.render(null, 0);
  }

  /** A number for a new object; those of removed ones come again only after all others. */
  takeId() {
    while (this.#nextId <= LARGEST_ID && this.known.has(this.#nextId)) this.#nextId += 1;
    if (this.#nextId <= LARGEST_ID) return this.#nextId++;
    for (let id = 1; id <= LARGEST_ID; id++) if (!this.known.has(id)) return id;
    return null;
  }

  add(id) {
    if (this.known.has(id)) return;
    this.#removed.delete(id);
    const color = this.#colors[(id - 1) % this.#colors.length];
    this.known.set(id, { name: "", color, isHidden: false, seenMs: null, lastBox: null, lastMask: null, state: "visible" });
  }

  remove(id) {
    this.known.delete(id);
    this.#removed.add(id);
    if (this.selected === id) this.select(null);
  }

  select(id) {
    this.selected = id;
    this.hooks.onSelect(id);
  }

  /** Note what a shown picture says of the objects. */
  note(result, now) {
    for (const one of result.objects) {
      // Another page may have prompted it; one that was removed is only on its way out.
      if (!this.known.has(one.id) && !this.#removed.has(one.id)) this.add(one.id);
      const object = this.known.get(one.id);
      if (!object) continue;
      if (one.state !== object.state) this.hooks.onNews(`${this.nameOf(one.id)} ${STATE_WORDS[one.state]}`);
      object.state = one.state;
      if (!one.outline) continue;
      object.seenMs = now;
      object.lastBox = one.box;
      object.lastMask = { frame: result.id, mask: one.mask };
    }
  }

  nameOf(id) {
    return this.known.get(id)?.name || `Object ${id}`;
  }

  /** @param {{take: () => void, objectId: number}} step how to take back what was just done */
  push(step) {
    this.#steps.push(step);
    if (this.#steps.length > MOST_STEPS) this.#steps.shift();
  }

  /** Drop a step that did not take place after all. */
  drop(step) {
    this.#steps = this.#steps.filter((one) => one !== step);
  }

  get canUndo() {
    return this.#steps.length > 0;
  }

  undo() {
    this.#steps.pop()?.take();
  }

  /** @param {any | null} result of the shown picture */
  render(result, now) {
    for (const [id, row] of this.#rows) {
      if (this.known.has(id)) continue;
      row.item.remove();
      this.#rows.delete(id);
    }
    for (const [id, object] of this.known) {
      const row = this.#rows.get(id) ?? this.#makeRow(id, object);
      const one = result?.objects.find((candidate) => candidate.id === id);
      this.#fill(row, id, object, one, result, now);
    }
  }

  #makeRow(id, object) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const parts = ["number", "name", "state"].map((name) => {
      const part = document.createElement("span");
      part.className = name;
      button.append(part);
      return part;
    });
    const [number, name, state] = parts;
    number.textContent = id;
    number.style.borderColor = object.color;
    button.addEventListener("click", () => this.select(this.selected === id ? null : id));
    item.append(button);
    this.list.append(item);
    const row = { item, button, name, state };
    this.#rows.set(id, row);
    return row;
  }

  #fill(row, id, object, one, result, now) {
    let name = object.name || `Object ${id}`;
    let state = "waiting for the first mask";
    let kind = "";
    if (one) {
      const text = describe(one, object, result.trusted, now);
      if (!object.name && one.class !== "unknown") name = one.class.replaceAll("_", " ");
      if (one.state !== "visible") {
        kind = one.state === "lost" ? "lost" : "hidden";
        state = text.slice(text.indexOf("·") + 2);
      } else if (!result.trusted) {
        kind = "doubt";
        state = "not trusted";
      } else {
        kind = one.score < DOUBT ? "doubt" : "";
        state = `${one.score < DOUBT ? "unsure" : "visible"}, ${Math.round(one.score * 100)}%`;
      }
    } else if (object.seenMs !== null) {
      kind = "doubt";
      state = "no tracking now";
    }
    if (object.isHidden) state += ", not drawn";
    set(row.item, "className", kind);
    set(row.name, "textContent", name);
    set(row.state, "textContent", state);
    const pressed = String(this.selected === id);
    if (row.button.getAttribute("aria-pressed") !== pressed) row.button.setAttribute("aria-pressed", pressed);
  }
}

/** Write only what changed: most pictures change nothing here. */
function set(element, property, value) {
  if (element[property] !== value) element[property] = value;
}
