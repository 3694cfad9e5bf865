// One trial: its figures, its recipe on the network's chain of cut points, and how to take it away.

function showTrial(box, trial, data, choose) {
  const parts = [heading(trial, data)];
  if (trial.reason) parts.push(el("p", {}, trial.reason));
  if (known(trial.duplicate_of)) {
    const other = el("button", { on: { click: () => choose(trial.duplicate_of) } }, `trial ${trial.duplicate_of}`);
    parts.push(el("p", {}, "Its model is that of ", other, "."));
  }
  if (trial.measures) parts.push(facts(trial, data));
  parts.push(...chain(trial, data));
  if (trial.measures) parts.push(...takeAway(trial, data));
  replace(box, parts);
}

function heading(trial, data) {
  const badge = (words, warn) => el("span", { class: warn ? "badge warn" : "badge" }, words);
  return el("div", {},
    el("h3", {}, `Trial ${trial.number}`),
    badge(trial.state, trial.state === "failed"),
    isOnFront(trial, data) && badge("on the front"),
    trial.polished && badge("polished"),
    trial.measures && badge(trial.gradient ? "with gradient steps" : "closed form"),
    trial.audited && badge("audit of pruning"),
    trial.slower && badge("slower than the teacher", true),
    trial.feasible === false && Object.keys(data.constraints.limits).length > 0 && badge("breaks constraints", true));
}

const isOnFront = (trial, data) => (data.fronts[`${data.cost} score_drop`] ?? []).includes(trial.number);
const interval = (pair, words) => (pair ? ` (95%: ${words(pair[0])} .. ${words(pair[1])})` : "");

