// Tables: rounds of adversarial preference optimisation, and settings of the selected runs.

import { el, errorMessage, fetchJson } from "./elements.js";
import { duration, short } from "./format.js";

function table(caption, heads, rows) {
  return el("div", { class: "wide" }, el("table", {}, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, rows)));
}

export class Rounds {
  constructor(state) {
    this.state = state;
    this.element = el("div", { id: "rounds" });
  }

  async update() {
    try {
      const cards = await Promise.all(this.state.selected.map((run) => this.card(run)));
      const text = JSON.stringify(cards.map(({ rounds }) => rounds)) + this.state.selected;
      if (text === this.text) return;
      this.text = text;
      this.element.replaceChildren(...cards.map(({ element }) => element));
    } catch (error) {
      this.element.replaceChildren(errorMessage(error));
    }
  }

  async card(run) {
    const rounds = await fetchJson(`/api/runs/${run}/rounds`);
    const both = (metric, of) => `${short(of(metric.before))} → ${short(of(metric.after))}`;
    const rows = rounds.map((round) => el("tr", {},
      el("th", { scope: "row" }, round.round), el("td", {}, round.step), el("td", {}, round.pairs),
      el("td", {}, both(round.golden_wins, (wins) => wins)),
      el("td", {}, both(round.held_out, (quality) => quality.accuracy)),
      el("td", {}, both(round.held_out, (quality) => quality.ece)),
      el("td", {}, round.policy ? both(round.policy, (quality) => quality.accuracy) : "–"),
      el("td", {}, short(round.drift)), el("td", {}, duration(round.seconds)),
      el("td", { class: round.rejected ? "bad" : "good" }, round.rejected ?? "accepted")));
    const heads = ["round", "step", "pairs", "golden win rate", "accuracy", "calibration error", "accuracy on the policy's samples", "drift", "duration", "status"];
    const body = rows.length ? table("The preference model before and after each round", heads, rows)
      : el("p", { class: "soft" }, "No round of adversarial preference optimisation has run.");
    return { rounds, element: el("section", { class: "card" }, el("h2", {}, this.state.runs[run].name), body) };
  }
}

function flatten(tree, path = "") {
  if (tree === null || typeof tree !== "object" || Array.isArray(tree)) return [[path, JSON.stringify(tree)]];
  return Object.entries(tree).flatMap(([key, value]) => flatten(value, path ? `${path}.${key}` : key));
}

export class Settings {
  constructor(state) {
    this.state = state;
    this.filter = el("input", { type: "search", id: "filter", oninput: () => this.draw() });
    this.differing = el("input", { type: "checkbox", id: "differing", onchange: () => this.draw() });
    this.place = el("div", { class: "card" });
    this.element = el("div", {}, el("div", { class: "bar" }, el("label", {}, "Key or value", this.filter),
      el("label", {}, "Only differences", this.differing)), this.place);
  }

  async update() {
    if (String(this.state.selected) === this.key && this.configs?.every(Boolean)) return;
    this.key = String(this.state.selected);
    try {
      this.configs = await Promise.all(this.state.selected.map((run) => fetchJson(`/api/runs/${run}/config`)));
      this.draw();
    } catch (error) {
      this.place.replaceChildren(errorMessage(error));
    }
  }

  draw() {
    const columns = (this.configs ?? []).map((config) => new Map(flatten(config ?? {})));
    const keys = [...new Set(columns.flatMap((column) => [...column.keys()]))].filter(Boolean);
    const needle = this.filter.value.toLowerCase();
    const rows = keys.flatMap((key) => {
      const values = columns.map((column) => column.get(key) ?? "–");
      const differs = new Set(values).size > 1;
      const found = [key, ...values].some((text) => text.toLowerCase().includes(needle));
      if (!found || (this.differing.checked && !differs)) return [];
      return [el("tr", { class: differs ? "differs" : null }, el("th", { scope: "row" }, el("code", {}, key)), values.map((value) => el("td", {}, el("code", {}, value))))];
    });
    this.place.replaceChildren(table("All settings, as resolved", ["setting", ...this.state.selected.map((run) => this.state.runs[run]?.name)], rows));
  }
}
