"use strict";
// Puts a button into each header of a table; pressing it sorts the rows. Without this script the headers are
// plain text and the rows stand in the order in which they were drawn.
(() => {
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  // A cell sorts by its data-value where it has one (a number, or empty where there is none), else by its text.
  const key = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    if (value === undefined) return cell.textContent.trim();
    return value === "" ? null : Number(value);
  };

  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b));

  // Missing values come last in both directions; equal rows keep the order they had.
  const sorted = (rows, column, sign) => {
    const keyed = rows.map((row) => [key(row, column), row]);
    const order = ([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    return keyed.sort(order).map(([, row]) => row);
  };

  const sort = (table, header) => {
    const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const body = table.tBodies[0];
    body.append(...sorted([...body.rows], header.cellIndex, direction === "ascending" ? 1 : -1));
  };

  for (const table of document.querySelectorAll("table")) {
    if (table.tBodies[0].rows.length < 2) continue;
    for (const header of table.tHead.rows[0].cells) {
      if (header.dataset.sort === "no") continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sort(table, header));
      header.append(button);
    }
  }
})();
