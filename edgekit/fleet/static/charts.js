// Live charts of one device: uPlot over /api/v1 series, with the newest values as text beside them.
const root = document.getElementById("charts");
const figures = [...root.querySelectorAll("figure")];
const dashes = [[], [6, 3], [2, 3]];
const tableRows = 12;
const gapFactor = 2.5;
let minutes = 10;
let isLoading = false;
let range = [0, 0];

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function options(figure, width) {
  const labels = figure.dataset.labels.split(",");
  const times = (_plot, splits, _axis, _space, step) => splits.map((time) => clock(time, step));
  const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
  const series = labels.map((label, i) => ({
    label, stroke: color(`--series-${i + 1}`), width: 2, dash: dashes[i], points: { show: false }, spanGaps: false,
    value: (_plot, value) => (value == null ? "–" : `${value.toPrecision(3)} ${figure.dataset.unit}`),
  }));
  return {
    width, height: 200, series: [{}, ...series], axes: [{ ...axis, values: times }, { ...axis, size: 56 }],
    scales: { x: { range: () => range }, y: { range: (_plot, low, high) => [0, Math.max(high * 1.1, 1e-6)] } }, legend: { show: labels.length > 1, live: true },
  };
}

// Hours in the reader's way; the day where a step is as long as that.
function clock(time, step = 1) {
  const date = new Date(time * 1000);
  if (step >= 43200) return date.toLocaleDateString([], { day: "numeric", month: "short" });
  const parts = { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(step < 60 ? { second: "2-digit" } : {}) };
  return date.toLocaleTimeString([], parts);
}

// Where windows are missing the line breaks: a null after the last one before the gap. What is a gap depends on the steps around
// it, since windows from a device's backlog may be coarser than live ones.
function withGaps(times) {
  const step = times.map((time, i) => (i ? time - times[i - 1] : 0));
  const isGap = (i) => i > 0 && step[i] > gapFactor * Math.max(step[i - 1] || 0, step[i + 1] || 0) && times.length > 2;
  return times.flatMap((time, i) => (isGap(i) ? [times[i - 1] + 1, time] : [time]));
}

function table(series) {
  const times = withGaps([...new Set(series.flatMap((item) => item.points.map((point) => point[0])))].sort((a, b) => a - b));
  const place = new Map(times.map((time, i) => [time, i]));
  const columns = series.map((item) => {
    const column = new Array(times.length).fill(null);
    for (const [time, value] of item.points) column[place.get(time)] = value;
    return column;
  });
  return [times.map((time) => time / 1000), ...columns];
}

function say(figure, series) {
  const labels = figure.dataset.labels.split(",");
  const parts = series.map((item, i) => {
    const last = item.points.at(-1)?.[1];
    return last == null ? null : `${labels.length > 1 ? `${labels[i]} ` : ""}${last.toPrecision(3)} ${figure.dataset.unit}`;
  });
  figure.querySelector(".now").textContent = parts.filter(Boolean).join(", ") || "no value yet";
  const last = series.at(-1).points.map((point) => point[1]).filter((value) => value != null);
  const highest = last.reduce((most, value) => Math.max(most, value), -Infinity);
  const name = labels.length > 1 ? `${labels.at(-1)} ` : "";
  figure.querySelector(".highest").textContent = last.length ? `; ${name}up to ${highest.toPrecision(3)} ${figure.dataset.unit} in this time` : "";
}

// The same figures for those who cannot see a line: the newest first, made when it is opened.
function fill(figure) {
  const details = figure.querySelector("details");
  if (!details.open || !figure.points) return;
  const [times, ...columns] = figure.points;
  const labels = ["time", ...figure.dataset.labels.split(",").map((label) => `${label}, ${figure.dataset.unit}`)];
  const rows = times.map((_time, i) => i).filter((i) => columns.some((column) => column[i] != null)).slice(-tableRows).reverse();
  const row = (cells, tag) => {
    const made = document.createElement("tr");
    made.append(...cells.map((text, i) => Object.assign(document.createElement(tag), { textContent: text, className: i ? "right" : "" })));
    return made;
  };
  const cells = (i) => [clock(times[i]), ...columns.map((column) => (column[i] == null ? "–" : column[i].toPrecision(3)))];
  const head = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(row(labels, "th"));
  body.append(...rows.map((i) => row(cells(i), "td")));
  figure.querySelector("details table").replaceChildren(head, body);
}

function draw(figure, data) {
  const plot = figure.querySelector(".plot");
  const width = plot.clientWidth;
  if (!figure.chart || figure.chart.width !== width) {
    figure.chart?.destroy();
    figure.chart = new uPlot(options(figure, width), data, plot);
  } else {
    figure.chart.setData(data);
  }
}

async function load() {
  if (isLoading) return;
  isLoading = true;
  try {
    const names = figures.map((figure) => figure.dataset.metrics).join(",");
    const since = Date.now() - minutes * 60000;
    const step = minutes > 60 ? Math.floor((minutes * 60000) / 500) : 0;
    range = [since / 1000, Date.now() / 1000];
    const answer = await fetch(`${root.dataset.series}?metric=${names}&since=${since}&step=${step}`);
    if (!answer.ok) return;
    const all = new Map((await answer.json()).map((series) => [series.metric, series]));
    for (const figure of figures) {
      const series = figure.dataset.metrics.split(",").map((name) => all.get(name));
      const data = table(series);
      figure.points = data;
      if (data[0].length) draw(figure, data);
      say(figure, series);
      fill(figure);
    }
  } finally {
    isLoading = false;
  }
}

for (const figure of figures) figure.querySelector("details").addEventListener("toggle", () => fill(figure));

for (const button of document.querySelectorAll("[data-minutes]")) {
  button.addEventListener("click", () => {
    minutes = Number(button.dataset.minutes);
    for (const other of document.querySelectorAll("[data-minutes]")) other.setAttribute("aria-pressed", String(other === button));
    load();
  });
}

function redraw() {
  for (const figure of figures) { figure.chart?.destroy(); figure.chart = null; }
  load();
}

let resized = 0;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(redraw, 150); });
document.addEventListener("edgekit-theme", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.addEventListener("edgekit-change", load);
load();
