"use strict";

// What Python wrote: the tokens, which layers, how many heads, whether later tokens are hidden, and types of heads.
const page = JSON.parse(document.getElementById("page").textContent);
const size = page.tokens.length;
const LEVELS = 65534;
const BROKEN = 65535; // what is no finite number
// The three ways of looking: a name, a number's name, and what a colour bar is called.
const KINDS = {
  pattern: { title: "Pattern", noun: "weight", bar: "Weight α" },
  scores: { title: "Scores", noun: "score", bar: "Score" },
  weighted: { title: "Weighted", noun: "norm", bar: "‖α v W_O‖" },
};
const state = { kind: "pattern", at: 0, row: 0, head: 0, pinned: size - 1, pinnedKey: null, hovered: null, key: null };
const byId = (id) => document.getElementById(id);

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  made.textContent = text;
  return made;
}

// ---- Values: a block is parsed and a head decoded when it is first looked at.

const blocks = new Map();

function block(id) {
  if (!blocks.has(id)) blocks.set(id, JSON.parse(byId(id).textContent));
  return blocks.get(id);
}

const layerOf = (row) => block(`layer-${page.layers[row]}`);

function decoded(Type, text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Type(bytes.buffer);
}

const keysOf = (query) => (page.causal ? query + 1 : size);
const firstOf = (query) => (page.causal ? (query * (query + 1)) / 2 : query * size);

// Numbers of the pairs that may be seen, query by query, and the ends of their shades.
function pairs(kind, row, head) {
  if (kind === "weighted") return weightedPairs(row, head);
  const { low, high, values } = layerOf(row)[kind][head];
  const number = (level) => (level === BROKEN ? NaN : low + (level / LEVELS) * (high - low));
  return { numbers: Float64Array.from(decoded(Uint16Array, values), number), low, high };
}

// ‖α v W_O‖ = α ‖v W_O‖: a key's norm is the same for all queries.
function weightedPairs(row, head) {
  const { numbers } = pairs("pattern", row, head);
  const norms = decoded(Float32Array, layerOf(row).norms[head]);
  let high = 0;
  for (let query = 0, i = 0; query < size; query++) {
    for (let key = 0; key < keysOf(query); key++, i++) {
      numbers[i] = Number.isFinite(norms[key]) ? numbers[i] * norms[key] : NaN;
      if (numbers[i] > high) high = numbers[i];
    }
  }
  return { numbers, low: 0, high, norm: norms.reduce((most, norm) => (norm > most ? norm : most), 0) };
}

// What a number may be off by, as it is embedded.
function errorOf(kind, { low, high, norm }) {
  return ((kind === "weighted" ? norm : high - low) || 0) / (2 * LEVELS);
}

// The sign of the field; none before what rounds to 0.
const minus = (text) => text.replace(/^-(0\.?0*)$/, "$1").replace("-", "−");

// A number with the digits that are right to one in the last, four at most.
function certain(number, error) {
  const digits = error > 0 ? Math.floor(-Math.log10(2 * error)) : 4;
  return minus(number.toFixed(Math.max(0, Math.min(4, digits))));
}

const numberText = (kind, number, about) => certain(number, errorOf(kind, about));

// An error in one digit that is no lower; nothing for none.
function roundedUp(error) {
  if (!(error > 0)) return "";
  const unit = 10 ** Math.floor(Math.log10(error));
  return String(Number((Math.ceil(error / unit) * unit).toPrecision(1)));
}

// ---- Shades: 256 colours between three, and one for no number.

function coloursOf(place) {
  const style = getComputedStyle(place);
  const [broken, ...stops] = ["--broken", "--low", "--middle", "--high"].map((name) => {
    const number = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
    return [number >> 16, (number >> 8) & 255, number & 255];
  });
  const colours = [];
  for (let i = 0; i < 256; i++) {
    const at = Math.min(Math.floor((2 * i) / 255), 1);
    colours.push(stops[at].map((from, c) => from + Math.round(((2 * i) / 255 - at) * (stops[at + 1][c] - from))));
  }
  return [...colours, broken];
}

let palette = [];
const packed = new Uint32Array(257);

function readColours() {
  palette = coloursOf(document.documentElement);
  palette.forEach(([red, green, blue], i) => { packed[i] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; });
}

// Which colour a number has. Shades of weights and norms grow with the square root, so that small ones are seen.
function shadeOf(kind, number, { low, high }) {
  if (Number.isNaN(number)) return 256;
  const part = high > low ? (number - low) / (high - low) : 0;
  return Math.round(255 * (kind === "scores" ? part : Math.sqrt(part)));
}

// One pixel a pair; what is hidden stays transparent.
function draw(canvas, kind, about, colours = packed) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  for (let query = 0, i = 0; query < size; query++) {
    for (let key = 0; key < keysOf(query); key++) pixels[query * size + key] = colours[shadeOf(kind, about.numbers[i++], about)];
  }
  context.putImageData(image, 0, 0);
}

// Places and words along a colour bar, from 0 to 1.
function ticksOf(kind, ends) {
  if (kind === "pattern") return [0, 0.01, 0.1, 0.25, 0.5, 1].map((weight) => [Math.sqrt(weight), String(weight)]);
  return ends.map((text, index) => [index / (ends.length - 1), text]);
}
