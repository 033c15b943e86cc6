/* What comes out of a log is text: it gets into the page by textContent alone. */
const MOST = 7, SHAPES = ["", "●", "■", "▲", "◆", "▼"];  // colours and marks of curves
const $ = id => document.getElementById(id);
const embedded = JSON.parse($("data").textContent);  // of a page without a server
const runs = new Map();    // id -> what the server says of a run, and its elements
const ticked = new Map();  // id -> slot, which gives colour and mark
let version = "", offset = 0, polling = null, groups = [], names = {title: "", labels: new Map()};
let chosen = false, x = "epochs", scale = null, focus = null, cursor = null, waiting = 0;

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const words = (tag, textContent, className = "") => el(tag, {textContent, className});
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/* Numbers and words */
const now = () => embedded ? embedded.now : Date.now() / 1000 + offset;
const age = run => span(Math.max(0, Math.round(now() - run.mtime)));
const order = new Intl.Collator("en", {numeric: true});
const inOrder = (a, b) => order.compare(place(a), place(b));
const place = run => run.folder ? `${run.folder}/${run.name}` : run.name;
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const percent = v => v === null ? "–" : `${(100 * v).toFixed(1)} %`;
const digits = count => v => v === null ? "–"
  : v && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5) ? v.toExponential(count - 2).replace("e+", "e")
  : Math.abs(v) >= 10 ** count ? v.toFixed(0) : v.toPrecision(count);
function span(seconds) {
  const [size, unit] = timeUnit(seconds), v = seconds / size;
  return `${v < 10 && size === 1 && v % 1 ? v.toFixed(1) : Math.round(v)} ${unit}`;
}
function state(run) {
  if (run.end) return run.end.final && !run.end.stopped ? "finished" : "stopped";
  return now() - run.mtime > run.patience ? "stalled" : "training";
}
function numbers(run) {
  const {last, total, done} = run;
  const parts = [total && total !== done ? `epoch ${done} of ${total}` : count(done, "epoch")];
  if (done) parts.push(run.text ? `loss ${digits(4)(last.test_loss)}` : `test ${percent(last.test_acc)}`);
  if (done && last.eta_mean !== null) parts.push(`η ${digits(3)(last.eta_mean)}`);
  return parts.map(part => part.replaceAll(" ", "\u00a0").replaceAll("-", "\u2011")).join(" · ");
}
/* {title: what runs have in common, labels: id -> what they have not}, as scripts/plot.py has it;
   but a label names a default only where that tells runs apart */
function named(some) {
  const word = (run, key) => run.words[key] ?? [`${key.replaceAll("_", " ")} as usual`, true];
  const keys = [...new Set(some.flatMap(run => Object.keys(run.words)))];
  const shared = new Set(keys.filter(key => new Set(some.map(run => word(run, key)[0])).size < 2));
  const said = (run, common, usual) => keys.filter(key => shared.has(key) === common)
    .map(key => word(run, key)).filter(w => usual || !w[1]).map(w => w[0]).join(", ");
  const labels = new Map();
  let rest = some;
  const there = (run, where) => [said(run, false, false), where].filter(Boolean).join(", ");
  for (const make of [run => said(run, false, false), run => said(run, false, true),
                      run => there(run, run.folder), run => there(run, place(run))]) {
    const texts = new Map(rest.map(run => [run.id, make(run)])), counts = new Map();
    for (const text of texts.values()) counts.set(text, (counts.get(text) ?? 0) + 1);
    for (const [id, text] of texts) if (text && counts.get(text) === 1) labels.set(id, text);
    rest = rest.filter(run => !labels.has(run.id));
  }
  return {title: some.length ? said(some[0], true, false) : "", labels};
}

