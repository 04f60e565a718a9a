/** A running job: its chart, progress and log, from server-sent events. */
import { call } from "./api.js";
import { Chart, short } from "./chart.js";

const STATES = { queued: "is queued", running: "is running", succeeded: "has succeeded", failed: "has failed", cancelled: "was cancelled" };
const SMOOTHED = 10; // steps that the drawn line is a mean of, the newest counting most

const root = document.getElementById("job");
const at = (name) => root.querySelector(`[data-${name}]`);
const id = root.dataset.job;
const address = `/jobs/${encodeURIComponent(id)}`;
let steps = [];
let values = [];
let smooth = [];

const chart = new Chart(at("chart"), {
  series: [
    { label: "each step's batch", paint: "faint", width: 1 },
    { label: "smoothed", paint: "accent", width: 2.5 },
  ],
  point: (place) => {
    const text = place === null || place >= steps.length ? latest() : `step ${steps[place]}: ${short(values[place])}`;
    at("now").textContent = text;
  },
});

function latest() {
  return steps.length ? `${short(values.at(-1))} at step ${steps.at(-1)}` : "";
}

function take(step, loss) {
  if (loss === null || loss === undefined || (steps.length && step <= steps.at(-1))) return;
  const keep = 1 - 1 / Math.min(SMOOTHED, steps.length + 1);
  smooth.push(smooth.length ? keep * smooth.at(-1) + (1 - keep) * loss : loss);
  steps.push(step);
  values.push(loss);
}

function draw() {
  if (at("chart").hidden) return; // a fleet has as many curves as adapters, and keeps none
  if (!steps.length) {
    at("about").textContent = "ended" in root.dataset ? "No step was taken." : "The curve begins with the first step.";
    return;
  }
  const least = Math.min(...values);
  const log = least > 0 && Math.max(...values) / least > 50;
  chart.show([steps, values, smooth], { log });
  at("now").textContent = latest();
  at("chart").setAttribute("aria-label", `Loss by step: ${short(values[0])} at step ${steps[0]}, ${latest()}`);
  at("about").textContent = `Of each step's batch before its update, and smoothed${log ? "; on a logarithmic scale" : ""}.`;
}

async function readHistory() {
  const job = await call("GET", address);
  if (job.history.length < steps.length && !("ended" in root.dataset)) return;
  [steps, values, smooth] = [[], [], []];
  for (const [step, loss] of job.history) take(step, loss);
  draw();
}

function progress({ step, steps: all, loss, seconds_left: left, adapters }) {
  const bar = at("progress");
  const [done, whole] = adapters ? [adapters.published + adapters.failed, adapters.total] : [step ?? 0, all ?? 1];
  bar.max = whole || 1;
  bar.value = done;
  if (step) take(step, loss);
  draw();
  const parts = [adapters ? `${done} of ${whole} adapters` : `step ${done} of ${whole}`];
  if (loss !== null && loss !== undefined) parts.push(`loss ${short(loss)}`);
  if (left) parts.push(`about ${left < 60 ? `${Math.ceil(left)} s` : `${Math.ceil(left / 60)} min`} left`);
  if (whole) at("now").textContent = parts.join(" · ");
}

function line({ time, text }) {
  const when = document.createElement("time");
  when.dateTime = time;
  when.textContent = time.slice(11, 19);
  const said = document.createElement("span");
  said.className = "wrap";
  said.textContent = text;
  const item = document.createElement("li");
  item.append(when, " ", said);
  at("log").append(item);
  at("no-log").hidden = true;
}

function refresh() {
  return window.htmx.ajax("GET", location.href, { target: "#outcome", swap: "innerHTML" });
}

function watch() {
  const events = new EventSource(`${address}/events`);
  at("log").replaceChildren();
  events.addEventListener("progress", (event) => progress(JSON.parse(event.data)));
  events.addEventListener("log", (event) => line(JSON.parse(event.data)));
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
      // The service was unavailable: the events continue when it is back.
    }
  });
}

readHistory().then(() => "ended" in root.dataset || watch());
