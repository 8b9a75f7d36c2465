// Charts as SVG, drawn from the table beside each: what is in the picture is in the table, and nothing else.
// A column's data-role says how it is drawn: line, low and high (a band), limit, bar, ghost (the outline of what is compared with).
const NS = "http://www.w3.org/2000/svg";
const dashes = ["", "7 3", "2 3", "9 3 2 3"];
const tableRows = 60;
const gapFactor = 2.5;
const pad = { left: 46, right: 10, top: 8, bottom: 22 };
const drawn = new WeakMap();

function node(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export function show(value, unit = "") {
  if (value == null) return "–";
  if (unit === "%") return `${trim(100 * value)}\u202f%`;
  if (unit === "percent") return `${trim(value)}\u202f%`;
  return unit ? `${trim(value)}\u202f${unit}` : trim(value);
}

function trim(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en").replaceAll(",", "\u202f");
  return String(Number(value.toPrecision(3)));
}

// Hours in the reader's way; the day where a step is as long as that.
function clock(ms, step) {
  const date = new Date(ms);
  if (step >= 43200e3) return date.toLocaleDateString([], { day: "numeric", month: "short" });
  return date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(step < 60e3 ? { second: "2-digit" } : {}) });
}

// ---------------------------------------------------------------- data

function read(figure) {
  const heads = [...figure.querySelectorAll(".twin thead th")].slice(1);
  const rows = [...figure.querySelectorAll(".twin tbody tr")];
  const isTime = figure.dataset.x === "time";
  const number = (cell) => (cell?.dataset.v === undefined || cell.dataset.v === "" ? null : Number(cell.dataset.v));
  return {
    x: rows.map((row) => (isTime ? Number(row.cells[0].dataset.v) : row.cells[0].textContent.trim())),
    columns: heads.map((head, i) => ({ name: head.dataset.name, role: head.dataset.role, values: rows.map((row) => number(row.cells[i + 1])) })),
  };
}

// Where windows are missing the line breaks; what a gap is depends on the steps around it.
function pieces(x, values) {
  const known = x.map((_, i) => i).filter((i) => values[i] != null);
  const found = [];
  for (let at = 0; at < known.length; at++) {
    const step = at ? x[known[at]] - x[known[at - 1]] : 0;
    const beside = Math.max(at > 1 ? x[known[at - 1]] - x[known[at - 2]] : 0, at + 1 < known.length ? x[known[at + 1]] - x[known[at]] : 0);
    if (!at || (beside && step > gapFactor * beside)) found.push([]);
    found.at(-1).push(known[at]);
  }
  return found;
}

function niceStep(span, count) {
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}

function timeStep(span, count) {
  const steps = [1, 5, 10, 30, 60, 300, 600, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000].map((s) => s * 1000);
  return steps.find((step) => span / step <= count) || 2592000e3 * Math.ceil(span / 2592000e3 / count);
}

// ---------------------------------------------------------------- drawing

function yScale(columns, height, isShare) {
  const all = columns.flatMap((column) => column.values).filter((value) => value != null && Number.isFinite(value));
  let low = Math.min(0, ...all);
  let high = Math.max(...all, low + 1e-9);
  if (isShare && high > 0.5 && Math.min(...all) > 0.4) low = Math.max(0, Math.floor((Math.min(...all) - 0.03) * 20) / 20);
  if (low < 0 && -low < 0.04 * high) low = 0;
  const step = niceStep(high - low || 1, Math.max(2, Math.floor(height / 42)));
  high = isShare && high <= 1 ? Math.min(Math.ceil((high + step * 0.15) / step) * step, 1) : Math.ceil((high + (high - low) * 0.04) / step) * step;
  low = Math.floor(low / step) * step;
  const inner = height - pad.top - pad.bottom;
  const ticks = [];
  for (let tick = low; tick <= high + step / 1e6; tick += step) ticks.push(Math.abs(tick) < step / 1e6 ? 0 : tick);
  return { at: (value) => pad.top + inner - ((value - low) / (high - low)) * inner, ticks, zero: low };
}

