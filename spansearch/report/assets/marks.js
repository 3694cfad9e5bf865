// Shapes beside colours, so that either alone tells what is meant. Colours: Okabe and Ito, darkened or
// lightened where the page's ground asks for it.

const SHAPES = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  square: (r) => `M${-r * 0.9},${-r * 0.9}h${1.8 * r}v${1.8 * r}h${-1.8 * r}Z`,
  diamond: (r) => `M0,${-1.25 * r}L${1.25 * r},0L0,${1.25 * r}L${-1.25 * r},0Z`,
  up: (r) => `M0,${-1.2 * r}L${1.1 * r},${0.9 * r}L${-1.1 * r},${0.9 * r}Z`,
  down: (r) => `M0,${1.2 * r}L${1.1 * r},${-0.9 * r}L${-1.1 * r},${-0.9 * r}Z`,
  cross: (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
  plus: (r) => `M${-1.2 * r},0H${1.2 * r}M0,${-1.2 * r}V${1.2 * r}`,
  hexagon: (r) => `M${-r},0L${-r / 2},${-0.9 * r}H${r / 2}L${r},0L${r / 2},${0.9 * r}H${-r / 2}Z`,
};

const KINDS = {
  front: { words: "on the front", shape: "circle", colour: "blue", size: 6, filled: true },
  polished: { words: "on the front, polished", shape: "diamond", colour: "green", size: 5.5, filled: true },
  dominated: { words: "dominated", shape: "circle", colour: "grey", size: 3.5, filled: false },
  audited: { words: "pruned, run as an audit", shape: "square", colour: "purple", size: 4.5, filled: false },
  pruned: { words: "pruned (not fitted)", shape: "down", colour: "orange", size: 4.5, filled: false },
  failed: { words: "failed", shape: "cross", colour: "vermillion", size: 4.5, filled: false },
};

const FAMILY_MARKS = [
  ["several", "circle", "black"], ["thin", "square", "blue"], ["truncated", "diamond", "vermillion"],
  ["ridge", "up", "green"], ["lowrank", "down", "purple"], ["mlp", "hexagon", "orange"],
  ["conv", "plus", "sky"], ["attention", "cross", "blue"], ["separable", "diamond", "sky"],
  ["random_features", "up", "orange"], ["identity", "circle", "yellow"],
];

function familyMark(name) {
  const listed = FAMILY_MARKS.find((one) => one[0] === name);
  if (listed) return { shape: listed[1], colour: listed[2] };
  const shapes = Object.keys(SHAPES), colours = ["vermillion", "green", "purple", "yellow", "black"];
  const sum = [...name].reduce((total, letter) => total + letter.codePointAt(0), 0);
  return { shape: shapes[sum % shapes.length], colour: colours[sum % colours.length] };
}

function shape(kind) {
  const colour = `var(--${kind.colour})`;
  return svg("path", {
    d: SHAPES[kind.shape](kind.size ?? 5), stroke: colour, "stroke-width": 1.75,
    fill: kind.filled ? colour : "transparent",
  });
}

const swatch = (kind) =>
  svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape({ ...kind, size: 5 }));
