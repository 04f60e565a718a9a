/** Line charts by uPlot, in the colours and width of the page; redrawn when the colour scheme changes. */

const { uPlot } = window;
const onlyTens = (_plot, marks) => marks.map((mark) => (Math.abs(Math.log10(mark) % 1) < 1e-6 ? mark : null));
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap((tens) => [1, 2, 5].map((one) => one * 10 ** tens));
const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function axis(more) {
  return {
    stroke: colour("muted"),
    grid: { stroke: colour("line"), width: 1 },
    ticks: { stroke: colour("line"), width: 1, size: 4 },
    font: '12px system-ui, "DejaVu Sans", sans-serif',
    ...more,
  };
}

export class Chart {
  #container;
  #options;
  #data;
  #plot = null;

  /** `series`: [{label, paint, width, dash}]; `labels` formats the marks of x; `span` is the range of x, if it is fixed. */
  constructor(container, options) {
    this.#container = container;
    this.#options = options;
    this.#data = [[], ...options.series.map(() => [])];
    this.#draw();
    new ResizeObserver(() => this.#plot.setSize(this.#size())).observe(container);
    dark.addEventListener("change", () => this.#draw());
  }

  show(data, { log = false } = {}) {
    this.#data = data;
    if (log !== Boolean(this.#options.log)) {
      this.#options.log = log;
      this.#draw();
    } else {
      this.#plot.setData(data);
    }
  }

  #size() {
    return { width: Math.max(120, this.#container.clientWidth), height: this.#container.clientHeight };
  }

  #draw() {
    const { series, log = false, labels, span } = this.#options;
    const tens = log ? { filter: onlyTens } : {};
    const lines = { stroke: colour("line"), width: 1, ...tens };
    this.#plot?.destroy();
    this.#plot = new uPlot(
      {
        ...this.#size(),
        legend: { show: false },
        cursor: { drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: false, range: span && (() => span) }, y: log ? { distr: 3 } : { range: (_plot, low, high) => [Math.min(0, low || 0), high > 0 ? high * 1.1 : 1] } },
        axes: [axis({ space: 60, size: 28, values: labels, incrs: WHOLE }), axis({ ...tens, grid: lines, ticks: { ...lines, size: 4 }, size: 52, space: 36, values: (_plot, marks) => marks.map((mark) => (mark === null ? "" : short(mark))) })],
        series: [{}, ...series.map(({ label, paint, width = 2, dash }) => ({ label, stroke: colour(paint), width, dash, points: { show: false }, spanGaps: false }))],
        hooks: { setCursor: [(plot) => this.#options.point?.(plot.cursor.idx ?? null)] },
      },
      this.#data,
      this.#container,
    );
  }
}

/** Format a number with about three digits: `0.0661`, `15.9`, `12 k`. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)} k`;
  return size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3));
}
