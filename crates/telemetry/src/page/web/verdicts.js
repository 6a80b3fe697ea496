// Verdicts view: a person compares pairs of completions, with buttons or keys.

import { el, fetchJson, postJson } from "./elements.js";
import { promptText } from "./samples.js";

const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", "=": "tie", b: "both-bad", u: "undo" };

export class Verdicts {
  constructor(state) {
    this.state = state;
    this.run = null;
    this.offered = null;
    this.busy = false;
    this.choice = el("select", { id: "choice", onchange: () => this.load() },
      el("option", { value: "uncertain" }, "the judge is least certain about"),
      el("option", { value: "random" }, "are drawn at random"));
    this.status = el("p", { role: "status", id: "verdict-status" });
    this.error = el("div", { id: "verdict-error" });
    this.pair = el("div", { id: "pair" });
    const button = (action, key, text) => el("button", { type: "button", "data-verdict": action, "aria-keyshortcuts": key, onclick: () => this.act(action) }, `${text} (${key.toUpperCase()})`);
    this.buttons = el("div", { class: "bar", role: "group", "aria-label": "Verdict" },
      button("left", "1", "Left is better"), button("right", "2", "Right is better"), button("tie", "t", "Equally good"),
      button("both-bad", "b", "Both bad"), button("undo", "u", "Undo"));
    this.element = el("div", { id: "verdicts" },
      el("p", { class: "soft" }, "Which answer is better? The judge's label is hidden and the sides are shuffled. Verdicts are kept in verdicts.jsonl of the run directory; those for one side are pairs in annotated_pairs.jsonl: the next APO round trains on them, and [preference.fit.pairs] or [pairs] of another run can name the file."),
      el("div", { class: "bar" }, el("label", { for: "choice" }, "Pairs that ", this.choice)),
      this.status, this.error, this.pair, this.buttons);
    addEventListener("keydown", (event) => this.key(event));
  }

  async update() {
    const run = this.state.selected[0];
    if (run === undefined) return;
    if (run !== this.run) {
      this.run = run;
      await this.load();
    } else if (this.offered === null && !this.error.hasChildNodes()) {
      // New samples may have arrived.
      await this.load();
    }
  }

  // Shows the next pair and the summary.
  async load() {
    await this.attempt(async () => {
      this.summarise(await fetchJson(`/api/runs/${this.run}/verdicts`));
      this.offer(await fetchJson(`/api/runs/${this.run}/verdicts/next?choice=${this.choice.value}`));
    });
  }

  async attempt(work) {
    if (this.busy) return;
    this.busy = true;
    try {
      await work();
      this.error.replaceChildren();
    } catch (error) {
      // What is shown may be out of date: another page may have judged it.
      this.offered = null;
      this.pair.replaceChildren();
      this.error.replaceChildren(el("p", { class: "bad", role: "alert" }, error.message), el("button", { type: "button", onclick: () => this.load() }, "Next pair"));
    } finally {
      this.busy = false;
    }
  }

  offer(offered) {
    this.offered = offered;
    if (offered === null) {
      this.pair.replaceChildren(el("p", {}, "No pair is left: every labelled sample with two different completions has a verdict. telemetry.samples_per_step sets how many a step logs."));
      return;
    }
    const order = offered.swapped ? [1, 0] : [0, 1];
    const side = (index, name) => el("section", { class: "side", "aria-label": name }, el("h3", {}, name),
      el("div", { class: "text" }, offered.row.completions[index]),
      el("footer", {}, offered.row.finish[index] === "length" ? "truncated" : "ended by itself"));
    this.pair.replaceChildren(el("article", { class: "card sample", "data-step": offered.step, "data-prompt": offered.prompt_id },
      el("div", { class: "prompt" }, promptText(offered.row)),
      el("div", { class: "sides" }, side(order[0], "Left"), side(order[1], "Right"))));
  }

  summarise(summary) {
    this.last = summary.last;
    const percent = (value) => `${(100 * value).toFixed(1)} %`;
    const rate = (agreement) => agreement.pairs === 0 ? "none yet" : `${percent(agreement.mean)} (${percent(agreement.low)} to ${percent(agreement.high)}) of ${agreement.pairs}`;
    const left = summary.decided === 0 ? "" : ` Left was better in ${percent(summary.first_shown / summary.decided)}.`;
    this.status.textContent = `${summary.verdicts} verdicts: ${summary.decided} decided, ${summary.ties} equal, ${summary.both_bad} both bad. `
      + `Agreement with the judge: ${rate(summary.agreement)}; on pairs drawn at random: ${rate(summary.random_agreement)}.${left}`;
    this.buttons.querySelector("[data-verdict=undo]").disabled = summary.last === null;
  }

  key(event) {
    const field = event.target.closest?.("input, select, textarea, [role=tab]");
    const action = KEYS[event.key];
    if (!action || field || event.ctrlKey || event.metaKey || event.altKey || !this.element.isConnected) return;
    event.preventDefault();
    this.act(action);
  }

  async act(action) {
    await this.attempt(async () => {
      if (action === "undo") {
        if (this.last === null) return;
        this.summarise(await postJson(`/api/runs/${this.run}/verdicts/withdraw`, { id: this.last }));
      } else {
        if (this.offered === null) return;
        const { step, prompt_id, swapped, choice } = this.offered;
        const sides = swapped ? { left: "second", right: "first" } : { left: "first", right: "second" };
        const verdict = sides[action] ?? action;
        this.summarise(await postJson(`/api/runs/${this.run}/verdicts`, { step, prompt_id, verdict, swapped, choice }));
      }
      this.offer(await fetchJson(`/api/runs/${this.run}/verdicts/next?choice=${this.choice.value}`));
    });
  }
}
