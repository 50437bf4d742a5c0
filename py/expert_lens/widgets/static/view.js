// One view: what lies where, what it shows, and whether anybody looks. `render` gets one cleanup back.
import { addControls } from "./controls.js";
import { Cursor } from "./cursor.js";
import { Painter } from "./draw.js";
import { ticks } from "./scale.js";
import { nothing, showStatus } from "./status.js";
import { watchTheme } from "./theme.js";

/** Pixels of the page beside the map, as the style sheet has them. */
const PADDING = 24;
const AXIS = 40;
const BALANCE = 92;
const LEGEND = 20 + 92;
const NARROW = 560;
/** A map is this high if its cells then are neither too small nor too large. */
const HEIGHT = 420;
const CELL = { shortest: 3, tallest: 28, widest: 56 };
const CALM_INTERVAL = 250;

const MARKUP = `
  <div class="xl-head">
    <span class="xl-title"></span>
    <span class="xl-state"><i></i><span></span></span>
  </div>
  <div class="xl-tools" data-lm-suppress-shortcuts="true">
    <div class="xl-segments" role="radiogroup" aria-label="Phase"></div>
    <div class="xl-window">
      <select aria-label="Which tokens are counted"></select>
      <span hidden><input type="number" min="1" step="1" aria-label="Count the last so many tokens"> tokens</span>
    </div>
    <button class="xl-pause" type="button"></button>
    <span class="xl-note" role="status"></span>
  </div>
  <div class="xl-main">
    <div class="xl-plot">
      <div class="xl-y"></div>
      <div class="xl-x"></div>
      <div class="xl-map" tabindex="0" role="grid" data-lm-suppress-shortcuts="true">
        <canvas></canvas>
        <div class="xl-row"></div><div class="xl-column"></div><div class="xl-cell"></div>
        <div class="xl-nothing" hidden></div>
        <div role="row" class="xl-hidden"><div role="gridcell"></div></div>
      </div>
      <div class="xl-balance"><canvas></canvas></div>
    </div>
    <div class="xl-legend" role="img">
      <div class="xl-caption">× uniform load</div>
      <div class="xl-scale"><div class="xl-gradient"><i class="xl-pointer" hidden></i></div><div class="xl-marks"></div></div>
      <div class="xl-empty"><i></i>no tokens</div>
    </div>
    <div class="xl-tip" hidden></div>
  </div>
  <div class="xl-status"></div>
  <div class="xl-hidden" aria-live="polite"></div>`;

const BALANCE_HELP =
  "Balance of each layer: the effective number of experts, exp(entropy of their shares), divided by the number of " +
  "experts. A full bar: all experts get the same number of tokens.";

/**
 * @param {any} model @param {HTMLElement} el @param {import("./store.js").Store} store
 * @returns {() => void}
 */
