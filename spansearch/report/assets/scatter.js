// Points with intervals that a mouse, a finger and a keyboard can reach.

const MARGIN = { left: 62, right: 14, top: 30, bottom: 44 };
const NEAR = 24; // pixels around a point that count as it

/* options: name; points [{key, x, y, low, high, xLow, xHigh, kind, label}]: those without y lie in the band above
   the plot, those without x at its left; line [[x, y]]; xLabel, yLabel, xWords; yLog; limit: larger y are left
   out; chosen: key; onChoose(key, byPointer). Returns how many were left out. */
function scatter(box, options) {
  const width = Math.max(280, box.clientWidth), height = Math.min(460, Math.max(300, 0.62 * width));
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
  const limit = options.limit ?? Infinity;
  const measured = options.points.filter((p) => known(p.y) && known(p.x) && p.y <= limit);
  const beyond = options.points.filter((p) => known(p.y) && p.y > limit).length;
  const beside = options.points.filter((p) => !known(p.y));
  const xs = [...measured, ...beside].map((p) => p.x).filter(known);
  const ys = measured.flatMap((p) => [p.y, p.low, p.high]).filter(known);
  const x = linear(padded(xs.length ? xs : [0, 1]), [inner.left + 12, inner.right - 6]);
  const y = options.yLog
    ? logarithmic(ys, [inner.bottom - 4, inner.top + 8])
    : linear(padded(ys.length ? [...ys, 0] : [0, 1]), [inner.bottom - 4, inner.top + 8]);
  const title = `${options.name}: ${plural(measured.length, "model")}, ${options.yLabel} against ${options.xLabel}. `
    + "Arrow keys go from model to model, Enter chooses one.";
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  axes(root, x, y, inner, options);
  if (options.line?.length) root.append(svg("path", { class: "steps", d: staircase(options.line, x, y, inner, limit) }));
  const places = [...measured, ...beside]
    .map((p) => ({ ...p, px: known(p.x) ? x.at(p.x) : inner.left + 2, py: known(p.y) ? y.at(p.y) : inner.top - 12 }))
    .sort((a, b) => a.px - b.px || a.py - b.py);
  if (beside.length) root.append(svg("text", { x: 4, y: inner.top - 8 }, "not measured"));
  const at = Math.max(0, places.findIndex((p) => String(p.key) === (focused ?? String(options.chosen))));
  const nodes = places.map((p, k) => {
    for (const bar of intervals(p, x, y)) root.append(bar);
    const own = parseInt(p.key, 10) === options.chosen; // on validation and on test
    return svg("g", {
      class: own ? "mark chosen" : "mark", transform: `translate(${p.px},${p.py})`, role: "button",
      tabindex: k === at ? 0 : -1, "data-key": p.key, "aria-label": p.label, "aria-pressed": own ? "true" : "false",
    }, svg("title", {}, p.label), svg("circle", { class: "halo", r: 10 }), shape(p.kind));
  });
  // what is drawn last lies on top: the front on what it dominates
  [...nodes].sort((a, b) => rank(places[nodes.indexOf(a)]) - rank(places[nodes.indexOf(b)])).forEach((n) => root.append(n));
  root.addEventListener("keydown", (event) => walk(event, nodes, places, options));
  root.addEventListener("click", (event) => {
    const one = nearest(event, root, places);
    if (one) options.onChoose(one.key, true);
  });
  replace(box, root);
  if (focused !== undefined) nodes[at]?.focus({ preventScroll: true });
  return beyond;
}

const rank = (place) => (place.kind.filled ? 1 : 0);

function padded(values) {
  const low = Math.min(...values), high = Math.max(...values), pad = 0.04 * (high - low || Math.abs(high) || 1);
  return [low - pad, high + pad];
}

function axes(root, x, y, inner, options) {
  for (const value of x.ticks(Math.max(3, Math.floor((inner.right - inner.left) / 90)))) {
    const at = x.at(value);
    root.append(svg("line", { class: "grid", x1: at, x2: at, y1: inner.top, y2: inner.bottom }));
    root.append(svg("text", { x: at, y: inner.bottom + 16, "text-anchor": "middle" }, (options.xWords ?? x.words)(value)));
  }
  for (const value of y.ticks(6)) {
    const at = y.at(value);
    root.append(svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: at, y2: at }));
    root.append(svg("text", { x: inner.left - 6, y: at + 4, "text-anchor": "end" }, (options.yWords ?? y.words)(value)));
  }
  root.append(svg("line", { class: "axis", x1: inner.left, x2: inner.right, y1: inner.bottom, y2: inner.bottom }));
  root.append(svg("line", { class: "axis", x1: inner.left, x2: inner.left, y1: inner.top, y2: inner.bottom }));
  const middle = (inner.top + inner.bottom) / 2;
  root.append(svg("text", { class: "title", x: (inner.left + inner.right) / 2, y: inner.bottom + 36, "text-anchor": "middle" }, options.xLabel));
  root.append(svg("text", { class: "title", x: 0, y: 0, "text-anchor": "middle", transform: `translate(13,${middle}) rotate(-90)` }, options.yLabel));
}

function staircase(line, x, y, inner, limit) {
  const inside = line.filter(([, value]) => value <= limit);
  let path = "";
  inside.forEach(([cost, value], k) => {
    path += k === 0 ? `M${x.at(cost)},${y.at(value)}` : `H${x.at(cost)}V${y.at(value)}`;
  });
  return path && `${path}H${inner.right}`;
}

function intervals(p, x, y) {
  const bars = [], style = { class: "bar", stroke: `var(--${p.kind.colour})` };
  if (known(p.low) && known(p.high) && known(p.y)) {
    bars.push(svg("path", { ...style, d: `M${p.px},${y.at(p.low)}V${y.at(p.high)}` }));
  }
  if (known(p.xLow) && known(p.xHigh)) bars.push(svg("path", { ...style, d: `M${x.at(p.xLow)},${p.py}H${x.at(p.xHigh)}` }));
  return bars;
}

function walk(event, nodes, places, options) {
  const now = nodes.indexOf(document.activeElement);
  if (now < 0) return;
  const last = nodes.length - 1;
  const to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: last }[event.key];
  if (to !== undefined) {
    const next = nodes[Math.min(last, Math.max(0, to))];
    nodes[now].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  } else if (event.key === "Enter" || event.key === " ") options.onChoose(places[now].key, false);
  else return;
  event.preventDefault();
}

function nearest(event, root, places) {
  const box = root.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  let best = null, least = NEAR;
  for (const place of places) {
    const away = Math.hypot(place.px - px, place.py - py) - (place.kind.filled ? 3 : 0);
    if (away < least) [best, least] = [place, away];
  }
  return best;
}
