// What is shown, from the data in the page; and, where it is served, from newer data.

const EVERY = 3000; // ms between looks at what is new
const WORDS = {
  flops: "flops", params: "parameters", latency: "latency", score_drop: "score drop", loss: "loss", divergence: "divergence",
};
const state = {
  data: JSON.parse(byId("data").textContent), x: null, y: "score_drop", split: "validation", log: false, zoom: true,
  kinds: Object.fromEntries(Object.keys(KINDS).map((name) => [name, true])), chosen: null, line: 0, span: null, time: "seconds",
  volume: "divergence", familyLog: true, families: {},
};

const trialOf = (number) => state.data.trials.find((trial) => trial.number === Number(number));
const ratio = (trial, x) => trial.measures?.[`${x}_ratio`] ?? (x === "flops" ? planned(trial) : null);
const planned = (trial) => {
  const flops = trial.rule?.flops ?? trial.planned_flops;
  return known(flops) && state.data.summary.teacher.flops ? flops / state.data.summary.teacher.flops : null;
};
const frontOf = (x, y) => state.data.fronts[`${x} ${y === "loss" ? "score_drop" : y}`] ?? [];

function kindOf(trial, front) {
  if (trial.state === "failed") return "failed";
  if (!trial.measures) return "pruned";
  if (front.has(trial.number)) return trial.polished ? "polished" : "front";
  return trial.audited ? "audited" : "dominated";
}

function frontPoints() {
  const { x, y, split } = state, front = new Set(frontOf(x, y)), points = [];
  for (const trial of state.data.trials) {
    if (trial.state === "duplicate") continue;
    const name = kindOf(trial, front);
    if (!state.kinds[name]) continue;
    const kind = KINDS[name], m = trial.measures, pair = trial.latency?.ratio_ci95;
    const base = { key: trial.number, x: ratio(trial, x), kind, xLow: x === "latency" ? pair?.[0] : null, xHigh: x === "latency" ? pair?.[1] : null };
    const where = known(base.x) ? `${share(base.x)} of the ${WORDS[x]}` : `${WORDS[x]} not known`;
    if (split !== "test" || !m) {
      const bound = !m && y === "divergence" && split !== "test" ? trial.rule?.bound : null;
      const value = m ? m[y] : bound;
      const said = m ? `${WORDS[y]} ${significant(value)}` : known(bound) ? `at best ${significant(bound)}` : trial.reason ?? "not measured";
      points.push({ ...base, y: value, label: `trial ${trial.number}, ${kind.words}: ${where}, ${said}` });
    }
    if (split !== "validation" && trial.test && m) {
      const ci = y === "score_drop" ? trial.test.ci95 : null, value = trial.test[y];
      if (!known(value)) continue;
      points.push({ ...base, key: split === "both" ? `${trial.number} test` : trial.number, y: value, low: ci?.[0], high: ci?.[1],
        kind: split === "both" ? { ...kind, filled: false, size: kind.size - 1 } : kind,
        label: `trial ${trial.number} on test: ${where}, ${WORDS[y]} ${significant(value)}${interval(ci, signed)}` });
    }
  }
  return { points, front };
}

function drawFront() {
  const { x, y, split, data } = state, { points, front } = frontPoints();
  const members = points.filter((p) => front.has(parseInt(p.key, 10)) && known(p.y));
  const line = members.filter((p) => !String(p.key).endsWith("test")).map((p) => [p.x, p.y]).sort((a, b) => a[0] - b[0]);
  const drops = (split === "test" ? members : members.filter((p) => !String(p.key).endsWith("test"))).map((p) => p.y);
  const limit = state.zoom && !state.log ? Math.max(usual(drops), chosenAt(points)) : Infinity;
  const beyond = scatter(byId("front-chart"), {
    name: "The front", points, line: split === "test" ? null : line, yLog: state.log, limit, chosen: state.chosen,
    xLabel: `${WORDS[x]}, share of the teacher's`, yLabel: `${WORDS[y]}${split === "both" ? "" : `, ${split}`}`, xWords: percent,
    onChoose: (key, byPointer) => choose(parseInt(key, 10), byPointer),
  });
  const tested = data.trials.some((trial) => trial.test);
  replace(byId("front-caption"), [
    beyond ? `${plural(beyond, "model lies", "models lie")} above what is shown (untick “zoom in”). ` : "",
    "Members are chosen on validation; nothing is chosen on test. ",
    tested ? "Bars on test are 95% intervals. " : "No model was scored on test yet: spansearch front does that. ",
    y === "divergence" ? "Pruned trials stand where the ridge rule put them at best. " : "",
  ].join(""));
  drawFrontTable();
}

