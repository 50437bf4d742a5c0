// The map and the balance beside it, on two canvases.
import { STEPS, pixels } from "./theme.js";
import { balance, position } from "./scale.js";

/** Cells of at least so many pixels of the page, both ways, stand apart and are hatched when they have no tokens. */
const GAP_FROM = 7;
const BALANCE_WIDTH = 56;

/**
 * @typedef {object} Size in pixels of the page
 * @property {number} cellWidth
 * @property {number} cellHeight
 * @property {number} width of the map
 * @property {number} height of the map
 */

export class Painter {
  /**
   * @param {HTMLCanvasElement} canvas of the map @param {HTMLCanvasElement} bars
   * @param {number} layers @param {number} experts
   */
  constructor(canvas, bars, layers, experts) {
    this.canvas = canvas;
    this.bars = bars;
    this.layers = layers;
    this.experts = experts;
    this.cells = new OffscreenCanvas(experts, layers);
    this.image = new ImageData(experts, layers);
    this.words = new Uint32Array(this.image.data.buffer);
    this.drawn = 0;
  }

  /** @param {"light" | "dark"} theme */
  dress(theme) {
    this.colours = PALETTE[theme];
    this.table = pixels(this.colours);
  }

  /** @param {Size} size @param {number} ratio pixels of the screen for one of the page */
  resize(size, ratio) {
    this.size = size;
    this.ratio = ratio;
    this.canvas.width = Math.round(size.width * ratio);
    this.canvas.height = this.bars.height = Math.round(size.height * ratio);
    this.bars.width = Math.round(BALANCE_WIDTH * ratio);
  }

  /** @param {ArrayLike<number>} counts layers x experts */
  draw(counts) {
    const { canvas, cells, size, ratio } = this;
    this.colour(counts);
    cells.getContext("2d").putImageData(this.image, 0, 0);
    const context = canvas.getContext("2d");
    // Cells smaller than a pixel are averaged, larger ones keep their edges.
    context.imageSmoothingEnabled = size.cellWidth * ratio < 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(cells, 0, 0, canvas.width, canvas.height);
    if (Math.min(size.cellWidth, size.cellHeight) >= GAP_FROM) {
      this.drawHatches(context, counts);
      this.drawGaps(context);
    }
    this.drawBalance(balance(counts, this.layers, this.experts));
    this.drawn += 1;
    canvas.dataset.drawn = String(this.drawn);
  }

  clear() {
    for (const canvas of [this.canvas, this.bars]) {
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    }
  }

  /** @param {ArrayLike<number>} counts */
  colour(counts) {
    const { layers, experts, table, words } = this;
    for (let layer = 0; layer < layers; layer++) {
      const [first, last] = [layer * experts, (layer + 1) * experts];
      let total = 0;
      for (let cell = first; cell < last; cell++) total += counts[cell];
      const toRelative = experts / total;
      for (let cell = first; cell < last; cell++) {
        const at = position(counts[cell] * toRelative, PALETTE.span);
        words[cell] = table[at >= 0 ? Math.round(at * (STEPS - 1)) : STEPS];
      }
    }
  }

  drawGaps(context) {
    const { canvas, size, ratio } = this;
    const line = Math.max(1, Math.round(ratio));
    for (let x = 1; x <= this.experts; x++) {
      context.clearRect(Math.round(x * size.cellWidth * ratio) - line, 0, line, canvas.height);
    }
    for (let y = 1; y <= this.layers; y++) {
      context.clearRect(0, Math.round(y * size.cellHeight * ratio) - line, canvas.width, line);
    }
  }

  drawHatches(context, counts) {
    const { size, ratio, experts } = this;
    const [w, h] = [size.cellWidth * ratio, size.cellHeight * ratio];
    context.strokeStyle = this.colours.emptyLine;
    context.lineWidth = ratio;
    context.beginPath();
    for (let cell = 0; cell < this.layers * experts; cell++) {
      if (counts[cell] > 0) continue;
      const [x, y] = [(cell % experts) * w, Math.floor(cell / experts) * h];
      for (let c = 5 * ratio; c < w + h; c += 5 * ratio) {
        context.moveTo(x + Math.max(0, c - h), y + Math.min(c, h));
        context.lineTo(x + Math.min(c, w), y + Math.max(0, c - w));
      }
    }
    context.stroke();
  }

  /** @param {Float64Array} shares one a layer */
  drawBalance(shares) {
    const { bars, size, ratio } = this;
    const context = bars.getContext("2d");
    const gap = size.cellHeight >= 4 ? Math.max(1, Math.round(ratio)) : 0;
    context.clearRect(0, 0, bars.width, bars.height);
    shares.forEach((share, layer) => {
      const top = Math.round(layer * size.cellHeight * ratio);
      const height = Math.round((layer + 1) * size.cellHeight * ratio) - gap - top;
      context.fillStyle = this.colours.track;
      context.fillRect(0, top, bars.width, height);
      context.fillStyle = this.colours.bar;
      context.fillRect(0, top, bars.width * share, height);
    });
  }
}
