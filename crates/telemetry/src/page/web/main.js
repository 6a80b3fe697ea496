// Entry point of the page: selected runs, open view, server-sent updates.

import { Curves } from "./curves.js";
import { el } from "./elements.js";
import { Flow } from "./pipeline.js";
import { Samples } from "./samples.js";
import { Rounds, Settings } from "./tables.js";
import { Verdicts } from "./verdicts.js";

const STATES = { running: "running", finished: "finished", interrupted: "interrupted", silent: "no process" };
const state = { runs: [], selected: [], live: null };
const views = { curves: new Curves(state), flow: new Flow(state), samples: new Samples(state), verdicts: new Verdicts(state), rounds: new Rounds(state), settings: new Settings(state) };
const panel = document.getElementById("view");
const tabs = [...document.querySelectorAll("[role=tab]")];
let open = "curves";

function show(view) {
  open = view in views ? view : "curves";
  for (const tab of tabs) {
    const selected = tab.dataset.view === open;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
  }
  panel.setAttribute("aria-labelledby", `tab-${open}`);
  panel.replaceChildren(views[open].element);
  if (location.hash !== `#${open}`) history.replaceState(null, "", `#${open}`);
  update();
}

async function update() {
  if (state.runs.length > 0) await views[open].update();
}

// Renders the run chips. They are recreated only when their number changes, to keep the keyboard focus.
function renderRuns() {
  const list = document.getElementById("runs");
  if (list.children.length !== state.runs.length) {
    state.selected = state.runs.map((_, index) => index);
    list.replaceChildren(...state.runs.map((run, index) => el("li", {}, el("label", { title: run.directory },
      el("input", { type: "checkbox", checked: true, "data-run": index, onchange: selectRuns }),
      el("span", { class: `dot color-${index % 6}` }), el("span", { class: "what" })))));
  }
  for (const [index, run] of state.runs.entries()) {
    const kind = run.state === "running" ? "good" : run.state === "silent" ? "warn" : "soft";
    list.children[index].querySelector(".what").replaceChildren(`${run.name} `, el("span", { class: kind }, `${STATES[run.state]}, step ${run.step}`));
  }
  document.title = state.runs.length === 1 ? `${state.runs[0].name} · Agon` : "Agon";
}

// Shows a warning above every view when the evaluations of the runs are not comparable.
function renderDifferences(all) {
  const place = document.getElementById("differences");
  const text = JSON.stringify(all);
  if (place.dataset.text === text) return;
  place.dataset.text = text;
  place.hidden = all.length === 0;
  place.replaceChildren(el("p", {}, "These runs were evaluated under different conditions: their win rates are not comparable."),
    el("ul", {}, all.map((difference) => el("li", {}, difference))));
}

function selectRuns() {
  state.selected = [...document.querySelectorAll("[data-run]:checked")].map((box) => Number(box.dataset.run));
  update();
}

function subscribe() {
  const link = document.getElementById("link");
  const events = new EventSource("/api/events");
  events.addEventListener("update", (event) => {
    const message = JSON.parse(event.data);
    [state.runs, state.live] = [message.runs, message.live];
    link.textContent = message.live ? "live" : "following the files";
    renderRuns();
    renderDifferences(message.differences);
    update();
  });
  events.addEventListener("error", () => {
    link.textContent = "no connection: the process has ended; agon view shows the run directory";
  });
}

function setUpThemes() {
  const button = document.getElementById("theme");
  const kinds = ["system", "light", "dark"];
  const use = (kind) => {
    if (kind === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = kind;
    button.setAttribute("aria-label", `Colour theme: ${kind}`);
    button.dataset.kind = kind;
  };
  use(kinds.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system");
  button.addEventListener("click", () => {
    const next = kinds[(kinds.indexOf(button.dataset.kind) + 1) % kinds.length];
    localStorage.setItem("theme", next);
    use(next);
  });
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab.dataset.view));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    next.focus();
    show(next.dataset.view);
  });
}
addEventListener("hashchange", () => {
  const view = location.hash.slice(1);
  if (view in views) show(view);
});
setUpThemes();
show(location.hash.slice(1) || "curves");
subscribe();
