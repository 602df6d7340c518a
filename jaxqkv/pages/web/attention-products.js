// ---- q_i k_i of one query and one key, dimension by dimension.

const LARGEST = 8; // rows of the table of dimensions
const HEIGHT = 100; // of the chart, in its own unit
let vectors = null; // q and k of the large head, [position][dimension], and what products are scaled by
const bars = [];

function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  made.textContent = text;
  return made;
}

// A position is a row of levels, each between the ends of its dimension.
function readRows({ low, high, values }) {
  const [lows, highs] = [low, high].map((text) => decoded(Float32Array, text));
  const levels = decoded(Uint16Array, values);
  const width = lows.length;
  return page.tokens.map((_, position) => Float64Array.from(lows, (from, i) => {
    const level = levels[position * width + i];
    return level === BROKEN ? NaN : from + (level / LEVELS) * (highs[i] - from);
  }));
}

function readVectors() {
  if (page.leftOut) return;
  const { q, k, scale } = block(`vectors-${page.layers[state.row]}`);
  vectors = { q: readRows(q[state.head]), k: readRows(k[state.head]), scale };
}

function buildProducts() {
  if (page.leftOut) {
    byId("products").replaceChildren(element("p", { class: "soft" }, page.leftOut));
    return;
  }
  byId("key").append(element("option", { value: "" }, "the first of the table"));
  page.tokens.forEach((token, index) => byId("key").append(element("option", { value: index }, `${token} (${index})`)));
  byId("key").addEventListener("change", () => {
    state.pinnedKey = byId("key").value === "" ? null : Number(byId("key").value);
    state.hovered = state.key = null;
    read();
  });
  const width = page.headDim;
  const chart = byId("chart");
  chart.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  for (let i = 0; i < width; i++) {
    const bar = svg("rect", { x: i + 0.08, width: 0.84 });
    bar.append(svg("title"));
    bars.push(bar);
  }
  chart.append(...bars, svg("line", { x1: 0, x2: width, class: "zero" }));
  byId("last-dimension").textContent = width - 1;
}

function pinKey(key) {
  state.pinnedKey = key;
  if (!page.leftOut) byId("key").value = key;
}

function factorText() {
  const root = Math.abs(vectors.scale * Math.sqrt(page.headDim) - 1) < 1e-6;
  return root ? `/√${page.headDim}` : vectors.scale === 1 ? "" : ` · ${Number(vectors.scale.toPrecision(4))}`;
}

// The products, and beside them a chart and a table of the largest.
function readProducts(query, key) {
  if (page.leftOut) return;
  const [q, k] = [vectors.q[query], vectors.k[key]];
  const products = Array.from(q, (each, i) => each * k[i] * vectors.scale);
  const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
  const score = (number) => numberText("scores", number, large.scores);
  const [positive, negative] = [products.filter((each) => each > 0), products.filter((each) => each < 0)].map(sum);
  const pair = `${quoted(query)} (${query}) to ${quoted(key)} (${key})`;
  byId("sum").textContent = `From ${pair}: the ${q.length} products q_i·k_i${factorText()} sum to the score, ${score(sum(products))}; ` +
    `the positive ones to ${score(positive)}, the negative ones to ${score(negative)}.`;
  drawProducts(q, k, products);
  const largest = [...products.keys()].sort((one, other) => Math.abs(products[other]) - Math.abs(products[one]) || 0);
  byId("chart").setAttribute("aria-label", `Products of ${pair} by dimension; the largest, ${digits(products[largest[0]])}, is in dimension ${largest[0]}`);
  byId("dimensions").replaceChildren(...largest.slice(0, LARGEST).map((i) => {
    const line = element("tr");
    line.append(...[i, ...[q[i], k[i], products[i]].map(digits)].map((text) => element("td", {}, text)));
    return line;
  }));
}

const digits = (number) => minus(number.toFixed(3));

function drawProducts(q, k, products) {
  const finite = products.filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...finite), Math.max(0, ...finite)];
  const place = (number) => (HEIGHT * (high - number)) / (high - low || 1);
  products.forEach((product, i) => {
    const top = place(Math.max(0, product)) || 0;
    bars[i].setAttribute("y", top);
    bars[i].setAttribute("height", (place(Math.min(0, product)) || 0) - top);
    bars[i].setAttribute("class", product < 0 ? "negative" : "positive");
    bars[i].firstChild.textContent = `dimension ${i}: q ${digits(q[i])} · k ${digits(k[i])}${factorText()} = ${minus(product.toFixed(5))}`;
  });
  const zero = byId("chart").lastChild;
  for (const y of ["y1", "y2"]) zero.setAttribute(y, place(0));
  byId("highest").textContent = digits(high);
  byId("lowest").textContent = digits(low);
}