function frame(svg, scale, width, height, unit) {
  for (const tick of scale.ticks) {
    const y = scale.at(tick).toFixed(1);
    svg.append(node("line", { x1: pad.left, x2: width - pad.right, y1: y, y2: y, class: tick === scale.zero ? "axis" : "grid" }));
    svg.append(node("text", { x: pad.left - 6, y: Number(y) + 4, "text-anchor": "end" }, show(tick, unit === "%" ? "%" : "")));
  }
  svg.append(node("line", { x1: pad.left, x2: width - pad.right, y1: height - pad.bottom, y2: height - pad.bottom, class: "axis" }));
}

function drawLines(svg, data, width, height, unit, range) {
  const scale = yScale(data.columns, height, unit === "%");
  const [first, last] = range || [data.x[0], data.x.at(-1)];
  const span = last - first || 1;
  const inner = width - pad.left - pad.right;
  const xAt = (ms) => pad.left + ((ms - first) / span) * inner;
  frame(svg, scale, width, height, unit);
  const step = timeStep(span, Math.max(2, Math.floor(inner / 78)));
  const offset = step >= 3600e3 ? new Date(first).getTimezoneOffset() * 60e3 : 0;
  for (let tick = Math.ceil((first - offset) / step) * step + offset; tick <= last; tick += step) {
    svg.append(node("line", { x1: xAt(tick), x2: xAt(tick), y1: height - pad.bottom, y2: height - pad.bottom + 4, class: "axis" }));
    svg.append(node("text", { x: Math.min(Math.max(xAt(tick), pad.left + 12), width - pad.right - 16), y: height - 6, "text-anchor": "middle" }, clock(tick, step)));
  }
  const path = (values) => pieces(data.x, values).map((piece) => piece.map((i, at) => `${at ? "L" : "M"}${xAt(data.x[i]).toFixed(1)} ${scale.at(values[i]).toFixed(1)}`).join("") + (piece.length === 1 ? "h.01" : "")).join("");
  const low = data.columns.find((column) => column.role === "low");
  const high = data.columns.find((column) => column.role === "high");
  if (low && high) {
    for (const piece of pieces(data.x, low.values.map((value, i) => (high.values[i] == null ? null : value)))) {
      const up = piece.map((i) => `${xAt(data.x[i]).toFixed(1)} ${scale.at(high.values[i]).toFixed(1)}`);
      const down = piece.map((i) => `${xAt(data.x[i]).toFixed(1)} ${scale.at(low.values[i]).toFixed(1)}`).reverse();
      svg.append(node("path", { d: `M${[...up, ...down].join("L")}Z`, class: "band" }));
    }
  }
  let index = 0;
  for (const column of data.columns) {
    if (column.role === "limit") svg.append(node("path", { d: path(column.values), class: "limit" }));
    if (column.role !== "line") continue;
    index += 1;
    svg.append(node("path", { d: path(column.values), class: `line s${index}`, "stroke-dasharray": dashes[index - 1], "stroke-linecap": "round" }));
  }
  return { xs: data.x.map(xAt), yAt: scale.at, label: (i) => new Date(data.x[i]).toLocaleString() };
}

function drawBars(svg, data, width, height, unit) {
  const scale = yScale(data.columns, height, false);
  const inner = width - pad.left - pad.right;
  const slot = inner / Math.max(1, data.x.length);
  frame(svg, scale, width, height, unit);
  const every = Math.ceil(data.x.length / Math.max(1, Math.floor(inner / 74)));
  data.x.forEach((label, i) => {
    const x = pad.left + i * slot;
    for (const column of data.columns) {
      const value = column.values[i];
      if (value == null) continue;
      const y = scale.at(value);
      const h = Math.max(scale.at(0) - y, value > 0 ? 1 : 0);
      const inset = column.role === "ghost" ? 0.08 * slot : 0.16 * slot;
      svg.append(node("rect", { x: (x + inset).toFixed(1), width: Math.max(1, slot - 2 * inset).toFixed(1), y: y.toFixed(1), height: h.toFixed(1), class: column.role, rx: 1 }));
    }
    if (i % every === 0) svg.append(node("text", { x: (x + slot / 2).toFixed(1), y: height - 6, "text-anchor": "middle" }, label.length > 11 ? `${label.slice(0, 10)}…` : label));
  });
  return { xs: data.x.map((_, i) => pad.left + (i + 0.5) * slot), yAt: scale.at, label: (i) => data.x[i] };
}

