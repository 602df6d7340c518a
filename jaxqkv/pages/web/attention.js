// ---- Which kind, in which colours.

const EXPLAINED = {
  pattern: "Pattern: the weights α of each query, which sum to 1. Shades grow with their square root, so that small weights are seen.",
  scores: "Scores: QKᵀ/√head_dim before the softmax. Each head has its own range of shades, from its lowest to its highest score.",
  weighted: "Weighted: ‖α v W_O‖, the norm of what a query takes from each key: its weight α, times the norm of the key's value v " +
    "(with its bias) after the head's output matrix. Each head has its own range of shades, from 0 to its largest norm; they grow with the square root.",
};

function drawLegend(legend, ends) {
  legend.lastElementChild.replaceChildren(...ticksOf(state.kind, ends).map(([place, text]) => {
    const tick = element("span", {}, minus(text));
    tick.style.left = `${100 * place}%`;
    return tick;
  }));
}

function show(kind) {
  state.kind = kind;
  for (const input of document.querySelectorAll(".kinds input")) input.checked = input.value === kind;
  byId("explained").textContent = EXPLAINED[kind];
  drawLegend(byId("legend"), kind === "weighted" ? ["0", "¼", "head's largest"] : ["lowest of each head", "highest"]);
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
makeCells();
buildOrders();
buildLarge();
buildProducts();
listenLarge();
orderBy("");
show("pattern");