// Up to where most members lie: the cheapest of a front may be useless, and flatten all others.
function usual(values) {
  const ordered = [...values].sort((a, b) => a - b);
  const most = ordered[Math.floor(0.6 * (ordered.length - 1))] || 0;
  return 1.6 * Math.max(most, ordered.find((value) => value > 0) ?? Infinity);
}

const chosenAt = (points) => points.find((p) => p.key === state.chosen)?.y ?? -Infinity;

function drawFrontTable() {
  const { x, y, data } = state;
  const members = frontOf(x, y).map(trialOf).filter(Boolean);
  const timed = members.some((trial) => known(trial.measures.latency_ratio));
  const columns = [
    { name: "trial", number: true, of: (t) => t.number, show: (t) => el("button", { "aria-label": `show trial ${t.number}`, on: { click: () => choose(t.number, true) } }, t.number) },
    { name: "flops", number: true, of: (t) => t.measures.flops_ratio, show: (t) => share(t.measures.flops_ratio) },
    { name: "params", number: true, of: (t) => t.measures.params_ratio, show: (t) => share(t.measures.params_ratio) },
    timed && { name: "latency", number: true, of: (t) => t.measures.latency_ratio, show: (t) => share(t.measures.latency_ratio) + (t.slower ? " slower" : "") },
    { name: "drop", number: true, of: (t) => t.measures.score_drop, show: (t) => significant(t.measures.score_drop) },
    { name: "test drop", number: true, of: (t) => t.test?.score_drop, show: (t) => (t.test ? significant(t.test.score_drop) : "-") },
    { name: "95% interval", number: true, of: (t) => t.test?.ci95?.[0], show: (t) => (t.test?.ci95 ? `${signed(t.test.ci95[0])} .. ${signed(t.test.ci95[1])}` : "-") },
    { name: "divergence", number: true, of: (t) => t.measures.divergence, show: (t) => significant(t.measures.divergence) },
    { name: "splices", words: true, show: recipeWords },
  ].filter(Boolean);
  replace(byId("front-table"), members.length
    ? table("Members of the front", columns, members, null, (t) => t.number === state.chosen)
    : el("p", {}, "No trial has completed yet: the front is empty."));
}

function choose(number, byPointer) {
  if (!trialOf(number)) return;
  state.chosen = number;
  try {
    history.replaceState(null, "", `#trial=${number}`);
  } catch { /* a page within another one may not */ }
  drawFront();
  drawFamilies();
  drawDetails();
  const details = byId("details");
  if (byPointer && details.getBoundingClientRect().top > innerHeight) details.scrollIntoView({ block: "nearest" });
}

function drawDetails() {
  const trial = known(state.chosen) ? trialOf(state.chosen) : null;
  if (trial) showTrial(byId("details"), trial, state.data, (number) => choose(number, false));
  else replace(byId("details"), el("p", { class: "soft" }, "Choose a point, with a click or with Tab, arrow keys and Enter: its recipe is drawn here."));
}

function frontControls() {
  const set = (name) => (value) => { state[name] = value; frontControls(); drawFront(); };
  const costs = state.data.costs.map((name) => [name, WORDS[name]]);
  const used = new Set(state.data.trials.filter((t) => t.state !== "duplicate").map((t) => kindOf(t, new Set(frontOf(state.x, state.y)))));
  const focused = [...byId("front-controls").querySelectorAll("select, input")].indexOf(document.activeElement);
  replace(byId("front-controls"),
    choice("across", costs, state.x, set("x")),
    choice("up", [["score_drop", "score drop"], ["loss", "loss"], ["divergence", "divergence"]], state.y, (value) => {
      state.log = value === "divergence";
      set("y")(value);
    }),
    choice("of", [["validation", "validation"], ["test", "test"], ["both", "both"]], state.split, set("split")),
    tick("log scale", state.log, set("log")),
    !state.log && tick("zoom in", state.zoom, set("zoom")),
    el("fieldset", {}, Object.entries(KINDS).filter(([name]) => used.has(name)).map(([name, kind]) =>
      tick(kind.words, state.kinds[name], (on) => { state.kinds[name] = on; drawFront(); }, swatch(kind)))));
  byId("front-controls").querySelectorAll("select, input")[focused]?.focus();
}

