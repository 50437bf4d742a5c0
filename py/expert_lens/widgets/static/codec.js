// The bytes of one frame. `frames.py` is the other side and says what they are.

const MAGIC = 0x31464c58; // "XLF1", little-endian

const FORMATS = { u2: Uint16Array, u4: Uint32Array, f8: Float64Array };

/**
 * @typedef {object} Frame
 * @property {number} layers
 * @property {number} experts
 * @property {string[]} planes
 * @property {Record<string, any>} facts what the header says
 * @property {(plane: string) => ArrayLike<number>} counts layers x experts numbers, layer by layer
 */

/**
 * Read a frame where it lies in its buffer. Throws when the bytes are not a whole frame.
 * @param {ArrayBuffer | ArrayBufferView} message
 * @returns {Frame}
 */
export function decode(message) {
  const view = ArrayBuffer.isView(message)
    ? new DataView(message.buffer, message.byteOffset, message.byteLength)
    : new DataView(message);
  if (view.byteLength < 8 || view.getUint32(0, true) !== MAGIC) throw new Error("not a frame of expert_lens");
  const start = 8 + view.getUint32(4, true);
  if (start > view.byteLength) throw new Error("the frame ends in its header");
  const text = new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + 8, start - 8));
  const facts = JSON.parse(text);
  const Format = FORMATS[facts.dtype];
  if (!Format) throw new Error(`unknown number format ${facts.dtype}`);
  const [planes, layers, experts] = facts.shape;
  const size = layers * experts;
  if (start + planes * size * Format.BYTES_PER_ELEMENT !== view.byteLength) {
    throw new Error(`the frame has ${view.byteLength - start} bytes of counts for ${facts.shape} of ${facts.dtype}`);
  }
  const at = view.byteOffset + start;
  const numbers =
    at % Format.BYTES_PER_ELEMENT === 0
      ? new Format(view.buffer, at, planes * size)
      : new Format(view.buffer.slice(at, at + planes * size * Format.BYTES_PER_ELEMENT));
  const counts = (/** @type {string} */ plane) => {
    const first = facts.planes.indexOf(plane) * size;
    return numbers.subarray(first, first + size);
  };
  return { layers, experts, planes: facts.planes, facts, counts };
}
