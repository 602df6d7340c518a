// ---- The grid of heads, in the order that is chosen; a row is drawn when it comes near the window, one in a frame.

const cells = []; // buttons by row and head
const near = new Set();
const drawn = new Set();
let order = []; // [row, head] of every cell, line by line
let waiting = false;
let observer = null;

const headName = (row, head) => `Layer ${page.layers[row]}, head ${head}`;
const typeOf = (row, head) => page.types?.names[row][head] ?? "";
const titleOf = (row, head) => headName(row, head) + (typeOf(row, head) && ` (${typeOf(row, head)})`);

// What heads are ordered by: the value of a kind, or how far it is above the control's. NaN comes last.
function rankOf(kind, row, head) {
  const value = kind.values[row][head];
  if (value === null) return -Infinity;
  return kind.control ? value - kind.control[row][head] : value;
}

function makeCells() {
  page.layers.forEach((_, row) => {
    cells.push([]);
    for (let head = 0; head < page.heads; head++) {
      const button = element("button", { type: "button", class: "cell unseen", tabindex: "-1" });
      const canvas = element("canvas", { "aria-hidden": "true" });
      if (size <= 64) canvas.className = "crisp";
      button.append(canvas);
      button.addEventListener("click", () => open(row, head));
      cells[row].push(button);
    }
  });
  byId("grid").addEventListener("keydown", (event) => step(event, () => cells[state.row][state.head].focus()));
  byId("grid").style.setProperty("--heads", page.heads);
}

// By layer and head, or from the largest to the smallest value of a kind.
function orderBy(name) {
  const kind = page.types?.kinds.find((each) => each.name === name);
  order = page.layers.flatMap((_, row) => cells[row].map((_, head) => [row, head]));
  if (kind) order.sort((one, other) => rankOf(kind, ...other) - rankOf(kind, ...one) || 0);
  buildGrid(kind);
  const [row, head] = order[0];
  choose(row, head);
}

function buildGrid(kind) {
  const grid = byId("grid");
  grid.replaceChildren();
  grid.setAttribute("aria-label", kind ? `Heads, ordered by ${kind.name}` : "Heads: rows are layers, columns heads");
  if (!kind) grid.append(headings());
  near.clear();
  observer?.disconnect();
  observer = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) {
      const line = Number(target.dataset.line);
      if (isIntersecting) near.add(line);
      else near.delete(line);
    }
    drawSoon();
  }, { rootMargin: "400px" });
  for (let line = 0; line < page.layers.length; line++) {
    const made = element("div", { class: "row", role: "row", "data-line": line });
    const first = line * page.heads;
    const name = kind ? `${first + 1}–${first + page.heads}` : `layer ${page.layers[line]}`;
    made.append(element("span", { role: "rowheader" }, name));
    for (const [row, head] of headsOf(line)) made.append(cellOf(kind, row, head));
    grid.append(made);
    observer.observe(made);
  }
  redraw();
}

const headsOf = (line) => order.slice(line * page.heads, (line + 1) * page.heads);

function headings() {
  const top = element("div", { class: "row", role: "row" });
  top.append(element("span", { role: "columnheader" }, ""));
  for (let head = 0; head < page.heads; head++) {
    top.append(element("span", { role: "columnheader", "aria-label": `Head ${head}` }, page.heads > 14 ? head : `head ${head}`));
  }
  return top;
}

// A head's button; below it its type, and in an order of heads which head it is and its value.
function cellOf(kind, row, head) {
  const cell = element("div", { role: "gridcell" });
  const button = cells[row][head];
  const type = typeOf(row, head) && `, ${typeOf(row, head)}`;
  const rank = kind && rankOf(kind, row, head);
  const number = kind && (rank === -Infinity ? "NaN" : minus(rank.toFixed(3)));
  button.setAttribute("aria-label", `${headName(row, head)}${type}${kind ? `, ${kind.name} ${number}` : ""}: enlarge`);
  cell.append(button);
  if (kind) {
    const which = element("small", { class: "name", "aria-hidden": "true" }, `${page.layers[row]}.${head} `);
    which.append(element("b", {}, number));
    cell.append(which);
  }
  if (page.types) cell.append(element("small", { class: "name type", "aria-hidden": "true" }, typeOf(row, head) || "\u00a0"));
  return cell;
}

function drawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const line = [...near].find((each) => !drawn.has(each));
    if (line === undefined) {
      if (near.size) document.documentElement.dataset.drawn = state.kind; // everything in sight is there
      return;
    }
    drawn.add(line);
    for (const [row, head] of headsOf(line)) draw(cells[row][head].firstChild, state.kind, pairs(state.kind, row, head));
    drawSoon();
  });
}

function choose(row, head) {
  cells[state.row][state.head].tabIndex = -1;
  state.row = row;
  state.head = head;
  state.at = order.findIndex(([otherRow, otherHead]) => otherRow === row && otherHead === head);
  cells[row][head].tabIndex = 0;
}

// Arrow keys, Home and End go from head to head; `then` shows the new one.
function step(event, then) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const inside = (index, length) => Math.max(0, Math.min(length - 1, index));
  const [down, right] = moves[event.key];
  const line = inside(Math.floor(state.at / page.heads) + down, page.layers.length);
  choose(...order[line * page.heads + inside((state.at % page.heads) + right, page.heads)]);
  then();
}

function buildOrders() {
  if (!page.types) return;
  byId("order").append(element("option", { value: "" }, "layer and head"));
  for (const { name, about } of page.types.kinds) byId("order").append(element("option", { value: name }, `${name}: ${about}`));
  byId("order").addEventListener("change", () => orderBy(byId("order").value));
  byId("types").textContent = page.types.about;
  byId("unnamed").textContent = page.types.unnamed;
  byId("unnamed").hidden = !page.types.unnamed;
  byId("ordering").hidden = byId("types").hidden = false;
}
