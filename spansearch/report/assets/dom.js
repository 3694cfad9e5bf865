// Elements, and numbers in words. Texts go into the page as texts only: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

function replace(node, ...children) {
  node.replaceChildren();
  return fill(node, null, children);
}

const known = (value) => value !== null && value !== undefined;

function significant(value, digits = 3) {
  if (!known(value)) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(digits - 1).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

function share(ratio) {
  if (!known(ratio)) return "-";
  const percent = 100 * ratio;
  return Math.abs(percent) >= 10 ? `${percent.toFixed(1)}%` : `${significant(percent, 2)}%`;
}

const percent = (ratio) => `${significant(100 * ratio)}%`;

function count(value) {
  if (!known(value)) return "-";
  for (const [unit, size] of [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(value) >= size) return `${significant(value / size)}${unit}`;
  }
  return significant(value);
}

function duration(seconds) {
  if (!known(seconds)) return "-";
  if (seconds >= 7200) return `${(seconds / 3600).toFixed(1)} h`;
  if (seconds >= 120) return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0)} min`;
  if (seconds >= 1 || seconds === 0) return `${significant(seconds)} s`;
  return seconds >= 1e-3 ? `${significant(1000 * seconds)} ms` : `${significant(1e6 * seconds)} us`;
}

const signed = (value) => (value > 0 ? "+" : "") + significant(value);
const plural = (number, one, many) => `${number} ${number === 1 ? one : many ?? `${one}s`}`;

function choice(label, options, value, act) {
  const select = el("select", { on: { change: () => act(select.value) } });
  for (const [name, words] of options) select.append(el("option", { value: name, selected: name === value }, words));
  return el("label", {}, label, select);
}

function tick(label, value, act, mark) {
  const box = el("input", { type: "checkbox", on: { change: () => act(box.checked) } });
  box.checked = value;
  return el("label", {}, box, mark, label);
}
