// Every setting as it is in force; secrets are hidden by the server.

import { call } from "./api.js";
import { chip, field, h, plural, table } from "./dom.js";

export const title = "Settings";

function sectionOf({ name, settings }, isShown) {
  const rows = settings.filter(isShown);
  return rows.length && h("section", { class: "panel" }, h("h2", {}, h("code", {}, `[${name}]`)),
    table(`Settings of ${name}`, ["Setting", "Value", "Meaning"], rows.map((row) => [
      h("span", {}, h("code", {}, row.name), h("br"), h("span", { class: "dim env" }, row.env)),
      h("span", { class: "setting" }, h("code", {}, row.value || "not set"), row.is_changed && h("span", {}, chip("changed", "busy"), h("span", { class: "dim" }, ` default: ${row.default || "not set"}`))),
      h("span", { class: "dim" }, row.help.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part))),
    ])));
}

export async function render(main, signal) {
  const sections = await call("settings", undefined, { signal });
  const changed = sections.flatMap((section) => section.settings).filter((row) => row.is_changed).length;
  const search = h("input", { type: "search", placeholder: "port, cache, QUIVER_…", autocomplete: "off" });
  const only = h("input", { type: "checkbox" });
  const shown = h("div", { class: "stack" });
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const isShown = (row) => (!only.checked || row.is_changed) && [row.name, row.env, row.value, row.help].some((text) => text.toLowerCase().includes(wanted));
    const found = sections.map((section) => sectionOf(section, isShown)).filter(Boolean);
    shown.replaceChildren(...(found.length ? found : [h("p", { class: "empty" }, "No setting has that in it.")]));
  };
  search.addEventListener("input", show);
  only.addEventListener("change", show);
  main.append(h("div", { class: "filter" }, field("Find", search), h("label", { class: "check" }, only, `only the ${plural(changed, "setting")} that differ${changed === 1 ? "s" : ""} from the default`)), shown);
  show();
}
