/** Rows per second and latency: differences between two readings of counters. */
import { Chart, short } from "./chart.js";

const EVERY = 2000;
const KEPT = 60;

const place = document.getElementById("traffic");
const at = (name) => place.querySelector(`[data-${name}]`);
const seconds = { span: [(-(KEPT - 1) * EVERY) / 1000, 0], labels: (_plot, marks) => marks.map((mark) => `${mark} s`) };
const charts = {
  rate: new Chart(place.querySelector("[data-chart=rate]"), { ...seconds, series: [{ label: "rows", paint: "accent" }] }),
  latency: new Chart(place.querySelector("[data-chart=latency]"), {
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
  let seen = 0;
  for (let place = 0; place < counts.length; place += 1) {
    const low = place ? bounds[place - 1] : 0;
    const high = bounds[Math.min(place, bounds.length - 1)];
    if (seen + counts[place] >= share * total) return 1000 * (low + (high - low) * ((share * total - seen) / (counts[place] || 1)));
    seen += counts[place];
  }
  return null;
}

async function look() {
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
    const counts = now.counts.map((count, place) => Math.max(0, count - before.counts[place]));
    points.push([(now.rows - before.rows) / (now.at - before.at), quantile(now.bounds, counts, 0.5), quantile(now.bounds, counts, 0.99)]);
    if (points.length > KEPT) points.shift();
    show();
  }
  before = now;
}

function show() {
  const x = points.map((_point, place) => ((place - points.length + 1) * EVERY) / 1000);
  const [rate, median, late] = points.at(-1);
  place.dataset.looks = points.length;
  charts.rate.show([x, points.map((point) => point[0])]);
  charts.latency.show([x, points.map((point) => point[1]), points.map((point) => point[2])]);
  at("rate").textContent = short(rate);
  at("latency").textContent = median === null ? "–" : `${short(median)} · ${short(late)} ms`;
  place.querySelector("[data-chart=rate]").setAttribute("aria-label", `Rows per second: ${short(rate)} now`);
  place.querySelector("[data-chart=latency]").setAttribute("aria-label", median === null ? "Time to an answer: no requests at the moment" : `Time to an answer now: median ${short(median)} ms, 99th percentile ${short(late)} ms`);
}

look();
setInterval(look, EVERY);
