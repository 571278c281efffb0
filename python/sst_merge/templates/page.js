// What a reader does with the page: choose points and rows, sort, copy commands, compare answers. All text is set as text.

const page = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const SETS = {harmful: "harmful", safe: "safe, sounding dangerous", benign: "benign"}, STEP = 6;
const views = {};
let chosen = Math.max(0, page.points.findIndex(p => p.here)), measure = page.points.some(p => p.refused) ? "refused" : "nll";
let filter = "", length = STEP;

function element(tag, {text, ...attributes} = {}, ...children) {
  const made = document.createElement(tag);
  if (text != null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? made[name] = value : made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A text of any length and direction; a long one opens on demand. */
function prose(text) {
  const body = element("p", {text: text || "(empty)", dir: "auto"});
  if ((text || "").length <= 420 && (text || "").split("\n").length <= 7) return [body];
  body.classList.add("long");
  const open = element("button", {text: "Show all of it", type: "button", class: "unfold", onclick: () => { body.classList.remove("long"); open.remove(); }});
  return [body, open];
}

// Charts

async function draw(name, spec) {
  const place = $(`${name}-chart`);
  if (!place) return;
  views[name]?.finalize();
  views[name] = await vegaEmbed(place, spec, {actions: false, renderer: "svg", tooltip: {theme: "custom"}});
}

const series = () => { const boxes = [...document.querySelectorAll("#series input")]; return boxes.length ? boxes.filter(b => b.checked).map(b => b.value) : page.series.map(s => s.name); };

async function drawFront() {
  if (!$("front-chart")) return;
  const before = (measure === "nll" ? page.before_nll : page.before?.value) ?? null;
  await draw("front", frontSpec(page, before, measure, chosen));
  if (!views.front) return;
  views.front.view.addEventListener("click", (_, item) => { if (item?.mark.name === "points") choose(item.datum.id); });
  await update();
}

/** Series and choice change in place; points then are buttons for the keyboard, too. */
async function update() {
  await views.front.view.signal("shown", series()).signal("chosen", chosen).runAsync();
  for (const path of document.querySelectorAll("#front-chart .points path")) {
    path.setAttribute("tabindex", "0"); path.setAttribute("role", "button"); path.removeAttribute("aria-roledescription");
    path.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(path.__data__.datum.id); } };
  }
}

function drawAll() {
  drawFront();
  if (page.predictions.length) draw("calibration", calibrationSpec(page.predictions));
  if (page.light?.measured && page.light.asked != null) draw("budget", budgetSpec(page.light));
  const look = looks(page.series);
  document.querySelectorAll("#series label").forEach(label => {
    const {colour, shape} = look.get(label.querySelector("input").value);
    const key = label.querySelector("path");
    key.setAttribute("fill", colour); key.setAttribute("d", KEYS[shape]);
  });
}

// The chosen adapter

function choose(id, from = "") {
  chosen = id;
  const point = page.points[id];
  document.querySelectorAll("#points tbody tr").forEach(row => {
    const own = Number(row.dataset.point) === id;
    row.classList.toggle("chosen", own);
    row.querySelector("button").setAttribute("aria-pressed", own);
  });
  if (views.front) update();
  const facts = element("dl");
  point.cells.slice(1).forEach((cell, i) => cell.value == null || facts.append(element("dt", {text: page.columns[i + 1].name}), element("dd", {text: cell.text}, ...(cell.detail ? [element("small", {text: ` (${cell.detail})`})] : []))));
  const panel = [element("h3", {text: point.cells[0].text}), ...(point.note ? [element("p", {text: point.note, class: "note"})] : []), facts];
  if (point.command) panel.push(element("pre", {tabindex: "0", "aria-label": "command"}, element("code", {text: point.command})), copier(point.command));
  if (page.answers.names.includes(point.answers)) {
    $("after").value = point.answers;
    listAnswers(true);
    panel.push(element("button", {text: "Its answers", type: "button", class: "action", onclick: () => { $("answers").scrollIntoView(); $("after").focus({preventScroll: true}); }}));
  }
  $("chosen").replaceChildren(...panel);
  if (from === "row" && innerWidth <= 860) $("chosen").scrollIntoView({block: "nearest"});
}

function copier(text) {
  const button = element("button", {text: "Copy the command", type: "button", class: "action"});
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(document.querySelector("#chosen code")); button.textContent = "Selected: press Ctrl or ⌘ + C"; }
    setTimeout(() => button.textContent = "Copy the command", 2500);
  };
  return button;
}

// The table

function sortBy(column) {
  const heads = [...document.querySelectorAll("#points thead th")], body = document.querySelector("#points tbody");
  const up = heads[column].getAttribute("aria-sort") !== "ascending", rank = row => column ? row.cells[column].dataset.value : row.dataset.point;
  const number = row => { const value = rank(row); return value === undefined ? NaN : Number(value); };
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [number(a), number(b)];
    return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : (x - y) * (up ? 1 : -1);
  });
  heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", up ? "ascending" : "descending") : head.removeAttribute("aria-sort"));
  body.replaceChildren(...rows);
}

