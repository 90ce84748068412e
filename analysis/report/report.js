"use strict";

// Tables: a heading is a button that sorts by its column.
for (const table of document.querySelectorAll("table.sortable")) {
  const [head, ...rows] = table.rows;
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
  [...head.cells].forEach((cell, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      const compare = (a, b) => {
        const x = value(a, i), y = value(b, i);
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
        return down ? -order : order;
      };
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].append(...rows.sort(compare));
    });
  });
}

// A link to what is folded away unfolds it.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();

// Charts.
const source = document.getElementById("explore-data");
if (source) explore(JSON.parse(source.textContent));

function explore(charts) {
  const filters = document.getElementById("filters");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  // Columns of names by number and of numbers become rows.
  const rows = (columns) => {
    const names = Object.keys(columns);
    const get = names.map((name) => {
      const column = columns[name];
      return Array.isArray(column) ? (i) => column[i] : (i) => column.names[column.codes[i]];
    });
    const first = columns[names[0]];
    const length = (Array.isArray(first) ? first : first.codes).length;
    return Array.from({ length }, (_, i) => Object.fromEntries(names.map((name, k) => [name, get[k](i)])));
  };
  for (const chart of Object.values(charts)) chart.rows = rows(chart.columns);

  const config = () => {
    const [text, line] = dark.matches ? ["#e6e6e6", "#3a3f45"] : ["#1a1a1a", "#ddd"];
    const words = { labelColor: text, titleColor: text };
    return {
      aria: false, background: null, font: "system-ui, sans-serif", view: { stroke: null }, legend: { ...words, orient: "bottom", columns: 6 },
      axis: { ...words, gridColor: line, domainColor: line, tickColor: line, labelLimit: 260 },
    };
  };

  async function draw(name) {
    const { spec } = charts[name];
    const place = document.getElementById("chart-" + name);
    const { view } = await vegaEmbed(place, { ...spec, datasets: { [name]: charts[name].rows } }, {
      actions: false, renderer: "svg", config: config(), ast: true, logLevel: 1,
    });
    place.querySelector("svg").setAttribute("aria-hidden", "true"); // "as a table" says the same
    views.set(name, view);
    set(name);
  }

  function set(name) {
    const view = views.get(name);
    const chart = charts[name];
    for (const filter of chart.filters) view.signal(filter + "_", filters.elements[filter].value);
    view.runAsync();
    const folded = document.querySelector(`details.rows[data-chart="${name}"]`);
    if (folded.open) list(name, folded);
  }

  // The rows that a chart shows: those that fit the menus.
  function list(name, folded) {
    const chart = charts[name];
    const most = 500;
    const fits = (row) => chart.filters.every((filter) => {
      const wanted = filters.elements[filter].value;
      return wanted === chart.everything || String(row[filter]) === wanted;
    });
    const found = chart.rows.filter(fits);
    const names = Object.keys(chart.columns);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const column of names) head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: column }));
    const body = table.createTBody();
    for (const row of found.slice(0, most)) {
      const line = body.insertRow();
      for (const column of names) line.insertCell().textContent = row[column] ?? "";
    }
    const place = folded.querySelector("div");
    place.replaceChildren(table);
    if (found.length > most) {
      place.append(Object.assign(document.createElement("p"), { textContent: `The first ${most} of ${found.length} rows; choose more above.` }));
    }
  }

  for (const folded of document.querySelectorAll("details.rows")) {
    folded.addEventListener("toggle", () => { if (folded.open) list(folded.dataset.chart, folded); });
  }
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("change", () => views.forEach((_, name) => set(name)));
  const all = () => Object.keys(charts).forEach(draw);
  dark.addEventListener("change", all);
  all();
}
