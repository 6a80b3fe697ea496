// Flow view: message counters of every stage, and open waits.

import { el, errorMessage, fetchJson, svg } from "./elements.js";
import { duration, short } from "./format.js";

const STAGES = ["actor", "preference", "learner"];
const WIDE = {
  size: [860, 250],
  boxes: { learner: [40, 70], actor: [330, 70], preference: [620, 70] },
  ways: {
    prompts: { d: "M240 100H322", head: [330, 100, 0], text: [285, 90] },
    pairs: { d: "M530 100H612", head: [620, 100, 0], text: [575, 90] },
    labelled: { d: "M720 170V222H140V178", head: [140, 170, -90], text: [430, 216] },
    weights: { d: "M140 70V28H430V62", head: [430, 70, 90], text: [285, 22] },
  },
};
const TALL = {
  size: [360, 560],
  boxes: { learner: [80, 40], actor: [80, 220], preference: [80, 400] },
  ways: {
    prompts: { d: "M180 140V212", head: [180, 220, 90], text: [222, 182] },
    pairs: { d: "M180 320V392", head: [180, 400, 90], text: [222, 362] },
    labelled: { d: "M80 450H36V90H72", head: [80, 90, 0], text: [42, 545] },
    weights: { d: "M280 90H324V270H288", head: [280, 270, 180], text: [318, 30] },
  },
};

// Groups metric samples into stage counters, open waits and others.
function groupReadings(readings) {
  const stages = Object.fromEntries(STAGES.map((name) => [name, { received: 0, emitted: 0, in_flight: 0, dropped: {} }]));
  const others = {};
  const waits = [];
  for (const { name, labels, value } of readings) {
    const stage = stages[labels.stage];
    if (name === "agon_stage_dropped_total" && stage) {
      if (value > 0) stage.dropped[labels.reason] = (stage.dropped[labels.reason] ?? 0) + value;
    } else if (name.startsWith("agon_stage_") && stage) {
      stage[name.replace("agon_stage_", "").replace("_total", "")] += value;
    } else if (name === "agon_wait_open_since_seconds") {
      if (value > 0) waits.push({ role: labels.role, reason: labels.reason, since: value });
    } else {
      others[name] = (others[name] ?? 0) + value;
    }
  }
  return { stages, others, waits };
}

export class Flow {
  constructor(state) {
    this.state = state;
    this.drawing = el("div", { class: "card flow wide", id: "pipeline" });
    this.waits = el("div", { class: "card" });
    this.tall = matchMedia("(max-width: 40rem)");
    this.tall.addEventListener("change", () => this.update());
    this.element = el("div", {}, this.drawing, this.waits);
    this.before = null;
  }

  async update() {
    try {
      const found = this.state.live ? groupReadings(this.state.live) : await this.finished();
      if (!found) {
        this.drawing.replaceChildren(el("p", { class: "soft" }, "The counters of a run in another process are in its report after the end, and on its own page during the run."));
        this.waits.replaceChildren();
        return;
      }
      this.draw(found);
      this.renderWaits(found.waits);
      this.before = found;
    } catch (error) {
      this.drawing.replaceChildren(errorMessage(error));
    }
  }

  async finished() {
    const run = this.state.selected[0];
    if (run === undefined) return null;
    const key = `${run} ${this.state.runs[run]?.state}`;
    if (this.key !== key) {
      this.report = await fetchJson(`/api/runs/${run}/report`);
      this.key = key;
    }
    return this.report?.stages ? { stages: this.report.stages, others: {}, waits: null } : null;
  }