function legend(figure, data) {
  const box = figure.querySelector(".legend");
  if (!box) return;
  const bands = data.columns.some((column) => column.role === "low");
  let index = 0;
  const items = [];
  for (const column of data.columns) {
    if (column.role === "low" || column.role === "high") continue;
    const sample = node("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
    if (column.role === "line") {
      index += 1;
      if (index === 1 && bands) sample.append(node("rect", { x: 0, y: 0, width: 22, height: 8, class: "band" }));
      sample.append(node("path", { d: "M0 4H22", class: `line s${index}`, "stroke-dasharray": dashes[index - 1] }));
    } else if (column.role === "limit") sample.append(node("path", { d: "M0 4H22", class: "limit" }));
    else sample.append(node("rect", { x: 4, y: 1, width: 14, height: 6, class: column.role }));
    const item = document.createElement("span");
    const value = document.createElement("b");
    value.dataset.of = data.columns.indexOf(column);
    item.append(sample, `${column.name} `, value);
    items.push(item);
  }
  const where = document.createElement("span");
  where.className = "at hidden";
  box.replaceChildren(...items, where);
}

// The values at a place: under the pointer, or where the arrow keys went; without one the newest.
function point(figure, i, isSpoken) {
  const state = drawn.get(figure);
  if (!state) return;
  const { data, unit, plot, svg, height } = state;
  const at = i ?? (figure.dataset.x === "time" ? data.x.length - 1 : -1);
  const words = figure.querySelector(".legend");
  for (const value of words.querySelectorAll("b")) value.textContent = at < 0 ? "" : show(data.columns[value.dataset.of].values[at], unit);
  words.querySelector(".at").textContent = i == null ? "" : plot.label(i);
  // it may grow and never shrinks: what is below would else move away from under a click
  words.style.minHeight = `${words.offsetHeight}px`;
  svg.querySelectorAll(".cursor, .dot, .when").forEach((item) => item.remove());
  if (i == null) return;
  const x = plot.xs[i];
  const isLeft = x < svg.width.baseVal.value / 2;
  svg.append(node("text", { x: x + (isLeft ? 5 : -5), y: pad.top + 4, "text-anchor": isLeft ? "start" : "end", class: "when" }, plot.label(i)));
  svg.append(node("line", { x1: x, x2: x, y1: pad.top, y2: height - pad.bottom, class: "cursor" }));
  let index = 0;
  for (const column of data.columns) {
    if (column.role !== "line") continue;
    index += 1;
    if (column.values[i] != null) svg.append(node("circle", { cx: x, cy: plot.yAt(column.values[i]), r: 3.2, class: `dot s${index}` }));
  }
  if (isSpoken) document.getElementById("said").textContent = words.textContent;
}

export function draw(figure, given) {
  const data = given || read(figure);
  const plot = figure.querySelector(".plot");
  const width = Math.floor(plot.clientWidth);
  if (!width) return;
  const key = JSON.stringify([width, figure.dataset.unit, data, figure.range]);
  if (drawn.get(figure)?.key === key) return;
  const words = figure.querySelector(".legend");
  if (words && drawn.get(figure)?.svg.width.baseVal.value !== width) words.style.minHeight = "";
  const height = plot.clientHeight || 190;
  const svg = node("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  if (data.x.length) {
    const made = (figure.dataset.kind === "bars" ? drawBars : drawLines)(svg, data, width, height, figure.dataset.unit, figure.range);
    plot.replaceChildren(svg);
    drawn.set(figure, { key, data, plot: made, unit: figure.dataset.unit, svg, height });
    legend(figure, data);
    point(figure, null, false);
  } else {
    svg.append(node("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing in this time"));
    plot.replaceChildren(svg);
    drawn.delete(figure);
  }
}

// ---------------------------------------------------------------- pointer, keys, export

function nearest(xs, x) {
  let best = 0;
  xs.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

function attend(figure) {
  const plot = figure.querySelector(".plot");
  let at = null;
  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-roledescription", "chart");
  plot.setAttribute("aria-label", `${figure.querySelector("figcaption").textContent.trim()} Arrow keys read the values.`);
  plot.addEventListener("pointermove", (event) => {
    const state = drawn.get(figure);
    if (state) point(figure, nearest(state.plot.xs, event.clientX - plot.getBoundingClientRect().left), false);
  });
  plot.addEventListener("pointerleave", () => point(figure, null, false));
  plot.addEventListener("blur", () => { at = null; point(figure, null, false); });
  plot.addEventListener("keydown", (event) => {
    const state = drawn.get(figure);
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!state || moves[event.key] === undefined) return;
    event.preventDefault();
    const last = state.data.x.length - 1;
    at = Math.min(last, Math.max(0, (at ?? (moves[event.key] > 0 ? -1 : last + 1)) + moves[event.key]));
    point(figure, at, true);
  });
}

// A picture that stands by itself: the styles that the page gives are written into it.
function standalone(figure) {
  const svg = figure.querySelector(".plot svg");
  const copy = svg.cloneNode(true);
  const names = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-size", "font-family", "opacity", "stroke-linejoin", "paint-order"];
  const from = [...svg.querySelectorAll("*")];
  [...copy.querySelectorAll("*")].forEach((item, i) => {
    const style = getComputedStyle(from[i]);
    for (const name of names) item.setAttribute(name, style.getPropertyValue(name));
  });
  const title = figure.querySelector("figcaption").textContent.trim().replace(/\s+/g, " ");
  const extra = 26;
  copy.setAttribute("height", svg.height.baseVal.value + extra);
  copy.setAttribute("viewBox", `0 -${extra} ${svg.width.baseVal.value} ${svg.height.baseVal.value + extra}`);
  const ground = getComputedStyle(figure).backgroundColor;
  copy.prepend(
    node("title", {}, title),
    node("rect", { x: 0, y: -extra, width: "100%", height: svg.height.baseVal.value + extra, fill: ground }),
    node("text", { x: 8, y: -9, fill: getComputedStyle(figure).color, "font-size": 13, "font-family": "system-ui, sans-serif" }, title.slice(0, 110)),
  );
  copy.setAttribute("xmlns", NS);
  return { text: new XMLSerializer().serializeToString(copy), width: svg.width.baseVal.value, height: svg.height.baseVal.value + extra, title };
}

function hand(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name, hidden: true });
  document.body.append(link);
  link.click();
  setTimeout(() => { URL.revokeObjectURL(link.href); link.remove(); }, 30e3);
}

