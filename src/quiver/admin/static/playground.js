// Texts to compare, and documents to rank: what a model makes of them.

import { call } from "./api.js";
import { bar, heatMap, strip } from "./charts.js";
import { field, h, notice, number, plural, seconds, select } from "./dom.js";
import { live, watch } from "./live.js";

const TEXTS = [
  "How do I reset my password?", "I forgot my login.", "My account is locked.", "The soup was cold.",
  "Our waiter was kind, but dinner came late.", "Restaurants near the river", "Wie setze ich mein Passwort zurück?",
];
const QUERY = "Who guards the guards?";
const DOCUMENTS = ["Bananas are yellow when they are ripe.", "The watchmen watch each other.", "Soldiers stood at the gate all night.", "A review board supervises the police."];

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

// A list of models that is filled as they become known, and keeps what was chosen
export function modelSelect(signal, kinds) {
  const chosen = select([["", "the first"]]);
  let known = "";
  watch(signal, (status) => {
    const usable = (status?.models ?? []).filter((model) => (!kinds || kinds.includes(model.kind)) && model.state !== "failed");
    const names = usable.map((model) => `${model.id}${model.state === "ready" ? "" : ` (${model.state})`}`);
    if (names.join() === known) return;
    known = names.join();
    const before = chosen.value;
    chosen.replaceChildren(h("option", { value: "" }, "the first"), ...usable.map((model, i) => h("option", { value: model.id }, names[i])));
    chosen.value = before;
  });
  return chosen;
}

function run(form, result, work) {
  const button = form.querySelector("button[type=submit]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    result.setAttribute("aria-busy", "true");
    try {
      result.replaceChildren(...[await work()].flat());
    } catch (error) {
      result.replaceChildren(notice(error.message));
    } finally {
      button.disabled = false;
      result.removeAttribute("aria-busy");
    }
  });
}

function factsLine(parts) {
  return h("p", { class: "line" }, parts.filter(Boolean).join(" · "));
}

// Embed

function nearest(found, texts) {
  let best = [0, 1];
  for (let i = 0; i < texts.length; i += 1) {
    for (let j = i + 1; j < texts.length; j += 1) if (found.similarities[i][j] > found.similarities[best[0]][best[1]]) best = [i, j];
  }
  return h("p", {}, "Most alike: ", h("q", {}, texts[best[0]]), " and ", h("q", {}, texts[best[1]]), ` (${number(found.similarities[best[0]][best[1]], 3)})`);
}

function embedded(found, texts) {
  const known = found.cached ? `${found.cached} known before` : "";
  const cut = found.truncated.length ? `${plural(found.truncated.length, "text")} cut` : "";
  return [
    factsLine([found.model, plural(found.dimensions, "dimension"), plural(found.tokens, "token"), seconds(found.seconds), known, cut]),
    texts.length > 1 && nearest(found, texts),
    heatMap(`How alike ${texts.length} texts are, by the cosine of their vectors`, found.similarities),
    h("ol", { class: "texts" }, texts.map((text, i) => h("li", {}, h("span", {}, text), strip(`The first ${found.vectors[i].length} numbers of vector ${i + 1}`, found.vectors[i])))),
  ].filter(Boolean);
}

export const embed = {
  title: "Embed",
  render(main, signal) {
    const texts = h("textarea", { rows: 9, required: true, spellcheck: "false", value: TEXTS.join("\n") });
    const model = modelSelect(signal, ["embed"]);
    const task = select([["", "none"], ["query", "query"], ["document", "document"]]);
    const dimensions = h("input", { type: "number", min: 1, step: 1, placeholder: "all", inputmode: "numeric" });
    const result = h("section", { class: "panel result", "aria-label": "Result", "aria-live": "polite" },
      h("p", { class: "empty" }, "The similarity of each pair of texts will stand here."));
    const form = h("form", { class: "panel" }, field("Texts", texts, "One on each line, up to 32."),
      h("div", { class: "row" }, field("Model", model), field("Task", task), field("Dimensions", dimensions)),
      h("div", { class: "actions" }, h("button", { class: "primary", type: "submit" }, "Compare")));
    main.append(h("div", { class: "split" }, form, result));
    run(form, result, async () => {
      const given = linesOf(texts.value);
      const body = { texts: given, model: model.value || null, task: task.value || null, dimensions: Number(dimensions.value) || null };
      return embedded(await call("try/embed", body, { signal }), given);
    });
  },
};

// Rerank

function ranked(found, documents) {
  const scores = found.hits.map((hit) => hit.score);
  const [low, high] = [Math.min(...scores, 0), Math.max(...scores, 1e-9)];
  return [
    factsLine([found.model, `scored by ${found.scored_by}`, plural(found.tokens, "token"), seconds(found.seconds)]),
    h("ol", { class: "ranking" }, found.hits.map((hit, place) => h("li", {},
      h("span", { class: "score" }, number(hit.score, 4)),
      h("div", {}, h("p", {}, documents[hit.index]), bar((hit.score - low) / (high - low), `score ${number(hit.score, 4)}`),
        h("p", { class: "hint" }, hit.index === place ? `was ${hit.index + 1}, stays` : `was ${hit.index + 1}`))))),
  ];
}

export const rerank = {
  title: "Rerank",
  render(main, signal) {
    const query = h("input", { type: "text", required: true, value: QUERY });
    const documents = h("textarea", { rows: 8, required: true, spellcheck: "false", value: DOCUMENTS.join("\n") });
    const model = modelSelect(signal, ["rerank", "embed", "multi_vector"]);
    const reranker = live.now?.models.find((each) => each.kind === "rerank" && each.state === "ready");
    if (reranker) model.value = reranker.id;
    const result = h("section", { class: "panel result", "aria-label": "Result", "aria-live": "polite" },
      h("p", { class: "empty" }, "The documents will stand here, the most relevant first."));
    const form = h("form", { class: "panel" }, field("Query", query), field("Documents", documents, "One on each line, up to 100."),
      field("Model", model, "A reranker reads query and document together; any other model compares their vectors."),
      h("div", { class: "actions" }, h("button", { class: "primary", type: "submit" }, "Rank")));
    main.append(h("div", { class: "split" }, form, result));
    run(form, result, async () => {
      const given = linesOf(documents.value);
      return ranked(await call("try/rerank", { query: query.value, documents: given, model: model.value || null }, { signal }), given);
    });
  },
};
