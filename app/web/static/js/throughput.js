/** Rows per second and latency: differences between two samples of the counters. */
import { Chart, short } from "./chart.js";

const INTERVAL_MS = 2000;
const MAX_POINTS = 60;

const section = document.getElementById("traffic");
const at = (name) => section.querySelector(`[data-${name}]`);
const seconds = { span: [(-(MAX_POINTS - 1) * INTERVAL_MS) / 1000, 0], labels: (_plot, marks) => marks.map((mark) => `${mark} s`) };
const charts = {
  rate: new Chart(section.querySelector("[data-chart=rate]"), { ...seconds, series: [{ label: "rows", paint: "accent" }] }),
  latency: new Chart(section.querySelector("[data-chart=latency]"), {
    ...seconds,
    series: [
      { label: "median", paint: "accent" },
      { label: "99th percentile", paint: "second", dash: [5, 3] },
    ],
  }),
};
const points = [];
let before = null;

/** Quantile in ms, interpolated within its bucket; null if nothing was counted. */
function quantile(bounds, counts, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return null;
  let below = 0;
  for (let index = 0; index < counts.length; index += 1) {
    const low = index ? bounds[index - 1] : 0;
    const high = bounds[Math.min(index, bounds.length - 1)];
    if (below + counts[index] >= share * total) return 1000 * (low + (high - low) * ((share * total - below) / (counts[index] || 1)));
    below += counts[index];
  }
  return null;
}

async function sample() {
  if (document.hidden) return;
  let now;
  try {
    const answer = await fetch("/ui/throughput", { headers: { Accept: "application/json" } });
    if (!answer.ok) return;
    now = await answer.json();
  } catch {
    before = null;
    return;
  }
  if (before && now.at > before.at && now.rows >= before.rows) {
    const counts = now.counts.map((count, index) => Math.max(0, count - before.counts[index]));
    points.push([(now.rows - before.rows) / (now.at - before.at), quantile(now.bounds, counts, 0.5), quantile(now.bounds, counts, 0.99)]);
    if (points.length > MAX_POINTS) points.shift();
    show();
  }
  before = now;
}

function show() {
  const x = points.map((_point, index) => ((index - points.length + 1) * INTERVAL_MS) / 1000);
  const [rate, median, tail] = points.at(-1);
  section.dataset.samples = points.length;
  charts.rate.show([x, points.map((point) => point[0])]);
  charts.latency.show([x, points.map((point) => point[1]), points.map((point) => point[2])]);
  at("rate").textContent = short(rate);
  at("latency").textContent = median === null ? "–" : `${short(median)} · ${short(tail)} ms`;
  section.querySelector("[data-chart=rate]").setAttribute("aria-label", `Rows per second: ${short(rate)} now`);
  section.querySelector("[data-chart=latency]").setAttribute("aria-label", median === null ? "Latency: no requests at the moment" : `Latency now: median ${short(median)} ms, 99th percentile ${short(tail)} ms`);
}

sample();
setInterval(sample, INTERVAL_MS);
