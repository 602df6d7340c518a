// ---- The enlarged head as a picture with axes, a title and a colour bar: light on white, as paper is.

const CELLS = 128; // tokens up to which a pair is a rectangle and a token a label; else one image, and positions
const SCALE = 3; // pixels of a PNG to a unit of the SVG, and fewer where it would be more than MOST across
const MOST = 6000;
const FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif";
const LONGEST = 18; // characters of a label

const rgb = (colour) => `rgb(${colour.join(",")})`;
// Characters as they are seen, an emoji or a letter with its accents being one.
const segmenter = globalThis.Intl?.Segmenter && new Intl.Segmenter("en", { granularity: "grapheme" });
const characters = (text) => (segmenter ? Array.from(segmenter.segment(text), ({ segment }) => segment) : Array.from(text));

function short(token) {
  const seen = characters(token);
  return seen.length > LONGEST ? `${seen.slice(0, LONGEST - 1).join("")}…` : token;
}

function widest(texts, font) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = `${font}px ${FONT}`;
  return Math.max(...texts.map((text) => context.measureText(text).width));
}

// Labels of an axis: [index, text], every token or some positions.
function axisLabels() {
  if (size <= CELLS) return page.tokens.map((token, index) => [index, short(token)]);
  const every = size <= 256 ? 25 : size <= 600 ? 50 : 100;
  return page.tokens.map((_, index) => [index, String(index)]).filter(([index]) => index % every === 0);
}

function makePicture() {
  const { kind, row, head } = state;
  const colours = coloursOf(byId("paper"));
  const cell = size <= 12 ? 32 : size <= 40 ? 16 : size <= CELLS ? 10 : 720 / size;
  const side = cell * size;
  const font = size <= 40 ? 11 : size <= CELLS ? 8.5 : 10;
  const texts = axisLabels();
  const margin = widest(texts.map(([, text]) => text), font) + 30;
  const title = `${page.name}: ${titleOf(row, head).toLowerCase()}. ${KINDS[kind].title}`;
  const [left, top] = [margin, margin + 24];
  const bar = left + side + 16;
  const ticks = ticksOf(kind, endsOf(kind));
  const width = Math.max(bar + 14 + 8 + widest(ticks.map(([, text]) => text), 10) + 26, widest([title], 14) + 16);
  const height = top + side + 12;
  const about = { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, "font-family": FONT, role: "img" };
  const picture = svg("svg", about);
  picture.append(svg("title", {}, title), svg("desc", {}, byId("made").textContent.trim()), hatching(),
    svg("rect", { width, height, fill: "#fff" }), svg("text", { x: 8, y: 20, "font-size": 14, "font-weight": "bold" }, title));
  picture.append(matrixOf(colours, left, top, cell, side), axesOf(texts, left, top, cell, side, font),
    barOf(colours, ticks, bar, top, side, width));
  return picture;
}

