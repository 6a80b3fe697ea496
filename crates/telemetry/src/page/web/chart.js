// SVG line chart over learner steps, readable with the pointer, the arrow keys, and as text.

import { el, svg } from "./elements.js";
import { short, ticks } from "./format.js";

const WIDTH = 480;
const HEIGHT = 210;
const LEFT = 44;
const RIGHT = 14;
const TOP = 8;
const BOTTOM = 22;

// Larger values are drawn at this value: differences of the largest numbers are infinite.
const LIMIT = 1e100;
const clamped = (value) => Math.min(LIMIT, Math.max(-LIMIT, value));

// Exponential moving average; weight 0 returns the values unchanged.
export function smoothed(values, weight) {
  if (weight <= 0) return values;
  let mean = null;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean === null ? value : weight * mean + (1 - weight) * value;
    return mean;
  });
}

function extent(series, range) {
  let low = range?.[0] ?? Infinity;
  let high = range?.[1] ?? -Infinity;
  let last = 1;
  for (const line of series) {
    for (const values of [line.values, line.low ?? [], line.high ?? []]) {
      for (const value of values) {
        if (value === null) continue;
        low = Math.min(low, clamped(value));
        high = Math.max(high, clamped(value));
      }
    }
    last = Math.max(last, line.steps.at(-1) ?? 1);
  }
  if (low > high) [low, high] = [0, 1];
  // A range that the values' precision does not resolve, or that underflows, is widened.
  const least = Math.max(1e-6 * Math.max(Math.abs(low), Math.abs(high)), 1e-100);
  if (low === high) [low, high] = [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
  else if (high - low < least) [low, high] = [low - least, high + least];
  return { low, high, last };
}

function path(points) {
  let text = "";
  let pen = "M";
  for (const [x, y] of points) {
    if (y === null) {
      pen = "M";
    } else {
      text += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
    }
  }
  return text;
}

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

export class Chart {
  constructor(title, options = {}) {
    this.title = title;
    this.options = options;
    this.series = [];
    this.at = null;
    this.picture = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": title,
      onpointermove: (event) => this.point(event),
      onpointerleave: () => this.mark(null),
      onkeydown: (event) => this.key(event),
    });
    this.readout = el("output", { "aria-live": "polite" });
    this.legend = el("div", { class: "legend" });
    this.element = el("section", { class: "card chart", "data-chart": title },
      el("h2", {}, title, options.unit ? el("span", { class: "soft" }, ` (${options.unit})`) : null),
      this.picture, this.readout, this.legend);
  }

  // Takes lines of {label, color, dash, steps, values, low, high}.
  show(series, weight) {
    this.series = series.map((line) => ({ ...line, values: smoothed(line.values, line.low ? 0 : weight) }));
    this.scale = extent(this.series, this.options.range);
    this.draw();
  }

  x(step) {
    return LEFT + (step / this.scale.last) * (WIDTH - LEFT - RIGHT);
  }

  y(value) {
    if (value === null) return null;
    const { low, high } = this.scale;
    return HEIGHT - BOTTOM - ((clamped(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  }

  draw() {
    const { low, high, last } = this.scale;
    const parts = [];
    for (const tick of ticks(low, high)) {
      const y = this.y(tick);
      parts.push(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
      parts.push(svg("text", { x: LEFT - 5, y: y + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of ticks(0, last)) {
      parts.push(svg("text", { x: this.x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, short(tick)));
    }
    if (this.options.half !== undefined) {
      const y = this.y(this.options.half);
      parts.push(svg("line", { class: "half", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    }
    for (const line of this.series) parts.push(...this.line(line));
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.picture.replaceChildren(...parts, this.cursor);
    this.legend.replaceChildren(...this.series.map((line) => el("span", { class: `color-${line.color}` },
      svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" },
        svg("path", { class: `stroke dash-${line.dash}`, d: "M0 4H22" })), line.label)));
    this.mark(this.at);
    this.picture.setAttribute("aria-label", `${this.title}. ${this.sentence(null)}`);
  }

  line({ color, dash, steps, values, low, high }) {
    const at = (list) => steps.map((step, i) => [this.x(step), this.y(list[i] ?? null)]);
    const parts = [];
    if (low && high) {
      const there = at(high).filter(([, y]) => y !== null);
      const back = at(low).filter(([, y]) => y !== null).reverse();
      if (there.length > 1) {
        parts.push(svg("path", { class: `band fill color-${color}`, d: `${path([...there, ...back])}Z` }));
      }
    }
    parts.push(svg("path", { class: `stroke color-${color} dash-${dash}`, d: path(at(values)) }));
    if (steps.length < 40) {
      for (const [x, y] of at(values)) {
        if (y !== null) parts.push(svg("circle", { class: `fill color-${color}`, cx: x, cy: y, r: 2.6 }));
      }
    }
    return parts;
  }

  point(event) {
    const box = this.picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    this.mark(((x - LEFT) / (WIDTH - LEFT - RIGHT)) * this.scale.last);
  }

  key(event) {
    const longest = this.series.reduce((a, b) => (b.steps.length > (a?.steps.length ?? 0) ? b : a), null);
    if (!longest || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const now = this.at === null ? longest.steps.length - 1 : nearest(longest.steps, this.at);
    const end = longest.steps.length - 1;
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: end }[event.key];
    this.mark(longest.steps[Math.min(end, Math.max(0, next))]);
  }

  mark(step) {
    this.at = step === null ? null : Math.min(this.scale?.last ?? 1, Math.max(0, step));
    this.readout.textContent = this.sentence(this.at);
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", this.at === null ? "hidden" : "visible");
    if (this.at !== null) {
      this.cursor.setAttribute("x1", this.x(this.at));
      this.cursor.setAttribute("x2", this.x(this.at));
    }
  }

  // The values at a step as text; the latest values when step is null.
  sentence(step) {
    if (this.series.length === 0) return "no data";
    return this.series.map(({ label, steps, values, low, high }) => {
      const i = step === null ? steps.length - 1 : nearest(steps, step);
      const band = low && high ? ` (${short(low[i])} to ${short(high[i])})` : "";
      return `${label} ${short(values[i])}${band} at step ${steps[i]}`;
    }).join("; ");
  }
}
