// Which page is shown, and the look at the router once a second.

import { loadModels, startChat } from "./chat.js";
import { drawCharts } from "./charts.js";
import { apiKey, ask, byId, count, el, percent, setApiKey } from "./dom.js";
import { drawRequests, showRequest } from "./requests.js";
import { drawTopology } from "./topology.js";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;
const MAX_SAMPLES = 1800;
const PAGES = ["chat", "cluster", "requests", "request"];
const THEME = "baton-theme";

let samples = [];
let shownRequest = null;

function page() {
  const [name, id] = location.hash.slice(1).split("/");
  return { name: PAGES.includes(name) ? name : "chat", id: id ? decodeURIComponent(id) : "" };
}

function turn() {
  const { name, id } = page();
  for (const each of PAGES) byId(`page-${each}`).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    const isHere = link.hash === `#${name}` || (name === "request" && link.hash === "#requests");
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  shownRequest = null;
  if (name === "request") byId("request-detail").replaceChildren(el("p", { class: "hint" }, "Loading"));
  if (name === "request") openRequest(id);
  if (name === "chat") byId("chat-input").focus();
  look();
}

async function openRequest(id) {
  shownRequest = id;
  try {
    const isRunning = await showRequest(id);
    if (!isRunning && shownRequest === id) shownRequest = null;
  } catch (error) {
    shownRequest = null;
    byId("request-detail").replaceChildren(el("p", {}, error.message));
    if (error.status === 401) askKey();
  }
}

// One at a time; the next begins a period after this one has ended.
let isLooking = false;

async function look() {
  if (isLooking || document.hidden) return;
  isLooking = true;
  try {
    const after = samples.length ? samples.at(-1).number : 0;
    const state = await (await ask(`ui/data/state/${after}`, { signal: AbortSignal.timeout(TIMEOUT_MS) })).json();
    // Numbers that begin again are another router's.
    if (state.samples.length && state.samples[0].number <= after) samples = [];
    samples = [...samples, ...state.samples].slice(-MAX_SAMPLES);
    draw(state);
    await loadModels();
  } catch (error) {
    setStatus("bad", error.status === 401 ? "an API key is needed" : `no answer from the router: ${error.message}`);
    if (error.status === 401 && !apiKey()) askKey();
  }
  isLooking = false;
}

function draw(state) {
  const ready = state.topology.workers.filter((w) => w.state === "ready").length;
  const all = state.topology.workers.length;
  setStatus(ready && ready === all ? "good" : "bad", `${ready} of ${all} workers ready`);
  const { name } = page();
  if (name === "cluster") {
    drawTiles(state);
    drawTopology(state.topology);
    drawCharts(samples, state.targets);
  }
  if (name === "requests") drawRequests(state.requests);
  if (shownRequest) openRequest(shownRequest);
}

function drawTiles(state) {
  const newest = samples.at(-1) ?? {};
  const tiles = [["Running", count(state.num_running)], ["Held back", count(state.num_queued)], ["Requests", `${count(newest.arrived_per_s ?? 0)}/s`],
    ["Output", `${count(newest.tokens_per_s ?? 0)} tok/s`], ["Kept TTFT", percent(newest.ttft_attainment) || "–"], ["Kept ITL", percent(newest.itl_attainment) || "–"],
    ["Arrived since start", count(state.num_arrived)], ["Turned away", count(state.num_refused)]];
  byId("tiles").replaceChildren(...tiles.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

function setStatus(state, text) {
  const status = byId("status");
  status.dataset.state = state;
  // Said aloud when it changes, not every second.
  if (status.textContent !== text) status.textContent = text;
}

function askKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key-input").value = apiKey();
  dialog.returnValue = "";
  dialog.showModal();
}

function start() {
  const stored = localStorage.getItem(THEME);
  if (stored) document.documentElement.dataset.theme = stored;
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem(THEME, root.dataset.theme);
  });
  byId("key-button").addEventListener("click", askKey);
  byId("key-dialog").addEventListener("close", () => {
    if (byId("key-dialog").returnValue !== "use") return;
    setApiKey(byId("key-input").value.trim());
    look();
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
  startChat(askKey);
  addEventListener("hashchange", turn);
  addEventListener("visibilitychange", look);
  setInterval(look, PERIOD_MS);
  turn();
}

start();
