// One cell under the pointer or the keys: its marks, and what is said of it.
import { describe, integer, position, short } from "./scale.js";

/** @typedef {{layer: number, expert: number}} Cell */

export class Cursor {
  /**
   * @param {HTMLElement} root of the view @param {number[]} names of the layers @param {number} experts
   * @param {AbortSignal} signal
   */
  constructor(root, names, experts, signal) {
    this.root = root;
    this.names = names;
    this.experts = experts;
    this.$ = (/** @type {string} */ selector) => /** @type {any} */ (root.querySelector(selector));
    this.map = this.$(".xl-map");
    this.tip = this.$(".xl-tip");
    /** @type {Cell | null} */
    this.at = null;
    this.byKeyboard = false;
    this.spoken = "";
    /** @type {ArrayLike<number> | null} */
    this.counts = null;
    this.listen(signal);
    const cell = this.$("[role=gridcell]");
    cell.id = `xl-${Math.random().toString(36).slice(2)}`;
    this.map.setAttribute("aria-activedescendant", cell.id);
  }

  /** @param {AbortSignal} signal */
  listen(signal) {
    const { map } = this;
    const point = (event) => this.moveTo(this.under(event), false);
    map.addEventListener("pointermove", point, { signal });
    map.addEventListener("pointerdown", point, { signal });
    map.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.moveTo(null, false), { signal });
    map.addEventListener("blur", () => this.moveTo(null, false), { signal });
    map.addEventListener(
      "focus",
      () => map.matches(":focus-visible") && this.moveTo(this.at ?? { layer: 0, expert: 0 }, true),
      { signal },
    );
    map.addEventListener("keydown", (event) => this.press(event), { signal });
  }

  /** The cell under the pointer. @param {PointerEvent} event @returns {Cell} */
  under(event) {
    const box = this.map.getBoundingClientRect();
    return this.inside({
      layer: Math.floor(((event.clientY - box.top) / box.height) * this.names.length),
      expert: Math.floor(((event.clientX - box.left) / box.width) * this.experts),
    });
  }

  /** @param {Cell} cell @returns {Cell} */
  inside({ layer, expert }) {
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    return { layer: clamp(layer, this.names.length - 1), expert: clamp(expert, this.experts - 1) };
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const [layers, experts] = [this.names.length, this.experts];
    const far = event.ctrlKey || event.metaKey ? layers : 0;
    const step = {
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
      ArrowUp: [-1, 0],
      ArrowDown: [1, 0],
      PageUp: [-10, 0],
      PageDown: [10, 0],
      Home: [-far, -experts],
      End: [far, experts],
    }[event.key];
    if (event.key === "Escape") this.moveTo(null, false);
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const { layer, expert } = this.at ?? { layer: 0, expert: 0 };
    this.moveTo(this.inside({ layer: layer + step[0], expert: expert + step[1] }), true);
  }

  /** @param {Cell | null} cell @param {boolean} byKeyboard */
  moveTo(cell, byKeyboard) {
    this.at = cell;
    this.byKeyboard = byKeyboard;
    this.draw();
  }

  /** @param {ArrayLike<number> | null} counts null when there is nothing to point at @param {import("./draw.js").Size} size */
  show(counts, size) {
    this.counts = counts;
    this.size = size;
    this.draw();
  }

  draw() {
    const { at, counts } = this;
    const shown = at !== null && counts !== null;
    this.root.classList.toggle("xl-at", shown);
    this.tip.hidden = !shown;
    if (!shown) {
      this.$(".xl-pointer").hidden = true;
      return;
    }
    const facts = describe(counts, this.experts, at.layer, at.expert);
    const parts = {
      title: `Layer ${this.names[at.layer]} · expert ${at.expert}`,
      tokens: `${integer(facts.tokens)} token${facts.tokens === 1 ? "" : "s"}`,
      relative: `${short(facts.relative)}× uniform`,
      share: `${short(facts.share * 100)} % of the layer`,
    };
    this.mark(at);
    this.write(parts);
    this.point(position(facts.relative, PALETTE.span));
    this.speak(at, Object.values(parts).join(", "));
  }

  /** Outline the cell, its row and its column. @param {Cell} at */
  mark({ layer, expert }) {
    const { cellWidth, cellHeight, width, height } = this.size;
    const [x, y] = [expert * cellWidth, layer * cellHeight];
    const place = (node, left, top, w, h) => {
      node.style.cssText = `left:${left}px;top:${top}px;width:${w}px;height:${h}px`;
    };
    place(this.$(".xl-row"), 0, y, width, cellHeight);
    place(this.$(".xl-column"), x, 0, cellWidth, height);
    place(this.$(".xl-cell"), x, y, cellWidth, cellHeight);
  }

  /** The tip stands beside the cell and inside the widget: above, or below where there is no room above. */
  write(parts) {
    const { tip, size } = this;
    if (!tip.firstChild) tip.innerHTML = Object.keys(parts).map((key) => `<span data-key="${key}"></span>`).join("");
    for (const [key, text] of Object.entries(parts)) tip.querySelector(`[data-key=${key}]`).textContent = text;
    const box = this.map.getBoundingClientRect();
    const main = this.$(".xl-main").getBoundingClientRect();
    const x = box.left - main.left + (this.at.expert + 0.5) * size.cellWidth - tip.offsetWidth / 2;
    const y = box.top - main.top + this.at.layer * size.cellHeight;
    const above = y - tip.offsetHeight - 8;
    tip.style.left = `${Math.min(Math.max(x, 0), main.width - tip.offsetWidth)}px`;
    tip.style.top = `${above >= -20 ? above : y + size.cellHeight + 8}px`;
  }

  /** Show on the legend where the cell lies. @param {number} at 0 to 1, NaN for nowhere */
  point(at) {
    const pointer = this.$(".xl-pointer");
    pointer.hidden = Number.isNaN(at);
    pointer.style.setProperty("--at", String(at));
  }

  /** Tell screen readers, once for each cell that the keys reach. @param {Cell} at @param {string} text */
  speak({ layer, expert }, text) {
    const cell = this.$("[role=gridcell]");
    cell.parentElement.setAttribute("aria-rowindex", layer + 1);
    cell.setAttribute("aria-colindex", expert + 1);
    cell.textContent = text;
    if (!this.byKeyboard || this.spoken === `${layer},${expert}`) return;
    this.spoken = `${layer},${expert}`;
    this.$("[aria-live=polite]").textContent = text;
  }
}
