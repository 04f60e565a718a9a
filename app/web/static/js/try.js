/** The answers of several adapters to one row. */
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
const labelsByDigest = new Map();
const baseLabels = JSON.parse(root.dataset.labels);
let answers = null;
let timer = 0;
let latestRequest = 0;

const chosen = new Chosen(at("chosen"), { maxAdapters: Number(root.dataset.maxAdapters), onChange: compareSoon });
const drawing = canvas && new Drawing(canvas, { onChange: useDrawing, onMove: (text) => (at("cell").textContent = text) });
const source = () => root.querySelector("[name=source]:checked").value;

/** Compare after a moment without changes; the answer to an earlier request is discarded. */
function compareSoon() {
  latestRequest += 1;
  clearTimeout(timer);
  timer = setTimeout(() => compare({ quiet: true }), 200);
}

/** Return the row's values, with the other columns of a stored row; null if there is no row yet. */
async function readRow(quiet) {
  if (source() === "draw") return drawing.isEmpty && quiet ? null : { values: drawing.values };
  if (source() === "paste") return paste.value.trim() === "" && quiet ? null : { values: readNumbers(paste.value, width) };
  if (!dataset) return null;
  return call("GET", `/ui/try/row?${new URLSearchParams({ dataset: dataset.value, row: number.value || "0" })}`);
}

function showStoredRow({ values, other_columns: columns }) {
  const others = Object.entries(columns).map(([name, value]) => [name, Array.isArray(value) ? value.join(", ") : value]);
  drawing?.show(values);
  at("other-columns").textContent = others.length === 1 ? `Label: ${others[0][1]}` : others.map((pair) => pair.join(": ")).join(", ");
}

async function compare({ quiet = false } = {}) {
  const request = ++latestRequest;
  clearProblem(problem, root);
  try {
    const row = await readRow(quiet);
    if (row === null || request !== latestRequest) return;
    if (row.other_columns) showStoredRow(row);
    const adapters = [...chosen.references, ...(document.getElementById("with-base").checked ? [null] : [])];
    if (!adapters.length) throw new Error("Choose an adapter or the base layer.");
    const answer = await call("POST", "/predict", { adapters, inputs: adapters.map(() => row.values), return: ["outputs", "probabilities"] });
    await Promise.all(answer.adapters.map(loadLabels));
    if (request !== latestRequest) return;
    answers = adapters.map((reference, index) => ({
      reference,
      version: answer.adapters[answer.row_adapters[index]] ?? null,
      outputs: answer.outputs[index],
      probabilities: answer.probabilities[index],
    }));
    showAnswers();
  } catch (error) {
    if (request === latestRequest) showProblem(problem, error, root);
  }
}

/** Load the class labels of a version, which never change. */
async function loadLabels({ name, version, digest }) {
  if (labelsByDigest.has(digest)) return;
  const { labels } = await call("GET", `/adapters/${encodeURIComponent(name)}/versions/${version}`);
  labelsByDigest.set(digest, labels);
}

/** Return the labels of a version; those of the base layer for the base layer, and for a version without its own. */
function labelsOf(version) {
  return (version && labelsByDigest.get(version.digest)) ?? baseLabels;
}

function showAnswers() {
  if (!answers) return;
  const isProbability = root.querySelector("[name=numbers]:checked").value === "probabilities";
  const tables = answers.map(({ reference, version, outputs, probabilities }) => {
    const labels = labelsOf(version);
    const values = isProbability ? probabilities : outputs;
    return barTable({ title: reference ?? "Base layer", note: version ? `version ${version.version}` : "without an adapter", values, labels, isProbability });
  });
  at("answers").replaceChildren(...tables);
  at("summary").textContent = answers.map(summarize).join(" · ");
}

function summarize({ reference, version, probabilities }) {
  const highest = Math.max(...probabilities);
  const index = probabilities.indexOf(highest);
  const label = labelsOf(version)?.[index] ?? index;
  return `${reference ?? "Base"}: ${label} (${percent(highest)})`;
}

function changeSource() {
  for (const part of root.querySelectorAll("[data-source]")) part.hidden = !part.dataset.source.split(" ").includes(source());
  compareSoon();
}

/** A drawing replaces the stored row. */
function useDrawing() {
  if (source() === "draw") compareSoon();
  else {
    document.getElementById("source-draw").checked = true;
    changeSource();
  }
}

root.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.add && !chosen.add(button.dataset.add)) showProblem(problem, { message: `at most ${root.dataset.maxAdapters} adapters can be compared` });
  if (button.dataset.sample) drawing.values = DIGITS[Number(button.dataset.sample)];
  if ("clear" in button.dataset) drawing.clear();
  if ("compare" in button.dataset) compare();
  if ("random" in button.dataset) {
    number.value = Math.floor(Math.random() * Number(dataset.selectedOptions[0].dataset.rows));
    compareSoon();
  }
});
root.addEventListener("change", (event) => {
  if (event.target.name === "source") changeSource();
  else if (event.target.name === "numbers") showAnswers();
  else if (event.target.id === "with-base") compareSoon();
});
for (const field of [paste, dataset, number]) field?.addEventListener("input", compareSoon);
changeSource();