export function createView(model, el, store) {
  const abort = new AbortController();
  const { signal } = abort;
  const { layers: names, title, num_experts: experts } = model.get("_facts");
  const layers = names.length;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const root = makeRoot(el, title, layers, experts);
  const $ = (/** @type {string} */ selector) => /** @type {any} */ (root.querySelector(selector));
  const painter = new Painter($(".xl-map canvas"), $(".xl-balance canvas"), layers, experts);
  const cursor = new Cursor(root, names, experts, signal);
  const view = { looks: false, update: schedule };
  /** @type {import("./draw.js").Size | null} */
  let size = null;
  let frame = store.frame;
  let paused = false;
  let visible = false;
  let drawnAt = -Infinity;
  let request = 0;
  let timer = 0;

  function schedule() {
    if (request || timer || signal.aborted) return;
    const wait = calm.matches ? drawnAt + CALM_INTERVAL - performance.now() : 0;
    const ask = () => (request = requestAnimationFrame(draw));
    if (wait > 0) timer = window.setTimeout(() => ((timer = 0), ask()), wait);
    else ask();
  }

  function draw() {
    request = 0;
    if (!root.isConnected) return look(); // its output was dropped while it was being made: nobody cleans up behind it
    drawnAt = performance.now();
    if (!paused) frame = store.frame;
    if (size) drawFrame();
    const [phase, window, failure] = ["phase", "window", "failure"].map((name) => model.get(name));
    showStatus(root, store, frame, { paused, phase, window, failure });
    if (view.looks) store.drawn();
  }

  function drawFrame() {
    const plane = frame?.planes.includes(model.get("phase")) ? model.get("phase") : frame?.planes[0];
    const counts = frame?.counts(plane);
    const some = counts?.some((/** @type {number} */ count) => count > 0);
    root.classList.toggle("xl-none", !some);
    $(".xl-nothing").hidden = some || !frame;
    if (some) painter.draw(counts);
    else painter.clear();
    if (frame && !some) $(".xl-nothing").textContent = nothing(frame.facts, plane);
    cursor.show(some ? counts : null, size);
  }

  function layout() {
    const width = root.clientWidth;
    if (width === 0) return;
    const narrow = width < NARROW;
    root.classList.toggle("xl-narrow", narrow);
    const room = width - PADDING - AXIS - BALANCE - (narrow ? 0 : LEGEND);
    const ratio = window.devicePixelRatio;
    const cellHeight = wholePixels(Math.min(Math.max(HEIGHT / layers, CELL.shortest), CELL.tallest), ratio);
    const cellWidth = wholePixels(Math.min(room / experts, cellHeight * 3, CELL.widest), ratio);
    size = { cellWidth, cellHeight, width: cellWidth * experts, height: cellHeight * layers };
    root.style.setProperty("--xl-width", `${size.width}px`);
    root.style.setProperty("--xl-height", `${size.height}px`);
    painter.resize(size, ratio);
    label($(".xl-x"), ticks(experts, 40 / cellWidth), (index) => [`left:${(index + 0.5) * cellWidth}px`, index]);
    label($(".xl-y"), ticks(layers, 17 / cellHeight), (index) => [`top:${(index + 0.5) * cellHeight}px`, names[index]]);
    draw();
  }

  function look() {
    view.looks = root.isConnected && visible && !document.hidden && !paused;
    if (root.isConnected) store.add(view);
    else store.remove(view);
  }

  function showPause() {
    $(".xl-pause").textContent = paused ? "Resume" : "Pause";
  }
  $(".xl-pause").addEventListener(
    "click",
    () => {
      paused = !paused;
      showPause();
      look();
      schedule();
    },
    { signal },
  );

  const sizes = new ResizeObserver(layout);
  sizes.observe(root);
  const sight = new IntersectionObserver((entries) => {
    visible = entries.at(-1).isIntersecting;
    look();
  });
  sight.observe(root);
  document.addEventListener("visibilitychange", look, { signal });
  watchScreen(layout, signal);
  watchTheme(
    el,
    (theme) => {
      root.dataset.theme = theme;
      root.style.setProperty("--xl-gradient", PALETTE[theme].stops.join(","));
      root.style.setProperty("--xl-none", PALETTE[theme].empty);
      root.style.setProperty("--xl-none-line", PALETTE[theme].emptyLine);
      painter.dress(theme);
      schedule();
    },
    signal,
  );
  addControls(root, model, schedule, signal);
  showPause();
  store.add(view);
  layout();

  return () => {
    abort.abort();
    sizes.disconnect();
    sight.disconnect();
    cancelAnimationFrame(request);
    clearTimeout(timer);
    view.looks = false;
    store.remove(view);
    root.remove();
  };
}

/** The view's elements, with what never changes. */
function makeRoot(el, title, layers, experts) {
  const root = document.createElement("div");
  root.className = "xl";
  root.innerHTML = MARKUP;
  el.append(root);
  const $ = (/** @type {string} */ selector) => /** @type {any} */ (root.querySelector(selector));
  $(".xl-title").textContent = $(".xl-title").title = title;
  $(".xl-map").setAttribute("aria-label", `Load of ${experts} experts in ${layers} layers. Arrow keys move between cells.`);
  $(".xl-map").setAttribute("aria-rowcount", layers);
  $(".xl-map").setAttribute("aria-colcount", experts);
  $(".xl-balance").title = BALANCE_HELP;
  $(".xl-marks").innerHTML = ["≥4", "2", "1", "½", "≤¼"].map((text) => `<span>${text}</span>`).join("");
  $(".xl-legend").setAttribute(
    "aria-label",
    "Colours: load relative to uniform load, from a quarter (blue) over 1 (neutral) to 4 times (orange). Grey: no tokens.",
  );
  return root;
}

/**
 * The length in whole pixels of the screen, so that all cells are alike, unless that would cost a quarter of it.
 * @param {number} length @param {number} ratio
 */
function wholePixels(length, ratio) {
  const pixels = Math.floor(length * ratio);
  return pixels >= length * ratio * 0.75 ? pixels / ratio : length;
}

/** Put labels on an axis: `where` gives each one's style and text. */
function label(node, indices, where) {
  node.innerHTML = indices
    .map((/** @type {number} */ index) => where(index))
    .map(([style, text]) => `<span style="${style}">${text}</span>`)
    .join("");
}

/** Call `moved` whenever the pixels of the screen change their size: another zoom, another screen. */
function watchScreen(moved, signal) {
  const watch = () => {
    const query = matchMedia(`(resolution: ${window.devicePixelRatio}dppx)`);
    query.addEventListener("change", () => (watch(), moved()), { signal, once: true });
  };
  watch();
}
