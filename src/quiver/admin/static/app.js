// The frame: which page is shown, the theme, the key, and whether the server answers.

import { call, forget, hasKey, remember } from "./api.js";
import * as benchmark from "./benchmark.js";
import { ask, field, h, notice, seconds, toast } from "./dom.js";
import * as jobs from "./jobs.js";
import * as keys from "./keys.js";
import { live } from "./live.js";
import * as models from "./models.js";
import * as overview from "./overview.js";
import { tiers, usage } from "./people.js";
import { embed, rerank } from "./playground.js";
import * as settings from "./settings.js";

const GROUPS = [
  ["Server", { "": overview, models, jobs, settings }],
  ["Try", { embed, rerank, benchmark }],
  ["Accounts", { keys, tiers, usage }],
];
const PAGES = Object.assign({}, ...GROUPS.map(([, pages]) => pages));
const THEMES = ["auto", "light", "dark"];
const THEME = "quiver-theme";

const $ = (id) => document.getElementById(id);

// Pages

let leaving = new AbortController();

async function go() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const name = location.hash.replace(/^#\/?/, "");
  const page = PAGES[name] ?? overview;
  const main = $("main");
  document.title = `${page.title} · Quiver`;
  for (const link of $("nav").querySelectorAll("a")) {
    if (link.getAttribute("href") === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  toggleMenu(false);
  main.replaceChildren(h("h1", {}, page.title));
  scrollTo(0, 0);
  try {
    await page.render(main, signal);
  } catch (error) {
    if (error.name !== "AbortError" && !signal.aborted) main.replaceChildren(h("h1", {}, page.title), notice(error.message));
  }
}

function toggleMenu(isOpen) {
  $("nav").classList.toggle("open", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
}

function buildNav() {
  $("nav").append(...GROUPS.map(([name, pages]) => h("div", {}, h("h2", {}, name),
    h("ul", {}, Object.entries(pages).map(([key, page]) => h("li", {}, h("a", { href: `#/${key}` }, page.title)))))));
}

// Theme

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem(THEME, theme);
  applyTheme(theme);
}

// The key

let isAsking = false;

async function unlock(refusal) {
  if (isAsking) return;
  isAsking = true;
  const key = h("input", { type: "password", required: true, autocomplete: "off", spellcheck: "false", placeholder: "qv_…" });
  const why = hasKey() || refusal.status === 403 ? refusal.message : "";
  forget();
  const given = await ask("This dashboard is locked", [
    why && notice(why), h("p", {}, "Show a key of an account with the scope ", h("code", {}, "admin"), "."),
    field("Key", key, "It is kept in this tab until you close it, and sent to this server alone."),
  ], {
    action: "Open", close: null,
    submit: async () => {
      await check(key.value.trim());
      remember(key.value.trim());
      return true;
    },
  });
  isAsking = false;
  if (given) {
    await live.ask();
    await go();
  } else {
    $("main").replaceChildren(h("h1", {}, "Locked"), notice("Without a key there is nothing to see."),
      h("button", { class: "primary", type: "button", onclick: () => unlock(refusal) }, "Show a key"));
  }
}

// Ask once with a key that is not kept yet; why it is not good stands in the dialogue.
async function check(key) {
  await call("status", undefined, { key });
}

// The server, at the top of every page; that it is lost is said aloud, the time that passes is not

let isLost = false;

function showServer() {
  const { now, error } = live;
  const wasLost = isLost;
  isLost = Boolean(error) && error.status !== 401 && error.status !== 403;
  if (wasLost !== isLost) toast(isLost ? "The server does not answer." : "The server answers again.");
  if (isLost) {
    $("server").replaceChildren(h("i", { class: "pulse lost" }), error.status ? error.message : "The server does not answer; trying again …");
    return;
  }
  if (!now) return;
  const tone = { ok: "", starting: "busy", stopping: "warn", failed: "lost" }[now.state];
  const said = [now.state === "ok" ? "running" : now.state, `up ${seconds(now.unix - now.started_at)}`, `version ${now.version}`].join(" · ");
  if ($("server").textContent !== said) $("server").replaceChildren(h("i", { class: `pulse ${tone}` }), said);
}

// What nobody has caught is said, too: no click may come to nothing in silence.
window.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  if (event.reason.name !== "AbortError") toast(event.reason.message, "bad");
});

buildNav();
applyTheme(localStorage.getItem(THEME) ?? "auto");
$("theme").addEventListener("click", nextTheme);
$("menu").addEventListener("click", () => toggleMenu($("menu").getAttribute("aria-expanded") !== "true"));
$("main").addEventListener("click", () => toggleMenu(false));
document.addEventListener("locked", (event) => unlock(event.detail));
live.addEventListener("change", showServer);
window.addEventListener("hashchange", () => go().then(() => $("main").focus({ preventScroll: true })));
await live.start();
await go();
