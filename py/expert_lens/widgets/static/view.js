// One view: the canvas, what lies around it, and the hands that work it. `render` gets one cleanup back.
import { balance, colour, describe, duration, integer, pixels, position, short, ticks } from "./scale.js";

const WINDOWS = [256, 1024, 4096, 16384];
const PHASES = { both: "Both", prefill: "Prefill", decode: "Decode" };
const GUTTER = { left: 40, right: 92, top: 20, bottom: 34 };
const PADDING = 24;
const LEGEND = 20 + 92;
const NARROW = 560;
const GAP_FROM = 7;

const MARKUP = `
  <div class="xl-head">
    <span class="xl-title"></span>
    <span class="xl-state"><i></i><span></span></span>
  </div>
  <div class="xl-tools">
    <div class="xl-segments" role="radiogroup" aria-label="Phase"></div>
    <label class="xl-window">Window
      <select></select>
      <input type="number" min="1" step="1" aria-label="Window in tokens" hidden>
    </label>
    <button class="xl-pause" type="button" aria-pressed="false"></button>
    <span class="xl-note" role="status"></span>
  </div>
  <div class="xl-main">
    <div class="xl-plot">
      <div class="xl-y"></div>
      <div class="xl-x"></div>
      <div class="xl-map" tabindex="0" role="grid" data-lm-suppress-shortcuts="true">
        <canvas></canvas>
        <div class="xl-row"></div><div class="xl-column"></div><div class="xl-cell"></div>
        <div role="row" class="xl-hidden"><div role="gridcell"></div></div>
      </div>
      <div class="xl-balance"><canvas></canvas></div>
    </div>
    <div class="xl-legend" role="img">
      <div class="xl-caption">× uniform load</div>
      <div class="xl-scale"><div class="xl-gradient"><i></i></div><div class="xl-marks"></div></div>
      <div class="xl-empty"><i></i>no tokens</div>
    </div>
    <div class="xl-tip" hidden></div>
  </div>
  <div class="xl-status"></div>
  <div class="xl-hidden" aria-live="polite"></div>`;

/**
 * @param {any} model
 * @param {HTMLElement} el
 * @param {import("./store.js").Store} store
 * @returns {() => void}
 */
