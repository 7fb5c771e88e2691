// Keys: made, shown once, replaced, ended.

import { call } from "./api.js";
import { ask, chip, field, h, moment, notice, plural, select, table, toast } from "./dom.js";

export const title = "Keys";

const SCOPES = ["embed", "rerank", "classify", "tokenize", "usage", "metrics", "admin"];
const DAY = 24 * 3600;
const ENDS = [["", "never"], [String(7 * DAY), "in a week"], [String(30 * DAY), "in 30 days"], [String(90 * DAY), "in 90 days"], [String(365 * DAY), "in a year"]];
const GRACES = [["0", "at once"], ["3600", "in an hour"], [String(DAY), "in a day"], [String(7 * DAY), "in a week"]];

// The one time that a key can be seen
function showOnce({ key, row }) {
  const text = h("input", { type: "text", readonly: true, value: key, class: "secret", id: "new-key" });
  const copy = h("button", { class: "quiet", type: "button", onclick: async () => {
    text.select();
    try {
      await navigator.clipboard.writeText(key);
      toast("The key is copied.");
    } catch {
      toast("Copy it by hand: the browser does not let this page.");
    }
  } }, "Copy");
  return ask("The new key", [
    h("p", {}, `It belongs to ${row.email} and is good for ${row.scopes.join(", ")}.`),
    h("div", { class: "copy" }, field("Key", text), copy), notice("It is not shown again: keep it now.", "warn"),
  ], { action: null, close: "I have kept it" });
}

async function create(tiers) {
  const email = h("input", { type: "email", required: true, autocomplete: "off", placeholder: "ann@example.com" });
  const name = h("input", { type: "text", maxlength: 200, autocomplete: "off", placeholder: "what people call it" });
  const tier = select([["", "as it is; free for a new user"], ...tiers.map((each) => [each.name, each.name])]);
  const ends = select(ENDS);
  const boxes = SCOPES.map((scope) => h("input", { type: "checkbox", value: scope, checked: scope !== "admin" }));
  return ask("New key", [
    field("Whose it is", email, "A new address is a new user."), field("Name", name),
    h("div", { class: "row" }, field("The user’s tier from now on", tier), field("Ends", ends)),
    h("fieldset", {}, h("legend", {}, "Good for"), boxes.map((box) => h("label", { class: "check" }, box, box.value))),
  ], {
    action: "Make the key",
    submit: async () => {
      const scopes = boxes.filter((box) => box.checked).map((box) => box.value);
      if (!scopes.length) throw new Error("Choose what the key is good for.");
      return call("keys", { email: email.value, name: name.value, tier: tier.value, scopes, expires_seconds: Number(ends.value) || null });
    },
  });
}

async function rotate(key) {
  const grace = select(GRACES, String(DAY));
  return ask(`Replace ${key.prefix}_${key.id}`, [h("p", {}, "A new key like it is made, and shown once."), field("The old key ends", grace)],
    { action: "Replace", submit: () => call(`keys/${key.id}/rotate`, { grace_seconds: Number(grace.value) }) });
}

async function revoke(key) {
  const words = `Whoever uses ${key.name || "it"} is refused within five seconds. This cannot be undone.`;
  return ask(`Revoke ${key.prefix}_${key.id}?`, [h("p", {}, words)], { action: "Revoke", tone: "danger", submit: () => call(`keys/${key.id}/revoke`, {}) });
}

function row(key, act) {
  const isGood = key.state === "good";
  const buttons = isGood && h("span", { class: "buttons" },
    h("button", { class: "quiet small", type: "button", "aria-label": `Replace key ${key.id}`, onclick: () => act(rotate, key) }, "Replace"),
    h("button", { class: "quiet small danger", type: "button", "aria-label": `Revoke key ${key.id}`, onclick: () => act(revoke, key) }, "Revoke"));
  return [h("code", { class: "whole" }, `${key.prefix}_${key.id}`), h("span", {}, key.name || h("span", { class: "dim" }, "no name"), h("br"), h("span", { class: "dim" }, key.email)), key.tier,
    h("span", { class: "scopes" }, key.scopes.map((scope) => chip(scope, scope === "admin" ? "warn" : ""))), chip(key.state, isGood ? "good" : "bad"), moment(key.created_at), key.expires_at ? moment(key.expires_at) : "never", buttons || ""];
}

function policy(reply) {
  if (reply.auth === "off") return notice("The setting auth is off: no key is asked for.", "warn");
  return reply.needs_key ? null : notice("Nobody needs a key yet: from the first one on, every caller does.", "warn");
}

export async function render(main, signal) {
  const list = h("section", { class: "panel" }, h("p", { class: "empty" }, "Loading …"));
  const above = h("div", {});
  const load = async () => {
    const reply = await call("keys", undefined, { signal });
    const good = reply.keys.filter((key) => key.state === "good").length;
    above.replaceChildren(...[policy(reply)].filter(Boolean));
    list.replaceChildren(h("div", { class: "head" }, h("h2", {}, `${plural(good, "good key")}, ${reply.keys.length} in all`),
      h("button", { class: "primary", type: "button", onclick: make }, "New key")),
    table("Keys", ["Key", "Name and user", "Tier", "Good for", "State", "Made", "Ends", ["Actions", "num"]], reply.keys.map((key) => row(key, act)), "There is no key yet."));
  };
  const made = async (reply) => {
    if (!reply) return;
    await load();
    if (reply.key) await showOnce(reply);
    else toast(`Key ${reply.id} is ${reply.state}.`);
  };
  const make = async () => made(await create(await call("tiers", undefined, { signal })));
  const act = async (what, key) => made(await what(key));
  main.append(above, list);
  await load();
}
