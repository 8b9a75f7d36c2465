// Every device as one cell: thousands at a glance. The table beside it says the same in words.
const field = document.getElementById("field");
const canvas = field.querySelector("canvas");
const tip = field.querySelector(".tip");
const chunk = 500;
let cells = { states: "", sites: [] };
let names = new Map();
let cursor = -1;
let size = 8;
let columns = 1;
let isLoading = false;

function colors() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { 0: of("--idle-fill"), 1: of("--good-fill"), 2: of("--warn-fill"), 3: of("--bad-fill"), a: of("--series-1"), b: of("--series-2"), c: of("--series-3"), d: of("--series-4"), e: of("--idle-fill"), ink: of("--ink"), ground: of("--surface"), line: of("--line") };
}

function layout() {
  const width = canvas.clientWidth;
  const count = Math.max(1, cells.states.length);
  const isNarrow = width < 500;
  size = Math.max(isNarrow ? 4 : 5, Math.min(16, Math.floor(Math.sqrt((width * (isNarrow ? 300 : 260)) / count))));
  columns = Math.max(1, Math.floor(width / size));
  const height = Math.ceil(count / columns) * size;
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.setAttribute("height", Math.round(height * ratio));
  }
  return ratio;
}

function paint() {
  const ratio = layout();
  const paintbox = canvas.getContext("2d");
  const palette = colors();
  const gap = size > 6 ? 1.5 : 1;
  paintbox.setTransform(ratio, 0, 0, ratio, 0, 0);
  paintbox.clearRect(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < cells.states.length; i++) {
    const state = cells.states[i];
    const x = (i % columns) * size;
    const y = Math.floor(i / columns) * size;
    paintbox.fillStyle = palette[state];
    // What is not well differs in shape, too: offline is a frame, silent half a cell.
    if (state === "3" && size > 5) {
      paintbox.fillRect(x, y, size - gap, size - gap);
      paintbox.clearRect(x + 2, y + 2, size - gap - 4, size - gap - 4);
    } else if (state === "2" && size > 5) paintbox.fillRect(x, y + (size - gap) / 2, size - gap, (size - gap) / 2);
    else paintbox.fillRect(x, y, size - gap, size - gap);
  }
  if (cursor >= 0) {
    paintbox.strokeStyle = palette.ink;
    paintbox.lineWidth = 2;
    paintbox.strokeRect((cursor % columns) * size - 1, Math.floor(cursor / columns) * size - 1, size + 0.5, size + 0.5);
  }
}

async function load() {
  if (isLoading) return;
  isLoading = true;
  try {
    const answer = await fetch(`/grid?${field.dataset.query}`);
    if (!answer.ok) return;
    const fresh = await answer.json();
    if (fresh.stamp !== cells.stamp) names = new Map();
    cells = fresh;
    paint();
  } finally {
    isLoading = false;
  }
}

async function nameOf(i) {
  const first = Math.floor(i / chunk) * chunk;
  if (!names.has(first)) {
    names.set(first, fetch(`/grid/names?${field.dataset.query}&first=${first}&count=${chunk}`).then((answer) => (answer.ok ? answer.json() : [])));
  }
  return (await names.get(first))[i - first];
}

async function point(i) {
  cursor = i >= 0 && i < cells.states.length ? i : -1;
  paint();
  if (cursor < 0) {
    tip.textContent = tip.dataset.idle;
    return;
  }
  const asked = cursor;
  const name = await nameOf(asked);
  if (asked === cursor && name) tip.textContent = `${name}: ${cells.words[cells.states[asked]]}`;
}

function under(event) {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / size);
  return column < columns ? Math.floor((event.clientY - box.top) / size) * columns + column : -1;
}

async function open(i) {
  const name = i >= 0 && i < cells.states.length ? await nameOf(i) : null;
  if (name) location.assign(`/devices/${name.split("/").map(encodeURIComponent).join("/")}`);
}

canvas.addEventListener("pointermove", (event) => point(under(event)));
canvas.addEventListener("pointerleave", () => point(-1));
canvas.addEventListener("click", (event) => open(under(event)));
canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (event.key === "Enter") open(cursor);
  if (moves[event.key] === undefined) return;
  event.preventDefault();
  point(Math.min(cells.states.length - 1, Math.max(0, (cursor < 0 ? -1 : cursor) + moves[event.key])));
});
canvas.addEventListener("blur", () => point(-1));

let waiting = 0;
document.addEventListener("edgekit-change", () => { waiting ||= setTimeout(() => { waiting = 0; if (!document.hidden) load(); }, 2000); });
document.addEventListener("edgekit-put", () => { if (field.dataset.query !== field.dataset.shown) { field.dataset.shown = field.dataset.query; load(); } });
document.addEventListener("edgekit-theme", paint);
let resized = 0;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(paint, 120); });
field.dataset.shown = field.dataset.query;
load();
