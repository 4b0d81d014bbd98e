"use strict";

// Hovering: titles become one quick tooltip. Without this script the browser shows them itself, more slowly.
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
for (const title of document.querySelectorAll("svg title")) {
  title.parentElement.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("pointermove", event => {
  const told = event.target.closest("[data-tip]");
  tip.hidden = !told;
  if (!told) return;
  tip.textContent = told.dataset.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const top = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.transform = `translate(${Math.max(left, 8)}px, ${top}px)`;
});

// Picking: "group:key" marks what shows it and what picks it, everywhere in the page.
function pick(chosen) {
  const group = chosen.split(":")[0] + ":";
  for (const kind of ["shown", "pick"])
    for (const element of document.querySelectorAll(`[data-${kind}^="${group}"]`))
      element.classList.toggle("on", element.dataset[kind] === chosen);
  for (const curve of document.querySelectorAll(`.curve[data-shown="${chosen}"]`)) curve.parentElement.append(curve);
  const option = document.querySelector(`option[value="${chosen}"]`);
  if (option) option.selected = true;
}
document.addEventListener("click", event => {
  const picker = event.target.closest("[data-pick]");
  if (picker) pick(picker.dataset.pick);
});
for (const select of document.querySelectorAll("select")) {
  select.addEventListener("change", () => pick(select.value));
  pick(select.value);
}

// Sorting: numbers by their value, words by their letters; a second click turns the order round.
for (const button of document.querySelectorAll(".sortable th button"))
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
    const turned = head.getAttribute("aria-sort") === "ascending";
    const cell = row => row.cells[column], value = row => cell(row).dataset.value ?? -Number.MAX_VALUE;
    const numbers = [...body.rows].some(row => cell(row).dataset.value !== undefined);
    const rows = [...body.rows].sort((a, b) => numbers ? value(a) - value(b)
      : cell(a).textContent.localeCompare(cell(b).textContent, "en", { numeric: true }));
    body.append(...(turned ? rows.reverse() : rows));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", turned ? "descending" : "ascending");
  });
