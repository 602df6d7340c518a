// ---- One head, large.

const SHOWN = 10; // rows of the table
const dialog = byId("large");
const items = page.tokens.map((token, index) => {
  const item = element("li", { role: "option", id: `token-${index}`, "aria-selected": "false" });
  item.append(element("bdi", {}, token), element("small"));
  return item;
});
const labels = { rows: [], keys: [] };
let large = null; // its pairs, by kind

const value = (kind, query, key) => large[kind].numbers[firstOf(query) + key];
const textOf = (kind, query, key) => kind === "pattern" ? value(kind, query, key).toFixed(4) : numberText(kind, value(kind, query, key), large[kind]);

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
  const { kind, row, head } = state;
  large = Object.fromEntries(Object.keys(KINDS).map((each) => [each, pairs(each, row, head)]));
  byId("large-title").textContent = titleOf(row, head);
  byId("matrix").setAttribute("aria-label", `${KINDS[kind].title} of ${headName(row, head)}, ${size} by ${counted(size, "token")}`);
  draw(byId("matrix"), kind, large[kind]);
  drawLegend(byId("large-legend"), endsOf(kind));
  const { low, high } = large.scores;
  const [score, norm] = ["scores", "weighted"].map((each) => roundedUp(errorOf(each, large[each])) || "0");
  byId("precision").textContent =
    `Weights are embedded to within 0.000008; scores of this head, from ${numberText("scores", low, large.scores)} to ` +
    `${numberText("scores", high, large.scores)}, to within ${score}; norms, up to ${numberText("weighted", large.weighted.high, large.weighted)}, to within ${norm}. ` +
    "The arrow keys go to other heads, in the list of tokens to other tokens; Escape closes.";
  byId("unsaved").hidden = true;
  showTypes();
  readVectors();
  read();
}

// Numbers at the ends of the colour bar; and a quarter of the largest, in the middle of shades that grow with the root.
function endsOf(kind) {
  const { low, high } = large[kind];
  const ends = (kind === "weighted" ? [high / 4, high] : [low, high]).map((end) => numberText(kind, end, large[kind]));
  return kind === "weighted" ? ["0", ...ends] : ends;
}

function showTypes() {
  if (!page.types) return;
  const at = (values) => { const number = values[state.row][state.head]; return number === null ? "NaN" : minus(number.toFixed(3)); };
  byId("type").textContent = page.types.kinds
    .map((kind) => `${kind.name} ${at(kind.values)}${kind.control ? ` (control ${at(kind.control)})` : ""}`).join(" · ");
  byId("type").hidden = false;
}

// Small, under a token: .412, 0 for what rounds to nothing; −1.25.
function shortText(kind, number) {
  if (kind !== "pattern") return minus(number.toFixed(2));
  return number < 0.0005 ? "0" : number.toFixed(3).replace(/^0/, "");
}

const quoted = (index) => `“${page.tokens[index]}”`;
const rank = (kind, query, key) => (Number.isNaN(value(kind, query, key)) ? -Infinity : value(kind, query, key));

// What the token under the pointer, or else the chosen one, attends to.
function read() {
  const { kind } = state;
  const query = state.hovered ?? state.pinned;
  const count = keysOf(query);
  const ranked = [...Array(count).keys()].sort((one, other) => rank(kind, query, other) - rank(kind, query, one) || 0);
  const pair = [state.key, state.pinnedKey, ranked[0]].find((key) => key !== null && key < count);
  readTokens(query);
  readSentence(query, ranked[0]);
  readTable(query, ranked);
  readProducts(query, pair);
  labels.rows.forEach((label, index) => label.classList.toggle("on", index === query));
  labels.keys.forEach((label, index) => label.classList.toggle("on", index === (state.key ?? state.pinnedKey)));
  const mark = document.querySelector(".mark");
  mark.style.top = `${(100 * query) / size}%`;
  mark.style.height = `${100 / size}%`;
}

