// Elements, and numbers and times as people read them. Text goes in as text alone: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "open") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// h("p", {class: "dim"}, "text", otherElement)
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function number(value, digits = 0) {
  if (!Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: 0 });
}

// 1234567 -> 1.23 M
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) {
      const scaled = value / (unit === "k" ? 1e3 : size);
      return `${number(scaled, scaled < 10 ? 2 : scaled < 100 ? 1 : 0)} ${unit}`;
    }
  }
  return number(value, Math.abs(value) < 10 ? 1 : 0);
}

export function bytes(value) {
  if (!value) return value === 0 ? "0 B" : "–";
  const power = Math.min(4, Math.floor(Math.log2(value) / 10));
  return `${number(value / 2 ** (10 * power), power > 1 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 0.01) return `${number(1e3 * value, 1)} ms`;
  if (value < 1) return `${number(1e3 * value)} ms`;
  if (value < 90) return `${number(value, value < 10 ? 1 : 0)} s`;
  if (value < 5400) return `${number(value / 60)} min`;
  return value < 172800 ? `${number(value / 3600, 1)} h` : `${number(value / 86400)} days`;
}

export function percent(part, digits = 0) {
  return Number.isFinite(part) ? `${number(100 * part, digits)} %` : "–";
}

export function moment(unix) {
  if (!unix) return "–";
  const date = new Date(1000 * unix);
  const text = date.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
  return h("time", { datetime: date.toISOString() }, text);
}

export function plural(count, one, many = `${one}s`) {
  return `${number(count)} ${count === 1 ? one : many}`;
}

// The state of something in a word and a colour; the word alone would do.
export function chip(text, tone = "") {
  return h("span", { class: `chip ${tone}` }, text);
}

export function field(label, control, hint) {
  const id = control.id || `f${Math.random().toString(36).slice(2)}`;
  control.id = id;
  if (hint) control.setAttribute("aria-describedby", `${id}-hint`);
  return h("div", { class: "field" }, h("label", { for: id }, label), control, hint && h("p", { class: "hint", id: `${id}-hint` }, hint));
}

export function select(options, value) {
  const made = h("select", {}, options.map(([key, text]) => h("option", { value: key }, text)));
  if (value !== undefined) made.value = value;
  return made;
}

// rows: arrays of cells; a heading that is ["tokens", "num"] gives its column a class. On a phone each row is a card, unless
// the table is `wide`; the roles stay what they are when the style sheet makes blocks of cells.
export function table(caption, headings, rows, nothing = "Nothing here yet.", kind = "cards") {
  if (!rows.length) return h("p", { class: "empty" }, nothing);
  const columns = headings.map((heading) => (Array.isArray(heading) ? heading : [heading, ""]));
  const cell = (content, [text, side]) => h("td", { class: side, role: "cell", "data-label": text }, h("div", {}, content));
  return h("div", { class: `scroll ${kind}`, tabindex: "0", role: "region", "aria-label": caption },
    h("table", { role: "table" },
      h("caption", { class: "hidden" }, caption),
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, columns.map(([text, side]) => h("th", { scope: "col", role: "columnheader", class: side }, text)))),
      h("tbody", { role: "rowgroup" }, rows.map((cells) => h("tr", { role: "row" }, cells.map((content, i) => cell(content, columns[i])))))));
}

export function toast(text, tone = "") {
  const shown = h("p", { class: `toast ${tone}` }, text);
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), 6000);
}

export function notice(text, tone = "bad") {
  return h("p", { class: `notice ${tone}`, role: tone === "bad" ? "alert" : null }, text);
}

// A dialogue with a form; resolves to what `submit` returns, or to null if it is closed without.
export function ask(title, contents, { action = "Save", tone = "primary", submit = async () => true, close = "Cancel" } = {}) {
  return new Promise((resolve) => {
    const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
    const go = action && h("button", { class: tone, type: "submit" }, action);
    const form = h("form", { method: "dialog" }, h("h2", {}, title), contents, wrong,
      h("div", { class: "actions" }, close && h("button", { class: "quiet", type: "button", onclick: () => dialog.close() }, close), go));
    const dialog = h("dialog", {}, form);
    let result = null;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (go) go.disabled = true;
      try {
        result = await submit();
        dialog.close();
      } catch (error) {
        wrong.textContent = error.message;
        wrong.hidden = false;
      } finally {
        if (go) go.disabled = false;
      }
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(result);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
