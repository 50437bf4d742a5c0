// One store a model: it takes frames, shares them among the model's views, and answers the kernel.
import { decode } from "./codec.js";

export class Store {
  /** @param {any} model */
  constructor(model) {
    this.model = model;
    this.page = crypto.randomUUID?.() ?? String(Math.random()).slice(2);
    /** @type {import("./codec.js").Frame | null} */
    this.frame = null;
    /** Whether a frame came from the kernel, rather than from the state that a page begins with. */
    this.live = false;
    this.connected = true;
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
    const { signal } = this.abort;

    const heard = {
      "msg:custom": (/** @type {any} */ content, /** @type {any[]} */ buffers) => this.receive(content, buffers),
      "change:_frame": () => this.restore(),
      "change:failure": () => this.update(),
      comm_live_update: () => void this.checkConnection(),
    };
    for (const [name, callback] of Object.entries(heard)) model.on(name, callback);
    signal.addEventListener("abort", () => {
      for (const [name, callback] of Object.entries(heard)) model.off(name, callback);
    });
    // A page that is left takes its views with it without a word to them; one that is kept for the way back says so.
    addEventListener("pagehide", () => this.send({ kind: "gone" }), { signal });
    addEventListener("pageshow", (event) => event.persisted && this.look(true), { signal });
    const style = hideStill(model.get("_facts").mark);
    signal.addEventListener("abort", () => style.remove());
    this.restore();
    void this.checkConnection();
  }

  /** Take the picture that the widget's state holds, which has all phases, unless a newer one came by message. */
  restore() {
    const state = this.model.get("_frame");
    if (!state?.byteLength) return;
    const frame = decode(state);
    if (!this.live || frame.facts.seconds >= this.frame.facts.seconds) this.take(frame);
  }

  /** Whether a kernel is at the other end: anywidget shows too little of the model to tell. */
  async checkConnection() {
    const model = await this.model.widget_manager?.get_model(this.model.get("_facts").id).catch(() => undefined);
    this.connected = model?.comm_live !== false;
    if (!this.connected) this.live = false;
    else this.look(true);
    this.update();
  }

  /** @param {any} content @param {any[]} buffers */
  receive(content, buffers) {
    if (content.kind !== "frame") return;
    this.live = true;
    if (content.ask) this.owed = content.number;
    this.take(decode(buffers[0]));
    // Not once the last view is gone: the kernel would take the answer for one of a page that looks.
    if (!this.looking && this.views.size > 0) this.drawn();
  }

  /** @param {import("./codec.js").Frame} frame */
  take(frame) {
    this.frame = frame;
    const { seconds, tokens } = frame.facts;
    const last = this.recent.at(-1);
    if (last && (tokens < last.tokens || seconds - last.seconds > 3)) this.recent = [];
    this.recent.push({ seconds, tokens });
    while (this.recent.length > 2 && seconds - this.recent[1].seconds > 1) this.recent.shift();
    const first = this.recent[0];
    this.rate = seconds - first.seconds > 0.2 ? (tokens - first.tokens) / (seconds - first.seconds) : NaN;
    // Without new tokens no frame comes that would say so.
    clearTimeout(this.rest);
    this.rest = setTimeout(() => ((this.rate = 0), this.update()), 1500);
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
    if (!this.views.delete(view)) return;
    this.look();
    if (this.views.size === 0) this.send({ kind: "gone" });
  }

  /**
   * Tell the kernel when the first view begins to look, and when the last one looks away.
   * @param {boolean} [again] also when it was told before
   */
  look(again = false) {
    const looking = [...this.views].some((view) => view.looks);
    if (looking === this.looking && !(again && looking)) return;
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
    clearTimeout(this.rest);
    this.abort.abort();
  }
}

/**
 * While the widget lives in this page, the picture for pages without it stays out of sight.
 * @param {string} mark part of the picture's base64 that no other picture has
 */
function hideStill(mark) {
  const style = document.createElement("style");
  style.textContent = `.jp-OutputArea-child:has(.jp-RenderedImage > img[src*=${JSON.stringify(mark)}]) { display: none; }`;
  document.head.append(style);
  return style;
}
