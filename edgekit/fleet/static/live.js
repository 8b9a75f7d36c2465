// One event stream a tab: when a device on this page changes, the page's fragment is fetched again and put in place.
const box = document.getElementById("live");
const link = document.getElementById("link");
let source = null;
let timer = 0;
let isFetching = false;

const units = [[86400, "d"], [3600, "h"], [60, "min"]];

function ago(ms) {
  const seconds = Math.max(0, Math.floor((Date.now() - ms) / 1000));
  for (const [size, unit] of units) if (seconds >= size) return `${Math.floor(seconds / size)}\u202f${unit} ago`;
  return `${seconds}\u202fs ago`;
}

function tick() {
  for (const element of document.querySelectorAll("time[data-ms]")) {
    const ms = Number(element.dataset.ms);
    element.textContent = ago(ms);
    element.title = new Date(ms).toLocaleString();
  }
}

function say(text, isLive) {
  if (link.textContent !== text) link.textContent = text;
  link.classList.toggle("is-live", isLive);
}

async function refresh() {
  timer = 0;
  if (isFetching || !box) return;
  isFetching = true;
  try {
    const answer = await fetch(box.dataset.fragment + location.search, { headers: { accept: "text/html" } });
    if (answer.ok) replace(await answer.text());
  } catch {
    say("connection lost", false);
  } finally {
    isFetching = false;
  }
}

// Put each part of the fragment in place; what is open stays open, what is scrolled stays scrolled, the focus stays where it is.
function replace(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const part of box.querySelectorAll("[data-part]")) {
    const other = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
    if (other) replacePart(part, other);
  }
  tick();
  tell();
}

// Say a figure that changed to those who cannot see it: politely, and only when it is another one.
const told = new Map();

function tell() {
  for (const element of document.querySelectorAll("[data-say]")) {
    const text = `${element.textContent} ${element.dataset.say}`;
    if (told.has(element.dataset.say) && told.get(element.dataset.say) !== text) document.getElementById("said").textContent = text;
    told.set(element.dataset.say, text);
  }
}

function replacePart(part, other) {
  const open = [...part.querySelectorAll("details")].map((item) => item.open);
  const scrolled = [...part.querySelectorAll(".scroll")].map((item) => item.scrollLeft);
  const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  part.replaceChildren(...other.childNodes);
  part.querySelectorAll("details").forEach((item, i) => { item.open = Boolean(open[i]); });
  part.querySelectorAll(".scroll").forEach((item, i) => { item.scrollLeft = scrolled[i] || 0; });
  if (focused) [...part.querySelectorAll("a")].find((item) => item.getAttribute("href") === focused)?.focus();
}

function changed(names) {
  const watch = box?.dataset.watch;
  if (!watch || (watch !== "all" && names !== "all" && !names.includes(watch))) return;
  document.dispatchEvent(new CustomEvent("edgekit-change"));
  if (!timer) timer = setTimeout(refresh, 100);
}

function connect() {
  if (source || document.hidden) return;
  source = new EventSource("/live");
  source.onopen = () => say("live", true);
  source.onerror = () => say("connection lost, trying again", false);
  source.addEventListener("change", (event) => changed(JSON.parse(event.data)));
}

function disconnect() {
  source?.close();
  source = null;
  say("paused", false);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) disconnect();
  else { connect(); refresh(); }
});
window.addEventListener("pagehide", disconnect);
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("edgekit-theme", root.dataset.theme);
  document.dispatchEvent(new CustomEvent("edgekit-theme"));
});
setInterval(tick, 1000);
tick();
tell();
if (box) connect();
else say("", false);
