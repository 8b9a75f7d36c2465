// Every page: keeps itself current, swaps its content in place, answers to the keyboard. Without it the pages work by themselves.
const main = document.getElementById("main");
const lamp = document.getElementById("live");
const said = document.getElementById("said");

// ---------------------------------------------------------------- times

const units = [[86400, "d"], [3600, "h"], [60, "min"]];

function ago(ms) {
  const seconds = Math.floor((Date.now() - ms) / 1000);
  const ahead = seconds < 0;
  for (const [size, unit] of units) {
    if (Math.abs(seconds) >= size) return phrase(Math.floor(Math.abs(seconds) / size), unit, ahead);
  }
  return phrase(Math.abs(seconds), "s", ahead);
}

function phrase(number, unit, ahead) {
  return ahead ? `in ${number}\u202f${unit}` : `${number}\u202f${unit} ago`;
}

function tick() {
  for (const element of document.querySelectorAll("time[data-ms]")) {
    const ms = Number(element.dataset.ms);
    const text = ago(ms);
    if (element.textContent !== text) element.textContent = text;
    if (!element.dataset.local) {
      element.dataset.local = "1";
      element.title = new Date(ms).toLocaleString();
    }
  }
}

// ---------------------------------------------------------------- putting new content in place

// What is the same stays the very same element: focus, scroll, open details and half-written text survive.
const own = new Set(["open", "data-local", "aria-busy"]);

function isSame(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && (a.id || a.dataset?.key || "") === (b.id || b.dataset?.key || "");
}

function morph(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (!own.has(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!own.has(name) && !fresh.hasAttribute(name) && !(name === "title" && old.dataset.local)) old.removeAttribute(name);
  }
  if (old.hasAttribute("data-keep")) return;
  if (old.tagName === "TIME" && old.dataset.ms) return;
  morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  const keyed = new Map();
  for (const child of old.children) if (child.id || child.dataset.key) keyed.set(child.id || child.dataset.key, child);
  let here = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const key = wanted.id || wanted.dataset?.key;
    const known = key ? keyed.get(key) : null;
    if (known && known !== here && isSame(known, wanted)) old.insertBefore(known, here);
    const match = known && isSame(known, wanted) ? known : here;
    if (match && isSame(match, wanted)) {
      morph(match, wanted);
      here = match.nextSibling;
    } else {
      old.insertBefore(wanted, here);
    }
  }
  while (here) {
    const next = here.nextSibling;
    here.remove();
    here = next;
  }
}

function put(html, isAsked) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const content = fresh.getElementById("main");
  if (!content) return false;
  morph(main, content);
  const nav = fresh.getElementById("nav");
  if (nav) morph(document.getElementById("nav"), nav);
  document.title = fresh.title;
  if (isAsked) takeValues(fresh);
  tick();
  tell();
  document.dispatchEvent(new CustomEvent("edgekit-put"));
  return true;
}

// What somebody asked for shows in the fields, too; what they type meanwhile is theirs.
function takeValues(fresh) {
  for (const field of fresh.querySelectorAll("#main form[method=get] :is(input, select)")) {
    const old = field.id && document.getElementById(field.id);
    if (old && old !== document.activeElement) old.value = field.value;
  }
}

// Say a figure that changed to those who cannot see it: politely, and only when it is another one.
const told = new Map();

function tell() {
  for (const element of document.querySelectorAll("[data-say]")) {
    const text = `${element.textContent.trim()} ${element.dataset.say}`;
    if (told.has(element.dataset.say) && told.get(element.dataset.say) !== text) said.textContent = text;
    told.set(element.dataset.say, text);
  }
}

// ---------------------------------------------------------------- asking for content

let asked = 0;
let isBusy = false;
let timer = 0;

async function load(url, isAsked) {
  const number = ++asked;
  isBusy = true;
  if (isAsked) main.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(url, { headers: { accept: "text/html" }, cache: "no-store" });
    if (answer.redirected && new URL(answer.url).pathname === "/login") return location.reload();
    const html = await answer.text();
    if (number !== asked) return false;
    return put(html, isAsked);
  } catch {
    return false;
  } finally {
    isBusy = false;
    main.removeAttribute("aria-busy");
  }
}

async function go(url, { isReplacing = false } = {}) {
  if (!(await load(url, true))) return location.assign(url);
  history[isReplacing ? "replaceState" : "pushState"](null, "", url);
  return undefined;
}

// At most one refresh in a page's own period, and none while the last one is under way.
function refresh() {
  if (timer || document.hidden) return;
  const period = Number(main.dataset.period || 1000);
  timer = setTimeout(() => {
    timer = 0;
    if (!isBusy) load(location.href, false);
  }, Math.random() * 150 + period - 1000 + 80);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-swap]");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  go(link.href);
});

function urlOf(form) {
  const values = [...new FormData(form)].filter(([, value]) => value !== "");
  const query = new URLSearchParams(values).toString();
  return form.getAttribute("action") + (query ? `?${query}` : "");
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method === "get" && form.hasAttribute("data-swap")) {
    event.preventDefault();
    go(urlOf(form));
  } else if (form.method === "post") {
    const button = event.submitter;
    if (button) setTimeout(() => { button.disabled = true; });
  }
});