function readTokens(query) {
  const { kind } = state;
  items.forEach((item, key) => {
    const seen = key < keysOf(query);
    item.classList.toggle("unseen", !seen);
    item.setAttribute("aria-selected", String(key === query));
    item.lastChild.textContent = seen ? shortText(kind, value(kind, query, key)) : "";
    const [red, green, blue] = seen ? palette[shadeOf(kind, value(kind, query, key), large[kind])] : [];
    item.style.background = seen ? `rgb(${red} ${green} ${blue})` : "";
    item.style.color = seen ? (0.299 * red + 0.587 * green + 0.114 * blue > 128 ? "#000" : "#fff") : "";
  });
  byId("tokens").setAttribute("aria-activedescendant", `token-${query}`);
}

function readSentence(query, top) {
  const { kind, key } = state;
  const most = () => ({
    pattern: `attends most to ${quoted(top)}, weight ${textOf(kind, query, top)}.`,
    scores: `has its highest score, ${textOf(kind, query, top)}, with ${quoted(top)}.`,
    weighted: `takes most from ${quoted(top)}, norm ${textOf(kind, query, top)}.`,
  })[kind];
  let sentence;
  if (key !== null && key >= keysOf(query)) sentence = `does not see ${quoted(key)}, position ${key}: it comes later.`;
  else if (key !== null) {
    sentence = `to ${quoted(key)}, position ${key}: ` +
      Object.entries(KINDS).map(([each, { noun }]) => `${noun} ${textOf(each, query, key)}`).join(", ") + ".";
  } else sentence = rank(kind, query, top) === -Infinity ? `has no ${KINDS[kind].noun} that is a number.` : most();
  byId("said").textContent = `${quoted(query)}, position ${query}, ${sentence}`;
}

function readTable(query, ranked) {
  const top = ranked.slice(0, SHOWN);
  const total = top.reduce((sum, key) => sum + value("pattern", query, key), 0);
  const named = { pattern: "Largest weights", scores: "Highest scores", weighted: "Largest norms" }[state.kind];
  byId("most").textContent = `${named} of ${quoted(query)}` + (ranked.length > SHOWN
    ? `; the weights of ${counted(ranked.length - SHOWN, "other token")} sum to ${Math.max(0, 1 - total).toFixed(4)}` : "");
  byId("keys").replaceChildren(...top.map((key) => {
    const line = element("tr");
    const name = element("td");
    name.append(element("bdi", {}, page.tokens[key]));
    line.append(name, element("td", {}, key), ...Object.keys(KINDS).map((kind) => element("td", {}, textOf(kind, query, key))));
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
  const tokenAt = (event) => items.indexOf(event.target.closest("li"));
  tokens.addEventListener("pointerover", (event) => { if (tokenAt(event) >= 0) point(tokenAt(event)); });
  tokens.addEventListener("pointerleave", () => point(null));
  tokens.addEventListener("click", (event) => { if (tokenAt(event) >= 0) pin(tokenAt(event)); });
  tokens.addEventListener("keydown", (event) => {
    const places = { ArrowLeft: state.pinned - 1, ArrowRight: state.pinned + 1, ArrowUp: state.pinned - 1, ArrowDown: state.pinned + 1, Home: 0, End: size - 1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    event.stopPropagation();
    pin(places[event.key]);
    items[state.pinned].scrollIntoView({ block: "nearest" });
  });
  listenMatrix(byId("matrix"));
  dialog.addEventListener("keydown", (event) => {
    if (event.target.type !== "radio" && event.target.tagName !== "SELECT") step(event, showLarge);
  });
  const next = (by) => {
    if (!order[state.at + by]) return;
    choose(...order[state.at + by]);
    showLarge();
  };
  byId("previous").addEventListener("click", () => next(-1));
  byId("next").addEventListener("click", () => next(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => cells[state.row][state.head].focus());
}

function listenMatrix(matrix) {
  const cellAt = (event) => {
    const box = matrix.getBoundingClientRect();
    const index = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor((offset / length) * size)));
    return [index(event.clientY - box.top, box.height), index(event.clientX - box.left, box.width)];
  };
  matrix.addEventListener("pointermove", (event) => point(...cellAt(event)));
  matrix.addEventListener("pointerleave", () => point(null));
  matrix.addEventListener("click", (event) => {
    const [query, key] = cellAt(event);
    if (key < keysOf(query)) pinKey(key);
    pin(query);
    point(query, key);
  });
}
