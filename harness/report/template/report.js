"use strict";
// Sorting and filters; the page is whole without them.
document.documentElement.classList.add("js");

function compare(one, other) {
  if (one === other) return 0;
  if (one === "") return 1; // what is undefined comes last, whichever way
  if (other === "") return -1;
  const [a, b] = [Number(one), Number(other)];
  return Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other) : a - b;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[index].dataset.order;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        const order = compare(x, y);
        return up || x === "" || y === "" ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

for (const form of document.querySelectorAll(".filters")) {
  const table = document.getElementById(form.dataset.table);
  const count = form.querySelector("output");
  const selects = [...form.querySelectorAll("select")];
  const apply = () => {
    let shown = 0;
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      row.hidden = selects.some((select) => select.value !== "" && row.dataset[select.name] !== select.value.slice(1));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} lines`;
  };
  for (const select of selects) {
    select.value = select.dataset.first ?? "";
    select.addEventListener("change", apply);
  }
  form.querySelector("button").addEventListener("click", () => {
    for (const select of selects) select.value = "";
    apply();
  });
  apply();
}
