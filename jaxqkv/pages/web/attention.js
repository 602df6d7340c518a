
"use strict";

// What Python wrote: the tokens, which layers, how many heads, and whether later tokens are hidden.
const page = JSON.parse(document.getElementById("page").textContent);
const size = page.tokens.length;
const LEVELS = 65534;
const BROKEN = 65535; // what is no finite number
const SHOWN = 10; // rows of the table
const state = { kind: "pattern", row: 0, head: 0, pinned: size - 1, hovered: null, key: null };
const byId = (id) => document.getElementById(id);
const dialog = byId("large");

// ---- Values: a layer is parsed and a head decoded when it is first looked at.

const layers = new Map();

function entry(kind, row, head) {
  if (!layers.has(row)) layers.set(row, JSON.parse(byId(`layer-${page.layers[row]}`).textContent));
  return layers.get(row)[kind][head];
}

// 16-bit levels of the pairs that may be seen, query by query.
function levels(kind, row, head) {
  const text = atob(entry(kind, row, head).values);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Uint16Array(bytes.buffer);
}

const keysOf = (query) => (page.causal ? query + 1 : size);
const firstOf = (query) => (page.causal ? (query * (query + 1)) / 2 : query * size);

// The large head's levels of both kinds, and the number that a level stands for.
let large = null;

function value(kind, query, key) {
  const { low, high } = entry(kind, state.row, state.head);
  const level = large[kind][firstOf(query) + key];
  return level === BROKEN ? NaN : low + (level / LEVELS) * (high - low);
}

// ---- Shades: 256 colours between three and one for no number, and which of them a level has.

const palette = new Uint8Array(257 * 3);
const packed = new Uint32Array(257);
const shade = { pattern: new Uint16Array(BROKEN + 1), scores: new Uint16Array(BROKEN + 1) };
for (let level = 0; level <= LEVELS; level++) {
  shade.pattern[level] = Math.round(255 * Math.sqrt(level / LEVELS)); // small weights are seen too
  shade.scores[level] = Math.round((255 * level) / LEVELS);
}
shade.pattern[BROKEN] = shade.scores[BROKEN] = 256;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const [broken, ...stops] = ["--broken", "--low", "--middle", "--high"].map((name) => {
    const number = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
    return [number >> 16, (number >> 8) & 255, number & 255];
  });
  for (let i = 0; i < 257; i++) {
    const place = (2 * i) / 255;
    const at = Math.min(Math.floor(place), 1);
    for (let c = 0; c < 3; c++) {
      const between = Math.round(stops[at][c] + (place - at) * (stops[at + 1][c] - stops[at][c]));
      palette[3 * i + c] = i < 256 ? between : broken[c];
    }
    packed[i] = ((255 << 24) | (palette[3 * i + 2] << 16) | (palette[3 * i + 1] << 8) | palette[3 * i]) >>> 0;
  }
}

// One pixel a pair; what is hidden stays transparent.
function draw(canvas, kind, values) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  for (let query = 0, i = 0; query < size; query++) {
    for (let key = 0; key < keysOf(query); key++) pixels[query * size + key] = packed[shade[kind][values[i++]]];
  }
  context.putImageData(image, 0, 0);
}

// ---- The grid: every row is drawn when it comes near the window, one in a frame.

const cells = [];
const near = new Set();
const drawn = new Set();
let waiting = false;

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  made.textContent = text;
  return made;
}

const headName = (row, head) => `Layer ${page.layers[row]}, head ${head}`;

function buildGrid() {
  const grid = byId("grid");
  grid.style.setProperty("--heads", page.heads);
  const top = element("div", { class: "row", role: "row" });
  top.append(element("span", { role: "columnheader" }, ""));
  for (let head = 0; head < page.heads; head++) {
    top.append(element("span", { role: "columnheader", "aria-label": `Head ${head}` }, page.heads > 14 ? head : `head ${head}`));
  }
  grid.append(top);
  const observer = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) {
      const row = Number(target.dataset.row);
      if (isIntersecting) near.add(row);
      else near.delete(row);
    }
    drawSoon();
  }, { rootMargin: "400px" });
  page.layers.forEach((layer, row) => {
    const line = element("div", { class: "row", role: "row", "data-row": row });
    line.append(element("span", { role: "rowheader" }, `layer ${layer}`));
    cells.push([]);
    for (let head = 0; head < page.heads; head++) {
      const label = `${headName(row, head)}: enlarge`;
      const button = element("button", { type: "button", class: "cell unseen", tabindex: "-1", "aria-label": label });
      const canvas = element("canvas", { "aria-hidden": "true" });
      if (size <= 64) canvas.className = "crisp";
      button.append(canvas);
      button.addEventListener("click", () => open(row, head));
      const cell = element("div", { role: "gridcell" });
      cell.append(button);
      line.append(cell);
      cells[row].push(button);
    }
    grid.append(line);
    observer.observe(line);
  });
  grid.addEventListener("keydown", (event) => step(event, () => cells[state.row][state.head].focus()));
  choose(0, 0);
}

function drawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const row = [...near].find((each) => !drawn.has(each));
    if (row === undefined) {
      if (near.size) document.documentElement.dataset.drawn = state.kind; // everything in sight is there
      return;
    }
    drawn.add(row);
    cells[row].forEach((cell, head) => draw(cell.firstChild, state.kind, levels(state.kind, row, head)));
    drawSoon();
  });
}

function choose(row, head) {
  cells[state.row][state.head].tabIndex = -1;
  state.row = row;
  state.head = head;
  cells[row][head].tabIndex = 0;
}

// Arrow keys, Home and End go from head to head; `then` shows the new one.
function step(event, then) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const inside = (index, length) => Math.max(0, Math.min(length - 1, index));
  const [down, right] = moves[event.key];
  choose(inside(state.row + down, page.layers.length), inside(state.head + right, page.heads));
  then();
}

// ---- One head, large.

const items = page.tokens.map((token, index) => {
  const item = element("li", { role: "option", id: `token-${index}`, "aria-selected": "false" });
  item.append(element("bdi", {}, token), element("small"));
  return item;
});
const labels = { rows: [], keys: [] };

function buildLarge() {
  byId("tokens").append(...items);
  if (size <= 40) {
    document.querySelector(".picture").classList.add("labelled");
    for (const side of ["rows", "keys"]) {
      labels[side] = page.tokens.map((token) => element("bdi", {}, token));
      document.querySelector(`.${side}`).append(...labels[side]);
    }
  }
  if (size <= 512) byId("matrix").className = "crisp";
}

function open(row, head) {
  choose(row, head);
  dialog.showModal();
  byId("large-title").focus();
  showLarge();
  dialog.scrollTo(0, 0);
}

function showLarge() {
  large = { pattern: levels("pattern", state.row, state.head), scores: levels("scores", state.row, state.head) };
  byId("large-title").textContent = headName(state.row, state.head);
  byId("matrix").setAttribute("aria-label", `${state.kind} of ${headName(state.row, state.head)}, ${size} by ${size} tokens`);
  draw(byId("matrix"), state.kind, large[state.kind]);
  const { low, high } = entry("scores", state.row, state.head);
  drawLegend(byId("large-legend"), [scoreText(low), scoreText(high)]);
  const error = Number(((high - low) / (2 * LEVELS)).toPrecision(1));
  byId("precision").textContent =
    `Weights are embedded to within 0.000008; scores of this head, from ${scoreText(low)} to ${scoreText(high)}, to within ${error}. ` +
    "The arrow keys go to other heads, in the list of tokens to other tokens; Escape closes.";
  read();
}

const weightText = (weight) => weight.toFixed(4);

function scoreText(score) {
  const { low, high } = entry("scores", state.row, state.head);
  const digits = high > low ? Math.floor(-Math.log10((high - low) / (2 * LEVELS))) : 4;
  return score.toFixed(Math.max(0, Math.min(4, digits))).replace("-", "−");
}

// Small, under a token: .412, 0 for what rounds to nothing; −1.25.
function shortText(kind, number) {
  if (kind === "scores") return number.toFixed(2).replace("-", "−");
  return number < 0.0005 ? "0" : number.toFixed(3).replace(/^0/, "");
}

const quoted = (index) => `“${page.tokens[index]}”`;

// What the token under the pointer, or else the chosen one, attends to.
function read() {
  const { kind } = state;
  const query = state.hovered ?? state.pinned;
  const count = keysOf(query);
  items.forEach((item, key) => {
    const seen = key < count;
    item.classList.toggle("unseen", !seen);
    item.setAttribute("aria-selected", String(key === query));
    item.lastChild.textContent = seen ? shortText(kind, value(kind, query, key)) : "";
    const at = seen ? 3 * shade[kind][large[kind][firstOf(query) + key]] : -1;
    const [red, green, blue] = palette.subarray(at, at + 3);
    item.style.background = seen ? `rgb(${red} ${green} ${blue})` : "";
    item.style.color = seen ? (0.299 * red + 0.587 * green + 0.114 * blue > 128 ? "#000" : "#fff") : "";
  });
  byId("tokens").setAttribute("aria-activedescendant", `token-${query}`);
  labels.rows.forEach((label, index) => label.classList.toggle("on", index === query));
  labels.keys.forEach((label, index) => label.classList.toggle("on", index === state.key));
  const mark = document.querySelector(".mark");
  mark.style.top = `${(100 * query) / size}%`;
  mark.style.height = `${100 / size}%`;

  const rank = (key) => (Number.isNaN(value(kind, query, key)) ? -Infinity : value(kind, query, key));
  const order = [...Array(count).keys()].sort((one, other) => rank(other) - rank(one) || 0);
  const top = order.slice(0, SHOWN);
  byId("said").textContent = `${quoted(query)}, position ${query}, ` + (state.key !== null && state.key < count
    ? `to ${quoted(state.key)}, position ${state.key}: weight ${weightText(value("pattern", query, state.key))}, score ${scoreText(value("scores", query, state.key))}.`
    : state.key !== null
      ? `does not see ${quoted(state.key)}, position ${state.key}: it comes later.`
      : rank(top[0]) === -Infinity
        ? `has no ${kind === "pattern" ? "weight" : "score"} that is a number.`
      : kind === "pattern"
        ? `attends most to ${quoted(top[0])}, weight ${weightText(value("pattern", query, top[0]))}.`
        : `has its highest score, ${scoreText(value("scores", query, top[0]))}, with ${quoted(top[0])}.`);
  const total = top.reduce((sum, key) => sum + value("pattern", query, key), 0);
  byId("most").textContent = `${kind === "pattern" ? "Largest weights" : "Highest scores"} of ${quoted(query)}` +
    (count > SHOWN ? `; the other ${count - SHOWN} tokens have weight ${weightText(Math.max(0, 1 - total))} together` : "");
  document.querySelector("tbody").replaceChildren(...top.map((key) => {
    const line = element("tr");
    const name = element("td");
    name.append(element("bdi", {}, page.tokens[key]));
    line.append(name, element("td", {}, key), element("td", {}, weightText(value("pattern", query, key))),
      element("td", {}, scoreText(value("scores", query, key))));
    return line;
  }));
}