function drawHeat() {
  const { data } = state, lines = data.network.lines.filter((line) => line.stations.length > 1);
  const line = lines[Math.min(state.line, lines.length - 1)];
  if (!line) {
    replace(byId("heat-chart"), el("p", {}, "Nothing was screened yet."));
    return;
  }
  const name = (one) => `${one.nested ? "inside" : "whole network"}: ${data.network.stations[one.stations[0]][0]} → ${data.network.stations[one.stations.at(-1)][0]}`;
  replace(byId("heat-controls"), heatLegend(), lines.length > 1
    && choice("chain", lines.map((one, k) => [String(k), name(one)]), String(state.line), (value) => { state.line = Number(value); state.span = null; drawHeat(); }));
  heatMap(byId("heat-chart"), data, line, state.span && `${state.span[0]} -> ${state.span[1]}`, (start, stop) => { state.span = [start, stop]; drawHeat(); });
  replace(byId("heat-caption"), state.span ? spanWords(...state.span) : "Rows are starts, columns stops. Choose a cell to see what was tried there.");
}

function spanWords(start, stop) {
  const error = state.data.linear_errors[`${start} -> ${stop}`];
  const tried = state.data.trials.filter((t) => t.state !== "duplicate" && t.recipe.some((s) => s.start === start && s.stop === stop));
  const found = tried.slice(0, 12).map((t) => [el("button", { on: { click: () => choose(t.number, true) } }, `${t.number}`), " "]);
  return el("span", {}, `${start} → ${stop}: ridge error ${significant(error)}. `,
    tried.length ? `${plural(tried.length, "trial")} replaced it: ` : "No trial replaced it.", found);
}

function drawFamilies() {
  const { data } = state, measured = data.trials.filter((t) => t.measures && t.state !== "duplicate");
  const names = [...new Set(measured.map((t) => t.family))].sort();
  const mark = (name) => ({ ...familyMark(name), size: 4.5, filled: false });
  replace(byId("family-controls"), el("fieldset", {}, names.map((name) =>
    tick(name === "several" ? "several splices" : name, state.families[name] ?? true, (on) => { state.families[name] = on; drawFamilies(); }, swatch(mark(name))))));
  const points = measured.filter((t) => state.families[t.family] ?? true).map((t) => ({
    key: t.number, x: t.measures.flops_ratio, y: t.measures.divergence, kind: mark(t.family),
    label: `trial ${t.number}, ${t.family}: ${share(t.measures.flops_ratio)} of the flops, divergence ${significant(t.measures.divergence)}`,
  }));
  scatter(byId("family-chart"), { name: "Families", points, yLog: true, chosen: state.chosen, xWords: percent,
    xLabel: "flops, share of the teacher's", yLabel: "divergence, validation", onChoose: (key, byPointer) => choose(parseInt(key, 10), byPointer) });
  replace(byId("family-caption"), "Divergence: ", data.divergence === "kl" ? "KL from the teacher's output, in nats per prediction." : "squared difference to the teacher's output, relative to it.");
}

function drawFamilyTable() {
  const row = (name, key) => ({ name, number: true, of: (r) => r[key], show: (r) => r[key] });
  replace(byId("family-table"), table("Trials by family", [
    { name: "family", of: (r) => r.family, show: (r) => (r.family === "several" ? "several splices" : r.family) },
    row("trials", "trials"), row("complete", "complete"), row("pruned", "pruned"), row("failed", "failed"), row("on the front", "front"),
    { name: "fitting", number: true, of: (r) => r.fitting, show: (r) => duration(r.fitting) },
    { name: "evaluating", number: true, of: (r) => r.evaluating, show: (r) => duration(r.evaluating) },
  ], state.data.families));
}

function drawGrowth() {
  const { data } = state, points = data.growth.map((p) => ({ x: p[state.time], y: p[state.volume] }));
  const set = (name) => (value) => { state[name] = value; drawGrowth(); };
  replace(byId("growth-controls"),
    choice("across", [["seconds", "time in trials"], ["finished", "finished trials"]], state.time, set("time")),
    choice(`of ${WORDS[data.cost]} and`, [["divergence", "divergence"], ["score_drop", "score drop"]], state.volume, set("volume")));
  if (!points.length) return void replace(byId("growth-chart"), el("p", {}, "No trial has finished yet."));
  growthChart(byId("growth-chart"), points, state.time === "seconds" ? "time in trials" : "finished trials", "hypervolume",
    state.time === "seconds" ? duration : (value) => significant(value));
  const last = points.at(-1);
  replace(byId("growth-caption"), `The area that the models found dominate, in shares of the teacher's ${WORDS[data.cost]}: ${significant(last.y, 5)} now. `
    + "The scale does not begin at 0. Nights in which nobody worked are left out.");
}

