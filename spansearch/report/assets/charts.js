// The heat map of the spans, the hypervolume, and bars.

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const BEST = -3; // powers of ten: errors below are drawn as 0.001

function heatColour(error) {
  const part = Math.min(1, Math.max(0, (Math.log10(Math.max(error, 1e-12)) - BEST) / -BEST));
  return CIVIDIS[Math.min(CIVIDIS.length - 1, Math.floor((1 - part) * CIVIDIS.length))];
}

/* line: a chain of the network; chosen: "start -> stop"; onChoose(start, stop) */
function heatMap(box, data, line, chosen, onChoose) {
  const names = line.stations.map((k) => data.network.stations[k][0]);
  const width = Math.max(280, box.clientWidth), n = names.length;
  const longest = Math.max(...names.map((name) => name.length));
  const left = Math.min(0.36 * width, 12 + 6.6 * longest), letters = Math.floor((left - 10) / 6.6);
  const cell = Math.max(4, Math.min(34, (width - left - 8) / Math.max(1, n - 1))), top = 6;
  const height = top + cell * (n - 1) + 30, labelled = cell >= 11 ? 1 : Math.ceil(11 / cell);
  const focused = box.contains(document.activeElement);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `Ridge error by start, downwards, and stop, to the right: ${n} cut points. Arrow keys go from span to span.` });
  const short = (name) => (name.length > letters ? `…${name.slice(1 - letters)}` : name);
  const cells = new Map();
  for (let i = 0; i < n - 1; i++) {
    if (i % labelled === 0) root.append(svg("text", { x: left - 6, y: top + cell * (i + 0.5) + 4, "text-anchor": "end" }, short(names[i]), svg("title", {}, names[i])));
    for (let j = i + 1; j < n; j++) {
      const key = `${names[i]} -> ${names[j]}`, error = data.linear_errors[key];
      if (!known(error)) continue;
      const words = `${names[i]} → ${names[j]}: ridge error ${significant(error)}`;
      const rect = svg("rect", { class: "cell", x: left + cell * (j - 1), y: top + cell * i, width: cell - 1, height: cell - 1,
        fill: heatColour(error), stroke: key === chosen ? "var(--ink)" : "none", "stroke-width": 2.5, role: "button",
        tabindex: -1, "aria-label": words, on: { click: () => onChoose(names[i], names[j]) } }, svg("title", {}, words));
      cells.set(`${i} ${j}`, { rect, key, ends: [names[i], names[j]] });
      root.append(rect);
      if (cell >= 26) root.append(svg("text", { x: left + cell * (j - 0.5) - 0.5, y: top + cell * (i + 0.5) + 3.5, "text-anchor": "middle",
        style: `fill:${lightOn(error) ? "#111" : "#fff"};font-size:10px;pointer-events:none` }, error < 0.1 ? significant(error, 1).replace("0.", ".") : error.toFixed(2).replace("0.", ".")));
    }
  }
  for (let j = labelled; j < n; j += labelled) root.append(svg("text", { x: left + cell * (j - 0.5), y: top + cell * (n - 1) + 13, "text-anchor": "middle" }, String(j)));
  root.append(svg("text", { x: left, y: height - 4 }, "stops, by their place in the chain"));
  const start = [...cells.values()].find((one) => one.key === chosen) ?? cells.values().next().value;
  start?.rect.setAttribute("tabindex", "0");
  root.addEventListener("keydown", (event) => walkCells(event, cells, onChoose));
  replace(box, cells.size ? root : el("p", {}, "No span of this chain has a linear map."));
  if (focused) start?.rect.focus({ preventScroll: true });
}

const lightOn = (error) => CIVIDIS.indexOf(heatColour(error)) > 4;

function walkCells(event, cells, onChoose) {
  const entry = [...cells].find(([, one]) => one.rect === document.activeElement);
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!entry) return;
  if (step) {
    let [i, j] = entry[0].split(" ").map(Number);
    for (let tries = 0; tries < 64; tries++) { // spans without a linear map are stepped over
      [i, j] = [i + step[0], j + step[1]];
      const next = cells.get(`${i} ${j}`);
      if (next) {
        entry[1].rect.setAttribute("tabindex", "-1");
        next.rect.setAttribute("tabindex", "0");
        next.rect.focus();
        break;
      }
    }
  } else if (event.key === "Enter" || event.key === " ") onChoose(...entry[1].ends);
  else return;
  event.preventDefault();
}

const heatLegend = () => el("span", { class: "legend" }, "0.001 or less",
  svg("svg", { width: 150, height: 14, "aria-hidden": "true" },
    CIVIDIS.map((_, k) => svg("rect", { x: 15 * k, y: 0, width: 15, height: 14, fill: CIVIDIS[CIVIDIS.length - 1 - k] }))), "1 or more");

/* points [{x, y}] of a quantity that only grows */
function growthChart(box, points, xLabel, yLabel, xWords) {
  const width = Math.max(280, box.clientWidth), height = Math.min(320, Math.max(220, 0.42 * width));
  const inner = { left: MARGIN.left, right: width - MARGIN.right, top: 12, bottom: height - MARGIN.bottom };
  const x = linear([0, Math.max(...points.map((p) => p.x))], [inner.left, inner.right - 6]);
  const y = linear(padded(points.map((p) => p.y)), [inner.bottom - 4, inner.top + 6]);
  const last = points[points.length - 1];
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${yLabel} against ${xLabel}: from ${significant(points[0].y, 4)} to ${significant(last.y, 4)} at ${xWords(last.x)}` });
  axes(root, x, y, inner, { xLabel, yLabel, xWords, yWords: (value) => significant(value, 4) });
  const path = points.map((p, k) => (k ? `H${x.at(p.x)}V${y.at(p.y)}` : `M${x.at(p.x)},${y.at(p.y)}`)).join("");
  root.append(svg("path", { class: "steps", d: path }));
  root.append(svg("circle", { cx: x.at(last.x), cy: y.at(last.y), r: 4, fill: "var(--blue)" }));
  replace(box, root);
}

/* rows [{words, parts: [{value, colour, words}], note}] */
function barList(rows) {
  const most = Math.max(1e-9, ...rows.map((row) => row.parts.reduce((sum, part) => sum + part.value, 0)));
  return el("dl", {}, rows.map((row) => {
    let at = 0;
    const picture = svg("svg", { width: "100%", height: 16, viewBox: "0 0 400 16", preserveAspectRatio: "none", "aria-hidden": "true" },
      row.parts.map((part) => {
        const wide = (400 * part.value) / most;
        at += wide;
        return svg("rect", { x: at - wide, y: 2, width: Math.max(0, wide), height: 12, fill: `var(--${part.colour})` }, svg("title", {}, part.words));
      }));
    return [el("dt", {}, row.words), el("dd", {}, picture, el("span", { class: "soft" }, row.note))];
  }));
}