/* What the server says */
function take(answer) {
  offset = answer.now - Date.now() / 1000;
  version = answer.version;
  for (const [id, run] of Object.entries(answer.runs)) {
    const old = runs.get(id);
    for (const part of ["rows", "steps"]) {
      const {from, ...columns} = run[part];
      for (const name in columns)
        if (from) run[part][name] = old[part][name].slice(0, from).concat(columns[name]);
    }
    const texts = Object.values(run.words).map(([text]) => text);
    run.find = [run.place, ...texts].join(" ").toLowerCase();
    runs.set(id, Object.assign(old ?? {id}, run));
  }
  if (answer.ids) {
    for (const id of runs.keys()) if (!answer.ids.includes(id)) runs.delete(id);
    put($("folder"), answer.folder);
    put($("begin"), answer.begin);
    $("notes").hidden = !answer.notes.length;
    put($("notes").firstChild, `${answer.notes.length} left out`);
    $("notes").lastChild.replaceChildren(...answer.notes.map(text => words("li", text)));
    list();
  }
  label();
  preselect();
  refresh();
}
async function poll() {
  clearTimeout(polling);
  polling = null;
  let good = true;
  try {
    const answer = await fetch(`runs?since=${version}`, {signal: AbortSignal.timeout(60000)});
    if (answer.status === 200) take(await answer.json());
    else good = answer.status === 204;
  } catch (error) {
    if (!["TypeError", "TimeoutError", "AbortError"].includes(error.name)) console.error(error);
    good = false;
  }
  put($("link"), good ? "live" : "no connection, trying again");
  $("link").classList.toggle("lost", !good);
  if (good) describe();
  polling = setTimeout(poll, document.visibilityState === "hidden" ? 10000 : 2000);
}

/* What is ticked. A run takes the first slot that is free, and keeps its colour */
function tick(id) {
  const taken = new Set(ticked.values());
  let slot = 0;
  while (taken.has(slot)) slot++;
  if (!ticked.has(id)) ticked.set(id, slot);
}
function preselect() {  // while nobody has chosen
  if (chosen) return;
  const newest = [...runs.values()].sort((a, b) => b.mtime - a.mtime);
  const training = newest.filter(run => state(run) === "training");
  const next = (training.length ? training : ticked.size ? [] : newest)
    .filter(run => !ticked.has(run.id)).slice(0, Math.max(0, MOST - ticked.size));
  for (const run of next.sort(inOrder)) tick(run.id);  // so that a page has the same colours again
}
function choose(wanted) {
  chosen = true;
  for (const id of ticked.keys()) if (!wanted.includes(id)) ticked.delete(id);
  wanted.forEach(tick);
  remember();
  refresh();
}
const add = some => choose([...ticked.keys(), ...some]);
const drop = some => choose([...ticked.keys()].filter(id => !some.includes(id)));
function remember() {
  const parts = [chosen && `runs=${[...ticked.keys()]}`, x !== "epochs" && `x=${x}`];
  if (scale) parts.push(`loss=${scale}`);
  history.replaceState(null, "", `#${parts.filter(Boolean).join("&")}`);
}
function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  x = kept.get("x") === "seconds" ? "seconds" : "epochs";
  scale = ["linear", "log"].find(word => word === kept.get("loss")) ?? null;
  document.querySelector(`input[value=${x}]`).checked = true;
  chosen = kept.has("runs");
  if (!chosen) return;
  ticked.clear();
  kept.get("runs").split(",").filter(id => /^[0-9a-f]{8}$/.test(id)).forEach(tick);
}
const some = () => [...ticked.keys()].map(id => runs.get(id)).filter(Boolean);
const colour = run => `--c${ticked.get(run.id) % MOST}`;
const mark = run => SHAPES[Math.floor(ticked.get(run.id) / MOST) % SHAPES.length];

