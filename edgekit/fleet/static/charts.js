// Live charts of one device: uPlot over /api/v1 series, with the newest values as text beside them.
const root = document.getElementById("charts");
const figures = [...root.querySelectorAll("figure")];
const dashes = [[], [6, 3], [2, 3]];
let minutes = 10;
let isLoading = false;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function options(figure, width) {
  const labels = figure.dataset.labels.split(",");
  const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
  const series = labels.map((label, i) => ({
    label, stroke: color(`--series-${i + 1}`), width: 2, dash: dashes[i], points: { show: false }, spanGaps: false,
    value: (_plot, value) => (value == null ? "–" : `${value.toPrecision(3)} ${figure.dataset.unit}`),
  }));
  return {
    width, height: 200, series: [{}, ...series], axes: [axis, { ...axis, size: 56 }],
    scales: { y: { range: (_plot, low, high) => [0, Math.max(high * 1.1, 1e-6)] } }, legend: { live: true },
  };
}

function table(series) {
  const times = [...new Set(series.flatMap((item) => item.points.map((point) => point[0])))].sort((a, b) => a - b);
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
    const answer = await fetch(`${root.dataset.series}?metric=${names}&since=${since}&step=${step}`);
    if (!answer.ok) return;
    const all = new Map((await answer.json()).map((series) => [series.metric, series]));
    for (const figure of figures) {
      const series = figure.dataset.metrics.split(",").map((name) => all.get(name));
      const data = table(series);
      if (data[0].length) draw(figure, data);
      say(figure, series);
    }
  } finally {
    isLoading = false;
  }
}

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
