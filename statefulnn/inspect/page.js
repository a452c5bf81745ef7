
const data = JSON.parse(document.getElementById("data").textContent);
const { modules, calls, traced } = data;
const $ = id => document.getElementById(id);
const NARROW = matchMedia("(max-width: 860px)");

function make(create, tag, attributes, children) {
  const node = create(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(c => c !== null && c !== undefined && c !== false));
  return node;
}
const html = (tag, attributes, ...children) => make(t => document.createElement(t), tag, attributes, children);
const svg = (tag, attributes, ...children) =>
  make(t => document.createElementNS("http://www.w3.org/2000/svg", t), tag, attributes, children);

// ------------------------------------------------------------------------------------------------
// Numbers

function scaled(number, units) {
  let i = 0;
  while (i < units.length - 1 && number >= (i ? 999.95 : 1000)) { number /= 1000; i++; }
  return number.toFixed(i ? 1 : 0) + units[i];
}
const brief = n => scaled(n, ["", " k", " M", " G", " T", " P"]);
const inBytes = n => scaled(n, [" B", " kB", " MB", " GB", " TB", " PB"]);
const whole = n => n.toLocaleString("en-US");
const short = x => (typeof x === "number" ? String(Number(x.toPrecision(3))) : x);
const percent = x => (x >= 0.9995 || x === 0 ? `${Math.round(100 * x)} %` : x < 0.001 ? "< 0.1 %" : `${(100 * x).toFixed(1)} %`);

const METRICS = {
  parameters: { label: "parameters", of: m => m.parameters, text: brief },
  bytes: { label: "memory", of: m => m.bytes, text: inBytes },
  ...(traced && {
    flops: { label: "FLOPs", of: m => m.flops, text: brief },
    activations: { label: "outputs", of: m => m.outputs, text: inBytes },
  }),
};
let metric = traced && modules[0].flops ? "flops" : "parameters";
const value = m => METRICS[metric].of(m);
const share = m => (m.shared === null && value(modules[0]) ? Math.min(1, value(m) / value(modules[0])) : 0);

const hues = new Map();
for (const [id, m] of modules.entries()) {
  m.id = id;
  m.children = [];
  m.outputs = m.activations;
  m.bad = m.arrays.reduce((n, a) => n + (a.numbers ? a.numbers.nans + a.numbers.infinities : 0), 0);
  m.ill = m.bad;
  if (!hues.has(m.cls)) hues.set(m.cls, Math.round(215 + 137.5 * hues.size) % 360);
  if (m.parent !== null) modules[m.parent].children.push(m);
}
for (const m of [...modules].reverse()) {
  if (m.parent === null || m.shared !== null) continue;
  modules[m.parent].outputs += m.outputs;
  modules[m.parent].ill += m.ill;
}
const byPath = new Map();
for (const m of modules) if (!byPath.has(m.path)) byPath.set(m.path, m);
const title = m => m.path || m.cls;
const ancestors = m => (m.parent === null ? [] : [modules[m.parent], ...ancestors(modules[m.parent])]);
const hue = cls => `--hue:${hues.get(cls) ?? 0}`;

// ------------------------------------------------------------------------------------------------
// State

let selected = modules[0];
let query = "";
const opened = new Set([0]);
const openCalls = new Set(["0"]);
const openStacks = new Set();

function select(m, from) {
  selected = m;
  for (const a of ancestors(m)) opened.add(a.id);
  history.replaceState(null, "", `#${encodeURIComponent(m.path)}`);
  if (from === "detail" || from === "tree") reveal(m);
  drawTree();
  drawDetail();
  markGraph();
  $("tree").querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
  $("detail-part").scrollTop = 0;
  if (NARROW.matches && from === "tree") show("detail-part");
}

function show(part) {
  for (const section of document.querySelectorAll("main > section")) section.classList.toggle("shown", section.id === part);
  for (const tab of $("tabs").children) tab.setAttribute("aria-pressed", tab.dataset.part === part);
  if (part === "graph-part") drawGraph();
}

// ------------------------------------------------------------------------------------------------
// Tree

function matches(m) {
  const text = query.toLowerCase();
  return `${m.path} ${m.cls}`.toLowerCase().includes(text) || m.arrays.some(a => `${m.path}.${a.name}`.toLowerCase().includes(text));
}

