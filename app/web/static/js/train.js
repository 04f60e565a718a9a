/** The form that trains from a data set. */
import { Problem, call, clearProblem, showProblem } from "./api.js";

const form = document.getElementById("train");
const fields = form.elements;
const problem = form.querySelector("[data-problem]");
const estimate = form.querySelector("[data-estimate]");

const COUNT = "a whole number, or auto";
const NUMBER = "a number, or auto";
const SETTINGS = { epochs: COUNT, learning_rate: NUMBER, batch_size: COUNT, ridge: NUMBER, seed: "a whole number" };

/** Return the body of POST /adapters; throw a Problem with the field of a text that is not a number. */
function request() {
  const loss = fields.loss.value;
  const training = { method: fields.method.value, loss };
  for (const [name, expected] of Object.entries(SETTINGS)) {
    const text = fields[name].value.trim();
    if (text) training[name] = numberOrAuto(text, `training.${name}`, expected);
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
  const split = fields.split.selectedOptions[0];
  const body = { name: fields.name.value.trim(), rank: numberOrAuto(fields.rank.value.trim(), "rank", COUNT), data, training };
  if (split.value === "group") {
    data.group = split.dataset.column;
    body.split = { by: "group", fraction: 0.2 };
  } else if (split.value) {
    body.split = { by: "rows", fraction: split.value === "tenth" ? 0.1 : 0.2 };
  }
  if (fields.gate.checked && split.value) body.publish = { when: "if_better" };
  return body;
}

function inputs() {
  if (fields.inputs.value) return JSON.parse(fields.inputs.value);
  const columns = lines(fields.columns.value);
  return columns.length === 1 ? { column: columns[0] } : { columns };
}

/** Parse a number; the service checks its bounds, and whether auto is possible. */
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
  fields.gate.disabled = fields.split.value === "";
}

async function send(url, button) {
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

function showPlan(plan) {
  const { seconds, memory_bytes: memory } = plan.estimate;
  const { split, training, rank, auto } = plan.spec;
  const sentences = [
    `The training takes about ${seconds < 1 ? "a second" : `${Math.ceil(seconds)} seconds`} and ${Math.ceil(memory / 2 ** 20)} MiB of memory.`,
    split ? `${split.train.rows} rows are used for training, and ${split.held_out.rows} are held out.` : "No rows are held out, so the result is not measured.",
    `Method ${training.method.replaceAll("_", " ")}, loss ${training.loss.replaceAll("_", " ")}, rank ${rank}.`,
    ...Object.entries(auto || {}).map(([name, reason]) => `${name.replaceAll("_", " ")}: ${reason}.`),
    ...(split?.warnings || []).map((warning) => `Warning: ${warning}.`),
  ];
  const list = document.createElement("ul");
  for (const text of sentences) {
    const item = document.createElement("li");
    item.textContent = text;
    list.append(item);
  }
  estimate.replaceChildren(list);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const job = await send("/adapters", event.submitter || form.querySelector("[type=submit]"));
  if (job) location.assign(`/ui/jobs/${encodeURIComponent(job.id)}`);
});
form.querySelector("[data-check]").addEventListener("click", async (event) => {
  const plan = await send("/adapters?dry_run=true", event.currentTarget);
  if (plan) showPlan(plan);
});
fields.target.addEventListener("change", suggestLoss);
fields.inputs.addEventListener("change", offerColumns);
fields.split.addEventListener("change", offerGate);
suggestLoss();
offerColumns();
offerGate();
