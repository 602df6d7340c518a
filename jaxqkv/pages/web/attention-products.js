// ---- q_i k_i of one query and one key, dimension by dimension.

const LARGEST = 8; // rows of the table of dimensions
const HEIGHT = 100; // of the chart, in its own unit
let vectors = null; // q and k of the large head, as `readRows` has them, and what products are scaled by
const bars = [];

function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  made.textContent = text;
  return made;
}

// A position is a row of levels, each between the ends of its dimension, and off by half a level at most.
function readRows({ low, high, values }) {
  const [lows, highs] = [low, high].map((text) => decoded(Float32Array, text));
  const levels = decoded(Uint16Array, values);
  const width = lows.length;
  const rows = page.tokens.map((_, position) => Float64Array.from(lows, (from, i) => {
    const level = levels[position * width + i];
    return level === BROKEN ? NaN : from + (level / LEVELS) * (highs[i] - from);
  }));
  return { rows, errors: Float64Array.from(lows, (from, i) => (highs[i] - from) / (2 * LEVELS)) };
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

// Each dimension's q, k and product, and what each may be off by, as q and k are embedded.
function productsOf(query, key) {
  return Array.from({ length: page.headDim }, (_, i) => {
    const [q, k] = [vectors.q.rows[query][i], vectors.k.rows[key][i]];
    const [qError, kError] = [vectors.q.errors[i], vectors.k.errors[i]];
    const error = Math.abs(vectors.scale) * (Math.abs(q) * kError + Math.abs(k) * qError + qError * kError);
    return { i, q, k, product: q * k * vectors.scale, qError, kError, error };
  });
}

const total = (numbers) => numbers.reduce((sum, each) => sum + each, 0);

// The score, which is the sum of the products up to what these and it are rounded by, in the model and in the page.
function sumText(pair, query, key, all) {
  const products = all.map(({ product }) => product);
  const error = total(all.map((each) => each.error));
  const score = value("scores", query, key);
  const within = roundedUp(Math.max(error + errorOf("scores", large.scores), Math.abs(total(products) - score)));
  const part = (sign) => (products.some(Number.isNaN) ? NaN : total(products.filter((each) => sign * each > 0)));
  return `From ${pair}: the ${counted(all.length, "product")} q_i·k_i${factorText()} sum to the score, ` +
    `${textOf("scores", query, key)}${within && `, to within ${within}`}; ` +
    `the positive ones to ${certain(part(1), error)}, the negative ones to ${certain(part(-1), error)}.`;
}

// The products, and beside them a chart and a table of the largest.
function readProducts(query, key) {
  if (page.leftOut) return;
  const all = productsOf(query, key);
  const pair = `${quoted(query)} (${query}) to ${quoted(key)} (${key})`;
  byId("sum").textContent = sumText(pair, query, key, all);
  drawProducts(all);
  const largest = [...all].sort((one, other) => Math.abs(other.product) - Math.abs(one.product) || 0);
  byId("chart").setAttribute("aria-label", `Products of ${pair} by dimension; the largest, ${certain(largest[0].product, largest[0].error)}, is in dimension ${largest[0].i}`);
  byId("dimensions").replaceChildren(...largest.slice(0, LARGEST).map((each) => {
    const line = element("tr");
    line.append(...[each.i, ...textsOf(each)].map((text) => element("td", {}, text)));
    return line;
  }));
}

const textsOf = ({ q, k, product, qError, kError, error }) => [certain(q, qError), certain(k, kError), certain(product, error)];

function drawProducts(all) {
  const finite = all.filter(({ product }) => Number.isFinite(product));
  const [low, high] = [Math.min(0, ...finite.map(({ product }) => product)), Math.max(0, ...finite.map(({ product }) => product))];
  const place = (number) => (HEIGHT * (high - number)) / (high - low || 1);
  for (const each of all) {
    const top = place(Math.max(0, each.product)) || 0;
    const [q, k, product] = textsOf(each);
    const bar = bars[each.i];
    bar.setAttribute("y", top);
    bar.setAttribute("height", (place(Math.min(0, each.product)) || 0) - top);
    bar.setAttribute("class", each.product < 0 ? "negative" : "positive");
    bar.firstChild.textContent = `dimension ${each.i}: q ${q} · k ${k}${factorText()} = ${product}`;
  }
  const zero = byId("chart").lastChild;
  for (const y of ["y1", "y2"]) zero.setAttribute(y, place(0));
  const error = Math.max(0, ...finite.map((each) => each.error));
  byId("highest").textContent = certain(high, error);
  byId("lowest").textContent = certain(low, error);
}
