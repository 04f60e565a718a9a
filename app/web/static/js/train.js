/** The form that trains from a data set. */
import { Problem, call, clearProblem, showProblem } from "./api.js";

const form = document.getElementById("train");
const fields = form.elements;
const problem = form.querySelector("[data-problem]");
const estimate = form.querySelector("[data-estimate]");

const COUNT = "a whole number, or auto";
const NUMBER = "a number, or auto";
const SETTINGS = { epochs: COUNT, learning_rate: NUMBER, batch_size: COUNT, ridge: NUMBER, seed: "a whole number" };

/**
 * Return the body of POST /adapters, which has only what was entered: the service has the defaults. Throw a Problem with
 * the field of a text that is not a number.
 */
function request() {
  const training = { ...entered("method"), ...entered("loss") };
  if (fields.bias.value) training.bias = fields.bias.value === "true";
  for (const [name, expected] of Object.entries(SETTINGS)) {
    const text = fields[name].value.trim();
    if (text) training[name] = numberOrAuto(text, `training.${name}`, expected);
  }
  const target = fields.target.value ? JSON.parse(fields.target.value) : {};
  const data = { dataset: form.dataset.dataset, inputs: inputs(), targets: target, ...entered("group"), ...entered("group_by") };
  const labels = lines(fields.labels.value);
  if (labels.length) data.labels = labels;
  const body = { name: adapterName(data.group_by), data, ...entered("publish"), ...split(data.group) };
  if (fields.rank.value.trim()) body.rank = numberOrAuto(fields.rank.value.trim(), "rank", COUNT);
  if (Object.keys(training).length) body.training = training;
  if (data.group_by) Object.assign(body, entered("fleet_prior"));
  if (body.publish === "if_better") body.publish = { when: "if_better" };
  return body;
}

/** Return a member of the request, or none if its field is empty or not there. */
function entered(field) {
  const value = fields[field]?.value.trim();
  return value ? { [field]: value } : {};
}

function adapterName(column) {
  const text = fields.name.value.trim();
  return column && text && !text.includes("{") ? `${text}-{${column}}` : text;
}

function split(group) {
  if (fields.split.value === "none") return { split: null };
  if (!fields.split.value) return {};
  const shape = { by: group ? "group" : "rows" };
  const text = fields.fraction.value.trim();
  if (text) shape.fraction = numberOrAuto(text, "split.fraction", "a number");
  return { split: shape };
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

function offer() {
  form.querySelector("[data-named-columns]").hidden = fields.inputs.value !== "";
  form.querySelector("[data-fraction]").hidden = fields.split.value !== "rows";
  const fleet = form.querySelector("[data-fleet]");
  if (fleet) fleet.hidden = fields.group_by.value === "";
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
  const { split, training, rank, auto, warnings } = plan.spec;
  const sentences = [
    `The training takes about ${seconds < 1 ? "a second" : `${Math.ceil(seconds)} seconds`} and ${Math.ceil(memory / 2 ** 20)} MiB of memory.`,
    split ? describeSplit(split) : "No rows are held out, so the result is not measured.",
    `Method ${training.method.replaceAll("_", " ")}, loss ${training.loss.replaceAll("_", " ")}, rank ${rank}.`,
    ...Object.entries(auto || {}).map(([setting, reason]) => `${setting.replaceAll("_", " ")}: ${reason}.`),
    ...[...(split?.warnings || []), ...(warnings || [])].map((warning) => `Warning: ${warning}.`),
  ];
  const list = document.createElement("ul");
  for (const text of sentences) {
    const item = document.createElement("li");
    item.textContent = text;
    list.append(item);
  }
  estimate.replaceChildren(list);
}

function describeSplit({ train, held_out: heldOut }) {
  return heldOut ? `${train.rows} rows are used for training, and ${heldOut.rows} are held out.` : "The result is measured on rows that are left out in turn.";
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
form.addEventListener("change", offer);
offer();