function hatching() {
  const pattern = svg("pattern", { id: "hidden", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(-45)" });
  pattern.append(svg("rect", { width: 5, height: 5, fill: "#f5f6f8" }), svg("rect", { width: 1, height: 5, fill: "#d3d8df" }));
  const definitions = svg("defs");
  definitions.append(pattern);
  return definitions;
}

// What is hidden is hatched; every other pair has a rectangle of its own, up to a size.
function matrixOf(colours, left, top, cell, side) {
  const group = svg("g", { id: "matrix-cells", transform: `translate(${left} ${top})`, "shape-rendering": "crispEdges" });
  if (page.causal) group.append(svg("rect", { width: side, height: side, fill: "url(#hidden)" }));
  const about = large[state.kind];
  if (size <= CELLS) {
    for (let query = 0, i = 0; query < size; query++) {
      for (let key = 0; key < keysOf(query); key++, i++) {
        const fill = rgb(colours[shadeOf(state.kind, about.numbers[i], about)]);
        group.append(svg("rect", { x: key * cell, y: query * cell, width: cell, height: cell, fill }));
      }
    }
  } else {
    const canvas = document.createElement("canvas");
    const light = Uint32Array.from(colours, ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0);
    draw(canvas, state.kind, about, light);
    group.append(svg("image", { width: side, height: side, href: canvas.toDataURL(), "image-rendering": "pixelated" }));
  }
  group.append(svg("rect", { width: side, height: side, fill: "none", stroke: "#59616c" }));
  return group;
}

function axesOf(texts, left, top, cell, side, font) {
  const group = svg("g", { "font-size": font, fill: "#1b1f24" });
  for (const [index, text] of texts) {
    const [x, y] = [left + (index + 0.5) * cell, top + (index + 0.5) * cell];
    group.append(svg("text", { class: "query", x: left - 5, y: y + font / 3, "text-anchor": "end" }, text));
    group.append(svg("text", { class: "key", transform: `translate(${x + font / 3} ${top - 5}) rotate(-90)` }, text));
  }
  const unit = size <= CELLS ? "" : " (position)";
  group.append(svg("text", { "text-anchor": "middle", "font-size": 12, transform: `translate(14 ${top + side / 2}) rotate(-90)` }, `Query${unit}`));
  group.append(svg("text", { "text-anchor": "middle", "font-size": 12, x: left + side / 2, y: 40 }, `Key${unit}`));
  return group;
}

function barOf(colours, ticks, x, top, side, width) {
  const group = svg("g", { "font-size": 10, fill: "#1b1f24" });
  const steps = svg("linearGradient", { id: "shades", x1: 0, x2: 0, y1: 1, y2: 0 });
  [[0, 0], [0.5, 127], [1, 255]].forEach(([offset, index]) => steps.append(svg("stop", { offset, "stop-color": rgb(colours[index]) })));
  const definitions = svg("defs");
  definitions.append(steps);
  group.append(definitions, svg("rect", { x, y: top, width: 14, height: side, fill: "url(#shades)", stroke: "#59616c" }));
  for (const [place, text] of ticks) {
    const y = top + side * (1 - place);
    group.append(svg("line", { x1: x + 14, x2: x + 18, y1: y, y2: y, stroke: "#59616c" }));
    group.append(svg("text", { class: "tick", x: x + 20, y: y + 3.5 }, text));
  }
  const end = x + 22 + widest(ticks.map(([, text]) => text), 10) + 14;
  group.append(svg("text", { "text-anchor": "middle", "font-size": 12, transform: `translate(${Math.min(end, width - 4)} ${top + side / 2}) rotate(-90)` }, KINDS[state.kind].bar));
  return group;
}

function save(blob, ending) {
  const link = element("a", {
    download: `${page.name} layer ${page.layers[state.row]} head ${state.head} ${state.kind}`.replace(/[^\p{L}\p{N}.]+/gu, "-") + `.${ending}`,
    href: URL.createObjectURL(blob),
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// What XML cannot hold is named, as in the page: control characters and halves of a pair.
const NOT_XML = /[^\t\n\r\u{20}-\u{d7ff}\u{e000}-\u{fffd}\u{10000}-\u{10ffff}]/gu;
const named = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

function sourceOf(picture) {
  const source = new XMLSerializer().serializeToString(picture).replace(NOT_XML, named);
  return `<?xml version="1.0" encoding="UTF-8"?>\n${source}\n`;
}

// The picture's pixels, as a PNG; rejected where the browser cannot make them.
async function pngOf(picture) {
  const [width, height] = ["width", "height"].map((side) => Number(picture.getAttribute(side)));
  const scale = Math.min(SCALE, MOST / Math.max(width, height));
  const image = new Image();
  await new Promise((resolve, reject) => {
    image.addEventListener("load", resolve);
    image.addEventListener("error", reject);
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(sourceOf(picture))}`;
  });
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject()), "image/png"));
}

async function savePng() {
  const unsaved = byId("unsaved");
  unsaved.hidden = true;
  try {
    save(await pngOf(makePicture()), "png");
  } catch {
    unsaved.textContent = "This browser could not make the PNG; save the picture as SVG.";
    unsaved.hidden = false;
  }
}

byId("save-svg").addEventListener("click", () => save(new Blob([sourceOf(makePicture())], { type: "image/svg+xml" }), "svg"));
byId("save-png").addEventListener("click", savePng);
