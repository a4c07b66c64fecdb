// What all explorers share. This file and an explorer's own are joined to one module.
const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "circle", "text", "g"]);

// An element: attributes that hold functions are listeners; false, null and undefined are left out.
function h(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== false));
  return element;
}

const picture = (uri, alt, attributes = {}) => h("img", { src: uri, alt, draggable: "false", ...attributes });

const button = (key, label, onclick, attributes = {}) =>
  h("button", { type: "button", "data-key": key, onclick, ...attributes }, label);

// The frame of an explorer. JupyterLab must not take its keys for shortcuts of the notebook.
const frame = (name, label, ...children) => h("div", { class: `nmlib-demo nm-${name}`, role: "group",
  "aria-label": label, "data-lm-suppress-shortcuts": "true" }, ...children);

// One stop of the Tab key for a row of buttons; arrow keys, Home and End move the choice along it, and the focus too.
function roving(group, count, chosen, choose) {
  group.onkeydown = (event) => {
    const to = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: count - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose((to + count) % count);
    group.querySelector('[aria-pressed="true"]').focus();
  };
}

// Draw anew and leave the keyboard where it was.
function redraw(root, draw) {
  const active = root.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  draw();
  if (active === undefined || document.activeElement?.dataset.key === active) return;
  root.querySelector(`[data-key="${CSS.escape(active)}"]`)?.focus({ preventScroll: true });
}

// A labelled <select>; fill it with `options`.
function chooser(key, label, onchange) {
  const select = h("select", { "data-key": key, "aria-label": label, onchange: () => onchange(select.selectedIndex) });
  return { select, field: h("label", { class: "nm-field" }, h("span", {}, label), select) };
}

function options(select, texts, chosen) {
  const same = select.options.length === texts.length && texts.every((text, place) => select.options[place].text === text);
  if (!same) select.replaceChildren(...texts.map((text) => h("option", {}, text)));
  select.selectedIndex = chosen;
}

const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));

// Whole steps for an axis, about `count` of them.
function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((size) => size >= rough * 0.75);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + 1e-9; value += step) found.push(value);
  return found;
}

function bounds(values, floor = null) {
  const low = Math.min(...values), high = Math.max(...values), room = 0.08 * (high - low) || 0.1;
  return [floor === null ? low - room : Math.min(floor, low), high + room];
}

const WIDE = 330, TALL = 190, LEFT = 34, BOTTOM = 30, TOP = 10, RIGHT = 10;

// The empty chart: axes, ticks, titles; `x` and `y` turn values into places.
function chart(xs, ys, xTitle, yTitle, label) {
  const x = (value) => LEFT + ((value - xs[0]) / (xs[1] - xs[0] || 1)) * (WIDE - LEFT - RIGHT);
  const y = (value) => TALL - BOTTOM - ((value - ys[0]) / (ys[1] - ys[0] || 1)) * (TALL - BOTTOM - TOP);
  const digits = (values) => (values.length > 1 && values[1] - values[0] < 0.095 ? 2 : values.some((v) => v % 1) ? 1 : 0);
  const across = ticks(...xs), up = ticks(...ys);
  const svg = h("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, class: "nm-chart", role: "img", "aria-label": label },
    up.map((value) => h("line", { class: "nm-grid", x1: LEFT, x2: WIDE - RIGHT, y1: y(value), y2: y(value) })),
    up.map((value) => h("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits(up)))),
    across.map((value) => h("text", { x: x(value), y: TALL - BOTTOM + 14, "text-anchor": "middle" }, value.toFixed(digits(across)))),
    h("text", { x: WIDE - RIGHT, y: TALL - 3, "text-anchor": "end", class: "nm-title" }, xTitle),
    h("text", { x: LEFT + 4, y: TOP + 8, class: "nm-title" }, yTitle));
  return { svg, x, y };
}
