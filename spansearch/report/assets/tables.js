// Tables that can be sorted by their heads.

/* columns [{name, of: row -> value to sort by, show: row -> text or element, number, words}] */
function table(caption, columns, rows, sort = null, isChosen = () => false) {
  const body = el("tbody");
  let by = sort;
  const heads = columns.map((column, k) => el("th", { scope: "col", class: column.number ? "number" : null },
    column.of ? el("button", { on: { click: () => { by = { column: k, down: by?.column === k ? !by.down : false }; write(); } } }, column.name) : column.name));
  function write() {
    const ordered = [...rows];
    if (by) {
      const value = columns[by.column].of;
      ordered.sort((a, b) => compare(value(a), value(b)) * (by.down ? -1 : 1));
    }
    heads.forEach((head, k) => head.setAttribute("aria-sort", by?.column === k ? (by.down ? "descending" : "ascending") : "none"));
    replace(body, ordered.map((row) => el("tr", { class: isChosen(row) ? "chosen" : null },
      columns.map((column) => el("td", { class: column.number ? "number" : column.words ? "words" : null }, column.show(row))))));
  }
  write();
  return el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}

function compare(a, b) {
  if (!known(a) || !known(b)) return known(b) - known(a) || 0;
  return typeof a === "string" ? a.localeCompare(String(b)) : a - b;
}

const spliceWords = (splice) => `${splice.start} → ${splice.stop}: ${splice.family}${splice.size ? `, ${splice.unit} ${splice.size}` : ""}`;
const recipeWords = (trial) => trial.recipe.map(spliceWords).join("; ") || "-";
