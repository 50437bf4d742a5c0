// One store a model: it takes frames, shares them among the model's views, and answers the kernel.
import { decode } from "./codec.js";

export class Store {
  /** @param {any} model */
  constructor(model) {
    this.model = model;
    this.page = crypto.randomUUID?.() ?? String(Math.random()).slice(2);
    /** @type {import("./codec.js").Frame | null} */
    this.frame = null;
    this.live = false;
    this.failure = "";
    this.received = 0;
    /** Tokens a second, over the last second or so; NaN while unknown. */
    this.rate = NaN;
    /** @type {{seconds: number, tokens: number}[]} */
    this.recent = [];
    /** @type {Set<{looks: boolean, update: () => void}>} */
    this.views = new Set();
    this.looking = false;
    /** Number of a frame that the kernel wants acknowledged once it is drawn. */
    this.owed = 0;
    this.abort = new AbortController();

    const onMessage = (/** @type {any} */ content, /** @type {any[]} */ buffers) => this.receive(content, buffers);
    const onState = () => this.restore();
    model.on("msg:custom", onMessage);
    model.on("change:_frame", onState);
    this.abort.signal.addEventListener("abort", () => {
      model.off("msg:custom", onMessage);
      model.off("change:_frame", onState);
    });
    // A page that is left takes its views with it, without a word to them.
    globalThis.addEventListener?.("pagehide", () => this.send({ kind: "gone" }), { signal: this.abort.signal });
    this.still = hideStill(String(model.get("_facts")?.id ?? ""));
    this.restore();
  }

  /** Take the picture that the widget's state holds, unless a newer one came by message. */
  restore() {
    const state = this.model.get("_frame");
    if (!this.live && state?.byteLength) this.take(state);
  }

  /** @param {any} content @param {any[]} buffers */
  receive(content, buffers) {
    if (content.kind === "failure") {
      this.failure = content.text;
      this.update();
    } else if (content.kind === "frame") {
      this.failure = "";
      this.live = true;
      if (content.ask) this.owed = content.number;
      this.received = content.number;
      this.take(buffers[0]);
      if (!this.looking) this.drawn();
    }
  }

  /** @param {ArrayBuffer | ArrayBufferView} bytes */
  take(bytes) {
    this.frame = decode(bytes);
    const { seconds, tokens } = this.frame.facts;
    const last = this.recent.at(-1);
    if (last && (tokens < last.tokens || seconds - last.seconds > 3)) this.recent = [];
    this.recent.push({ seconds, tokens });
    while (this.recent.length > 2 && seconds - this.recent[1].seconds > 1) this.recent.shift();
    const first = this.recent[0];
    this.rate = seconds - first.seconds > 0.2 ? (tokens - first.tokens) / (seconds - first.seconds) : NaN;
    this.update();
  }

  update() {
    for (const view of this.views) view.update();
  }

  /** A view has drawn what there is. */
  drawn() {
    if (this.owed) this.send({ kind: "drawn", number: this.owed });
    this.owed = 0;
  }

  /** @param {{looks: boolean, update: () => void}} view */
  add(view) {
    this.views.add(view);
    this.look();
  }

  /** @param {{looks: boolean, update: () => void}} view */
  remove(view) {
    this.views.delete(view);
    this.look();
    if (this.views.size === 0) this.send({ kind: "gone" });
  }

  /** Tell the kernel when the first view begins to look, and when the last one looks away. */
  look() {
    const looking = [...this.views].some((view) => view.looks);
    if (looking === this.looking) return;
    this.looking = looking;
    this.owed = 0;
    this.send({ kind: "look", looks: looking });
  }

  /** @param {Record<string, unknown>} content */
  send(content) {
    try {
      this.model.send({ page: this.page, ...content });
    } catch {
      // No kernel: a saved picture has nobody to talk to.
    }
  }

  close() {
    this.abort.abort();
    this.still.remove();
  }
}

/**
 * While the widget lives in this page, its picture for kernel-less pages stays out of sight.
 * @param {string} id
 */
function hideStill(id) {
  const style = document.createElement("style");
  if (/^[\w-]+$/.test(id)) {
    const still = `.expert-lens-still-${id}`;
    style.textContent = `${still}, .jp-OutputArea-child:has(> * ${still}) { display: none !important; }`;
  }
  document.head.append(style);
  return style;
}
