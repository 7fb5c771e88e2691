// Jobs of every kind and owner: how far they are, what was wrong, and a way to stop them.

import { call } from "./api.js";
import { bar } from "./charts.js";
import { ask, chip, h, moment, notice, number, percent, table, toast } from "./dom.js";
import { EVERY_MS } from "./live.js";

export const title = "Jobs";

const TONES = { completed: "good", failed: "bad", expired: "bad", cancelled: "", open: "busy", reading: "busy", cancelling: "warn", expiring: "warn" };

function stateOf(job) {
  return chip(job.state, job.state === "completed" && job.failed ? "warn" : TONES[job.state]);
}

function progress(job) {
  if (!job.total) return job.has_ended ? "–" : "reading its file";
  const done = (job.done + job.failed) / job.total;
  return h("span", { class: "progress" }, `${number(job.done)} of ${number(job.total)}${job.failed ? `, ${number(job.failed)} failed` : ""}`, bar(done, `${percent(done)} done`, job.failed ? "bad" : ""));
}

function facts(job) {
  const times = [["Made", moment(job.created_at)], ["Opened", job.opened_at && moment(job.opened_at)], ["Told to stop", job.closing_at && moment(job.closing_at)],
    ["Ended", job.ended_at && moment(job.ended_at)], ["Of use until", job.expires_at && moment(job.expires_at)]];
  const about = Object.entries(job.facts).map(([name, value]) => [name.replaceAll("_", " "), h("code", {}, value)]);
  const all = [["Kind", job.kind], ["State", stateOf(job)], ["Lines", progress(job)], ["Owner", job.owner || "nobody: no key was asked for"], ["Tried again", job.retries || null], ...about, ...times];
  return h("dl", { class: "facts" }, all.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

async function cancel(job) {
  return ask(`Stop ${job.id}?`, [h("p", {}, "What is done of it is kept.")], { action: "Stop the job", tone: "danger", close: "Let it run", submit: () => call(`jobs/${job.id}/cancel`, {}) });
}

async function showJob(id, after) {
  const job = await call(`jobs/${id}`);
  const wrong = job.errors.map((fault) => notice(`line ${fault.line ?? "–"}: ${fault.message}`));
  await ask(job.id, [facts(job), wrong], { action: null, close: "Close" });
  await after();
}

function row(job, act) {
  const stop = !job.has_ended && h("button", { class: "quiet small danger", type: "button", "aria-label": `Cancel job ${job.id}`, onclick: () => act(cancel, job) }, "Cancel");
  return [h("code", { class: "whole" }, job.id), job.kind, stateOf(job), progress(job), moment(job.created_at), job.ended_at ? moment(job.ended_at) : "–",
    h("span", { class: "buttons" }, h("button", { class: "quiet small", type: "button", "aria-label": `Show job ${job.id}`, onclick: () => showJob(job.id, act) }, "Show"), stop)];
}

export async function render(main, signal) {
  const list = h("section", { class: "panel" }, h("p", { class: "empty" }, "Loading …"));
  main.append(list);
  let pages = 1;
  let shown = "";
  const load = async () => {
    let [jobs, after] = [[], null];
    for (let page = 0; page < pages; page += 1) {
      const reply = await call(after ? `jobs?after=${encodeURIComponent(after)}` : "jobs", undefined, { signal });
      [jobs, after] = [[...jobs, ...reply.jobs], reply.after];
      if (!after) break;
    }
    const said = JSON.stringify([jobs, after]);
    if (said === shown) return; // a button that has the focus keeps it
    shown = said;
    const more = after && h("button", { class: "quiet", type: "button", onclick: () => { pages += 1; return load(); } }, "Show older ones");
    list.replaceChildren(h("h2", {}, "Batches and RunPod jobs"),
      table("Jobs", ["Job", "Kind", "State", "Lines", "Made", "Ended", ["Actions", "num"]], jobs.map((job) => row(job, act)), "No job is known: they are forgotten a while after their end."), more || "");
  };
  const act = async (what, job) => {
    if (what && (await what(job))) toast(`${job.id} is told to stop.`);
    await load();
  };
  await load();
  const timer = setInterval(() => {
    if (!document.hidden && !document.querySelector("dialog[open]")) load().catch(() => {});
  }, EVERY_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
}
