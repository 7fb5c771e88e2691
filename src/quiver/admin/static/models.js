// Every model that may be asked for, and how far its files are.

import { bar } from "./charts.js";
import { bytes, h, notice, number, percent, plural } from "./dom.js";
import { watch } from "./live.js";
import { stateChip } from "./overview.js";

export const title = "Models";

function downloads(model) {
  if (!model.downloads.length) return null;
  const [done, total] = ["done_bytes", "total_bytes"].map((key) => model.downloads.reduce((sum, file) => sum + file[key], 0));
  const files = [...model.downloads].sort((a, b) => a.file.localeCompare(b.file));
  return h("div", { class: "downloads" },
    h("p", {}, `Downloading ${plural(files.length, "file")}: ${bytes(done)} of ${bytes(total)}, ${percent(total ? done / total : 0)}`),
    h("ul", {}, files.map((file) => h("li", {},
      h("span", { class: "file" }, file.file), h("span", { class: "num" }, `${bytes(file.done_bytes)} of ${bytes(file.total_bytes)}`),
      bar(file.total_bytes ? file.done_bytes / file.total_bytes : 0, `${file.file}: ${percent(file.done_bytes / file.total_bytes)}`)))));
}

const WIDE = new Set(["Also called", "Vectors"]);

function facts(model) {
  const known = [
    ["Kind", model.kind.replace("_", "-")], ["Dimensions", model.dimensions && number(model.dimensions)], ["Reads", model.max_tokens && `${number(model.max_tokens)} tokens`],
    ["Runs on", model.backend], ["Arithmetic", model.dtype], ["Weights", model.disk_bytes && bytes(model.disk_bytes)], ["Lanes", model.lanes],
    ["Room to wait", model.lanes && `${number(model.capacity_tokens)} tokens`], ["Prompts", model.prompts.join(", ")], ["Also called", model.aliases.join(", ")],
    ["Vectors", model.lanes && (model.batch_invariant ? "the same to the last bit, alone and in any company" : "would show their company in the last bit: inputs run alone")],
  ];
  return h("dl", { class: "facts" }, known.filter(([, value]) => value).map(([name, value]) => h("div", { class: WIDE.has(name) && "wide" }, h("dt", {}, name), h("dd", {}, String(value)))));
}

function card(model) {
  return h("article", { class: "panel model", id: `model-${model.id}` },
    h("h2", {}, h("span", { class: "name" }, model.id), stateChip(model)), model.description && h("p", { class: "dim" }, model.description),
    model.error && notice(model.error), downloads(model), facts(model));
}

const STATES = ["failed", "downloading", "loading", "ready"];

export function render(main, signal) {
  const list = h("div", { class: "stack" });
  const rest = h("details", { class: "panel" });
  let shown = "";
  main.append(list, rest);
  watch(signal, (status) => {
    if (!status) return;
    const here = status.models.filter((model) => model.state !== "available");
    const others = status.models.filter((model) => model.state === "available");
    const said = JSON.stringify([here.map(({ state, error, downloads: files, dtype, id }) => [id, state, error, files, dtype]), others.length]);
    if (said === shown) return; // nothing that this page shows has changed
    shown = said;
    here.sort((a, b) => STATES.indexOf(a.state) - STATES.indexOf(b.state));
    list.replaceChildren(...(here.length ? here.map(card) : [h("p", { class: "empty" }, "No model is loaded or on its way.")]));
    rest.hidden = !others.length;
    rest.replaceChildren(h("summary", {}, `${plural(others.length, "model")} more may be asked for: the first request loads one`),
      h("ul", { class: "plain" }, others.map((model) => h("li", {}, h("span", { class: "name" }, model.id), h("span", { class: "dim" }, ` ${model.description}`)))));
  });
}