let typing = 0;
document.addEventListener("input", (event) => {
  const form = event.target.form;
  if (!form?.hasAttribute("data-auto")) return;
  clearTimeout(typing);
  typing = setTimeout(() => go(urlOf(form), { isReplacing: true }), event.target.tagName === "SELECT" ? 0 : 300);
});
window.addEventListener("popstate", () => { load(location.href, true).then((is) => is || location.reload()); });

// ---------------------------------------------------------------- one event stream for all tabs of this browser

const channel = "BroadcastChannel" in window ? new BroadcastChannel("edgekit-live") : null;
let source = null;
let release = null;
let lastId = "";
let isWaiting = false;

function say(text, isLive) {
  if (!lamp) return;
  if (lamp.textContent !== text) lamp.textContent = text;
  lamp.classList.toggle("is-live", isLive);
}

function concerns(change) {
  const topics = (main.dataset.topics || "").split(" ");
  if (change.topics.some((topic) => topics.includes(topic))) return true;
  const device = main.dataset.device;
  if (device) return change.devices === "all" || change.devices.includes(device);
  return topics.includes("devices") && (change.devices === "all" || change.devices.length > 0);
}

function heard({ id, change, state }) {
  if (state) say(state, state === "live");
  if (id) lastId = id;
  if (!change || document.hidden) return;
  if (concerns(change)) {
    document.dispatchEvent(new CustomEvent("edgekit-change", { detail: change }));
    if (!main.hasAttribute("data-still")) refresh();
  }
}

function pass(message) {
  heard(message);
  channel?.postMessage(message);
}

function listen() {
  source = new EventSource(`/live${lastId ? `?after=${encodeURIComponent(lastId)}` : ""}`);
  source.onopen = () => pass({ state: "live" });
  source.onerror = () => pass({ state: "connection lost, trying again" });
  source.addEventListener("change", (event) => pass({ id: event.lastEventId, change: JSON.parse(event.data), state: "live" }));
}

function hush() {
  source?.close();
  source = null;
  release?.();
  release = null;
}

// The tab that holds the lock listens for all; a hidden tab gives it away.
function lead() {
  if (isWaiting || source || document.hidden) return;
  if (!navigator.locks || !channel) return listen();
  isWaiting = true;
  const stop = new AbortController();
  document.addEventListener("visibilitychange", () => stop.abort(), { once: true });
  navigator.locks
    .request("edgekit-live", { signal: stop.signal }, () => {
      isWaiting = false;
      if (document.hidden) return undefined;
      listen();
      return new Promise((resolve) => { release = resolve; });
    })
    .catch(() => { isWaiting = false; });
  channel.postMessage({ ask: true });
  say("live", true);
  return undefined;
}

if (channel) {
  channel.onmessage = ({ data }) => {
    if (!data.ask) heard(data);
    else if (source) channel.postMessage({ id: lastId, state: lamp?.textContent });
  };
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hush();
    say("paused", false);
  } else if (main?.dataset.topics || main?.dataset.device) {
    lead();
    refresh();
  }
});
window.addEventListener("pagehide", hush);
window.addEventListener("pageshow", (event) => { if (event.persisted && main?.dataset.topics) lead(); });

// ---------------------------------------------------------------- theme and keyboard

document.getElementById("theme")?.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("edgekit-theme", root.dataset.theme);
  document.dispatchEvent(new CustomEvent("edgekit-theme"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new CustomEvent("edgekit-theme")));

const places = { o: "/", d: "/devices", m: "/models", r: "/rollouts", a: "/alerts", g: "/registry", e: "/events", u: "/audit", s: "/settings" };
const help = document.getElementById("help");
const switchKeys = document.getElementById("keys-on");
let isAfterG = 0;

if (switchKeys) {
  switchKeys.checked = localStorage.getItem("edgekit-keys") !== "off";
  switchKeys.addEventListener("change", () => localStorage.setItem("edgekit-keys", switchKeys.checked ? "on" : "off"));
}
for (const button of document.querySelectorAll("[data-keys]")) button.addEventListener("click", () => help.showModal());

document.addEventListener("keydown", (event) => {
  if (event.metaKey || event.ctrlKey || event.altKey || event.defaultPrevented || localStorage.getItem("edgekit-keys") === "off") return;
  if (event.target.closest("input, textarea, select, [contenteditable], dialog")) return;
  if (Date.now() - isAfterG < 1200 && places[event.key]) {
    isAfterG = 0;
    location.assign(places[event.key]);
    return;
  }
  switch (event.key) {
    case "g": isAfterG = Date.now(); break;
    case "/": {
      const field = document.querySelector("input[type=search]");
      if (!field) return;
      event.preventDefault();
      field.focus();
      field.select();
      break;
    }
    case "?": help?.showModal(); break;
    case "t": document.getElementById("theme")?.click(); break;
    default:
  }
});

document.querySelector("#nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
setInterval(tick, 1000);
tick();
tell();
if (main?.dataset.topics || main?.dataset.device) lead();
else say("", false);
