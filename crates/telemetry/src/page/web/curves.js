// Curves view: metrics of all selected runs in shared charts.

import { Chart } from "./chart.js";
import { el, errorMessage, fetchJson } from "./elements.js";
import { duration, short } from "./format.js";

const CHARTS = [
  { title: "Win rate", names: ["eval/win_rate", "eval/gold_win_rate", "eval/win_rate_lc", "eval/average_win_rate", "eval/average_gold_win_rate"], prefix: "eval/judge_win_rate/", range: [0.4, 0.7], half: 0.5, band: ["eval/win_rate_ci_low", "eval/win_rate_ci_high"] },
  { title: "KL", unit: "nats per completion", names: ["objective/kl", "eval/kl", "objective/log_ratio"] },
  { title: "Loss", names: ["loss"] },
  { title: "Implicit rewards", unit: "nats", names: ["rewards/margins", "rewards/chosen", "rewards/rejected"] },
  { title: "Lengths", unit: "tokens", names: ["completions/mean_length", "completions/min_length", "completions/max_length"] },
  { title: "Entropy", unit: "nats per token", names: ["objective/entropy"] },
  { title: "Throughput", unit: "pairs per second", names: ["perf/pairs_per_second"] },
  { title: "Staleness", unit: "steps", names: ["staleness/mean", "staleness/max"] },
  { title: "Step time", unit: "seconds", names: ["time/step", "time/wait_for_batch"] },
];
const MIN_INTERVAL = 3000; // ms between two requests

export class Curves {
  constructor(state) {
    this.state = state;
    this.charts = CHARTS.map((options) => ({ ...options, chart: new Chart(options.title, options) }));
    this.others = [];
    this.smoothing = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, id: "smoothing", oninput: () => this.draw() });
    this.more = el("select", { id: "more", onchange: () => this.add(this.more.value) }, el("option", { value: "" }, "select a metric"));
    this.figures = el("div", { class: "figures", role: "group" });
    this.grid = el("div", { class: "grid" }, this.charts.map(({ chart }) => chart.element));
    this.note = el("div", {});
    this.element = el("div", {}, this.figures,
      el("div", { class: "bar" }, el("label", {}, "Smoothing", this.smoothing), el("label", {}, "Add a curve", this.more)),
      this.note, this.grid);
    this.found = [];
    this.lines = "";
    this.requested = 0;
  }

  shown() {
    return [...this.charts, ...this.others];
  }

  // Requests the curves again when a run has new lines, at a bounded rate.
  async update() {
    this.head();
    const lines = JSON.stringify(this.state.runs.map((run) => [run.lines, run.state]).concat(this.state.selected));
    if (lines === this.lines || Date.now() - this.requested < MIN_INTERVAL) return;
    [this.lines, this.requested] = [lines, Date.now()];
    await this.read();
  }

  async read() {
    const names = this.shown().flatMap(({ names, band }) => [...names, ...(band ?? [])]).join(",");
    try {
      this.found = await Promise.all(this.state.selected.map(async (run) => ({ run, ...(await fetchJson(`/api/runs/${run}/curves?names=${encodeURIComponent(names)}`)) })));
      this.note.replaceChildren();
    } catch (error) {
      this.lines = "";
      this.note.replaceChildren(errorMessage(error));
      return;
    }
    if (this.extend()) await this.read();
    this.offer();
    this.draw();
  }

  // Adds curves of which only the beginning of the name is known, such as those of evaluation judges. Returns
  // whether there are new ones.
  extend() {
    const all = [...new Set(this.found.flatMap(({ names }) => names))].sort();
    let count = 0;
    for (const chart of this.charts.filter(({ prefix }) => prefix)) {
      const more = all.filter((name) => name.startsWith(chart.prefix) && !chart.names.includes(name));
      chart.names = [...chart.names, ...more];
      count += more.length;
    }
    return count > 0;
  }

  offer() {
    const all = [...new Set(this.found.flatMap(({ names }) => names))].sort();
    if (all.length + 1 === this.more.options.length) return;
    this.more.replaceChildren(el("option", { value: "" }, "select a metric"), ...all.map((name) => el("option", { value: name }, name)));
  }

  async add(name) {
    if (!name) return;
    if (!this.others.some(({ title }) => title === name)) {
      const other = { title: name, names: [name], chart: new Chart(name) };
      this.others.push(other);
      this.grid.prepend(other.chart.element);
      await this.read();
    }
    this.others.find(({ title }) => title === name)?.chart.picture.focus();
    this.more.value = "";
  }

  draw() {
    const weight = Number(this.smoothing.value);
    for (const { chart, names, band } of this.shown()) {
      const lines = this.found.flatMap(({ run, curves }) => names.flatMap((name, dash) => {
        const curve = curves[name];
        if (!curve) return [];
        const label = this.state.runs.length > 1 ? `${this.state.runs[run].name} ${name}` : name;
        const interval = band && dash === 0 ? { low: curves[band[0]]?.values, high: curves[band[1]]?.values } : {};
        return [{ label, color: run % 6, dash, steps: curve.steps, values: curve.values, ...interval }];
      }));
      chart.show(lines, weight);
    }
    this.head();
  }

  // The latest values of the first selected run.
  head() {
    const first = this.state.selected[0];
    const run = this.state.runs[first];
    if (!run) return;
    const curves = this.found.find((found) => found.run === first)?.curves ?? {};
    const last = (name) => curves[name]?.last;
    const figures = [
      ["step", short(run.step)],
      ["win rate", short(last("eval/win_rate"))],
      ["gold win rate", short(last("eval/gold_win_rate"))],
      ["length-controlled win rate", short(last("eval/win_rate_lc"))],
      ["KL", short(last("objective/kl") ?? last("eval/kl"))],
      ["pairs per second", short(last("perf/pairs_per_second"))],
      ["max staleness, steps", short(last("staleness/max"))],
      ["time", duration(run.wall_seconds)],
    ];
    this.figures.setAttribute("aria-label", `Latest values of ${run.name}`);
    this.figures.replaceChildren(...figures.filter(([, value]) => value !== "–")
      .map(([name, value]) => el("div", {}, el("b", {}, value), el("span", {}, name))));
    if (run.ignored > 0) this.figures.append(el("div", {}, el("b", { class: "bad" }, short(run.ignored)), el("span", {}, "values of too many metrics")));
    if (run.unreadable > 0) this.figures.append(el("div", {}, el("b", { class: "bad" }, run.unreadable), el("span", {}, "malformed lines")));
  }
}
