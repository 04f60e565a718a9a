/** Chart, progress and log of a job, from server-sent events. */
import { call } from "./api.js";
import { Chart, short } from "./chart.js";

const STATES = { queued: "is queued", running: "is running", succeeded: "has succeeded", failed: "has failed", cancelled: "was cancelled" };
const SMOOTHED = 10; // steps in the moving average, in which newer steps weigh more

const root = document.getElementById("job");
const at = (name) => root.querySelector(`[data-${name}]`);
const id = root.dataset.job;
const address = `/jobs/${encodeURIComponent(id)}`;
let steps = [];
let values = [];
let smooth = [];

const chart = new Chart(at("chart"), {
  series: [
    { label: "batch of each step", paint: "faint", width: 1 },
    { label: "smoothed", paint: "accent", width: 2.5 },
  ],
  point: (index) => {
    const text = index === null || index >= steps.length ? latest() : `step ${steps[index]}: ${short(values[index])}`;
    at("now").textContent = text;
  },
});

function latest() {
  return steps.length ? `${short(values.at(-1))} at step ${steps.at(-1)}` : "";
}

function addStep(step, loss) {
  if (loss === null || loss === undefined || (steps.length && step <= steps.at(-1))) return;
  const keep = 1 - 1 / Math.min(SMOOTHED, steps.length + 1);
  smooth.push(smooth.length ? keep * smooth.at(-1) + (1 - keep) * loss : loss);
  steps.push(step);
  values.push(loss);
}

function draw() {
  if (at("chart").hidden) return; // a fleet would have a curve for each adapter, and keeps none
  if (!steps.length) {
    at("chart").hidden = "ended" in root.dataset;
    at("caption").textContent = "ended" in root.dataset ? "This training has no loss by step." : "The curve starts with the first step.";
    return;
  }
  const lowest = Math.min(...values);
  const log = lowest > 0 && Math.max(...values) / lowest > 50;
  chart.show([steps, values, smooth], { log });
  at("now").textContent = latest();
  at("chart").setAttribute("aria-label", `Loss by step: ${short(values[0])} at step ${steps[0]}, ${latest()}`);
  at("caption").textContent = `Loss on the batch of each step, before the update, and its moving average${log ? ", on a logarithmic scale" : ""}.`;
}

async function readHistory() {
  const job = await call("GET", address);
  if (job.history.length < steps.length && !("ended" in root.dataset)) return;
  [steps, values, smooth] = [[], [], []];
  for (const [step, loss] of job.history) addStep(step, loss);
  draw();
}

function showProgress({ step, steps: total, loss, seconds_left: left, adapters }) {
  const bar = at("progress");
  const [done, whole] = adapters ? [adapters.published + adapters.failed, adapters.total] : [step ?? 0, total ?? 1];
  bar.max = whole || 1;
  bar.value = done;
  if (step) addStep(step, loss);
  draw();
  const parts = [adapters ? `${done} of ${whole} adapters` : `step ${done} of ${whole}`];
  if (loss !== null && loss !== undefined) parts.push(`loss ${short(loss)}`);
  if (left) parts.push(`about ${left < 60 ? `${Math.ceil(left)} s` : `${Math.ceil(left / 60)} min`} left`);
  if (whole) at("now").textContent = parts.join(" · ");
}

function addLine({ time, text }) {
  const when = document.createElement("time");
  when.dateTime = time;
  when.textContent = time.slice(11, 19);
  const message = document.createElement("span");
  message.className = "wrap";
  message.textContent = text;
  const item = document.createElement("li");
  item.append(when, " ", message);
  at("log").append(item);
  at("no-log").hidden = true;
}

function refresh() {
  return window.htmx.ajax("GET", location.href, { target: "#outcome", swap: "innerHTML" });
}

function watch() {
  const events = new EventSource(`${address}/events`);
  at("log").replaceChildren();
  events.addEventListener("progress", (event) => showProgress(JSON.parse(event.data)));
  events.addEventListener("log", (event) => addLine(JSON.parse(event.data)));
  events.addEventListener("status", async (event) => {
    const { status, result } = JSON.parse(event.data);
    const ended = !["queued", "running"].includes(status);
    at("announce").textContent = `The training ${STATES[status]}${result ? `: ${result.name}, version ${result.version}` : ""}`;
    if (ended) {
      events.close();
      root.dataset.ended = "";
      document.getElementById("cancel").close();
      if (status === "succeeded") at("progress").value = at("progress").max;
      at("no-log").hidden = at("log").childElementCount > 0;
    }
    try {
      await refresh();
      await readHistory();
    } catch {
      // The service is unavailable. The events continue when it is back.
    }
  });
}

readHistory().then(() => "ended" in root.dataset || watch());
