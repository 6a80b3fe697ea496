// Samples view: pairs of completions side by side, filtered and paginated by the server.

import { el, errorMessage, fetchJson } from "./elements.js";
import { short } from "./format.js";

const ROWS = 20;

export class Samples {
  constructor(state) {
    this.state = state;
    this.fields = {
      search: el("input", { type: "search", id: "search", placeholder: "any text" }),
      first_step: el("input", { type: "number", min: 0, id: "first_step" }),
      last_step: el("input", { type: "number", min: 0, id: "last_step" }),
      least_confidence: el("input", { type: "number", min: 0, max: 1, step: 0.05, id: "least_confidence" }),
      most_confidence: el("input", { type: "number", min: 0, max: 1, step: 0.05, id: "most_confidence" }),
      shortest: el("input", { type: "number", min: 0, id: "shortest" }),
      longest: el("input", { type: "number", min: 0, id: "longest" }),
    };
    const label = (name, field) => el("label", { for: field.id }, name, field);
    const f = this.fields;
    this.form = el("form", { class: "bar", role: "search", onsubmit: (event) => { event.preventDefault(); this.begin(); } },
      label("Text", f.search), label("From step", f.first_step), label("to step", f.last_step),
      label("Confidence from", f.least_confidence), label("to", f.most_confidence),
      label("Tokens from", f.shortest), label("to", f.longest),
      el("button", { type: "submit", id: "find" }, "Find"),
      el("button", { type: "reset", onclick: () => setTimeout(() => this.begin()) }, "Clear"));
    this.count = el("p", { role: "status", id: "count" });
    this.list = el("div", { id: "rows" });
    this.more = el("button", { type: "button", id: "older", hidden: true, onclick: () => this.next() }, "Older");
    this.fresh = el("button", { type: "button", id: "fresh", hidden: true, onclick: () => this.begin() }, "Show newer samples");
    this.element = el("div", {}, this.form, this.key(), this.count, this.fresh, this.list, this.more);
    this.run = null;
    this.seen = 0;
  }

  key() {
    const token = (kind, text) => el("span", { class: `token ${kind}` }, text);
    return el("p", { class: "soft" }, "Colours: the policy assigns a token a ", token("d3", " much lower "), " ", token("d1", " lower "), " ", token("u1", " higher "), " ", token("u3", " much higher "), " probability than the reference. Confidence is |2p − 1|.");
  }

  async update() {
    const run = this.state.selected[0];
    if (run !== this.run) {
      this.run = run;
      await this.begin();
    }
    const total = this.state.runs[run]?.samples ?? 0;
    if (this.seen === 0 && total > 0) await this.begin();
    this.fresh.hidden = total <= this.seen || this.seen === 0;
  }

  async begin() {
    this.before = null;
    this.list.replaceChildren();
    await this.next();
  }

  async next() {
    if (this.run === null || this.run === undefined) return;
    const query = new URLSearchParams({ limit: ROWS });
    for (const [name, field] of Object.entries(this.fields)) if (field.value !== "") query.set(name, field.value);
    if (this.before !== null) query.set("before", this.before);
    this.more.hidden = true;
    try {
      const page = await fetchJson(`/api/runs/${this.run}/samples?${query}`);
      this.before = page.next;
      this.seen = page.total;
      this.fresh.hidden = true;
      this.list.append(...page.rows.map(([number, row]) => sample(number, row)));
      this.more.hidden = page.next === null;
      const shown = this.list.children.length;
      const rest = page.next !== null && this.fields.search.value ? `, ${page.total - page.next} searched` : "";
      this.count.textContent = page.total === 0 ? "This run has no samples: telemetry.samples_per_step is 0, or no step is complete."
        : `${shown} shown of ${page.matching} that match the filters, ${page.total} in total${rest}; newest first.`;
      // A text search continues until it has found a row.
      if (page.next !== null && page.rows.length === 0) await this.next();
    } catch (error) {
      this.list.append(errorMessage(error));
    }
  }
}

function sample(number, row) {
  const won = row.p === null ? -1 : row.p > 0.5 ? 0 : row.p < 0.5 ? 1 : -1;
  const about = [`step ${row.step}`, `prompt ${row.prompt_id}`, row.purpose, `policy version ${row.version}`, `judge ${row.judge} ${row.judge_version}`, row.actor];
  return el("article", { class: "card sample", "data-number": number, "aria-label": `Sample of step ${row.step}` },
    el("header", {}, about.filter(Boolean).map((text) => el("span", {}, text)),
      row.p === null ? el("span", {}, "no label")
        : el("span", {}, `p(first) ${row.p.toFixed(3)} `, el("meter", { min: 0, max: 1, value: row.p, "aria-label": "probability that the first is preferred" })),
      row.gold === null || row.gold === undefined ? null : el("span", {}, `gold ${row.gold.toFixed(3)}`)),
    el("div", { class: "prompt" }, promptText(row)),
    el("div", { class: "sides" }, row.completions.map((text, i) => side(row, i, text, i === won))));
}

// The prompt: a single user turn as plain text, a longer dialogue turn by turn, or the prompt's text.
export function promptText(row) {
  const turns = row.dialogue?.messages;
  if (!turns) return row.prompt;
  const turnText = (turn) => {
    const parts = Array.isArray(turn.content) ? turn.content : [turn.content ?? ""];
    const text = parts.map((part) => typeof part === "string" ? part : part.text ?? JSON.stringify(part)).join("");
    return turn.tool_calls ? `${text}${text ? "\n" : ""}${JSON.stringify(turn.tool_calls)}` : text;
  };
  if (turns.length === 1 && turns[0].role === "user" && !row.dialogue.tools) return turnText(turns[0]);
  const tools = row.dialogue.tools ? [`tools: ${JSON.stringify(row.dialogue.tools)}`] : [];
  return [...tools, ...turns.map((turn) => `${turn.role}: ${turnText(turn)}`)].join("\n\n");
}

function side(row, i, text, won) {
  const tokens = row.tokens?.[i];
  const ratio = difference(row.sum_logp?.[i], row.sum_ref_logp?.[i]);
  return el("section", { class: won ? "side won" : "side" },
    el("h3", {}, ["First", "Second"][i] ?? `Completion ${i + 1}`, won ? el("span", { class: "good" }, " ✓ preferred") : null),
    el("div", { class: "text" }, tokens?.length ? tokens.map((token, t) => tokenSpan(token, row.logp?.[i]?.[t], row.ref_logp?.[i]?.[t])) : text),
    el("footer", {}, `${row.lengths[i]} tokens, ${row.finish[i] === "length" ? "truncated" : "ended by itself"}, log π/ref ${short(ratio)}`));
}

function difference(a, b) {
  return a === null || a === undefined || b === null || b === undefined ? null : a - b;
}

function tokenSpan(token, logp, reference) {
  const ratio = difference(logp, reference);
  const size = Math.abs(ratio ?? 0);
  const level = size < 0.1 ? 0 : size < 0.5 ? 1 : size < 1.5 ? 2 : 3;
  const kind = level === 0 ? "token" : `token ${ratio > 0 ? "u" : "d"}${level}`;
  return el("span", { class: kind, title: `log π ${short(logp)}, log ref ${short(reference)}, difference ${short(ratio)}` }, token);
}
