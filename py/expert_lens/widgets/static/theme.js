// Light or dark, and the colours of the scale in each.

export const STEPS = 256;

/**
 * The scale of a theme as STEPS packed pixels, then one for "no tokens".
 * @param {{stops: string[], empty: string}} theme
 * @returns {Uint32Array} RGBA as canvas image data holds it (little-endian)
 */
export function pixels(theme) {
  const pack = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const parse = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const channels = theme.stops.map(parse);
  const table = new Uint32Array(STEPS + 1);
  for (let step = 0; step < STEPS; step++) {
    const at = (step / (STEPS - 1)) * (channels.length - 1);
    const low = Math.min(Math.floor(at), channels.length - 2);
    table[step] = pack(channels[low].map((value, c) => Math.round(value + (at - low) * (channels[low + 1][c] - value))));
  }
  table[STEPS] = pack(parse(theme.empty));
  return table;
}

/**
 * Whether what lies behind the element is dark: the first ground that is not transparent.
 * @param {Element} el
 */
function isDark(el) {
  for (let node = el; node; node = node.parentElement) {
    const channels = getComputedStyle(node).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [];
    const [r, g, b, alpha = 1] = channels;
    if (channels.length >= 3 && alpha > 0.5) return 0.2126 * r + 0.7152 * g + 0.0722 * b < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/**
 * Call `dress` with "light" or "dark" now and whenever it changes.
 * @param {Element} el @param {(theme: "light" | "dark") => void} dress @param {AbortSignal} signal
 */
export function watchTheme(el, dress, signal) {
  let known = "";
  const look = () => {
    const theme = isDark(el) ? "dark" : "light";
    if (theme !== known) dress((known = theme));
  };
  const later = () => requestAnimationFrame(look);
  const changes = new MutationObserver(later);
  for (const node of [document.documentElement, document.body]) changes.observe(node, { attributes: true });
  signal.addEventListener("abort", () => changes.disconnect());
  // JupyterLab names its new theme before that theme's style sheet is there.
  document.addEventListener("load", later, { signal, capture: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later, { signal });
  look();
}
