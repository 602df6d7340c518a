
"use strict";

const dialog = document.getElementById("large");
const picture = dialog.querySelector("img");
const title = dialog.querySelector("span");
const file = dialog.querySelector("a");
const size = dialog.querySelector(".size");

// As large as it is, or as the window lets it be; the point at these fractions of it stays in sight.
function resize(full, across = 0.5, down = 0.5) {
  picture.classList.toggle("full", full);
  size.textContent = full ? "Fit the window" : "Full size";
  dialog.scrollTo(across * picture.clientWidth - dialog.clientWidth / 2, down * picture.clientHeight - dialog.clientHeight / 2);
}

// Without this script, and with the keys that open tabs, the links open the files.
for (const link of document.querySelectorAll("a.enlarge")) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    const small = link.querySelector("img");
    picture.src = small.src;
    picture.alt = small.alt;
    picture.width = small.width && small.getAttribute("width");
    picture.height = small.height && small.getAttribute("height");
    title.textContent = link.closest("figure").querySelector("h3").textContent;
    file.href = link.href;
    dialog.showModal();
    resize(false, 0, 0);
  });
}
picture.addEventListener("click", (event) => {
  resize(!picture.classList.contains("full"), event.offsetX / picture.clientWidth, event.offsetY / picture.clientHeight);
});
size.addEventListener("click", () => resize(!picture.classList.contains("full")));
dialog.addEventListener("click", (event) => {
  if (!event.target.closest("a, img, .size")) dialog.close(); // gives the focus back, as Escape does
});

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // not allowed here: select it, and copy what is selected
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return;
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