function drawSeconds() {
  const { seconds } = state.data.summary;
  const parts = [["preparing", "recording, screening, the opening", "sky"], ["fitting", "students, healing, polishing", "blue"],
    ["evaluating", "splicing, measuring, replaying", "green"], ["search", "asking, storing and the rest", "grey"]];
  const all = parts.reduce((sum, [key]) => sum + seconds[key], 0) || 1;
  replace(byId("seconds-chart"), barList(parts.map(([key, words, colour]) => ({
    words: key, parts: [{ value: seconds[key], colour, words: duration(seconds[key]) }], note: `${duration(seconds[key])}, ${share(seconds[key] / all)}: ${words}`,
  }))));
  replace(byId("seconds-caption"), `${duration(seconds.total)} by the clock on the wall; several workers spend more than that together.`);
}

function drawPruning() {
  const { data } = state, { pruning } = data.summary;
  const refused = data.trials.filter((t) => t.state === "pruned" && !t.rule);
  const audits = data.trials.filter((t) => t.audited && t.rule);
  const box = [el("p", {}, `The ridge rule left out ${plural(pruning.pruned, "proposal")}, about ${duration(pruning.seconds_saved)} of fitting. `
    + `${plural(pruning.audited, "of those was", "of those were")} run anyway: ${pruning.audited_on_front} of them came to the front. `
    + (refused.length ? `${plural(refused.length, "proposal")} more could not be tried (a span failed its replay, or the fit gave up).` : ""))];
  if (audits.length) {
    box.push(table("The audit", [
      { name: "trial", number: true, of: (t) => t.number, show: (t) => el("button", { on: { click: () => choose(t.number, true) } }, t.number) },
      { name: "family", of: (t) => t.family, show: (t) => t.family },
      { name: "at best, by the rule", number: true, of: (t) => t.rule.bound, show: (t) => significant(t.rule.bound) },
      { name: "came to", number: true, of: (t) => t.measures?.divergence, show: (t) => significant(t.measures?.divergence) },
      { name: "known at no more flops", number: true, of: (t) => t.rule.best, show: (t) => significant(t.rule.best) },
      { name: "on the front", show: (t) => (isOnFront(t, data) ? "yes" : "no") },
      { name: "splices", words: true, show: recipeWords },
    ], audits));
  }
  replace(byId("pruning"), box);
}

function drawSufficiency() {
  const told = state.data.sufficiency;
  if (!told) return void replace(byId("sufficiency"), el("p", {}, "This study did not keep it. spansearch screen says it of every span."));
  const rows = Object.entries(told.spans).map(([name, of]) => ({ name, ...of }));
  const limited = rows.filter((row) => row.limited).length;
  replace(byId("sufficiency"), el("p", {}, `${told.fitted} calibration examples were fitted to and ${told.held_out} held out. Of ${plural(rows.length, "span")} `
    + `tried first, ${limited} ${limited === 1 ? "is" : "are"} limited by data: twice the examples would lower the error by more than a tenth.`),
  rows.length ? table("Error by number of examples", [
    { name: "span", words: true, of: (r) => r.name, show: (r) => r.name.replace(" -> ", " → ") },
    { name: "degrees of freedom", number: true, of: (r) => r.degrees, show: (r) => significant(r.degrees) },
    { name: "half the data", number: true, of: (r) => r.half, show: (r) => significant(r.half) },
    { name: "all", number: true, of: (r) => r.all, show: (r) => significant(r.all) },
    { name: "twice, expected", number: true, of: (r) => r.twice, show: (r) => significant(r.twice) },
    { name: "limited by", show: (r) => (r.limited ? "data" : "") },
  ], rows) : null);
}

function drawFailures() {
  const { data } = state, failed = data.trials.filter((t) => t.state === "failed");
  const box = [];
  box.push(failed.length ? table("Failed trials", [
    { name: "trial", number: true, of: (t) => t.number, show: (t) => t.number },
    { name: "reason", words: true, of: (t) => t.reason, show: (t) => t.reason ?? "-" },
    { name: "splices", words: true, show: recipeWords },
  ], failed) : el("p", {}, "No trial failed."));
  if (data.messages.length) {
    box.push(el("h3", {}, "Warnings of the run"), el("ul", {}, data.messages.map((one) => el("li", {}, one.text))));
  }
  replace(byId("failures"), box);
}

