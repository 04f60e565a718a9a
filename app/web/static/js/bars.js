/** One adapter's answer as a table whose numbers have bars. */

const SHOWN = 12;

/** `values` under their `labels` (their places where there are none): probabilities where `share`, else numbers of either sign. */
export function barTable({ title, note, values, labels, share }) {
  const order = values.map((_value, place) => place);
  const long = values.length > 2 * SHOWN;
  if (long) order.sort((one, other) => values[other] - values[one]);
  const shown = long ? order.slice(0, SHOWN) : order;
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const span = share ? 1 : high - low || 1;
  const top = values.indexOf(Math.max(...values));
  const table = document.createElement("table");
  table.className = "answer";
  const caption = table.createCaption();
  const name = document.createElement("span");
  name.className = "wrap";
  name.textContent = title;
  const small = document.createElement("small");
  small.textContent = ` ${note}${long ? `, the ${SHOWN} largest of ${values.length}` : ""}`;
  caption.append(name, small);
  const head = table.createTHead().insertRow();
  for (const [text, kind] of [["Output", ""], ["", "hide"], [share ? "Probability" : "Value", "number"]]) {
    const cell = document.createElement(kind === "hide" ? "td" : "th");
    if (kind !== "hide") cell.scope = "col";
    cell.className = kind === "number" ? "number" : "";
    cell.textContent = text;
    head.append(cell);
  }
  const body = table.createTBody();
  for (const place of shown) {
    const row = body.insertRow();
    row.classList.toggle("most", place === top);
    const label = document.createElement("th");
    label.scope = "row";
    label.className = "wrap";
    label.textContent = String(labels?.[place] ?? place);
    const bar = document.createElement("span");
    bar.className = "bar";
    const ink = document.createElement("i");
    ink.style.setProperty("--from", `${(100 * (Math.min(0, values[place]) - (share ? 0 : low))) / span}%`);
    ink.style.setProperty("--long", `${(100 * Math.abs(values[place])) / span}%`);
    bar.append(ink);
    row.append(label);
    row.insertCell().append(bar);
    const number = row.insertCell();
    number.className = "number";
    number.textContent = share ? percent(values[place]) : figure(values[place]);
  }
  return table;
}

export function percent(value) {
  return `${(100 * value).toFixed(value > 0.0005 && value < 0.9995 ? 1 : 0)} %`;
}

function figure(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}
