// Users, their tiers, and what they have used.

import { call } from "./api.js";
import { bar } from "./charts.js";
import { ask, field, h, moment, number, percent, plural, select, short, table, toast } from "./dom.js";

// Users and tiers

const bound = (value, unit) => (value === null ? "no bound" : `${number(value, 1)}${unit}`);

function amountOf(input) {
  return input.value.trim() === "" ? null : Number(input.value);
}

async function editTier(tier) {
  const name = h("input", { type: "text", required: true, maxlength: 64, value: tier?.name ?? "", readonly: Boolean(tier) });
  const amount = (value, step) => h("input", { type: "number", min: 0, step, value: value ?? "", placeholder: "no bound", inputmode: "decimal" });
  const [monthly, rate, burst] = [amount(tier?.monthly_embeddings, 1), amount(tier?.rate_per_second, "any"), amount(tier?.burst, "any")];
  return ask(tier ? `Tier ${tier.name}` : "New tier", [
    field("Name", name), field("Embeddings in a month", monthly, "Of all of a user’s keys together; empty: no bound."),
    h("div", { class: "row" }, field("Requests a second", rate), field("At once after a rest", burst)),
    h("p", { class: "hint" }, "Of each key; both empty: as the server’s settings say. Those who have the tier feel it within seconds."),
  ], { submit: () => call("tiers", { name: name.value, monthly_embeddings: amountOf(monthly), rate_per_second: amountOf(rate), burst: amountOf(burst) }) });
}

async function editUser(tiers, user) {
  const email = h("input", { type: "email", required: true, value: user?.email ?? "", readonly: Boolean(user) });
  const tier = select(tiers.map((each) => [each.name, each.name]), user?.tier ?? "free");
  return ask(user ? "Move to another tier" : "New user", [field("Address", email), field("Tier", tier, "It counts for all of the user’s keys.")],
    { submit: () => call("users", { email: email.value, tier: tier.value }) });
}

export const tiers = {
  title: "Users and tiers",
  async render(main, signal) {
    const [above, below] = [h("section", { class: "panel" }), h("section", { class: "panel" })];
    main.append(above, below);
    const changed = async (what) => {
      if (!(await what)) return;
      await load();
      toast("Saved.");
    };
    const edit = (label, open) => h("button", { class: "quiet small", type: "button", "aria-label": label, onclick: () => changed(open()) }, "Edit");
    const load = async () => {
      const [known, users] = await Promise.all([call("tiers", undefined, { signal }), call("users", undefined, { signal })]);
      above.replaceChildren(h("div", { class: "head" }, h("h2", {}, "Tiers"), h("button", { class: "primary", type: "button", onclick: () => changed(editTier()) }, "New tier")),
        table("Tiers", ["Tier", ["Embeddings a month", "num"], ["Requests a second", "num"], ["At once", "num"], ["Actions", "num"]],
          known.map((tier) => [tier.name, bound(tier.monthly_embeddings, ""), tier.rate_per_second === null ? "as the settings say" : number(tier.rate_per_second, 1), tier.burst === null ? "–" : number(tier.burst), edit(`Edit tier ${tier.name}`, () => editTier(tier))])));
      below.replaceChildren(h("div", { class: "head" }, h("h2", {}, plural(users.length, "user")), h("button", { class: "quiet", type: "button", onclick: () => changed(editUser(known)) }, "New user")),
        table("Users", ["User", "Tier", "Since", ["Actions", "num"]], users.map((user) => [user.email, user.tier, moment(user.created_at), edit(`Edit user ${user.email}`, () => editUser(known, user))]), "There is no user yet: the first key makes one."));
    };
    await load();
  },
};

// Usage

function months(count = 12) {
  const now = new Date();
  return Array.from({ length: count }, (_, back) => {
    const month = new Date(Date.UTC(now.getUTCFullYear(), now.getUTCMonth() - back, 1));
    return [month.toISOString().slice(0, 7), month.toLocaleString("en-GB", { month: "long", year: "numeric", timeZone: "UTC" })];
  });
}

function byUser(rows) {
  const users = new Map();
  for (const row of rows) users.set(row.email, [...(users.get(row.email) ?? []), row]);
  return [...users].map(([email, theirs]) => ({ email, used: theirs.reduce((sum, row) => sum + row.embeddings, 0), quota: theirs[0].quota }));
}

function quotas(rows) {
  return byUser(rows).map(({ email, used, quota }) => h("div", { class: "quota" },
    h("span", { class: "name" }, email), h("span", { class: "num" }, quota === null ? `${number(used)}, no bound` : `${number(used)} of ${number(quota)} (${percent(used / quota, 1)})`),
    quota !== null && bar(used / quota, `${percent(used / quota)} of the month’s quota`, used > 0.9 * quota ? "bad" : "")));
}

export const usage = {
  title: "Usage",
  async render(main, signal) {
    const month = select(months());
    const shown = h("div", {});
    main.append(h("section", { class: "panel" }, h("div", { class: "head" }, h("h2", {}, "Used in a month"), field("Month (UTC)", month)), shown));
    const load = async () => {
      const rows = await call(`usage?period=${month.value}`, undefined, { signal });
      shown.replaceChildren(...quotas(rows), table("Usage", ["User", "Key", "Model", ["Requests", "num"], ["Embeddings", "num"], ["Known before", "num"], ["Tokens", "num"]],
        rows.map((row) => [row.email, h("code", { class: "whole" }, row.key), row.model, number(row.requests), number(row.embeddings), number(row.cached), short(row.tokens)]),
        "Nothing was used with a key in this month. What servers have not written down yet, of the last seconds, is missing."));
    };
    month.addEventListener("change", load);
    await load();
  },
};
