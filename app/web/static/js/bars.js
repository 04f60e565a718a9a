/** Table of one adapter's answer, with a bar for each number. */

const MAX_BARS = 12;

/** `labels` default to the indices of `values`, which are probabilities if `isProbability`, otherwise any numbers. */
export function barTable({ title, note, values, labels, isProbability }) {
  const order = values.map((_value, index) => index);
  const isLong = values.length > 2 * MAX_BARS;
  if (isLong) order.sort((one, other) => values[other] - values[one]);
  const shown = isLong ? order.slice(0, MAX_BARS) : order;
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const span = isProbability ? 1 : high - low || 1;
  const top = values.indexOf(Math.max(...values));
  const table = document.createElement("table");
  table.className = "answer";
  const caption = table.createCaption();
  const name = document.createElement("span");
  name.className = "wrap";
  name.textContent = title;
  const details = document.createElement("small");
  details.textContent = ` ${note}${isLong ? `, the ${MAX_BARS} largest of ${values.length}` : ""}`;
  caption.append(name, details);
  const head = table.createTHead().insertRow();
  for (const [text, kind] of [["Output", ""], ["", "hide"], [isProbability ? "Probability" : "Value", "number"]]) {
    const cell = document.createElement(kind === "hide" ? "td" : "th");
    if (kind !== "hide") cell.scope = "col";
    cell.className = kind === "number" ? "number" : "";
    cell.textContent = text;
    head.append(cell);
  }
  const body = table.createTBody();
  for (const index of shown) {
    const row = body.insertRow();
    row.classList.toggle("largest", index === top);
    const label = document.createElement("th");
    label.scope = "row";
    label.className = "wrap";
    label.textContent = String(labels?.[index] ?? index);
    const bar = document.createElement("span");
    bar.className = "bar";
    const ink = document.createElement("i");
    ink.style.setProperty("--from", `${(100 * (Math.min(0, values[index]) - (isProbability ? 0 : low))) / span}%`);
    ink.style.setProperty("--long", `${(100 * Math.abs(values[index])) / span}%`);
    bar.append(ink);
    row.append(label);
    row.insertCell().append(bar);
    const number = row.insertCell();
    number.className = "number";
    number.textContent = isProbability ? percent(values[index]) : figure(values[index]);
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