function visible() {
  const found = query ? new Set(modules.filter(matches)) : null;
  const kept = found && new Set([...found].flatMap(m => [m, ...ancestors(m)]));
  const rows = [];
  const todo = [[modules[0], 1]];
  while (todo.length) {
    const [m, level] = todo.pop();
    if (kept && !kept.has(m)) continue;
    rows.push([m, level]);
    if (kept || opened.has(m.id)) for (const child of [...m.children].reverse()) todo.push([child, level + 1]);
  }
  $("found").hidden = !query;
  if (found) $("found").textContent = `${found.size} of ${modules.length} modules`;
  return rows;
}

function highlighted(text) {
  const at = query ? text.toLowerCase().indexOf(query.toLowerCase()) : -1;
  if (at < 0) return [text];
  const end = at + query.length;
  return [text.slice(0, at), html("mark", null, text.slice(at, end)), text.slice(end)];
}

function row([m, level]) {
  const open = query ? m.children.length > 0 : opened.has(m.id);
  const part = share(m);
  return html("li", {
      role: "treeitem", "data-id": m.id, "aria-level": level, style: `--level:${level};${hue(m.cls)}`,
      "aria-expanded": m.children.length ? String(open) : undefined,
      "aria-selected": String(m === selected), tabindex: m === selected ? 0 : -1, title: `${title(m)}: ${m.cls}`,
    },
    html("span", { class: "twist", "aria-hidden": "true" }, m.children.length ? "▸" : ""),
    html("span", { class: "dot", "aria-hidden": "true" }),
    html("span", { class: "name" }, ...highlighted(m.path ? m.name : m.cls)),
    m.path && html("span", { class: "cls" }, ...highlighted(m.cls)),
    m.ill > 0 && html("span", { class: "bad", title: "holds NaN or infinite numbers" }, "NaN"),
    m.shared !== null && html("span", { class: "tag" }, `= ${m.shared || "the model"}`),
    html("span", { class: "amount" }, m.shared === null && value(m) ? METRICS[metric].text(value(m)) : ""),
    html("span", { class: "bar", "aria-hidden": "true" }, html("i", { style: `width:${(100 * part).toFixed(2)}%` })),
  );
}

function drawTree() {
  const focused = $("tree").contains(document.activeElement);
  $("tree").replaceChildren(...visible().map(row));
  const current = $("tree").querySelector('[tabindex="0"]');
  if (!current) $("tree").firstElementChild?.setAttribute("tabindex", 0);
  if (focused) (current ?? $("tree").firstElementChild)?.focus();
}

function fold(m, open) {
  if (open) opened.add(m.id); else opened.delete(m.id);
  drawTree();
}