function point(hovered, key = null) {
  if (state.hovered === hovered && state.key === key) return;
  state.hovered = hovered;
  state.key = key;
  read();
}

function pin(query) {
  state.pinned = Math.max(0, Math.min(size - 1, query));
  state.hovered = state.key = null;
  read();
}

function listenLarge() {
  const tokens = byId("tokens");
  const matrix = byId("matrix");
  const tokenAt = (event) => items.indexOf(event.target.closest("li"));
  tokens.addEventListener("pointerover", (event) => { if (tokenAt(event) >= 0) point(tokenAt(event)); });
  tokens.addEventListener("pointerleave", () => point(null));
  tokens.addEventListener("click", (event) => { if (tokenAt(event) >= 0) pin(tokenAt(event)); });
  const cellAt = (event) => {
    const box = matrix.getBoundingClientRect();
    const index = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor((offset / length) * size)));
    return [index(event.clientY - box.top, box.height), index(event.clientX - box.left, box.width)];
  };
  matrix.addEventListener("pointermove", (event) => point(...cellAt(event)));
  matrix.addEventListener("pointerleave", () => point(null));
  matrix.addEventListener("click", (event) => {
    const [query, key] = cellAt(event);
    pin(query);
    point(query, key);
  });
  tokens.addEventListener("keydown", (event) => {
    const places = { ArrowLeft: state.pinned - 1, ArrowRight: state.pinned + 1, ArrowUp: state.pinned - 1, ArrowDown: state.pinned + 1, Home: 0, End: size - 1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    event.stopPropagation();
    pin(places[event.key]);
    items[state.pinned].scrollIntoView({ block: "nearest" });
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.type !== "radio") step(event, showLarge);
  });
  const next = (by) => {
    const at = state.row * page.heads + state.head + by;
    if (at < 0 || at >= page.layers.length * page.heads) return;
    choose(Math.floor(at / page.heads), at % page.heads);
    showLarge();
  };
  byId("previous").addEventListener("click", () => next(-1));
  byId("next").addEventListener("click", () => next(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => cells[state.row][state.head].focus());
}

// ---- Which kind, in which colours.

const WEIGHTS = [0, 0.01, 0.1, 0.25, 0.5, 1];

function drawLegend(legend, ends) {
  const ticks = state.kind === "pattern"
    ? WEIGHTS.map((weight) => [Math.sqrt(weight), String(weight)])
    : [[0, ends[0]], [1, ends[1]]];
  legend.lastElementChild.replaceChildren(...ticks.map(([place, text]) => {
    const tick = element("span", {}, text.replace("-", "−"));
    tick.style.left = `${100 * place}%`;
    return tick;
  }));
}

function show(kind) {
  state.kind = kind;
  for (const input of document.querySelectorAll(".kinds input")) input.checked = input.value === kind;
  byId("explained").textContent = kind === "pattern"
    ? "Pattern: the weights of each query, which sum to 1. Shades grow with their square root, so that small weights are seen."
    : "Scores: QKᵀ/√head_dim before the softmax. Each head has its own range of shades, from its lowest to its highest score.";
  drawLegend(byId("legend"), ["lowest of each head", "highest"]);
  redraw();
}

function redraw() {
  delete document.documentElement.dataset.drawn;
  drawn.clear();
  drawSoon();
  if (dialog.open) showLarge();
}

for (const note of document.querySelectorAll(".hatched")) note.hidden = !page.causal;
for (const input of document.querySelectorAll(".kinds input")) {
  input.addEventListener("change", () => show(input.value));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours();
  redraw();
});
readColours();
buildGrid();
buildLarge();
listenLarge();
show("pattern");