/* The list */
function list() {
  const folders = new Map();
  for (const run of [...runs.values()].sort(inOrder))
    folders.set(run.folder, [...folders.get(run.folder) ?? [], run]);
  groups = [...folders].sort((a, b) => order.compare(a[0], b[0])).map(([folder, members]) => {
    const box = el("input", {type: "checkbox", ariaLabel: `all runs in ${folder || "the folder"}`});
    box.onchange = () => box.checked ? add(visible(members)) : drop(members.map(run => run.id));
    const title = words("p", "", "soft"), name = folder || $("folder").textContent;
    const node = el("section", {className: "group"},
      el("h2", {}, box, name, words("span", members.length, "soft")),
      title, el("ul", {}, ...members.map(item)));
    return {members, box, title, node};
  });
  $("list").replaceChildren(...groups.map(group => group.node));
}
function item(run) {
  if (run.item) return run.item;
  run.box = el("input", {type: "checkbox"});
  run.box.onchange = () => run.box.checked ? add([run.id]) : drop([run.id]);
  [run.mark, run.label, run.age, run.state, run.rest] =
    ["mark", "", "age number", "state", "number"].map(className => el("span", {className}));
  run.age.title = "since its last row";
  run.meta = el("span", {}, run.state, " · ", run.rest);
  [run.only, run.more] = [words("button", "only"), words("button", "details")];
  run.only.onclick = () => choose([run.id]);
  run.more.onclick = () => details(run);
  const name = el("span", {className: "name"}, run.mark, run.label);
  run.item = el("li", {}, el("label", {}, run.box, name, run.age, run.meta),
    el("span", {className: "acts"}, run.only, run.more));
  return emphasised(run.item, run);
}
function label() {
  for (const {members, title: node} of groups) {
    const {title, labels} = named(members), several = members.length > 1;
    put(node, several ? title : "");
    for (const run of members) {
      const text = several ? labels.get(run.id) : title || run.name;
      put(run.label, text);
      run.item.title = place(run);
      run.only.ariaLabel = `only ${text}`;
      run.more.ariaLabel = `details of ${text}`;
    }
  }
}
const visible = members => members.filter(run => !run.item.hidden).map(run => run.id);
function describe() {  // what changes without news: states and ages; and what the search finds
  const wanted = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let training = 0;
  for (const run of runs.values()) {
    const word = state(run), text = `${run.find} ${word} ${ticked.has(run.id) ? "ticked" : ""}`;
    training += word === "training";
    put(run.state, word);
    run.state.title = word === "stalled" ? `no row for more than ${span(run.patience)}` : "";
    run.meta.className = `meta ${word}`;
    put(run.rest, numbers(run));
    put(run.age, `${age(run)} ago`);
    run.item.hidden = !wanted.every(part => text.includes(part));
  }
  for (const {members, box, node} of groups) {
    const on = members.filter(run => ticked.has(run.id)).length;
    node.hidden = !visible(members).length;
    box.checked = on === members.length;
    box.indeterminate = on > 0 && !box.checked;
  }
  const found = wanted.length ? `${visible([...runs.values()]).length} found, ` : "";
  put($("ticked"), `${found}${some().length} ticked`);
  put($("count"), count(runs.size, "run") + (training ? `, ${training} training` : ""));
  document.title = `${training ? `${training} training – ` : ""}${$("folder").textContent}`;
}

