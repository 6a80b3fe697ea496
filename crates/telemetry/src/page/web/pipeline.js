// Does it flow? The stations, what each took, gave, dropped and holds, and what is waited for.

import { ask, el, failed, svg } from "./elements.js";
import { duration, short } from "./numbers.js";

const STATIONS = ["actor", "preference", "learner"];
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

// Readings of a process as the books of its stations.
function books(readings) {
  const stations = Object.fromEntries(STATIONS.map((name) => [name, { taken: 0, given: 0, in_hand: 0, dropped: {} }]));
  const others = {};
  const waits = [];
  for (const { name, labels, value } of readings) {
    const station = stations[labels.station];
    if (name === "agon_station_dropped_total" && station) {
      if (value > 0) station.dropped[labels.reason] = (station.dropped[labels.reason] ?? 0) + value;
    } else if (name.startsWith("agon_station_") && station) {
      station[name.replace("agon_station_", "").replace("_total", "")] += value;
    } else if (name === "agon_wait_open_since_seconds") {
      if (value > 0) waits.push({ role: labels.role, reason: labels.reason, since: value });
    } else {
      others[name] = (others[name] ?? 0) + value;
    }
  }
  return { stations, others, waits };
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
      const found = this.state.live ? books(this.state.live) : await this.finished();
      if (!found) {
        this.drawing.replaceChildren(el("p", { class: "soft" }, "The counts of a run in another process stand in its report, once it has ended, and in its own page while it runs."));
        this.waits.replaceChildren();
        return;
      }
      this.draw(found);
      this.tell(found.waits);
      this.before = found;
    } catch (error) {
      this.drawing.replaceChildren(failed(error));
    }
  }

  async finished() {
    const run = this.state.chosen[0];
    if (run === undefined) return null;
    const key = `${run} ${this.state.runs[run]?.state}`;
    if (this.key !== key) {
      this.report = await ask(`/api/runs/${run}/report`);
      this.key = key;
    }
    return this.report?.stations ? { stations: this.report.stations, others: {}, waits: null } : null;
  }

  draw({ stations, others }) {
    const plan = this.tall.matches ? TALL : WIDE;
    const { actor, preference, learner } = stations;
    const way = (given, taken) => Math.max(0, given - taken);
    const rate = others.agon_actor_gen_throughput;
    const labels = {
      prompts: others.agon_staleness_in_flight === undefined ? "prompts" : `${short(others.agon_staleness_in_flight)} asked`,
      pairs: `${short(way(actor.given, preference.taken))} pairs`,
      labelled: `${short(way(preference.given, learner.taken))} labelled pairs on their way`,
      weights: others.agon_policy_version === undefined ? "weights" : `weights, version ${short(others.agon_policy_version)}`,
    };
    const extra = {
      actor: rate ? `${short(rate)} tokens/s` : "",
      preference: others.agon_judge_queue === undefined ? "" : `${short(others.agon_judge_queue)} questions wait`,
      learner: others.agon_perf_pairs_per_second ? `${short(others.agon_perf_pairs_per_second)} pairs/s` : "",
    };
    const [width, height] = plan.size;
    const parts = Object.entries(plan.ways).flatMap(([name, { d, head: [x, y, turn], text }]) => [
      svg("path", { class: this.state.live ? "way moving" : "way", d }),
      svg("path", { class: "head", d: "M-9 -5L0 0L-9 5Z", transform: `translate(${x} ${y}) rotate(${turn})` }),
      svg("text", { x: text[0], y: text[1], "text-anchor": this.tall.matches && name === "labelled" ? "start" : this.tall.matches && name === "weights" ? "end" : "middle" }, labels[name]),
    ]);
    for (const name of STATIONS) parts.push(this.box(name, plan.boxes[name], stations[name], extra[name]));
    const sentence = STATIONS.map((name) => `${name}: taken ${stations[name].taken}, given ${stations[name].given}, in hand ${stations[name].in_hand}`).join("; ");
    this.drawing.replaceChildren(
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `The pipeline. ${sentence}` }, parts),
      others.agon_health_judge_circuit_open > 0 ? el("p", { class: "bad", role: "alert" }, "The judge's circuit is open: it fails, and is asked again after a pause.") : "",
      this.table(stations));
  }

  box(name, [x, y], station, extra) {
    const dropped = Object.values(station.dropped ?? {}).reduce((a, b) => a + b, 0);
    const lines = [`taken ${short(station.taken)}   given ${short(station.given)}`, `in hand ${short(station.in_hand)}   dropped ${short(dropped)}`, extra];
    return svg("g", { "data-station": name },
      svg("rect", { class: station.in_hand > 0 ? "box busy" : "box", x, y, width: 200, height: 100, rx: 8 }),
      svg("text", { class: "name", x: x + 100, y: y + 24, "text-anchor": "middle" }, name),
      lines.map((line, i) => svg("text", { class: "count", x: x + 100, y: y + 48 + 19 * i, "text-anchor": "middle" }, line)));
  }

  table(stations) {
    const reasons = (dropped) => Object.entries(dropped ?? {}).map(([reason, count]) => `${short(count)} ${reason}`).join(", ") || "0";
    return el("table", {},
      el("caption", {}, "Taken = given + dropped + in hand, at every station"),
      el("thead", {}, el("tr", {}, ["station", "taken", "given", "dropped", "in hand"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, STATIONS.map((name) => el("tr", {}, el("th", { scope: "row" }, name),
        [stations[name].taken, stations[name].given].map((count) => el("td", {}, count)), el("td", {}, reasons(stations[name].dropped)), el("td", {}, stations[name].in_hand)))));
  }

  tell(waits) {
    const now = Date.now() / 1000;
    const rows = (waits ?? []).sort((a, b) => a.since - b.since);
    this.waits.replaceChildren(el("h2", {}, "Waits"),
      waits === null ? el("p", { class: "soft" }, "The run has ended; how long it waited stands in its metrics.")
        : rows.length === 0 ? el("p", { class: "soft" }, "Nobody waits at this moment.")
          : el("ul", {}, rows.map(({ role, reason, since }) => el("li", { class: now - since > 60 ? "warn" : "" }, `${role} waits for ${reason}: ${duration(now - since)}`))));
  }
}