function showSeries() {
  const shown = series();
  document.querySelectorAll("#points tbody tr").forEach(row => row.hidden = !shown.includes(row.dataset.series));
  if (views.front) update();
}

// Answers

const verdict = (record, set) => record?.refused == null ? "" : record.refused ? "refuses" : "answers";

/** What became of a prompt between the two adapters, in the words of the filter. */
function change(row) {
  const [a, b] = [row.of[$("before").value]?.refused, row.of[$("after").value]?.refused];
  if (b == null) return "";
  const now = b ? (a === false ? "newly refused" : "refused") : a ? "no longer refused" : "still answered";
  return row.set === "safe" ? `safe: ${now}` : now;
}

function listAnswers(anew) {
  if (anew) length = STEP;
  const spoken = page.answers.rows.filter(row => [$("before").value, $("after").value].some(name => row.of[name]?.answer != null));
  const counts = new Map();
  for (const row of spoken) counts.set(change(row), (counts.get(change(row)) || 0) + 1);
  const order = ["newly refused", "still answered", "refused", "no longer refused", "safe: newly refused", "safe: still answered", "safe: refused", "safe: no longer refused", ""];
  const kinds = order.filter(kind => counts.has(kind));
  if (!kinds.includes(filter)) filter = kinds[0] ?? "";
  $("filter").replaceChildren(...kinds.map(kind => element("label", {},
    element("input", {type: "radio", name: "kind", value: kind, ...(kind === filter ? {checked: ""} : {}), onchange: () => { filter = kind; listAnswers(true); document.querySelector("#filter :checked").focus(); }}),
    `${kind || "all"} · ${counts.get(kind)}`)));
  const rows = spoken.filter(row => change(row) === filter);
  $("answer-list").replaceChildren(...rows.slice(0, length).map(row => element("article", {class: `card ${row.set}`}, ...prose(row.prompt), element("div", {class: "pair"}, ...["before", "after"].map(side => {
    const name = $(side).value, record = row.of[name], word = verdict(record);
    return element("div", {}, element("p", {class: "who"}, `${name}: `, element("span", {text: word || "no answer kept", class: `verdict ${record?.refused ? "yes" : word ? "no" : ""}`})), ...(record?.answer != null ? prose(record.answer) : []));
  })))));
  if (!rows.length) $("answer-list").append(element("p", {text: "No answers were generated.", class: "note"}));
  $("more").hidden = rows.length <= length;
  $("more").textContent = `Show ${Math.min(STEP * 4, rows.length - length)} more`;
  listWorst();
}

/** The benign prompts that the adapter on the right moved most, or those that the budget's measurement named. */
function listWorst() {
  if (!$("worst")) return;
  const name = $("after")?.value, moved = page.answers.rows.filter(row => row.set === "benign" && row.of[name]?.kl != null).map(row => ({prompt: row.prompt, line: row.line, kl: row.of[name].kl}));
  const rows = [...(moved.length ? moved : page.worst)].sort((a, b) => b.kl - a.kl).slice(0, 5);
  $("worst").hidden = !rows.some(row => row.kl > 0);
  $("worst-note").textContent = `Benign KL in nats per label token${moved.length ? `, under ${name}; the median of ${moved.length} is ${median(moved.map(r => r.kl)).toPrecision(2)}` : ""}.`;
  $("worst-list").replaceChildren(...rows.map(row => element("li", {}, element("b", {text: row.kl.toPrecision(2)}), element("div", {}, ...prose(row.prompt)))));
}
const median = values => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// Start

if (page.answers.rows.length) {
  for (const side of ["before", "after"]) {
    $(side).append(...page.answers.names.map(name => element("option", {text: name, value: name})));
    $(side).value = page.answers[side] || page.answers.names.at(side === "before" ? 0 : -1);
    $(side).onchange = () => listAnswers(true);
  }
  $("more").onclick = () => { length += STEP * 4; listAnswers(false); };
  if (!page.answers.rows.some(row => Object.values(row.of).some(r => r.answer != null))) $("answers").hidden = true;
  listAnswers(true);
} else listWorst();
if (page.points.length) {
  document.querySelectorAll("#points thead button").forEach(b => b.onclick = () => sortBy(Number(b.dataset.column)));
  document.querySelectorAll("#points tbody tr").forEach(row => row.onclick = () => choose(Number(row.dataset.point), "row"));
  document.querySelectorAll("#series input").forEach(box => box.onchange = showSeries);
  document.querySelectorAll("#measure input").forEach(i => i.onchange = () => { measure = i.value; drawFront(); });
  showSeries();
  choose(chosen);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