$("tree").addEventListener("click", event => {
  const item = event.target.closest("li");
  if (!item) return;
  const m = modules[item.dataset.id];
  if (event.target.closest(".twist") && m.children.length) fold(m, !opened.has(m.id));
  else select(m, "tree");
});
$("tree").addEventListener("keydown", event => {
  const item = event.target.closest("li");
  if (!item) return;
  const m = modules[item.dataset.id];
  const go = to => {
    if (!to) return;
    item.setAttribute("tabindex", -1);
    to.setAttribute("tabindex", 0);
    to.focus();
  };
  const open = item.getAttribute("aria-expanded") === "true";
  const keys = {
    ArrowDown: () => go(item.nextElementSibling),
    ArrowUp: () => go(item.previousElementSibling),
    Home: () => go($("tree").firstElementChild),
    End: () => go($("tree").lastElementChild),
    ArrowRight: () => (m.children.length && !open ? refocus(m, true) : go(item.nextElementSibling)),
    ArrowLeft: () => (open && !query ? refocus(m, false) : go($("tree").querySelector(`[data-id="${m.parent}"]`))),
    Enter: () => select(m, "tree"),
    " ": () => select(m, "tree"),
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
function refocus(m, open) {
  fold(m, open);
  for (const item of $("tree").children) item.setAttribute("tabindex", item.dataset.id === String(m.id) ? 0 : -1);
  $("tree").querySelector(`[data-id="${m.id}"]`)?.focus();
}

$("unfold-all").addEventListener("click", () => { for (const m of modules) opened.add(m.id); drawTree(); });
$("fold-all").addEventListener("click", () => { opened.clear(); opened.add(0); drawTree(); });
$("search").addEventListener("input", event => { query = event.target.value.trim(); drawTree(); });
$("search").addEventListener("keydown", event => {
  if (event.key === "Enter") {
    const first = modules.find(m => query && matches(m));
    if (first) select(first, "tree");
  } else if (event.key === "Escape") {
    event.target.value = query = "";
    drawTree();
  }
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.closest("input, select")) {
    event.preventDefault();
    if (NARROW.matches) show("tree-part");
    $("search").focus();
  }
});

// ------------------------------------------------------------------------------------------------
// Details

function histogram(numbers) {
  const bins = numbers.histogram, most = Math.max(...bins, 1);
  const low = Number(numbers.low), high = Number(numbers.high);
  const zero = low < 0 && high > 0 ? (-low / (high - low)) * bins.length : null;
  return svg("svg", { class: "histogram", viewBox: `0 0 ${bins.length} 1`, preserveAspectRatio: "none", role: "img",
      "aria-label": `histogram from ${short(numbers.low)} to ${short(numbers.high)}` },
    zero !== null && svg("path", { class: "zero", d: `M${zero} 0V1` }),
    svg("path", { d: bins.map((n, i) => (n ? `M${i + 0.05} 1V${1 - Math.max(n / most, 0.03)}h.9V1z` : "")).join("") }));
}

function arrayCard(m, a) {
  const n = a.numbers;
  const line = [a.shape, a.dtype, a.kind === "parameter" ? null : a.kind, a.sharding].filter(Boolean).join(" · ");
  const looked = n ? n.histogram.reduce((x, y) => x + y, 0) + n.nans + n.infinities : 0;
  return html("article", { class: "array" },
    html("h4", null, html("code", null, a.name), html("span", null, line), html("span", { class: "right" }, inBytes(a.bytes))),
    a.tied !== null && html("p", null, "is the same box as ", link(byPath.get(a.tied.split(".").slice(0, -1).join(".")) ?? modules[0], a.tied)),
    a.why !== null && html("p", { class: "muted" }, a.why),
    n && (n.nans + n.infinities > 0) && html("p", { class: "alarm" }, `${whole(n.nans)} NaN and ${whole(n.infinities)} infinite of ${whole(looked)}`),
    n && n.low !== n.high && histogram(n),
    n && n.low !== n.high && html("p", { class: "ends" }, html("span", null, short(n.low)), html("span", null, `${short(n.mean)} ± ${short(n.std)}`), html("span", null, short(n.high))),
    n && n.low === n.high && html("p", { class: "muted" }, looked > n.nans + n.infinities ? `all ${short(n.low)}` : "no finite number"),
    n && n.zeros > 0 && n.low !== n.high && html("p", { class: "muted" }, `${percent(n.zeros / looked)} zeros`),
    n && n.step > 1 && html("p", { class: "muted" }, `from a sample of one in ${n.step}`),
  );
}

const link = (m, text) => html("button", { class: "link", type: "button", onclick: () => select(m, "detail") }, text ?? title(m));

function bars(list, name) {
  const most = Math.max(...list.map(value), 1);
  return html("ul", { class: "bars" }, list.map(m => html("li", { style: hue(m.cls) },
    link(m, name(m)), html("span", { class: "bar" }, html("i", { style: `width:${(100 * value(m)) / most}%` })),
    html("span", { class: "amount" }, METRICS[metric].text(value(m))))));
}

function callLine(number) {
  const c = calls[number];
  return html("li", null,
    html("code", null, c.inputs || "()"), html("span", { class: "arrow", "aria-label": "gives" }, " → "), html("code", null, c.output),
    html("span", { class: "muted" }, ` ${brief(c.flops)} FLOPs`, c.times > 1 ? ` in ${c.times} turns of a loop` : ""));
}

function drawDetail() {
  const m = selected, root = modules[0];
  const fact = (name, text, part) => html("div", null, html("dt", null, name), html("dd", null, text, part !== undefined && html("small", null, percent(part))));
  const below = [];
  const todo = [...m.children];
  while (todo.length) { const x = todo.pop(); todo.push(...x.children); if (!x.children.length && x.shared === null && value(x)) below.push(x); }
  below.sort((a, b) => value(b) - value(a));
  const parts = [
    html("nav", { class: "crumbs", "aria-label": "Around it" }, [...ancestors(m)].reverse().map(a => [link(a, a.path ? a.name : a.cls), " › "])),
    html("h2", { style: hue(m.cls) }, html("span", { class: "dot" }), m.path ? m.name : m.cls, m.path && html("span", { class: "cls" }, m.cls)),
    m.path && html("p", { class: "path" }, html("code", null, m.path)),
    m.extra && html("p", { class: "muted" }, html("code", null, m.extra)),
    m.shared !== null && html("p", null, "This is ", link(byPath.get(m.shared)), " under another name; its numbers are there."),
    m.unknown.length > 0 && html("p", { class: "alarm" }, `without a shape: ${m.unknown.join(", ")}`),
    html("dl", { class: "facts" },
      fact("Parameters", whole(m.parameters), root.parameters ? m.parameters / root.parameters : undefined),
      m.trainable !== m.parameters && fact("Trained", whole(m.trainable)),
      m.buffers > 0 && fact("In buffers", whole(m.buffers)),
      fact("Memory", inBytes(m.bytes), root.bytes ? m.bytes / root.bytes : undefined),
      traced && fact("FLOPs", brief(m.flops), root.flops ? m.flops / root.flops : undefined),
      traced && fact("Outputs", inBytes(m.outputs)),
      fact("Mode", m.mode)),
    m.calls.length > 0 && html("section", null, html("h3", null, m.calls.length > 1 ? `${m.calls.length} calls` : "Call"), html("ul", { class: "calls" }, m.calls.slice(0, 20).map(callLine))),
    traced && !m.calls.length && m.shared === null && !m.children.length && html("p", { class: "muted" }, "This call of the model did not call it."),
    m.arrays.length > 0 && html("section", null, html("h3", null, "Arrays"), m.arrays.map(a => arrayCard(m, a))),
    m.children.length > 0 && value(m) > 0 && html("section", null, html("h3", null, `${METRICS[metric].label} by part`), bars(m.children.filter(c => value(c) && c.shared === null).sort((a, b) => value(b) - value(a)).slice(0, 16), c => c.name)),
    below.length > 1 && html("section", null, html("h3", null, `Layers with the most ${METRICS[metric].label}`), bars(below.slice(0, 10), x => x.path)),
  ];
  $("detail-part").replaceChildren(...parts.filter(Boolean));
}

// ------------------------------------------------------------------------------------------------
// Data flow

const pen = document.createElement("canvas").getContext("2d");
const FONT = '"Inter", system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
function wide(text, font) { pen.font = `${font} ${FONT}`; return pen.measureText(text).width; }
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function nameOf(number) {
  const c = calls[number];
  if (c.module === null) return c.cls;
  const m = modules[c.module];
  const around = c.parent === null ? null : calls[c.parent].module;
  const base = around === null ? "" : modules[around].path;
  return m.path.startsWith(`${base}.`) ? m.path.slice(base.length + 1) : m.path || m.cls;
}

// What is drawn for a call: its size, and if it is open, what lies in it.
function boxOf(number, root = false) {
  const c = calls[number], again = c.module === null ? 1 : modules[c.module].calls.length;
  const which = again > 1 ? ` (call ${modules[c.module].calls.indexOf(Number(number)) + 1} of ${again})` : "";
  const b = { id: String(number), kind: "call", call: c, number, lines: [nameOf(number), c.cls, c.output].map(t => cut(t, 44)), which,
    foldable: c.children.length > 0, open: c.children.length > 0 && openCalls.has(String(number)), in: 0, out: 0 };
  if (root) b.lines.splice(0, 2, c.cls, b.open ? "" : "the model");
  b.head = b.open ? 34 : 58;
  const beside = wide(b.lines[0], "600 13px") + wide(b.lines[1], "12px") + 62 + (which ? 70 : 0);
  b.w = b.open ? beside : Math.max(96, wide(b.lines[0], "600 13px") + (b.foldable ? 44 : 24) + (which ? 20 : 0), wide(b.lines[1], "12px") + 24, wide(b.lines[2], "11px") + 24);
  b.h = b.head;
  if (b.open) inside(b, root);
  return b;
}

function stackOf(members) {
  const b = boxOf(members[0]);
  b.open = false;
  b.id = `s${members[0]}`;
  b.members = members;
  b.foldable = true;
  b.lines[0] = `${nameOf(members[0])} … ${nameOf(members[members.length - 1])}`;
  b.lines[1] = `${b.lines[1]} × ${members.length}`;
  b.head = b.h = 58;
  b.w = Math.max(110, wide(b.lines[0], "600 13px") + 44, wide(b.lines[1], "12px") + 24, wide(b.lines[2], "11px") + 24);
  return b;
}

function inside(b, root) {
  const c = b.call, standsFor = new Map();
  const nodes = [];
  const end = (id, text) => {
    const label = root ? cut(text, 60) : "";
    nodes.push({ id, kind: "end", label, w: root ? wide(label, "12px") + 28 : 12, h: root ? 26 : 12 });
  };
  end("in", c.inputs || "no inputs");
  for (const members of c.stacks) {
    if (openStacks.has(members[0])) continue;
    for (const n of members) standsFor.set(String(n), `s${members[0]}`);
  }
  const drawn = new Set();
  for (const n of c.children) {
    const id = standsFor.get(String(n)) ?? String(n);
    if (drawn.has(id)) continue;
    drawn.add(id);
    nodes.push(id === String(n) ? boxOf(n) : stackOf(c.stacks.find(s => `s${s[0]}` === id)));
  }
  for (const [id, sign] of Object.entries(c.operations)) {
    const label = cut(sign, 24);
    nodes.push({ id, kind: "operation", label, w: label.length === 1 ? 24 : wide(label, "12px") + 20, h: 24 });
  }
  end("out", c.output);
  const shapes = new Map();
  for (const [from, to, shape] of c.edges) {
    const pair = [standsFor.get(String(from)) ?? String(from), standsFor.get(String(to)) ?? String(to)];
    if (pair[0] !== pair[1]) shapes.set(pair.join("\n"), { pair, shape });
  }
  const list = [...shapes.values()];
  const size = layout(nodes, list.map(e => e.pair));
  b.nodes = nodes;
  b.edges = list.filter(e => nodes.some(n => n.id === e.pair[0]) && nodes.some(n => n.id === e.pair[1]))
    .map((e, i) => ({ ...e, route: size.routes[i] }));
  const w = Math.max(b.w, size.w + 36);
  b.inset = (w - size.w) / 2;
  b.w = w;
  b.h = b.head + size.h + 18;
  const at = id => nodes.find(n => n.id === id);
  b.in = at("in").x + b.inset - w / 2;
  b.out = at("out").x + b.inset - w / 2;
}

function pathOf(route, from, to) {
  const points = route.map(([x, y, h], i) => {
    if (i === 0) return [[x + (from.out ?? 0), y + h / 2]];
    if (i === route.length - 1) return [[x + (to.in ?? 0), y - h / 2 - 1]];
    return h > 2 ? [[x, y - h / 2], [x, y + h / 2]] : [[x, y]];
  }).flat();
  let d = `M${points[0].map(v => v.toFixed(1)).join(" ")}`;
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    const middle = (y0 + y1) / 2;
    d += `C${[x0, middle, x1, middle, x1, y1].map(v => v.toFixed(1)).join(" ")}`;
  }
  return d;
}

function toggle(b) {
  const where = place(b.id);
  if (b.members) openStacks.add(b.members[0]);
  else if (b.open) {
    openCalls.delete(b.id);
    for (const s of b.call.stacks) openStacks.delete(s[0]);
  } else openCalls.add(b.id);
  drawGraph(false);
  const now = place(b.id) ?? place(String(b.number));
  if (where && now) { view.x += where[0] - now[0]; view.y += where[1] - now[1]; applyView(); }
  focusBox(b.id) || focusBox(String(b.number));
  function place(id) {
    const box = drawnBoxes.get(id);
    return box && [view.x + view.k * (box.left + box.w / 2), view.y + view.k * box.top];
  }
}
const focusBox = id => { const g = drawnBoxes.get(id)?.element; g?.focus({ preventScroll: true }); return Boolean(g); };

const drawnBoxes = new Map();
function drawBox(b, left, top, depth) {
  b.left = left; b.top = top;
  drawnBoxes.set(b.id, b);
  const m = b.call.module === null ? null : modules[b.call.module];
  const part = (b.members ?? [b.number]).reduce((sum, n) => sum + (m ? share(modules[calls[n].module]) : 0), 0);
  const x = left + b.w / 2, wideBar = b.w - 16;
  const label = `${b.lines[0]}, ${b.lines[1]}, gives ${b.lines[2]}${b.which}`;
  const g = svg("g", { class: `box${b.open ? " open" : ""}${m ? "" : " foreign"}`, "data-module": m ? m.id : "", "data-call": b.id, tabindex: 0,
      role: "button", "aria-label": label, "aria-expanded": b.foldable ? String(b.open) : undefined, style: `${hue(b.call.cls)};--depth:${depth}` },
    svg("title", null, `${m ? title(m) : b.call.cls}${b.which}\n${b.call.inputs} → ${b.call.output}\n${brief(b.call.flops)} FLOPs${b.members ? " each" : ""}`));
  if (b.members) for (const shift of [8, 4]) g.append(svg("rect", { class: "behind", x: left + shift, y: top + shift, width: b.w, height: b.h, rx: 8 }));
  g.append(svg("rect", { class: "body", x: left, y: top, width: b.w, height: b.h, rx: b.open ? 12 : 8 }));
  if (b.open) {
    g.append(svg("text", { x: left + 14, y: top + 22 }, svg("tspan", { class: "name" }, b.lines[0]), svg("tspan", { class: "cls", dx: 8 }, b.lines[1]),
      b.which ? svg("tspan", { class: "cls", dx: 6 }, b.which.trim()) : ""));
  } else {
    g.append(svg("text", { class: "name", x: x - (b.foldable ? 8 : 0), y: top + 18, "text-anchor": "middle" }, b.lines[0]),
      svg("text", { class: "cls", x, y: top + 33, "text-anchor": "middle" }, b.lines[1]),
      svg("text", { class: "shape", x, y: top + 47, "text-anchor": "middle" }, b.lines[2]),
      svg("rect", { class: "share", x: left + 8, y: top + b.h - 5, width: part > 0 ? Math.max(2, wideBar * part) : 0, height: 2.5, rx: 1 }));
    if (b.which) g.append(svg("text", { class: "count", x: left + b.w - (b.foldable ? 30 : 8), y: top + 14, "text-anchor": "end" }, b.which.match(/\d+/)[0]));
  }
  if (m?.ill) g.append(svg("circle", { class: "ill", cx: left + b.w - 4, cy: top + 4, r: 5 }));
  if (b.foldable) {
    g.append(svg("g", { class: "fold", onclick: event => { event.stopPropagation(); toggle(b); } },
      svg("rect", { x: left + b.w - 28, y: top + 5, width: 22, height: 22, rx: 5 }),
      svg("path", { d: b.open ? `M${left + b.w - 21.5} ${top + 14}l4.5 5 4.5-5z` : `M${left + b.w - 19} ${top + 11.5}l5 4.5-5 4.5z` })));
  }
  g.addEventListener("click", event => { event.stopPropagation(); if (!moved && m) select(m, "graph"); });
  g.addEventListener("dblclick", event => { event.stopPropagation(); if (b.foldable) toggle(b); });
  g.addEventListener("keydown", event => {
    if (event.target !== g) return;
    const fits = { Enter: m && (() => select(m, "graph")), " ": b.foldable && (() => toggle(b)),
      ArrowRight: b.foldable && !b.open && (() => toggle(b)), ArrowLeft: b.open && (() => toggle(b)) }[event.key];
    if (fits) { event.preventDefault(); fits(); }
  });
  g.addEventListener("focus", () => intoView(b));
  b.element = g;
  $("scene").append(g);
  if (b.open) drawInside(b, left + b.inset, top + b.head, depth);
}

function drawInside(b, left, top, depth) {
  const at = new Map(b.nodes.map(n => [n.id, n]));
  const layer = svg("g", { class: "flow", transform: `translate(${left} ${top})` });
  for (const e of b.edges) {
    const line = svg("path", { class: "edge", "marker-end": "url(#arrow)", d: pathOf(e.route, at.get(e.pair[0]), at.get(e.pair[1])) }, svg("title", null, e.shape));
    line.dataset.ends = e.pair.join(" ");
    layer.append(line);
  }
  $("scene").append(layer);
  for (const n of b.nodes) {
    const x = left + n.x, y = top + n.y;
    if (n.kind === "call") drawBox(n, x - n.w / 2, y - n.h / 2, depth + 1);
    else $("scene").append(svg("g", { class: n.kind },
      n.kind === "end" && !n.label ? svg("circle", { cx: x, cy: y, r: 4 }) : svg("rect", { x: x - n.w / 2, y: y - n.h / 2, width: n.w, height: n.h, rx: 13 }),
      n.label ? svg("text", { x, y: y + 4, "text-anchor": "middle" }, n.label) : ""));
  }
  for (const e of b.edges) for (const end of e.pair) {
    const element = at.get(end)?.element;
    if (!element) continue;
    const line = [...layer.children].find(l => l.dataset.ends === e.pair.join(" "));
    for (const [name, lit] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
      element.addEventListener(name, () => {
        line.classList.toggle("lit", lit);
        line.setAttribute("marker-end", lit ? "url(#arrow-lit)" : "url(#arrow)");
      });
    }
  }
}

const view = { x: 0, y: 0, k: 1, w: 1, h: 1 };
function applyView() { $("scene").setAttribute("transform", `translate(${view.x.toFixed(1)} ${view.y.toFixed(1)}) scale(${view.k.toFixed(4)})`); }
function fit(all = false) {
  const { width, height } = $("graph").getBoundingClientRect();
  const k = Math.min((width - 24) / view.w, (height - 24) / view.h, 1);
  view.k = all ? k : Math.max(k, Math.min(0.62, (width - 16) / view.w));
  view.x = (width - view.k * view.w) / 2;
  view.y = Math.max(12, (height - view.k * view.h) / 2);
  applyView();
}
function zoom(by, x, y) {
  const k = Math.min(4, Math.max(0.03, view.k * by));
  view.x = x - ((x - view.x) * k) / view.k;
  view.y = y - ((y - view.y) * k) / view.k;
  view.k = k;
  applyView();
}
function intoView(b) {
  const { width, height } = $("graph").getBoundingClientRect();
  const [l, t] = [view.x + view.k * b.left, view.y + view.k * b.top];
  const [r, d] = [l + view.k * b.w, t + view.k * b.h];
  if (r < 40 || l > width - 40) view.x += width / 2 - (l + r) / 2;
  if (t < 0 || t > height - 40 || (d > height && view.k * b.h < height)) view.y += Math.min(80, height / 3) - t;
  applyView();
}

function drawGraph(fitting = true) {
  if (!traced) {
    $("graph").style.display = "none";
    $("no-graph").hidden = false;
    $("no-graph").textContent = "Give nn.explore the inputs of a call, and here is what flows between the modules.";
    return;
  }
  $("scene").replaceChildren();
  drawnBoxes.clear();
  const root = boxOf(0, true);
  view.w = root.w;
  view.h = root.h;
  drawBox(root, 0, 0, 0);
  if (fitting) fit();
  markGraph();
}

// Open what leads to a module, and bring it into view.
function reveal(m) {
  if (!traced || !$("graph").getBoundingClientRect().width) return;
  const first = m.calls[0] ?? (m.shared === null ? m.children : []).flatMap(c => c.calls)[0];
  if (first === undefined) return;
  let changed = false;
  for (let c = calls[first].parent; c !== null; c = calls[c].parent) if (!openCalls.has(String(c))) { openCalls.add(String(c)); changed = true; }
  const within = n => { const p = calls[n].parent; return p === null ? [] : [n, ...within(p)]; };
  for (const n of within(first)) {
    for (const s of calls[calls[n].parent].stacks) if (s.includes(n) && !openStacks.has(s[0]) && s[0] !== n) { openStacks.add(s[0]); changed = true; }
  }
  if (changed) drawGraph(false);
  const box = drawnBoxes.get(String(first)) ?? drawnBoxes.get(`s${first}`);
  if (box) intoView(box);
}

// Mark the boxes of the selected module; where it is folded away, the box that it is in.
function markGraph() {
  const own = selected.shared === null ? selected : byPath.get(selected.shared);
  const around = new Set(ancestors(own));
  for (const b of drawnBoxes.values()) {
    const here = (b.members ?? [b.number]).map(n => modules[calls[n].module]);
    b.element.classList.toggle("selected", here.includes(own));
    b.element.classList.toggle("holds", !b.open && !here.includes(own) && here.some(m => around.has(m)));
  }
}

const fingers = new Map();
let moved = false;
$("graph").addEventListener("pointerdown", event => { fingers.set(event.pointerId, [event.clientX, event.clientY]); moved = false; });
$("graph").addEventListener("pointermove", event => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const now = [event.clientX, event.clientY];
  if (!moved && Math.hypot(now[0] - before[0], now[1] - before[1]) < 4) return;
  if (!moved) $("graph").setPointerCapture(event.pointerId);
  moved = true;
  if (fingers.size === 1) { view.x += now[0] - before[0]; view.y += now[1] - before[1]; applyView(); }
  else {
    const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
    const area = $("graph").getBoundingClientRect();
    const apart = p => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
    zoom(apart(now) / apart(before), (now[0] + other[0]) / 2 - area.left, (now[1] + other[1]) / 2 - area.top);
  }
  fingers.set(event.pointerId, now);
});
for (const name of ["pointerup", "pointercancel"]) $("graph").addEventListener(name, event => fingers.delete(event.pointerId));
$("graph").addEventListener("wheel", event => {
  event.preventDefault();
  const area = $("graph").getBoundingClientRect();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), event.clientX - area.left, event.clientY - area.top);
}, { passive: false });
const middle = by => { const a = $("graph").getBoundingClientRect(); zoom(by, a.width / 2, a.height / 2); };
$("zoom-in").addEventListener("click", () => middle(1.3));
$("zoom-out").addEventListener("click", () => middle(1 / 1.3));
$("fit").addEventListener("click", () => fit(true));

