// From counts to colours and words: load relative to uniform load, its scale, and how numbers are written.

const STEPS = 256;

/**
 * The scale of a theme as STEPS packed pixels, then one for "no tokens".
 * @param {{stops: string[], empty: string}} theme
 * @returns {Uint32Array} RGBA as canvas image data holds it (little-endian)
 */
export function pixels(theme) {
  const table = new Uint32Array(STEPS + 1);
  const channels = theme.stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  for (let step = 0; step < STEPS; step++) {
    const at = (step / (STEPS - 1)) * (channels.length - 1);
    const low = Math.min(Math.floor(at), channels.length - 2);
    const [r, g, b] = channels[low].map((value, c) => Math.round(value + (at - low) * (channels[low + 1][c] - value)));
    table[step] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(theme.empty.slice(at, at + 2), 16));
  table[STEPS] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  return table;
}

/**
 * Where on the scale a load lies.
 * @param {number} relative share of the layer's choices times the number of experts
 * @param {number} span powers of two on each side of 1
 * @returns {number} 0 (lowest) to 1 (highest); NaN for no tokens
 */
export function position(relative, span) {
  if (!(relative > 0)) return NaN;
  return Math.min(Math.max((Math.log2(relative) + span) / (2 * span), 0), 1);
}

/**
 * Colour every cell.
 * @param {ArrayLike<number>} counts @param {number} layers @param {number} experts
 * @param {Uint32Array} table of `pixels` @param {number} span @param {Uint32Array} target layers x experts
 */
export function colour(counts, layers, experts, table, span, target) {
  for (let layer = 0; layer < layers; layer++) {
    const first = layer * experts;
    const last = first + experts;
    let total = 0;
    for (let cell = first; cell < last; cell++) total += counts[cell];
    const toRelative = experts / total;
    for (let cell = first; cell < last; cell++) {
      const at = position(counts[cell] * toRelative, span);
      target[cell] = table[at >= 0 ? Math.round(at * (STEPS - 1)) : STEPS];
    }
  }
}

/**
 * What there is to say of one cell.
 * @param {ArrayLike<number>} counts @param {number} experts @param {number} layer @param {number} expert
 * @returns {{tokens: number, share: number, relative: number}}
 */
export function describe(counts, experts, layer, expert) {
  let total = 0;
  for (let cell = layer * experts; cell < (layer + 1) * experts; cell++) total += counts[cell];
  const tokens = counts[layer * experts + expert];
  const share = total > 0 ? tokens / total : 0;
  return { tokens, share, relative: share * experts };
}

/**
 * Each layer's balance: exp(entropy of the shares) / experts. 1: all the same; 1/experts: one gets all; 0: no tokens.
 * @param {ArrayLike<number>} counts @param {number} layers @param {number} experts
 * @returns {Float64Array}
 */
export function balance(counts, layers, experts) {
  const result = new Float64Array(layers);
  for (let layer = 0; layer < layers; layer++) {
    let total = 0;
    let sum = 0;
    for (let cell = layer * experts; cell < (layer + 1) * experts; cell++) {
      const count = counts[cell];
      if (count > 0) {
        total += count;
        sum += count * Math.log(count);
      }
    }
    result[layer] = total > 0 ? Math.exp(Math.log(total) - sum / total) / experts : 0;
  }
  return result;
}

/**
 * Indices to label: every step-th, with the roundest step of at least `least` cells.
 * @param {number} count @param {number} least @returns {number[]}
 */
export function ticks(count, least) {
  let step = 1;
  while (step < least) step *= 2;
  return Array.from({ length: Math.ceil(count / step) }, (_, index) => index * step);
}

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** @param {number} value */
export const integer = (value) => whole.format(value);

/** Three significant digits. @param {number} value */
export const short = (value) =>
  value === 0 ? "0" : value >= 100 ? whole.format(value) : value.toFixed(value >= 10 ? 1 : value >= 0.1 ? 2 : 3);

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${short(seconds * 1000).replace(/\.?0+$/, "")} ms`;
  return `${short(seconds)} s`;
}
