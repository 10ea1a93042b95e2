// The dashboard: reads the hub's API and draws it. Every word from a document goes in as text, never as HTML.
"use strict";

const at = (id) => document.getElementById(id);
const MARKS = {
  finished: "good", answering: "good", connected: "good", failed: "bad", stopped: "bad", away: "warn", lost: "bad",
  cancelled: "warn", pruned: "warn", interrupted: "warn", running: "live", planning: "live", starting: "live",
  waiting: "warn", approved: "good", rejected: "bad", expired: "warn",
};
let picked = null; // the run whose details are shown
let details = null; // its event stream
let me = null; // who is logged in
let shown = ""; // the runs as last drawn, to know when models and traffic may have changed

// --- words and numbers

const number = (value) => {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(4)).toString();
};

const volume = (size) => {
  let unit = 0;
  for (; size >= 999.5 && unit < 4; unit += 1) size /= 1000;
  return `${Number(size.toPrecision(3))} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
};

const duration = (seconds) => {
  if (seconds < 600) return `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`;
  return seconds < 10800 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
};

const short = (value) => {
  let unit = 0;
  for (; value >= 999.5 && unit < 4; unit += 1) value /= 1000;
  return `${Number(value.toPrecision(3))}${["", " k", " M", " G", " T"][unit]}`;
};

const rate = (pace) => pace.tokens_per_second === null
  ? `${short(pace.examples_per_second)} examples/s` : `${short(pace.tokens_per_second)} tokens/s`;

const steps = (seconds) => {
  if (!seconds.length) return "–";
  const [scale, unit] = Math.max(...seconds) < 1 ? [1000, "ms"] : [1, "s"];
  const shown = (value) => Number((value * scale).toPrecision(3));
  if (seconds.length <= 4) return `${seconds.map(shown).join(" / ")} ${unit}`;
  return `${shown(Math.min(...seconds))} to ${shown(Math.max(...seconds))} ${unit} in ${seconds.length} ranks`;
};

// --- drawing

const element = (kind, text, style) => {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (style) made.className = style;
  return made;
};

const state = (word) => element("span", word, MARKS[word] || "");

// Columns whose name begins with ">" hold numbers. A cell is text or an element.
const table = (id, columns, rows, empty = "none yet") => {
  const head = element("tr");
  for (const column of columns) {
    head.append(element("th", column.replace(">", ""), column.startsWith(">") ? "number" : ""));
  }
  const body = rows.map(({ cells, style }) => {
    const line = element("tr", undefined, style);
    cells.forEach((cell, index) => {
      const box = element("td", undefined, columns[index].startsWith(">") ? "number" : "");
      box.append(cell instanceof Node ? cell : String(cell));
      line.append(box);
    });
    return line;
  });
  at(id).replaceChildren(...(rows.length ? [head, ...body] : [element("caption", empty, "muted")]));
};

// One line for what several policies refuse in the same words.
const told = (reasons) => {
  const grounds = new Map();
  for (const { by, words } of reasons) {
    const [party, ground] = words.split(" refuses: ", 2);
    const same = ground && by.startsWith(`policy of ${party} (`);
    const key = same ? ground : by === "price" || by === "the job" ? words : `${words} [${by}]`;
    grounds.set(key, [...(grounds.get(key) || []), ...(same ? [party] : [])]);
  }
  return [...grounds].map(([ground, who]) =>
    who.length ? `${who.join(", ")} refuse${who.length > 1 ? "" : "s"}: ${ground}` : ground);
};
const rows = (items, cells) => items.map((item) => ({ cells: cells(item) }));

const curve = (losses, withheld) => {
  const make = (kind, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const parts = [];
  if (losses.length > 1) {
    const low = Math.min(...losses);
    const high = Math.max(...losses);
    const x = (index) => 48 + (index / (losses.length - 1)) * 580;
    const y = (loss) => 14 + (high > low ? (high - loss) / (high - low) : 0.5) * 160;
    for (const value of high > low ? [high, (high + low) / 2, low] : [low]) {
      parts.push(make("line", { x1: 48, x2: 628, y1: y(value), y2: y(value) }));
      parts.push(make("text", { x: 42, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(3)));
    }
    parts.push(make("text", { x: 48, y: 194 }, "round 1"));
    parts.push(make("text", { x: 628, y: 194, "text-anchor": "end" }, `round ${losses.length}`));
    const points = losses.map((loss, index) => `${x(index).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    parts.push(make("polyline", { points }));
  }
  at("curve").replaceChildren(...parts);
  const last = losses.length ? `loss ${number(losses[losses.length - 1])} after ${losses.length} rounds` : "";
  at("curve-words").textContent = last || withheld || "no round is merged yet";
};

const facts = (pairs) => {
  const boxes = pairs.map(([name, value]) => {
    const box = element("div");
    const told = element("dd");
    told.append(value instanceof Node ? value : String(value));
    box.append(element("dt", name), told);
    return box;
  });
  at("run-facts").replaceChildren(...boxes);
};

const drawRuns = (views) => {
  const columns = ["run", "job", "kind", "state", ">round", ">loss", ">up", ">down", ">time"];
  const body = [...views].sort((a, b) => b.started - a.started).map((view) => {
    const name = element("button", view.run);
    name.addEventListener("click", () => pick(view.run));
    const round = view.rounds ? `${view.round}/${view.rounds}` : "–";
    const bytes = [volume(view.bytes_up), volume(view.bytes_down)];
    const cells = [name, view.name, view.job_kind, state(view.state), round, number(view.loss), ...bytes];
    return { cells: [...cells, duration(view.seconds)], style: view.run === picked ? "picked" : "" };
  });
  table("runs", columns, body, "none yet: atoll run job.yaml");
};

const drawRun = (view) => {
  at("run-card").hidden = false;
  at("run-title").textContent = `Run ${view.run}`;
  const why = [view.words, view.withheld].filter(Boolean).map((words) => `: ${words}`).join("");
  at("run-words").textContent = `${view.name} (${view.job_kind}) for ${view.purpose}, by ${view.user}${why}`;
  facts([
    ["state", state(view.state)], ["stage", view.work || "–"], ["round", `${view.round}/${view.rounds}`],
    ["loss", number(view.loss)], ["up", volume(view.bytes_up)], ["down", volume(view.bytes_down)],
    ["time", duration(view.seconds)],
  ]);
  curve(view.losses, view.withheld);
  table("run-sites", ["site", "state", ">step"], rows(Object.entries(view.sites), ([name, site]) => [
    name, site.connected ? site.state : state("lost"), site.steps ? `${site.step}/${site.steps}` : "–",
  ]));
  drawTrials(view.sweep);
  drawPaces(view);
  drawResult(view.result, view.withheld);
  table("run-plan", ["candidate", ">time", ">traffic", "why"], (view.plan ? view.plan.considered : []).map((item) => ({
    cells: [
      item.name, item.price ? duration(item.price.seconds) : "–", item.price ? volume(item.price.bytes) : "–",
      told(item.rejected).join("; ") || "chosen",
    ],
    style: item.rejected.length ? "" : "chosen",
  })));
};

const drawTrials = (sweep) => {
  at("run-search").hidden = !sweep;
  if (!sweep) return;
  table("run-trials", [">trial", "values", "state", ">round", ">loss", `>${sweep.objective}`, "run", ""],
    sweep.trials.map((one) => ({
      cells: [
        one.number, Object.entries(one.parameters).map(([path, value]) => `${path} ${number(value)}`).join(", "),
        state(one.state), one.rounds ? `${one.round}/${one.rounds}` : "–", number(one.loss), number(one.objective),
        one.run, one.words || one.model || "",
      ],
      style: one.number === sweep.best ? "chosen" : "",
    })));
};

// How fast each site trains now, or did in its newest round.
const drawPaces = (view) => {
  const live = Object.entries(view.sites).filter(([, site]) => site.pace).map(([name, site]) => [name, site.pace]);
  const paces = Object.entries({ ...view.paces, ...Object.fromEntries(live) }).sort(([a], [b]) => (a < b ? -1 : 1));
  const columns = ["site", ">rate", ">MFU", ">memory", ">step, rank by rank", ">loss", ""];
  table("run-paces", columns, rows(paces, ([name, pace]) => [
    name, rate(pace), pace.mfu === null ? "–" : `${(100 * pace.mfu).toFixed(1)}%`,
    `${volume(pace.memory_bytes)} (most ${volume(pace.memory_peak_bytes)})`, steps(pace.step_seconds),
    number(pace.loss), pace.straggler,
  ]), "no site has told one yet");
};

const drawResult = (result, withheld) => {
  if (result && result.columns.length) {
    table("run-result", result.columns, rows(result.rows, (row) => row.map(number)));
    return;
  }
  const names = result ? Object.keys(result.metrics) : [];
  const body = result ? rows(Object.entries(result.by_site), ([site, scores]) => [
    site, ...names.map((name) => number(scores[name])),
  ]) : [];
  if (names.length) body.push({ cells: ["all sites", ...names.map((name) => number(result.metrics[name]))], style: "chosen" });
  table("run-result", ["site", ...names.map((name) => `>${name}`)], body, withheld || "none yet");
};

// --- reading

const read = async (path) => {
  const answer = await fetch(`/v1/${path}`, { headers: { Accept: "application/json" } });
  if (answer.status === 401) throw new Error("not logged in: run `atoll ui` and open the link it prints");
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer.json();
};

// Whether the hub would show this; it decides anew each time it is asked.
const may = (action) => me && me.scope.includes(action)
  && me.user.roles.some((role) => ["auditor", "operator", "owner"].includes(role));

const say = (words, bad) => {
  at("status").textContent = words;
  at("status").className = bad ? "bad" : "";
};

// What its run promises, each wording once; an epsilon is rounded up, so that it does not look smaller than it is.
const privacy = (model) => {
  const said = model.promises.map(({ guarantee: one }) => (one
    ? `${one.unit}-level (epsilon ${Math.ceil(one.epsilon * 1e4) / 1e4}, delta ${one.delta.toPrecision(2)})`
    : "no privacy promise"));
  return [...new Set(said)].join("; ") || "no privacy promise";
};

const readRest = async () => {
  const names = ["sites", "models", "aliases", "deployments", "approvals"];
  const [sites, models, aliases, deployments, approvals] = await Promise.all(names.map(read));
  const traffic = may("audit") ? await read("traffic").catch(() => []) : [];
  table("sites", ["site", "owner", "region", "state", ">latency", "datasets"], rows(sites, (site) => [
    site.name, site.owner, site.region, state(site.quarantine ? "quarantine" : site.connected ? "connected" : "away"),
    site.latency_ms === null ? "–" : `${site.latency_ms.toFixed(1)} ms`, site.datasets.join(", "),
  ]), "none yet: atoll site add NAME");
  table("models", ["model", "aliases", "metrics", "privacy", "run"], rows(models, (model) => [
    `${model.name}@${model.version}`,
    Object.entries(aliases[model.name] || {}).filter((pair) => pair[1] === model.version).map((pair) => pair[0]).join(", "),
    Object.entries(model.metrics).map(([name, value]) => `${name} ${number(value)}`).join(", "),
    privacy(model), model.lineage.run,
  ]));
  table("deployments", ["name", "model", "state", "url"], rows(deployments, (item) => [
    item.name, item.model, state(item.state), item.url,
  ]), "none yet: atoll deploy MODEL");
  table("traffic", ["site", "way", "kind", ">crossings", ">volume", ">refused"], rows(traffic, (item) => [
    item.site, item.direction, item.kind, number(item.count), volume(item.bytes), number(item.refused),
  ]), may("audit") ? "nothing has crossed a border yet" : "for auditors, operators and owners");
  const waiting = approvals.filter((item) => item.state === "waiting");
  at("approvals-card").hidden = !waiting.length;
  table("approvals", ["id", "asked by", "what", "by another", "until"], rows(waiting, (item) => [
    item.approval, item.user, item.words, item.roles.join(" or "), new Date(item.expires * 1000).toLocaleString(),
  ]));
};

const readMe = async () => {
  me = await read("me");
  at("me").textContent = `${me.user.name}: ${me.user.roles.join(", ")}`;
};

const refresh = () => readRest().catch((error) => say(error.message, true));

const pick = (run) => {
  picked = run;
  if (details) details.close();
  const stream = new EventSource(`/v1/runs/${encodeURIComponent(run)}/events`);
  let plan = null; // told once in each stream
  details = stream;
  stream.onmessage = (event) => {
    const view = JSON.parse(event.data);
    plan = view.plan || plan;
    drawRun({ ...view, plan });
    if (["finished", "failed", "cancelled", "interrupted"].includes(view.state)) stream.close();
  };
};

const watch = () => {
  const stream = new EventSource("/v1/events");
  stream.onmessage = (event) => {
    const views = JSON.parse(event.data);
    const live = views.filter((view) => ["planning", "running"].includes(view.state));
    say(live.length ? `${live.length} of ${views.length} runs under way` : `connected, ${views.length} runs`);
    drawRuns(views);
    if (picked === null && views.length) pick([...views].sort((a, b) => b.started - a.started)[0].run);
    const now = views.map((view) => `${view.run} ${view.state} ${view.round}`).join();
    if (now !== shown) refresh();
    shown = now;
  };
  stream.onerror = () => say(stream.readyState === EventSource.CLOSED
    ? "logged out: run `atoll ui` and open the link it prints" : "the hub does not answer; trying again", true);
};

readMe().then(readRest).then(watch, (error) => say(error.message, true));
setInterval(refresh, 15000);