// Open as much as can be read at once, the containers with most in them first, those of one kind together.
function openSome(most = 16) {
  if (!traced) return;
  const inStack = n => calls[calls[n].parent].stacks.some(s => s.includes(n));
  const count = n => { const c = calls[n]; return c.children.length - c.stacks.reduce((x, s) => x + s.length - 1, 0); };
  const kinds = n => Map.groupBy(calls[n].children.filter(x => calls[x].children.length && !inStack(x)), x => calls[x].cls).values();
  const waiting = [...kinds(0)];
  let shown = count(0);
  while (waiting.length) {
    const flops = kind => kind.reduce((sum, n) => sum + calls[n].flops, 0);
    waiting.sort((a, b) => flops(b) - flops(a));
    const kind = waiting.shift();
    const more = kind.reduce((sum, n) => sum + count(n), 0);
    if (shown + more > most) continue;
    shown += more;
    for (const n of kind) { openCalls.add(String(n)); waiting.push(...kinds(n)); }
  }
}

// ------------------------------------------------------------------------------------------------
// Start

function start() {
  const root = modules[0];
  $("title").textContent = root.cls;
  const total = (name, text) => html("div", null, html("dt", null, name), html("dd", null, text));
  $("totals").append(total("parameters", whole(root.parameters)), total("memory", inBytes(root.bytes)),
    ...(traced ? [total("FLOPs a call", brief(root.flops)), total("outputs", inBytes(root.outputs))] : []), total("modules", whole(new Set(modules.map(m => m.shared ?? m.path)).size)));
  for (const [name, m] of Object.entries(METRICS)) $("metric").append(html("option", { value: name, selected: name === metric }, m.label));
  $("metric").addEventListener("change", event => { metric = event.target.value; drawTree(); drawDetail(); drawGraph(false); });
  const ill = modules.filter(m => m.bad);
  if (ill.length) {
    $("alarm").hidden = false;
    $("alarm").append(`${ill.length} ${ill.length > 1 ? "modules hold" : "module holds"} NaN or infinite numbers: `,
      ...ill.slice(0, 5).flatMap((m, i) => [i ? ", " : "", link(m)]), ill.length > 5 ? " …" : "");
  }
  $("theme").addEventListener("click", () => {
    const style = document.documentElement.style;
    const dark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    style.colorScheme = dark ? "light" : "dark";
  });
  for (const tab of $("tabs").children) tab.addEventListener("click", () => show(tab.dataset.part));
  addEventListener("resize", () => fit());
  // The first levels, as long as the list stays short.
  for (let i = 0; i < modules.length && opened.size < 40; i++) {
    if (ancestors(modules[i]).length < 2 && modules[i].children.length <= 40) opened.add(i);
  }
  openSome();
  drawGraph();
  select(byPath.get(decodeURIComponent(location.hash.slice(1))) ?? root);
}
start();
