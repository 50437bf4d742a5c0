// From counts to words: load relative to uniform load, its scale, and how numbers are written.

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

/** Three significant digits with the unit that fits. @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${Number((seconds * 1000).toPrecision(3))} ms`;
  return `${short(seconds)} s`;
}
