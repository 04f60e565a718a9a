/** One row, with the answers of several adapters side by side. */
import { call, clearProblem, showProblem } from "./api.js";
import { barTable, percent } from "./bars.js";
import { Chosen } from "./chosen.js";
import { DIGITS } from "./digits.js";
import { Drawing } from "./draw.js";
import { readNumbers } from "./rows.js";

const root = document.getElementById("try");
const at = (name) => root.querySelector(`[data-${name}]`);
const width = Number(root.dataset.width);
const problem = at("problem");
const canvas = document.getElementById("canvas");
const paste = document.getElementById("numbers");
const dataset = document.getElementById("row-dataset");
const number = document.getElementById("row-number");
const named = new Map();
let answered = null;
let waiting = 0;
let asked = 0;

const chosen = new Chosen(at("chosen"), { most: Number(root.dataset.most), changed: soon });
const drawing = canvas && new Drawing(canvas, { changed: drawn, tell: (text) => (at("cell").textContent = text) });
const way = () => root.querySelector("[name=way]:checked").value;

/** Send a request after a moment without changes; the answer to an earlier request is discarded. */
function soon() {
  asked += 1;
  clearTimeout(waiting);
  waiting = setTimeout(() => ask({ quiet: true }), 200);
}

/** The row's values with the other columns of a stored row; null if there is no row yet. */
async function row(quiet) {
  if (way() === "draw") return drawing.empty && quiet ? null : { values: drawing.values };
  if (way() === "paste") return paste.value.trim() === "" && quiet ? null : { values: readNumbers(paste.value, width) };
  if (!dataset) return null;
  return call("GET", `/ui/try/row?${new URLSearchParams({ dataset: dataset.value, row: number.value || "0" })}`);
}

function showStored({ values, beside }) {
  const others = Object.entries(beside).map(([name, value]) => [name, Array.isArray(value) ? value.join(", ") : value]);
  drawing?.show(values);
  at("beside").textContent = others.length === 1 ? `Label: ${others[0][1]}` : others.map((pair) => pair.join(": ")).join(", ");
}

async function ask({ quiet = false } = {}) {
  const mine = ++asked;
  clearProblem(problem, root);
  try {
    const found = await row(quiet);
    if (found === null || mine !== asked) return;
    if (found.beside) showStored(found);
    const adapters = [...chosen.references, ...(document.getElementById("with-base").checked ? [null] : [])];
    if (!adapters.length) throw new Error("Choose an adapter, or the base layer.");
    const answer = await call("POST", "/predict", { adapters, inputs: adapters.map(() => found.values), return: ["outputs", "probabilities"] });
    await Promise.all(answer.adapters.map(learn));
    if (mine !== asked) return;
    answered = adapters.map((reference, place) => ({ reference, version: answer.adapters[answer.row_adapters[place]] ?? null, outputs: answer.outputs[place], probabilities: answer.probabilities[place] }));
    show();
  } catch (error) {
    if (mine === asked) showProblem(problem, error, root);
  }
}

/** Class labels of a version, which never change. */
async function learn({ name, version, digest }) {
  if (named.has(digest)) return;
  const { labels } = await call("GET", `/adapters/${encodeURIComponent(name)}/versions/${version}`);
  named.set(digest, labels);
}

function show() {
  if (!answered) return;
  const share = root.querySelector("[name=shown]:checked").value === "probabilities";
  const tables = answered.map(({ reference, version, outputs, probabilities }) => {
    const labels = version ? named.get(version.digest) : null;
    return barTable({ title: reference ?? "Base layer", note: version ? `version ${version.version}` : "alone", values: share ? probabilities : outputs, labels, share });
  });
  at("answers").replaceChildren(...tables);
  at("said").textContent = answered.map(sentence).join(" · ");
}

function sentence({ reference, version, probabilities }) {
  const most = Math.max(...probabilities);
  const place = probabilities.indexOf(most);
  const label = (version && named.get(version.digest)?.[place]) ?? place;
  return `${reference ?? "Base"}: ${label} (${percent(most)})`;
}

function changeWay() {
  for (const part of root.querySelectorAll("[data-way]")) part.hidden = !part.dataset.way.split(" ").includes(way());
  soon();
}

/** A drawing replaces the stored row. */
function drawn() {
  if (way() === "draw") soon();
  else {
    document.getElementById("way-draw").checked = true;
    changeWay();
  }
}

root.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.add && !chosen.add(button.dataset.add)) showProblem(problem, { message: `${root.dataset.most} adapters at most are compared` });
  if (button.dataset.sample) drawing.values = DIGITS[Number(button.dataset.sample)];
  if ("clear" in button.dataset) drawing.clear();
  if ("ask" in button.dataset) ask();
  if ("random" in button.dataset) {
    number.value = Math.floor(Math.random() * Number(dataset.selectedOptions[0].dataset.rows));
    soon();
  }
});
root.addEventListener("change", (event) => {
  if (event.target.name === "way") changeWay();
  else if (event.target.name === "shown") show();
  else if (event.target.id === "with-base") soon();
});
for (const field of [paste, dataset, number]) field?.addEventListener("input", soon);
changeWay();
