/** The form that trains from a data set. */
import { Problem, call, clearProblem, showProblem } from "./api.js";

const form = document.getElementById("train");
const fields = form.elements;
const problem = form.querySelector("[data-problem]");
const estimate = form.querySelector("[data-estimate]");

const COUNT = "a whole number, or auto";
const SIZE = "a number, or auto";
const NUMBERS = { epochs: COUNT, learning_rate: SIZE, batch_size: COUNT, ridge: SIZE, seed: "a whole number" };

/** Body of POST /adapters; throws a Problem that names the field of a text that is not a number. */
function request() {
  const loss = fields.loss.value;
  const training = { method: fields.method.value, loss };
  for (const [name, expected] of Object.entries(NUMBERS)) {
    const given = fields[name].value.trim();
    if (given) training[name] = numberOrAuto(given, `training.${name}`, expected);
  }
  if (training.method !== "closed_form" && !(training.method === "auto" && loss === "mse")) {
    for (const name of ["epochs", "learning_rate", "batch_size"]) training[name] ??= "auto";
  } else if (training.method === "closed_form") {
    training.ridge ??= "auto";
  }
  if (fields.bias.checked) training.bias = true;
  const data = { dataset: form.dataset.dataset, inputs: inputs(), targets: fields.target.value ? JSON.parse(fields.target.value) : {} };
  const labels = lines(fields.labels.value);
  if (labels.length) data.labels = labels;
  const held = fields.held.selectedOptions[0];
  const body = { name: fields.name.value.trim(), rank: numberOrAuto(fields.rank.value.trim(), "rank", COUNT), data, training };
  if (held.value === "group") {
    data.group = held.dataset.column;
    body.split = { by: "group", fraction: 0.2 };
  } else if (held.value) {
    body.split = { by: "rows", fraction: held.value === "tenth" ? 0.1 : 0.2 };
  }
  if (fields.gate.checked && held.value) body.publish = { when: "if_better" };
  return body;
}

function inputs() {
  if (fields.inputs.value) return JSON.parse(fields.inputs.value);
  const columns = lines(fields.columns.value);
  return columns.length === 1 ? { column: columns[0] } : { columns };
}

/** The service checks bounds, and whether auto is possible. */
function numberOrAuto(text, field, expected) {
  if (text === "auto") return text;
  if (text === "" || !Number.isFinite(Number(text))) throw new Problem(422, { field, detail: `${field} must be ${expected}` });
  return Number(text);
}

function lines(text) {
  return text.split("\n").map((line) => line.trim()).filter(Boolean);
}

function suggestLoss() {
  const loss = fields.target.selectedOptions[0]?.dataset.loss;
  if (loss) fields.loss.value = loss;
}

function offerColumns() {
  form.querySelector("[data-named-columns]").hidden = fields.inputs.value !== "";
}

function offerGate() {
  fields.gate.disabled = fields.held.value === "";
}

async function ask(url, button) {
  clearProblem(problem, form);
  estimate.replaceChildren();
  button.disabled = true;
  try {
    return await call("POST", url, request());
  } catch (error) {
    showProblem(problem, error, form);
    return null;
  } finally {
    button.disabled = false;
  }
}

function say(plan) {
  const { seconds, memory_bytes: memory } = plan.estimate;
  const { split, training, rank, auto } = plan.spec;
  const told = [
    `It can be trained: about ${seconds < 1 ? "a second" : `${Math.ceil(seconds)} seconds`} and ${Math.ceil(memory / 2 ** 20)} MiB of memory, roughly.`,
    split ? `${split.train.rows} rows are trained on, ${split.held_out.rows} held out.` : "No rows are held out: the result will not be measured.",
    `Method ${training.method.replaceAll("_", " ")}, loss ${training.loss.replaceAll("_", " ")}, rank ${rank}.`,
    ...Object.entries(auto || {}).map(([name, why]) => `${name.replaceAll("_", " ")}: ${why}.`),
    ...(split?.warnings || []).map((warning) => `Mind: ${warning}.`),
  ];
  const list = document.createElement("ul");
  for (const text of told) {
    const item = document.createElement("li");
    item.textContent = text;
    list.append(item);
  }
  estimate.replaceChildren(list);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const job = await ask("/adapters", event.submitter || form.querySelector("[type=submit]"));
  if (job) location.assign(`/ui/jobs/${encodeURIComponent(job.id)}`);
});
form.querySelector("[data-check]").addEventListener("click", async (event) => {
  const plan = await ask("/adapters?dry_run=true", event.currentTarget);
  if (plan) say(plan);
});
fields.target.addEventListener("change", suggestLoss);
fields.inputs.addEventListener("change", offerColumns);
fields.held.addEventListener("change", offerGate);
suggestLoss();
offerColumns();
offerGate();
