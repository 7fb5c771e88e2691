// Charts as SVG, drawn anew for the width that they get. Colours are classes: the style sheet knows light and dark.

import { h, number, s, short } from "./dom.js";

// An element that draws itself whenever its width changes: draw(width) -> an SVG element
function responsive(draw, attributes = {}) {
  const box = h("div", { class: "chart", ...attributes });
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(box.clientWidth);
    if (width && width !== drawn) {
      drawn = width;
      box.replaceChildren(draw(width));
    }
  };
  new ResizeObserver(redraw).observe(box);
  box.redraw = () => {
    drawn = 0;
    redraw();
  };
  return box;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// A line without axes, for what has just been: points are [unix, value]
export function sparkline(label, height = 44) {
  let points = [];
  const chart = responsive((width) => {
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    if (points.length < 2) return svg;
    const [first, last] = [points[0][0], points.at(-1)[0]];
    const span = Math.max(last - first, 60);
    const top = Math.max(...points.map(([, value]) => value), 1e-9);
    const at = ([time, value]) => [width - ((last - time) / span) * width, height - 2 - (Math.max(0, value) / top) * (height - 6)];
    const line = points.map(at);
    svg.append(
      s("path", { class: "area", d: `${path(line)}L${line.at(-1)[0].toFixed(1)} ${height}L${line[0][0].toFixed(1)} ${height}Z` }),
      s("path", { class: "line", d: path(line) }),
    );
    return svg;
  }, { "aria-hidden": "true" });
  chart.update = (given) => {
    points = given;
    chart.redraw();
  };
  return chart;
}

// Steps of 1, 2 or 5 times a power of ten, about four of them.
function ticks(top) {
  const rough = top / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  return Array.from({ length: Math.ceil(top / step) + 1 }, (_, i) => i * step);
}

// Lines over categories: series = [{name, values}], one value for each category
export function lines(label, categories, series, { write = short, height = 220, unit = "" } = {}) {
  return responsive((width) => {
    const [left, right, top, bottom] = [58, 14, 12, 26];
    const highest = Math.max(...series.flatMap((each) => each.values), 1e-9);
    const levels = ticks(highest);
    const y = (value) => top + (1 - value / levels.at(-1)) * (height - top - bottom);
    const x = (i) => (categories.length < 2 ? (left + width - right) / 2 : left + 12 + (i / (categories.length - 1)) * (width - left - right - 24));
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (const level of levels) {
      svg.append(
        s("line", { class: "grid", x1: left, x2: width - right, y1: y(level), y2: y(level) }),
        s("text", { class: "tick", x: left - 8, y: y(level) + 4, "text-anchor": "end" }, write(level)),
      );
    }
    categories.forEach((category, i) => svg.append(s("text", { class: "tick", x: x(i), y: height - 6, "text-anchor": "middle" }, String(category))));
    series.forEach(({ name, values }, n) => {
      const points = values.map((value, i) => [x(i), y(value)]);
      svg.append(s("g", { class: `series s${n}` },
        s("path", { class: "line", d: path(points) }),
        points.map(([px, py], i) => s("circle", { cx: px, cy: py, r: 4 }, s("title", {}, `${name} at ${categories[i]}: ${write(values[i])}${unit}`)))));
    });
    return svg;
  });
}

export function legend(names) {
  return h("ul", { class: "legend" }, names.map((name, n) => h("li", {}, s("svg", { width: 12, height: 12, "aria-hidden": "true" },
    s("g", { class: `series s${n}` }, s("circle", { cx: 6, cy: 6, r: 5 }))), name)));
}

// A square of cells, one for each pair: values from -1 to 1
export function heatMap(label, values) {
  const count = values.length;
  return responsive((width) => {
    const margin = 28;
    const size = Math.min(56, (Math.min(width, 620) - margin) / count);
    const side = margin + size * count;
    const svg = s("svg", { width: side, height: side, viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": label, class: "heat" });
    for (let i = 0; i < count; i += 1) {
      const middle = margin + size * (i + 0.5);
      svg.append(
        s("text", { class: "tick", x: middle, y: margin - 10, "text-anchor": "middle" }, String(i + 1)),
        s("text", { class: "tick", x: margin - 10, y: middle + 4, "text-anchor": "end" }, String(i + 1)),
      );
      for (let j = 0; j < count; j += 1) svg.append(cell(values[i][j], [i, j], margin, size));
    }
    return svg;
  });
}

function cell(value, [i, j], margin, size) {
  const [x, y] = [margin + j * size, margin + i * size];
  const strength = Math.min(1, Math.abs(value));
  return s("g", { class: `cell ${value < 0 ? "below" : ""} ${strength > 0.85 ? "strongest" : strength > 0.7 ? "strong" : ""}` },
    s("title", {}, `${i + 1} and ${j + 1}: ${number(value, 3)}`),
    s("rect", { x: x + 1, y: y + 1, width: size - 2, height: size - 2, rx: Math.min(5, size / 6), "fill-opacity": (0.06 + 0.94 * strength ** 1.3).toFixed(3) }),
    size >= 34 && s("text", { x: x + size / 2, y: y + size / 2 + 4, "text-anchor": "middle" }, value.toFixed(2).replace("-0.00", "0.00")));
}

// The first numbers of a vector, as a strip of colours
export function strip(label, values) {
  const top = Math.max(...values.map(Math.abs), 1e-9);
  return responsive((width) => {
    const size = width / values.length;
    return s("svg", { width, height: 16, viewBox: `0 0 ${width} 16`, role: "img", "aria-label": label, class: "heat" },
      values.map((value, i) => s("g", { class: `cell ${value < 0 ? "below" : ""}` },
        s("title", {}, `${i + 1}: ${value}`),
        s("rect", { x: i * size, y: 0, width: Math.max(size - 0.5, 0.5), height: 16, "fill-opacity": (0.06 + 0.94 * (Math.abs(value) / top)).toFixed(3) }))));
  });
}

// A bar that is full by a part, said in words beside it; `tone` colours it
export function bar(part, label, tone = "") {
  const whole = Math.max(0, Math.min(1, Number.isFinite(part) ? part : 0));
  return s("svg", { class: `bar ${tone}`, viewBox: "0 0 100 6", preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("rect", { class: "track", width: 100, height: 6 }), s("rect", { class: "full", width: 100 * whole, height: 6 }));
}