/* All that follows what is ticked */
function refresh() {
  const shown = some(), drawn = shown.some(run => run.done);
  names = named(shown);
  for (const run of runs.values()) {
    run.box.checked = ticked.has(run.id);
    run.box.style.accentColor = run.mark.style.color = run.box.checked ? `var(${colour(run)})` : "";
    put(run.mark, run.box.checked && mark(run) ? `${mark(run)} ` : "");
  }
  put($("title"), names.title);
  const keys = shown.slice(0, shown.length > 1 ? 2 * MOST : 0).map(run =>
    emphasised(el("span", {}, swatch(run), words("span", names.labels.get(run.id))), run));
  $("legend").replaceChildren(...keys);
  const rest = shown.length - 2 * MOST;
  if (rest > 0) $("legend").append(words("span", `and ${rest} more`, "soft"));
  $("charts").hidden = $("top").hidden = !drawn;
  $("empty").hidden = drawn;
  $("begin").hidden = runs.size > 0;
  put($("why"), !runs.size ? "There are no runs here yet. This one takes seconds, and appears here:"
    : shown.length ? "The curves begin with the first epoch." : "Tick runs to compare them.");
  describe();
  redraw();
}
function swatch(run) {
  const node = el("i", {className: "swatch"});
  node.dataset.mark = mark(run);
  node.style.color = `var(${colour(run)})`;
  return node;
}
/* While the pointer is on an element of a run, its curves stand out */
function emphasised(node, run) {
  const on = id => () => {
    focus = ticked.has(id) && ticked.size > 1 ? id : null;
    redraw();
  };
  [node.onpointerenter, node.onpointerleave] = [on(run.id), on(null)];
  return node;
}
function redraw() {
  waiting ||= requestAnimationFrame(() => {
    waiting = 0;
    const shown = some().filter(run => run.done);
    document.body.dataset.drawn = shown.length;
    if (!shown.length) return;
    document.querySelector(`input[value=${logarithmic(shown) ? "log" : "linear"}]`).checked = true;
    for (const chart of charts) chart.draw(shown);
    for (const chart of charts) chart.point(shown);
  });
}
function point(chart, at, y) {
  cursor = chart && {chart, at, y};
  const shown = some().filter(run => run.done);
  for (const chart of charts) chart.point(shown);
}
/* Whether the loss has a log scale: as chosen, else where it spans more than a factor of 5 */
function logarithmic(shown) {
  let [low, high] = [Infinity, -Infinity];
  for (const {rows} of scale ? [] : shown) for (const column of [rows.train_loss, rows.test_loss])
    for (const v of column) if (v !== null) [low, high] = [Math.min(low, v), Math.max(high, v)];
  return scale ? scale === "log" : low > 0 && high / low > 5;
}

/* A run's settings, versions and command */
async function details(run) {
  const answer = embedded ? null : await fetch(`run?id=${run.id}`).catch(() => null);
  if (!embedded && !answer?.ok) return;
  const {first, command} = embedded ? embedded.details[run.id] : await answer.json();
  const {flags, settings, kind, ...facts} = first;
  const why = run.end?.stopped ? `: ${run.end.stopped}` : "";
  const text = v => typeof v === "object" ? JSON.stringify(v) : String(v);
  const table = (title, values) => [words("h3", title), el("dl", {}, ...Object.entries(values)
    .filter(([, v]) => v !== null)
    .flatMap(([name, v]) => [words("dt", name), words("dd", text(v))]))];
  $("sheet").replaceChildren(
    el("h2", {id: "heading", textContent: named([run]).title || run.name}),
    words("p", run.place, "soft"),
    words("p", `${state(run)}${why} · ${numbers(run)} · last row ${age(run)} ago`, "number"),
    ...(command ? [words("h3", "The command that makes it again"), words("code", command)] : []),
    ...table("Facts", facts), ...table("Settings, which shape the result", settings),
    ...table("Flags", flags));
  $("dialog").showModal();
  $("dialog").scrollTop = 0;
}

const charts = [
  new Chart("loss", ["train_loss", "test_loss"], [], digits(4)),
  new Chart("acc", ["train_acc", "test_acc"], [], percent),
  new Chart("eta", ["eta_mean"], ["eta_min", "eta_max"], digits(3)),
];
$("shut").onclick = () => $("dialog").close();
$("dialog").onclick = event => { if (event.target === $("dialog")) $("dialog").close(); };
$("count").onclick = () => $("search").focus();
$("search").oninput = describe;
$("all").onclick = () => add(visible([...runs.values()]));
$("none").onclick = () => choose([]);
for (const box of document.querySelectorAll("fieldset input")) box.onchange = () => {
  if (box.name === "x") x = box.value; else scale = box.value;
  remember();
  redraw();
};
addEventListener("hashchange", () => { recall(); preselect(); refresh(); });
document.addEventListener("visibilitychange", () => {
  if (polling && document.visibilityState === "visible") poll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
recall();
if (embedded) {
  take(embedded);
  const form = {dateStyle: "medium", timeStyle: "short"};
  put($("link"), `as of ${new Date(embedded.now * 1000).toLocaleString([], form)}`);
  $("link").classList.add("file");
} else poll();