function facts(trial, data) {
  const m = trial.measures, test = trial.test;
  const rows = [
    ["flops", `${share(m.flops_ratio)} of the teacher's, ${count(m.flops)}`],
    ["parameters", `${share(m.params_ratio)}, ${count(m.params)}`],
    known(m.latency_ratio) && ["latency", `${share(m.latency_ratio)} of the teacher's`
      + interval(trial.latency?.ratio_ci95, share) + `, ${duration(m.latency_s)} for a batch`],
    ["score", `${significant(m.score, 4)}, a drop of ${significant(m.score_drop)}`],
    test && ["on test", `${significant(test.score, 4)}, a drop of ${significant(test.score_drop)}` + interval(test.ci95, signed)],
    ["divergence", significant(m.divergence) + (trial.before ? `, ${significant(trial.before.divergence)} before ${trial.before.what}` : "")
      + (test ? `; on test ${significant(test.divergence)}` : "")],
    known(trial.seconds.total) && ["took", duration(trial.seconds.total)],
  ].filter(Boolean);
  return el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

// The top-level cut points in their order, the flops between neighbours, and what each splice covers of them.
function laidOut(trial, data) {
  const { stations, lines } = data.network;
  const named = new Map(stations.map((station, k) => [station[0], k]));
  const top = [...new Set(lines.filter((line) => !line.nested).flatMap((line) => line.stations))].sort((a, b) => a - b);
  const between = top.slice(1).map(() => null);
  for (const line of lines.filter((one) => !one.nested && one.flops.length)) {
    line.flops.forEach((flops, k) => {
      const at = top.indexOf(line.stations[k]);
      if (top[at + 1] === line.stations[k + 1]) between[at] = flops;
    });
  }
  const covers = trial.recipe.map((splice) => {
    const a = named.get(splice.start), b = named.get(splice.stop);
    if (a === undefined || b === undefined) return null;
    if (top.includes(a) && top.includes(b)) return { splice, first: top.indexOf(a), last: top.indexOf(b) };
    const line = lines.find((one) => one.stations.includes(a) && one.stations.includes(b));
    const before = line?.after ?? a;
    const first = Math.max(0, top.findLastIndex((place) => place <= before));
    const last = top.findIndex((place, k) => k > first && place >= b);
    return { splice, first, last: last < 0 ? Math.min(first + 1, top.length - 1) : last, nested: true };
  });
  return { stations, top, between, covers };
}

function chain(trial, data) {
  if (!trial.recipe.length) return [];
  const { stations, top, between, covers } = laidOut(trial, data);
  const parts = [el("h3", {}, "Recipe")];
  if (covers.some((one) => one === null) || top.length < 2) {
    parts.push(el("ol", { class: "chain" }, trial.recipe.map((splice) => replaced(splice))));
    return [...parts, ...beside(trial)];
  }
  if (between.every(known) && trial.recipe.every((splice) => splice.flops)) parts.push(bars(trial, data, top, between, covers));
  const list = el("ol", { class: "chain" });
  const whole = between.every(known) ? between.reduce((a, b) => a + b, 0) : 0;
  const point = (k) => {
    const [name, layout, size] = stations[top[k]];
    list.append(el("li", { class: "point" }, el("b", {}, name), layout && el("span", { class: "soft" }, ` ${layout} ${size.join(" x ")}`)));
  };
  let k = 0;
  point(0);
  while (k < top.length - 1) {
    const here = covers.filter((one) => one.first === k);
    if (here.length) {
      here.forEach((one) => list.append(replaced(one.splice, one.nested)));
      k = Math.max(...here.map((one) => one.last));
    } else {
      const from = k;
      do k += 1; while (k < top.length - 1 && !covers.some((one) => one.first === k));
      const inside = k - from - 1;
      const flops = whole ? `, ${share(between.slice(from, k).reduce((a, b) => a + b, 0) / whole)} of the flops` : "";
      list.append(el("li", { class: "same" }, `unchanged${inside ? `, ${plural(inside, "cut point")} on the way` : ""}${flops}`));
    }
    point(k);
  }
  return [...parts, list, ...beside(trial)];
}

function replaced(splice, nested) {
  const width = known(splice.width) && splice.size ? `, ${share(splice.width)} of its widest` : "";
  const size = splice.size ? `, ${splice.unit} ${splice.size}${width}` : "";
  const depth = splice.depth ? `, depth ${splice.depth}` : "";
  const cost = splice.flops ? `${count(splice.flops[0])} flops before, ${count(splice.flops[1])} now` : null;
  const params = known(splice.params) ? `${count(splice.params)} parameters` : null;
  const own = `--own: var(--${familyMark(splice.family).colour})`;
  return el("li", { class: "new", style: own },
    el("b", {}, splice.family), `${size}${depth}${splice.scratch ? ", from scratch" : ""}`, el("br"),
    `in place of ${splice.start} → ${splice.stop}`, nested && el("span", { class: "soft" }, " (inside a branch)"),
    el("br"), el("span", { class: "soft" }, [cost, params].filter(Boolean).join(", ") || "its cost is not stored"),
    splice.counts && el("span", { class: "soft" }, el("br"), `its layers keep ${splice.counts.join(", ")}`));
}

function beside(trial) {
  const parts = [];
  if (trial.healed.length) parts.push(el("p", { class: "soft" }, `Corrected behind it, in closed form: ${trial.healed.join(", ")}.`));
  if (known(trial.polish_of)) parts.push(el("p", { class: "soft" }, `All weights of trial ${trial.polish_of} were trained towards the teacher's output.`));
  return parts;
}

// Two rows at one scale of flops: the teacher, and the model under it.
function bars(trial, data, top, between, covers) {
  const whole = between.reduce((a, b) => a + b, 0) || 1, width = 400, high = 18, wide = (flops) => (flops / whole) * width;
  const root = svg("svg", { viewBox: `0 0 ${width} 84`, width: "100%", role: "img",
    "aria-label": `The model costs ${share(trial.measures?.flops_ratio)} of the teacher's flops; what is replaced is coloured.` });
  let above = 0, below = 0;
  const put = (flops, y, at, colour, words, open) => root.append(svg("rect", {
    x: at, y, width: Math.max(0.5, wide(flops)), height: high, fill: open ? "transparent" : `var(--${colour})`,
    stroke: `var(--${open ? colour : "card"})`, "stroke-width": open ? 1.5 : 0.5 }, svg("title", {}, words)));
  root.append(svg("text", { x: 0, y: 11 }, `teacher, ${count(data.summary.teacher.flops)} flops`));
  let k = 0;
  while (k < top.length - 1) {
    const here = covers.filter((one) => one.first === k);
    const end = here.length ? Math.max(...here.map((one) => one.last)) : k + 1;
    const flops = between.slice(k, end).reduce((a, b) => a + b, 0);
    const saved = here.reduce((sum, one) => sum + one.splice.flops[0] - one.splice.flops[1], 0);
    const now = Math.max(0, flops - saved), words = `${data.network.stations[top[k]][0]} → ${data.network.stations[top[end]][0]}`;
    const colour = here.length ? familyMark(here[0].splice.family).colour : "grey";
    put(flops, 16, above, colour, `${words}: ${count(flops)} flops`, here.length > 0);
    put(now, 62, below, colour, `${words}: ${count(now)} flops`, false);
    if (here.length) root.append(svg("path", { fill: `var(--${colour})`, opacity: 0.18,
      d: `M${above},34H${above + wide(flops)}L${below + wide(now)},62H${below}Z` }));
    above += wide(flops);
    below += wide(now);
    k = end;
  }
  root.append(svg("text", { x: Math.min(width - 4, below + 6), y: 76, "text-anchor": below > width - 130 ? "end" : "start" },
    below > width - 130 ? "" : `model, ${share(trial.measures?.flops_ratio)}`));
  return root;
}

function takeAway(trial, data) {
  const written = (data.export.shell ?? data.export.python).replaceAll("{trial}", trial.number);
  const code = el("code", { tabindex: 0 }, written);
  const copy = navigator.clipboard && el("button", { on: { click: async () => {
    try {
      await navigator.clipboard.writeText(written);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
    }
  } } }, "Copy");
  return [el("h3", {}, "Take it away"), el("div", { class: "command" }, code, copy)];
}
