// What is said about the picture: its state above, the figures below, and what is missing in its place.
import { duration, integer, short } from "./scale.js";

/**
 * One word for the state, and its kind, which the style sheet colours.
 * @param {import("./store.js").Store} store @param {boolean} paused @param {string} failure
 * @returns {[kind: string, text: string]}
 */
export function stateOf(store, paused, failure) {
  const facts = store.frame?.facts;
  if (failure) return ["failed", "failed"];
  if (facts && facts.state !== "running") return ["ended", facts.state];
  if (!store.connected) return ["ended", "closed: no kernel"];
  if (!facts || !store.live) return ["waiting", "waiting for the kernel"];
  return paused ? ["paused", "paused"] : ["running", "running"];
}

/**
 * What stands in place of a map without tokens; `still.py` says the same.
 * @param {any} facts of the frame @param {string} phase
 */
export function nothing(facts, phase) {
  const kind = phase === "both" || !facts.tokens ? "tokens" : `${phase} tokens`;
  return facts.state === "running" ? `No ${kind} yet` : `No ${kind}`;
}

/** What to warn of beside the controls. */
function warningOf(frame, live, { phase, window, failure }) {
  if (failure) return failure;
  if (!frame) return "";
  const { facts, planes } = frame;
  if (facts.error) return facts.error;
  const agrees = planes.includes(phase) && (facts.window ?? null) === (window ?? null);
  if (agrees) return "";
  if (facts.state === "running" && live) return "The new choice applies when the kernel hears it";
  return `Kept: ${planes.length > 1 ? "all phases" : planes[0]}, ${facts.window ? `last ${integer(facts.window)}` : "all"} tokens`;
}

/** @returns {[key: string, value: string, warning: string][]} */
function figures(facts, running, rate) {
  const entries = [
    ["tokens", integer(facts.tokens), ""],
    ["speed", `${running && rate >= 0 ? short(rate) : "–"} tokens/s`, ""],
    ["lag", running ? duration(facts.lag) : "–", ""],
    ["dropped", integer(facts.dropped), facts.dropped > 0 ? "did not fit into the arena" : ""],
  ];
  if (facts.lost > 0) entries.push(["lost", integer(facts.lost), "were overwritten before they were read"]);
  entries.push(["missing", integer(facts.missing), ""]);
  return entries;
}

/**
 * @param {HTMLElement} root @param {import("./store.js").Store} store @param {import("./codec.js").Frame | null} frame
 * @param {{paused: boolean, phase: string, window: number | null, failure: string}} view
 */
export function showStatus(root, store, frame, view) {
  const [kind, text] = stateOf(store, view.paused, view.failure);
  root.dataset.state = kind;
  setText(root.querySelector(".xl-state span"), text);
  setText(root.querySelector(".xl-note"), warningOf(frame, store.live, view));
  if (!frame) return;
  const status = root.querySelector(".xl-status");
  const entries = figures(frame.facts, kind === "running", store.rate);
  const keys = entries.map(([key]) => key).join(" ");
  if (status.dataset.keys !== keys) {
    status.dataset.keys = keys;
    status.innerHTML = entries
      .map(([key]) => `<span data-key="${key}"><span>${key}</span> <b></b> <small></small></span>`)
      .join("");
  }
  for (const [key, value, warning] of entries) {
    const entry = status.querySelector(`[data-key=${key}]`);
    setText(entry.querySelector("b"), value);
    setText(entry.querySelector("small"), warning);
    entry.classList.toggle("xl-warning", warning !== "");
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