  draw({ stages, others }) {
    const plan = this.tall.matches ? TALL : WIDE;
    const { actor, preference, learner } = stages;
    const inTransit = (emitted, received) => Math.max(0, emitted - received);
    const rate = others.agon_actor_gen_throughput;
    const labels = {
      prompts: others.agon_staleness_outstanding === undefined ? "prompts" : `${short(others.agon_staleness_outstanding)} prompts in flight`,
      pairs: `${short(inTransit(actor.emitted, preference.received))} pairs`,
      labelled: `${short(inTransit(preference.emitted, learner.received))} labelled pairs in transit`,
      weights: others.agon_policy_version === undefined ? "weights" : `weights, version ${short(others.agon_policy_version)}`,
    };
    const extra = {
      actor: rate ? `${short(rate)} tokens/s` : "",
      preference: others.agon_judge_queue === undefined ? "" : `${short(others.agon_judge_queue)} comparisons queued`,
      learner: others.agon_perf_pairs_per_second ? `${short(others.agon_perf_pairs_per_second)} pairs/s` : "",
    };
    const [width, height] = plan.size;
    const parts = Object.entries(plan.ways).flatMap(([name, { d, head: [x, y, turn], text }]) => [
      svg("path", { class: this.state.live ? "way moving" : "way", d }),
      svg("path", { class: "head", d: "M-9 -5L0 0L-9 5Z", transform: `translate(${x} ${y}) rotate(${turn})` }),
      svg("text", { x: text[0], y: text[1], "text-anchor": this.tall.matches && name === "labelled" ? "start" : this.tall.matches && name === "weights" ? "end" : "middle" }, labels[name]),
    ]);
    for (const name of STAGES) parts.push(this.box(name, plan.boxes[name], stages[name], extra[name]));
    const sentence = STAGES.map((name) => `${name}: received ${stages[name].received}, emitted ${stages[name].emitted}, in flight ${stages[name].in_flight}`).join("; ");
    this.drawing.replaceChildren(
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `The pipeline. ${sentence}` }, parts),
      others.agon_health_judge_circuit_open > 0 ? el("p", { class: "bad", role: "alert" }, "The judge's circuit breaker is open: its calls fail, and are retried after a pause.") : "",
      this.table(stages));
  }

  box(name, [x, y], stage, extra) {
    const dropped = Object.values(stage.dropped ?? {}).reduce((a, b) => a + b, 0);
    const lines = [`received ${short(stage.received)}   emitted ${short(stage.emitted)}`, `in flight ${short(stage.in_flight)}   dropped ${short(dropped)}`, extra];
    return svg("g", { "data-stage": name },
      svg("rect", { class: stage.in_flight > 0 ? "box busy" : "box", x, y, width: 200, height: 100, rx: 8 }),
      svg("text", { class: "name", x: x + 100, y: y + 24, "text-anchor": "middle" }, name),
      lines.map((line, i) => svg("text", { class: "count", x: x + 100, y: y + 48 + 19 * i, "text-anchor": "middle" }, line)));
  }

  table(stages) {
    const reasons = (dropped) => Object.entries(dropped ?? {}).map(([reason, count]) => `${short(count)} ${reason}`).join(", ") || "0";
    return el("table", {},
      el("caption", {}, "Conservation: received = emitted + dropped + in flight at every stage"),
      el("thead", {}, el("tr", {}, ["stage", "received", "emitted", "dropped", "in flight"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, STAGES.map((name) => el("tr", {}, el("th", { scope: "row" }, name),
        [stages[name].received, stages[name].emitted].map((count) => el("td", {}, count)), el("td", {}, reasons(stages[name].dropped)), el("td", {}, stages[name].in_flight)))));
  }

  renderWaits(waits) {
    const now = Date.now() / 1000;
    const rows = (waits ?? []).sort((a, b) => a.since - b.since);
    this.waits.replaceChildren(el("h2", {}, "Waits"),
      waits === null ? el("p", { class: "soft" }, "The run has ended; its total waiting times are in its metrics.")
        : rows.length === 0 ? el("p", { class: "soft" }, "There are no open waits.")
          : el("ul", {}, rows.map(({ role, reason, since }) => el("li", { class: now - since > 60 ? "warn" : "" }, `${role} waits for ${reason}: ${duration(now - since)}`))));
  }
}