function drawTrials() {
  const { data } = state, box = byId("trials");
  replace(byId("trials-summary"), `${plural(data.trials.length, "finished trial")} as a table`);
  const write = () => {
    if (!box.open) return;
    replace(byId("trials-table"), table("All trials", [
      { name: "trial", number: true, of: (t) => t.number, show: (t) => el("button", { "aria-label": `show trial ${t.number}`, on: { click: () => choose(t.number, true) } }, t.number) },
      { name: "state", of: (t) => t.state, show: (t) => t.state },
      { name: "flops", number: true, of: (t) => ratio(t, "flops"), show: (t) => share(ratio(t, "flops")) },
      { name: "drop", number: true, of: (t) => t.measures?.score_drop, show: (t) => significant(t.measures?.score_drop) },
      { name: "divergence", number: true, of: (t) => t.measures?.divergence, show: (t) => significant(t.measures?.divergence) },
      { name: "seconds", number: true, of: (t) => t.seconds.total, show: (t) => significant(t.seconds.total) },
      { name: "splices", words: true, of: recipeWords, show: recipeWords },
      { name: "reason", words: true, of: (t) => t.reason, show: (t) => t.reason ?? "" },
    ], data.trials));
  };
  box.ontoggle = write;
  write();
}

function drawSettings() {
  const row = (name, value) => [el("dt", {}, name), el("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))];
  replace(byId("settings"), el("dl", {}, Object.entries(state.data.settings).map(([name, value]) => row(name, value))));
}

function drawHead() {
  const { summary, status, constraints } = state.data, { teacher, trials } = summary;
  const working = status.workers ? `${plural(status.workers, "worker")} at it${known(status.total) ? `, ${status.total} trials asked for` : ""}`
    + (known(status.seconds_left) ? `, about ${duration(status.seconds_left)} left` : "") : "nobody works on it";
  replace(byId("standing"), `${plural(state.data.trials.length, "trial")} finished: ${trials.complete} complete, ${trials.pruned} pruned, ${trials.failed} failed. `
    + `${duration(status.seconds)} of work, ${working}.`);
  const tile = (value, words) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, words));
  const tiles = [tile(known(teacher.score) ? significant(teacher.score, 4) : "-", `the teacher's score, ${count(teacher.flops)} flops, ${count(teacher.params)} parameters`)];
  for (const [size, best] of Object.entries(status.best)) {
    const value = best && (best.score_drop > 0 ? signed(-best.score_drop) : "no drop");
    tiles.push(tile(value ?? "none yet", `of the score at ${share(Number(size))} of the ${WORDS[state.data.cost]}`
      + (best ? `, divergence ${significant(best.divergence)}, trial ${best.trial}` : "")));
  }
  for (const [name, value] of Object.entries(constraints.limits)) tiles.push(tile(significant(value), `${name.replaceAll("_", " ")}, fulfilled by ${plural(constraints.fulfilled_by, "model")}`));
  replace(byId("tiles"), tiles);
  replace(byId("written"), `Written ${state.data.written.replace("T", " ").replace("+00:00", " UTC")} by spansearch.`);
}

function drawCharts() {
  drawFront();
  drawHeat();
  drawFamilies();
  drawGrowth();
}

function drawAll() {
  if (!state.data.costs.includes(state.x)) state.x = state.data.costs.includes(state.data.cost) ? state.data.cost : state.data.costs[0];
  drawHead();
  frontControls();
  drawCharts();
  drawDetails();
  drawFamilyTable();
  drawSeconds();
  drawPruning();
  drawSufficiency();
  drawFailures();
  drawTrials();
  drawSettings();
}

function follow() {
  let tag = null;
  setInterval(async () => {
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status !== 200) return;
      tag = answer.headers.get("ETag");
      state.data = await answer.json();
      drawAll();
    } catch {
      byId("standing").append(" (The server does not answer.)");
    }
  }, EVERY);
}

if (state.data.trials.some((trial) => trial.test)) state.split = "both";
const asked = /^#trial=(\d+)$/.exec(location.hash);
if (asked) state.chosen = Number(asked[1]);
drawAll();
let wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === wide) return;
  wide = innerWidth;
  requestAnimationFrame(drawCharts);
});
if (document.body.dataset.live === "yes") follow();
