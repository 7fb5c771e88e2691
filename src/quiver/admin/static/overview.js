// What the server is doing, at a glance.

import { bar, sparkline } from "./charts.js";
import { bytes, chip, h, notice, number, percent, plural, seconds, short, table } from "./dom.js";
import { hitRate, latency, latencySeries, queueSeries, requestsPerSecond, tokensPerSecond, watch } from "./live.js";

export const title = "Overview";

const TONES = { ready: "good", failed: "bad", downloading: "busy", loading: "busy" };

export function stateChip(model) {
  return chip(model.state, TONES[model.state] ?? "");
}

function tile(name, chart) {
  const value = h("p", { class: "value" }, "–");
  const note = h("p", { class: "note" }, "\u00a0");
  const element = h("section", { class: "tile", "aria-label": name }, h("h2", {}, name), value, note, chart);
  return { element, set: (text, words) => { value.replaceChildren(...[text].flat()); note.textContent = words; } };
}

function lastOf(points) {
  return points.length ? points.at(-1)[1] : NaN;
}

function lanes(model) {
  const dots = Array.from({ length: Math.min(model.lanes, 16) }, (_, i) => h("i", { class: i < model.busy_lanes ? "dot on" : "dot" }));
  return h("span", { class: "lanes" }, h("span", { "aria-hidden": "true" }, dots), `${model.busy_lanes} of ${model.lanes}`);
}

function modelsTable(status) {
  const shown = status.models.filter((model) => model.state !== "available");
  return table("Models", ["Model", "State", "Lanes at work", ["Waiting", "num"], ["Tokens/s", "num"], ["Tokens read", "num"]],
    shown.map((model) => [
      h("span", { class: "name" }, model.id), stateChip(model), model.lanes ? lanes(model) : "–",
      model.waiting_tokens ? `${short(model.waiting_tokens)} tokens` : "–",
      short(lastOf(tokensPerSecond(model.id)) || 0), short(model.tokens),
    ]), "No model is loaded.");
}

function dialectsTable(status) {
  const most = Math.max(...status.dialects.map((row) => row.answered + row.refused + row.failed), 1);
  return table("Requests by API", ["API", "Share", ["Answered", "num"], ["Refused", "num"], ["Failed", "num"]],
    status.dialects.map((row) => {
      const all = row.answered + row.refused + row.failed;
      return [row.dialect, bar(all / most, `${number(all)} requests`), number(row.answered), number(row.refused), number(row.failed)];
    }), "No request has come yet.");
}

function warnings(status) {
  const failed = status.models.filter((model) => model.state === "failed");
  return [
    ...failed.map((model) => notice(`${model.id} could not be loaded: ${model.error}`)),
    status.is_short_of_memory && notice("Memory is short: new requests are refused with 429 until it is not.", "warn"),
    status.state === "failed" && notice("The server can compute no more, and ends."),
    status.state === "stopping" && notice("The server is stopping: it answers what it has accepted.", "warn"),
  ].filter(Boolean);
}

function show(tiles, status) {
  const took = latency();
  const hits = hitRate();
  const { memory } = status;
  const waiting = status.models.reduce((sum, model) => sum + model.waiting_tokens, 0);
  const wait = Math.max(...status.models.map((model) => model.wait_seconds), 0);
  tiles.tokens.set(short(lastOf(tokensPerSecond())), `${short(status.models.reduce((sum, model) => sum + model.tokens, 0))} since the start`);
  const all = status.dialects.reduce((sum, row) => sum + row.answered + row.refused + row.failed, 0);
  tiles.requests.set(number(lastOf(requestsPerSecond()), 1), `${plural(all, "request")} since the start, ${short(status.turned_away)} turned away`);
  tiles.latency.set([seconds(took.p50), h("small", {}, ` p95 ${seconds(took.p95)} · p99 ${seconds(took.p99)}`)], took.isLately ? "median of the last minute; below, p95" : "median since the start");
  tiles.queue.set([short(waiting), h("small", {}, " tokens wait")], waiting ? `about ${seconds(wait)} until a new one is computed` : "nothing waits");
  tiles.cache.set(hits.isOn ? percent(Number.isFinite(hits.lately) ? hits.lately : hits.ever) : "off",
    hits.isOn ? `${Number.isFinite(hits.lately) ? "of the last minute’s inputs" : "of all inputs"} were known; ${short(hits.entries)} kept in ${bytes(hits.bytes)}` : "results are not kept");
  tiles.memory.set(bytes(memory.resident), `of ${bytes(memory.limit)} that it may hold; ${bytes(memory.available)} free`);
}

function redraw(charts, status) {
  charts.tokens.update(tokensPerSecond());
  charts.requests.update(requestsPerSecond());
  charts.latency.update(latencySeries(0.95));
  charts.queue.update(queueSeries());
  const hits = hitRate();
  const { memory } = status;
  const part = memory.limit ? memory.resident / memory.limit : 0;
  charts.memory.replaceChildren(bar(part, `${percent(part)} of the memory that it may hold`, part > 0.9 ? "bad" : ""));
  charts.cache.replaceChildren(hits.isOn ? bar(Number.isFinite(hits.lately) ? hits.lately : hits.ever, "part of inputs whose results were known") : "");
}

export function render(main, signal) {
  const charts = {
    tokens: sparkline("tokens a second"), requests: sparkline("requests a second"), latency: sparkline("95th percentile of latency"),
    queue: sparkline("tokens that wait"), cache: h("div", { class: "gauge" }), memory: h("div", { class: "gauge" }),
  };
  const names = { tokens: "Tokens a second", requests: "Requests a second", latency: "Latency", queue: "Queue", cache: "Cache hits", memory: "Memory" };
  const tiles = Object.fromEntries(Object.entries(names).map(([key, name]) => [key, tile(name, charts[key])]));
  const [alerts, models, dialects] = [h("div", {}), h("div", {}), h("div", {})];
  let shownAlerts = "";
  main.append(alerts, h("div", { class: "tiles" }, Object.values(tiles).map(({ element }) => element)),
    h("section", { class: "panel" }, h("h2", {}, "Models"), models),
    h("section", { class: "panel" }, h("h2", {}, "Requests by API"), dialects));
  watch(signal, (status) => {
    if (!status) return;
    show(tiles, status);
    redraw(charts, status);
    models.replaceChildren(modelsTable(status));
    dialects.replaceChildren(dialectsTable(status));
    const wrong = warnings(status);
    const words = wrong.map((each) => each.textContent).join("\n");
    if (words !== shownAlerts) alerts.replaceChildren(...wrong); // said once, not every two seconds
    shownAlerts = words;
  });
}