async function save(figure, kind) {
  const made = standalone(figure);
  const name = `${(figure.id || made.title).replace(/[^\w-]+/g, "-").slice(0, 60)}.${kind}`;
  if (kind === "svg") return hand(new Blob([made.text], { type: "image/svg+xml" }), name);
  const image = new Image();
  const isReady = new Promise((resolve, reject) => { image.onload = resolve; image.onerror = reject; });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(made.text)}`;
  await isReady;
  const canvas = Object.assign(document.createElement("canvas"), { width: made.width * 2, height: made.height * 2 });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.drawImage(image, 0, 0);
  return canvas.toBlob((blob) => hand(blob, name));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-save]");
  if (button) save(button.closest("figure"), button.dataset.save);
});

// ---------------------------------------------------------------- charts that fetch their figures

const live = document.querySelector("[data-series]");
let minutes = Number(live?.dataset.minutes || 10);
let isLoading = false;

function fill(figure, data) {
  const body = figure.querySelector(".twin tbody");
  if (!figure.querySelector("details").open) return;
  const unit = figure.dataset.unit;
  const rows = data.x.map((_, i) => i).slice(-tableRows).reverse();
  body.replaceChildren(...rows.map((i) => {
    const row = document.createElement("tr");
    const cell = (tag, text, isRight) => Object.assign(document.createElement(tag), { textContent: text, className: isRight ? "right" : "nowrap" });
    row.append(cell("th", new Date(data.x[i]).toLocaleString(), false), ...data.columns.map((column) => cell("td", show(column.values[i], unit), true)));
    row.firstChild.scope = "row";
    return row;
  }));
}

function sentence(figure, data) {
  const unit = figure.dataset.unit;
  const now = data.columns.map((column) => ({ name: column.name, last: column.values.filter((value) => value != null).at(-1) })).filter((item) => item.last != null);
  const main = data.columns.at(-1);
  const highest = main ? main.values.reduce((most, value) => (value == null ? most : Math.max(most, value)), -Infinity) : -Infinity;
  figure.querySelector(".now").textContent = now.map((item) => `${data.columns.length > 1 ? `${item.name} ` : ""}${show(item.last, unit)}`).join(", ") || "no value yet";
  figure.querySelector(".most").textContent = Number.isFinite(highest) ? `; ${data.columns.length > 1 ? `${main.name} ` : ""}up to ${show(highest, unit)} in this time` : "";
}

async function load() {
  if (isLoading || !live) return;
  isLoading = true;
  try {
    const figures = [...live.querySelectorAll("figure[data-metrics]")];
    const names = figures.map((figure) => figure.dataset.metrics).join(",");
    const since = Date.now() - minutes * 60e3;
    const step = minutes > 60 ? Math.floor((minutes * 60e3) / 500) : 0;
    const answer = await fetch(`${live.dataset.series}?metric=${names}&since=${since}&step=${step}`);
    if (!answer.ok) return;
    const all = new Map((await answer.json()).map((series) => [series.metric, series.points]));
    for (const figure of figures) {
      const wanted = figure.dataset.metrics.split(",").map((name) => all.get(name) || []);
      const x = [...new Set(wanted.flatMap((points) => points.map((item) => item[0])))].sort((a, b) => a - b);
      const place = new Map(x.map((time, i) => [time, i]));
      const heads = [...figure.querySelectorAll(".twin thead th")].slice(1);
      const columns = wanted.map((points, i) => {
        const values = new Array(x.length).fill(null);
        for (const [time, value] of points) values[place.get(time)] = value;
        return { name: heads[i].dataset.name, role: "line", values };
      });
      figure.range = [since, Date.now()];
      figure.data = { x, columns };
      draw(figure, figure.data);
      sentence(figure, figure.data);
      fill(figure, figure.data);
    }
  } finally {
    isLoading = false;
  }
}

if (live) {
  live.addEventListener("click", (event) => {
    const button = event.target.closest("[data-range]");
    if (!button) return;
    minutes = Number(button.dataset.range);
    live.dataset.minutes = minutes;
    for (const other of live.querySelectorAll("[data-range]")) other.setAttribute("aria-pressed", String(other === button));
    const url = new URL(location.href);
    url.searchParams.set("minutes", minutes);
    history.replaceState(null, "", url);
    load();
  });
  live.addEventListener("toggle", (event) => {
    const figure = event.target.closest("figure");
    if (figure?.data) fill(figure, figure.data);
  }, true);
  let changed = 0;
  document.addEventListener("edgekit-change", () => { changed ||= setTimeout(() => { changed = 0; load(); }, 900); });
}

function drawAll() {
  for (const figure of document.querySelectorAll("figure.chart")) {
    if (!figure.dataset.attended) {
      figure.dataset.attended = "1";
      attend(figure);
    }
    if (!figure.dataset.metrics) draw(figure);
    else if (figure.data) draw(figure, figure.data);
  }
}

let resized = 0;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawAll, 120); });
document.addEventListener("edgekit-put", drawAll);
document.addEventListener("toggle", (event) => { if (event.target.open) requestAnimationFrame(drawAll); }, true);
drawAll();
load();