export function createView(model, el, store) {
  const abort = new AbortController();
  const { signal } = abort;
  const { layers: names, title } = model.get("_facts");
  const experts = model.get("_facts").num_experts;
  const layers = names.length;
  const span = PALETTE.span;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  const root = document.createElement("div");
  root.className = "xl";
  root.innerHTML = MARKUP;
  el.append(root);
  const $ = (/** @type {string} */ selector) => /** @type {any} */ (root.querySelector(selector));
  const map = $(".xl-map");
  const canvas = $(".xl-map canvas");
  const bars = $(".xl-balance canvas");
  const tip = $(".xl-tip");
  const cells = document.createElement("canvas");
  cells.width = experts;
  cells.height = layers;
  const image = new ImageData(experts, layers);
  const words = new Uint32Array(image.data.buffer);

  const view = { looks: false, update: schedule };
  let theme = "light";
  let table = pixels(PALETTE.light);
  let size = { cellWidth: 1, cellHeight: 1, width: 0, height: 0 };
  /** @type {{layer: number, expert: number} | null} */
  let at = null;
  let byKeyboard = false;
  let paused = false;
  let visible = false;
  let frame = store.frame;
  let drawnCount = 0;
  let drawnAt = -Infinity;
  let request = 0;
  let timer = 0;

  // Once: what does not change.
  $(".xl-title").textContent = title;
  $(".xl-title").title = title;
  map.setAttribute("aria-label", `Load of ${experts} experts in ${layers} layers. Arrow keys move between cells.`);
  map.setAttribute("aria-rowcount", layers);
  map.setAttribute("aria-colcount", experts);
  const cellId = `xl-${store.page}-${Math.random().toString(36).slice(2)}`;
  $("[role=gridcell]").id = cellId;
  $(".xl-balance").title =
    "Balance of each layer: the effective number of experts, exp(entropy of their shares), divided by the number " +
    "of experts. A full bar: all experts get the same number of tokens.";
  $(".xl-marks").innerHTML = ["≥4", "2", "1", "½", "≤¼"].map((text) => `<span>${text}</span>`).join("");
  $(".xl-legend").setAttribute(
    "aria-label",
    "Colours: load relative to uniform load, from a quarter (blue) over 1 (neutral) to 4 times (orange). Grey: no tokens.",
  );
  for (const [phase, label] of Object.entries(PHASES)) {
    const button = document.createElement("button");
    button.type = "button";
    button.role = "radio";
    button.dataset.phase = phase;
    button.textContent = label;
    $(".xl-segments").append(button);
  }
  const select = $(".xl-window select");
  const typed = $(".xl-window input");
  select.innerHTML =
    `<option value="">all tokens</option>` +
    WINDOWS.map((n) => `<option value="${n}">last ${n < 1024 ? n : `${n / 1024} k`}</option>`).join("") +
    `<option value="other">last …</option>`;

  // Drawing.

  function schedule() {
    if (request || timer || signal.aborted) return;
    const wait = calm.matches ? drawnAt + 250 - performance.now() : 0;
    if (wait > 0) timer = window.setTimeout(() => ((timer = 0), (request = requestAnimationFrame(draw))), wait);
    else request = requestAnimationFrame(draw);
  }

  function draw() {
    request = 0;
    drawnAt = performance.now();
    if (!paused) frame = store.frame;
    if (frame && size.width > 0) drawMap();
    drawStatus();
    drawPointer();
    if (view.looks) store.drawn();
  }

  function drawMap() {
    const ratio = window.devicePixelRatio;
    const counts = frame.counts(model.get("phase"));
    colour(counts, layers, experts, table, span, words);
    cells.getContext("2d").putImageData(image, 0, 0);
    const context = canvas.getContext("2d");
    // Cells smaller than a pixel are averaged, larger ones keep their edges.
    context.imageSmoothingEnabled = size.cellWidth * ratio < 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(cells, 0, 0, canvas.width, canvas.height);
    if (Math.min(size.cellWidth, size.cellHeight) >= GAP_FROM) {
      drawGaps(context, ratio);
      drawHatches(context, counts, ratio);
    }
    drawBalance(balance(counts, layers, experts), ratio);
    drawnCount += 1;
    canvas.dataset.drawn = String(drawnCount);
    canvas.dataset.frame = String(store.received);
  }

  function drawGaps(context, ratio) {
    const line = Math.max(1, Math.round(ratio));
    for (let x = 1; x <= experts; x++) {
      context.clearRect(Math.round(x * size.cellWidth * ratio) - line, 0, line, canvas.height);
    }
    for (let y = 1; y <= layers; y++) {
      context.clearRect(0, Math.round(y * size.cellHeight * ratio) - line, canvas.width, line);
    }
  }

  function drawHatches(context, counts, ratio) {
    context.strokeStyle = PALETTE[theme].emptyLine;
    context.lineWidth = ratio;
    context.beginPath();
    const step = 5 * ratio;
    const [w, h] = [size.cellWidth * ratio - ratio, size.cellHeight * ratio - ratio];
    for (let cell = 0; cell < layers * experts; cell++) {
      if (counts[cell] > 0) continue;
      const x = (cell % experts) * size.cellWidth * ratio;
      const y = Math.floor(cell / experts) * size.cellHeight * ratio;
      for (let c = step; c < w + h; c += step) {
        context.moveTo(x + Math.max(0, c - h), y + Math.min(c, h));
        context.lineTo(x + Math.min(c, w), y + Math.max(0, c - w));
      }
    }
    context.stroke();
  }

  function drawBalance(shares, ratio) {
    const context = bars.getContext("2d");
    const style = getComputedStyle(root);
    context.clearRect(0, 0, bars.width, bars.height);
    const gap = size.cellHeight >= 4 ? Math.max(1, Math.round(ratio)) : 0;
    for (const [fill, width] of [["--xl-track", () => 1], ["--xl-bar", (share) => share]]) {
      context.fillStyle = style.getPropertyValue(fill);
      shares.forEach((share, layer) => {
        const top = Math.round(layer * size.cellHeight * ratio);
        const bottom = Math.round((layer + 1) * size.cellHeight * ratio);
        context.fillRect(0, top, bars.width * width(share), bottom - top - gap);
      });
    }
  }

  function drawStatus() {
    const facts = frame?.facts;
    const [state, text] = store.failure
      ? ["failed", "source failed"]
      : !facts
        ? ["waiting", "waiting"]
        : facts.state === "ended"
          ? ["ended", "ended"]
          : !store.live
            ? ["saved", "saved picture"]
            : paused
              ? ["paused", "paused"]
              : ["running", "running"];
    root.dataset.state = state;
    setText($(".xl-state span"), text);
    const wanted = model.get("window");
    const late = facts && store.live && facts.state !== "ended" && (facts.window ?? null) !== (wanted ?? null);
    setText($(".xl-note"), store.failure || (late ? "The new window applies when the kernel hears it" : ""));
    if (!facts) return setText($(".xl-status"), "No tokens yet");
    const rate = store.live && facts.state === "running" && !paused ? store.rate : NaN;
    const entries = [
      ["tokens", integer(facts.tokens), ""],
      ["rate", Number.isNaN(rate) ? "–" : `${short(rate)} tok/s`, ""],
      ["lag", facts.state === "running" ? duration(facts.lag) : "–", ""],
      ["dropped", integer(facts.dropped), facts.dropped > 0 ? "tokens did not fit into the arena and are lost" : ""],
      ["missing", integer(facts.missing), facts.missing > 0 ? "positions ran before the lens looked" : ""],
    ];
    const status = $(".xl-status");
    if (!status.firstElementChild) {
      const parts = (/** @type {string} */ key) => `<span>${key}</span> <b></b> <small></small>`;
      status.innerHTML = entries.map(([key]) => `<span data-key="${key}">${parts(key)}</span>`).join("");
    }
    for (const [key, value, warning] of entries) {
      const entry = status.querySelector(`[data-key=${key}]`);
      setText(entry.querySelector("b"), value);
      setText(entry.querySelector("small"), warning);
      entry.classList.toggle("xl-warning", key === "dropped" && warning !== "");
    }
  }

  // One cell under the pointer or the keys.

  function drawPointer() {
    const marker = $(".xl-gradient i");
    root.classList.toggle("xl-at", at !== null);
    tip.hidden = at === null || !frame;
    marker.hidden = true;
    if (at === null || !frame) return;
    const { cellWidth, cellHeight } = size;
    const counts = frame.counts(model.get("phase"));
    const { tokens, share, relative } = describe(counts, experts, at.layer, at.expert);
    const [x, y] = [at.expert * cellWidth, at.layer * cellHeight];
    place($(".xl-row"), 0, y, size.width, cellHeight);
    place($(".xl-column"), x, 0, cellWidth, size.height);
    place($(".xl-cell"), x, y, cellWidth, cellHeight);
    const parts = {
      title: `Layer ${names[at.layer]} · expert ${at.expert}`,
      tokens: `${integer(tokens)} token${tokens === 1 ? "" : "s"}`,
      share: `${short(share * 100)} % of the layer`,
      relative: tokens > 0 ? `${short(relative)}× uniform` : "no tokens",
    };
    if (!tip.firstChild) tip.innerHTML = Object.keys(parts).map((key) => `<span data-key="${key}"></span>`).join("");
    for (const [key, text] of Object.entries(parts)) setText(tip.querySelector(`[data-key=${key}]`), text);
    const where = position(relative, span);
    if (!Number.isNaN(where)) {
      marker.hidden = false;
      marker.style.setProperty("--at", String(where));
    }
    // Beside the cell, inside the widget: above it, or below where there is no room above.
    const box = map.getBoundingClientRect();
    const main = $(".xl-main").getBoundingClientRect();
    const left = box.left - main.left + x + cellWidth / 2 - tip.offsetWidth / 2;
    const above = box.top - main.top + y - tip.offsetHeight - 8;
    const top = above >= -GUTTER.top - 40 ? above : box.top - main.top + y + cellHeight + 8;
    tip.style.left = `${Math.min(Math.max(left, 0), main.width - tip.offsetWidth)}px`;
    tip.style.top = `${top}px`;
    const cell = $("[role=gridcell]");
    cell.parentElement.setAttribute("aria-rowindex", at.layer + 1);
    cell.setAttribute("aria-colindex", at.expert + 1);
    const spoken = Object.values(parts).join(", ");
    setText(cell, spoken);
    if (byKeyboard && root.dataset.spoken !== `${at.layer},${at.expert}`) {
      root.dataset.spoken = `${at.layer},${at.expert}`;
      setText($("[aria-live=polite]"), spoken);
    }
  }

  function moveTo(next, keyboard) {
    at = next;
    byKeyboard = keyboard;
    if (next) map.setAttribute("aria-activedescendant", cellId);
    drawPointer();
  }

  function cellAt(event) {
    const box = map.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left) / box.width) * experts);
    const layer = Math.floor(((event.clientY - box.top) / box.height) * layers);
    return {
      layer: Math.min(Math.max(layer, 0), layers - 1),
      expert: Math.min(Math.max(expert, 0), experts - 1),
    };
  }

  const pointed = (event) => moveTo(cellAt(event), false);
  map.addEventListener("pointermove", pointed, { signal });
  map.addEventListener("pointerdown", pointed, { signal });
  map.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && moveTo(null, false), { signal });
  map.addEventListener("blur", () => moveTo(null, false), { signal });
  map.addEventListener("focus", () => map.matches(":focus-visible") && moveTo(at ?? { layer: 0, expert: 0 }, true), { signal });
  map.addEventListener(
    "keydown",
    (event) => {
      const from = at ?? { layer: 0, expert: 0 };
      const far = event.ctrlKey || event.metaKey;
      const to = {
        ArrowLeft: [0, -1],
        ArrowRight: [0, 1],
        ArrowUp: [-1, 0],
        ArrowDown: [1, 0],
        PageUp: [-10, 0],
        PageDown: [10, 0],
        Home: [far ? -layers : 0, -experts],
        End: [far ? layers : 0, experts],
      }[event.key];
      if (event.key === "Escape") moveTo(null, false);
      if (!to) return;
      event.preventDefault();
      event.stopPropagation();
      const clamp = (value, most) => Math.min(Math.max(value, 0), most);
      moveTo({ layer: clamp(from.layer + to[0], layers - 1), expert: clamp(from.expert + to[1], experts - 1) }, true);
    },
    { signal },
  );

  // Controls.

  function set(name, value) {
    model.set(name, value);
    model.save_changes();
  }

  function showOptions() {
    for (const button of root.querySelectorAll("[data-phase]")) {
      const chosen = button.dataset.phase === model.get("phase");
      button.setAttribute("aria-checked", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    }
    const window = model.get("window");
    const known = window === null || window === undefined || WINDOWS.includes(window);
    if (document.activeElement !== typed) {
      select.value = known ? String(window ?? "") : "other";
      typed.hidden = known;
      if (!known) typed.value = String(window);
    }
    const button = $(".xl-pause");
    button.setAttribute("aria-pressed", String(paused));
    button.textContent = paused ? "Resume" : "Pause";
    schedule();
  }

  $(".xl-segments").addEventListener(
    "click",
    (event) => event.target.dataset.phase && set("phase", event.target.dataset.phase),
    { signal },
  );
  $(".xl-segments").addEventListener(
    "keydown",
    (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const order = Object.keys(PHASES);
      const next = order[(order.indexOf(model.get("phase")) + step + order.length) % order.length];
      set("phase", next);
      $(`[data-phase=${next}]`).focus();
    },
    { signal },
  );
  $(".xl-tools").dataset.lmSuppressShortcuts = "true";
  select.addEventListener(
    "change",
    () => {
      typed.hidden = select.value !== "other";
      if (select.value !== "other") return set("window", select.value === "" ? null : Number(select.value));
      typed.value = String(model.get("window") ?? 1000);
      typed.focus();
      typed.select();
      applyTyped();
    },
    { signal },
  );
  function applyTyped() {
    const tokens = Number(typed.value);
    const valid = Number.isSafeInteger(tokens) && tokens >= 1;
    typed.setAttribute("aria-invalid", String(!valid));
    if (valid) set("window", tokens);
  }
  typed.addEventListener("change", applyTyped, { signal });
  $(".xl-pause").addEventListener(
    "click",
    () => {
      paused = !paused;
      look();
      showOptions();
    },
    { signal },
  );
  model.on("change:phase", showOptions);
  model.on("change:window", showOptions);

  // Size, theme, and whether anybody looks.

  function layout() {
    const width = root.clientWidth;
    if (width === 0) return;
    const narrow = width < NARROW;
    root.classList.toggle("xl-narrow", narrow);
    const room = width - PADDING - GUTTER.left - GUTTER.right - (narrow ? 0 : LEGEND);
    const cellHeight = Math.min(Math.max(Math.floor(420 / layers), 3), 22);
    let cellWidth = Math.min(room / experts, cellHeight * 3, 44);
    const ratio = window.devicePixelRatio;
    if (cellWidth * ratio >= 4) cellWidth = Math.floor(cellWidth * ratio) / ratio;
    size = { cellWidth, cellHeight, width: cellWidth * experts, height: cellHeight * layers };
    root.style.setProperty("--xl-width", `${size.width}px`);
    root.style.setProperty("--xl-height", `${size.height}px`);
    canvas.width = Math.round(size.width * ratio);
    canvas.height = Math.round(size.height * ratio);
    bars.width = Math.round(56 * ratio);
    bars.height = canvas.height;
    axis($(".xl-x"), ticks(experts, 40 / cellWidth), (index) => [`left:${(index + 0.5) * cellWidth}px`, index]);
    axis($(".xl-y"), ticks(layers, 17 / cellHeight), (index) => [`top:${(index + 0.5) * cellHeight}px`, names[index]]);
    draw();
  }

  function dress() {
    theme = isDark(el) ? "dark" : "light";
    root.dataset.theme = theme;
    table = pixels(PALETTE[theme]);
    root.style.setProperty("--xl-gradient", PALETTE[theme].stops.join(","));
    root.style.setProperty("--xl-none", PALETTE[theme].empty);
    root.style.setProperty("--xl-none-line", PALETTE[theme].emptyLine);
    schedule();
  }

  function look() {
    view.looks = visible && !document.hidden && !paused;
    store.look();
  }

  const sizes = new ResizeObserver(() => layout());
  sizes.observe(root);
  const sight = new IntersectionObserver((entries) => {
    visible = entries.at(-1).isIntersecting;
    look();
  });
  sight.observe(root);
  const themes = new MutationObserver(() => requestAnimationFrame(dress));
  for (const node of [document.documentElement, document.body]) {
    themes.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-name", "data-jp-theme-light"] });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress, { signal });
  document.addEventListener("visibilitychange", look, { signal });

  store.add(view);
  dress();
  showOptions();
  layout();

  return () => {
    abort.abort();
    sizes.disconnect();
    sight.disconnect();
    themes.disconnect();
    cancelAnimationFrame(request);
    clearTimeout(timer);
    model.off("change:phase", showOptions);
    model.off("change:window", showOptions);
    view.looks = false;
    store.remove(view);
    root.remove();
  };
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function place(node, left, top, width, height) {
  node.style.cssText = `left:${left}px;top:${top}px;width:${width}px;height:${height}px`;
}

/** Labels of an axis: `where` gives each one's style and text. */
function axis(node, indices, where) {
  node.innerHTML = indices
    .map((index) => where(index))
    .map(([style, text]) => `<span style="${style}">${text}</span>`)
    .join("");
}

/** Whether what lies behind the element is dark: the first ground that is not transparent. */
function isDark(el) {
  for (let node = el; node; node = node.parentElement) {
    const channels = getComputedStyle(node).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [];
    const [r, g, b, alpha = 1] = channels;
    if (channels.length >= 3 && alpha > 0.5) return 0.2126 * r + 0.7152 * g + 0.0722 * b < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}
