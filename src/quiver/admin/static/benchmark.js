// How fast a model is at more and more requests at a time: one call for each step, so that leaving the page ends it.

import { call } from "./api.js";
import { legend, lines } from "./charts.js";
import { field, h, notice, number, percent, seconds, short, table } from "./dom.js";
import { modelSelect } from "./playground.js";

export const title = "Benchmark";

const STEPS = [1, 2, 4, 8, 16, 32];

function figures(steps) {
  const at = steps.map((step) => step.concurrency);
  const latencies = ["p50", "p95", "p99"].map((name) => ({ name, values: steps.map((step) => step[name]) }));
  return [
    h("div", { class: "split even" },
      h("figure", {}, h("figcaption", {}, "Tokens a second, by requests at a time"),
        lines("Tokens a second", at, [{ name: "tokens/s", values: steps.map((step) => step.tokens_per_second) }], { unit: " tokens/s" })),
      h("figure", {}, h("figcaption", {}, "Latency, by requests at a time", legend(latencies.map(({ name }) => name))),
        lines("Latency", at, latencies, { write: seconds }))),
    table("Steps", ["At a time", ["Requests", "num"], ["Texts/s", "num"], ["Tokens/s", "num"], ["p50", "num"], ["p95", "num"], ["p99", "num"], ["Refused", "num"]],
      steps.map((step) => [number(step.concurrency), number(step.requests), number(step.texts_per_second, 1), short(step.tokens_per_second), seconds(step.p50), seconds(step.p95), seconds(step.p99), number(step.refused)]), "", "wide"),
  ];
}

async function measure(body, until, { signal, tell, show }) {
  const steps = [];
  const planned = STEPS.filter((step) => step <= until);
  for (const concurrency of planned) {
    tell(`${concurrency} at a time: step ${steps.length + 1} of ${planned.length}, ${percent(steps.length / planned.length)} done`);
    steps.push(await call("try/benchmark", { ...body, concurrency }, { signal }));
    show(steps);
  }
  const best = steps.reduce((a, b) => (b.tokens_per_second > a.tokens_per_second ? b : a));
  tell(`Done: at best ${short(best.tokens_per_second)} tokens a second, with ${best.concurrency} at a time.`);
}

export function render(main, signal) {
  const amount = (value, max) => h("input", { type: "number", min: 1, max, value: String(value), required: true, inputmode: "numeric" });
  const model = modelSelect(signal);
  const [texts, words, time] = [amount(1, 64), amount(16, 256), amount(3, 20)];
  const until = h("select", {}, STEPS.map((step) => h("option", { value: step, selected: step === 16 }, `${step} at a time`)));
  const start = h("button", { class: "primary", type: "submit" }, "Start");
  const stop = h("button", { class: "quiet", type: "button", disabled: true }, "Stop");
  const said = h("p", { class: "line", role: "status" }, "Each step sends texts that nobody has sent before; other callers keep their turns.");
  const result = h("div", {});
  const form = h("form", { class: "panel" },
    h("div", { class: "row" }, field("Model", model), field("Texts in a request", texts), field("Words in a text", words), field("Seconds for a step", time), field("Up to", until)),
    h("div", { class: "actions" }, start, stop), said);
  main.append(form, h("section", { class: "panel result", "aria-label": "Result" }, h("h2", {}, "Result"), result));
  result.append(h("p", { class: "empty" }, "Throughput and latency will stand here, step by step."));
  let running = null;
  const end = () => running?.abort();
  signal.addEventListener("abort", end);
  stop.addEventListener("click", end);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running = new AbortController();
    [start.disabled, stop.disabled] = [true, false];
    const body = { model: model.value || null, texts: Number(texts.value), words: Number(words.value), seconds: Number(time.value) };
    const show = (steps) => result.replaceChildren(...figures(steps));
    try {
      await measure(body, Number(until.value), { signal: running.signal, tell: (text) => { said.textContent = text; }, show });
    } catch (error) {
      if (error.name === "AbortError") said.textContent = "Stopped.";
      else result.replaceChildren(notice(error.message));
    } finally {
      [start.disabled, stop.disabled] = [false, true];
    }
  });
}
