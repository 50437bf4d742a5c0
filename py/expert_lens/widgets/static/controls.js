// Which tokens are counted: phase and window. Both are the model's, so all views of a widget agree.

const PHASES = { both: "Both", prefill: "Prefill", decode: "Decode" };
const WINDOWS = [256, 1024, 4096, 16384];

/**
 * @param {HTMLElement} root @param {any} model @param {() => void} changed @param {AbortSignal} signal
 */
export function addControls(root, model, changed, signal) {
  const $ = (/** @type {string} */ selector) => /** @type {any} */ (root.querySelector(selector));
  const segments = $(".xl-segments");
  const select = $(".xl-window select");
  const typed = $(".xl-window input");

  const set = (/** @type {string} */ name, /** @type {unknown} */ value) => {
    model.set(name, value);
    model.save_changes();
  };

  for (const [phase, label] of Object.entries(PHASES)) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.dataset.phase = phase;
    button.textContent = label;
    segments.append(button);
  }
  segments.addEventListener("click", ({ target }) => target.dataset.phase && set("phase", target.dataset.phase), { signal });
  segments.addEventListener(
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

  const last = (/** @type {number} */ tokens) => `Last ${tokens.toLocaleString("en-US")} tokens`;
  select.append(
    new Option("All tokens", ""),
    ...WINDOWS.map((tokens) => new Option(last(tokens), String(tokens))),
    new Option("Last …", "other"),
  );
  const apply = () => {
    const tokens = Number(typed.value);
    const valid = Number.isSafeInteger(tokens) && tokens >= 1;
    typed.setAttribute("aria-invalid", String(!valid));
    if (valid) set("window", tokens);
  };
  select.addEventListener(
    "change",
    () => {
      typed.parentElement.hidden = select.value !== "other";
      if (select.value !== "other") return set("window", select.value === "" ? null : Number(select.value));
      typed.value = String(model.get("window") ?? 1000);
      typed.focus();
      typed.select();
      apply();
    },
    { signal },
  );
  typed.addEventListener("change", () => select.value === "other" && apply(), { signal });
  typed.addEventListener("keydown", (event) => event.key === "Enter" && apply(), { signal });

  const show = () => {
    for (const button of segments.children) {
      const chosen = button.dataset.phase === model.get("phase");
      button.setAttribute("aria-checked", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    }
    const window = model.get("window") ?? null;
    if (document.activeElement !== typed) {
      const known = window === null || WINDOWS.includes(window);
      select.value = known ? String(window ?? "") : "other";
      typed.parentElement.hidden = known;
      if (!known) typed.value = String(window);
    }
    changed();
  };
  model.on("change:phase", show);
  model.on("change:window", show);
  signal.addEventListener("abort", () => {
    model.off("change:phase", show);
    model.off("change:window", show);
  });
  show();
}
