// Two columns of workers, and KV that passes between them as moving lines.

import { bytes, byId, count, el, percent, svg, table } from "./dom.js";

const WIDTH = 900;
const NODE = { width: 270, height: 74, gap: 14 };
const MOVING_MS = 2500;
const MAX_DRAWN = 40;

const before = new Map();

export function drawTopology(topology) {
  const pools = ["prefill", "decode"].map((role) => topology.workers.filter((w) => w.role === role));
  byId("topology").replaceChildren(picture(pools, topology.edges));
  byId("workers").replaceChildren(workersTable(topology.workers));
  const tooMany = pools.some((pool) => pool.length > MAX_DRAWN);
  if (tooMany) byId("topology").append(el("p", { class: "hint" }, `The first ${MAX_DRAWN} workers of each pool are drawn; the table has all.`));
}

function picture(pools, edges) {
  const drawn = pools.map((pool) => pool.slice(0, MAX_DRAWN));
  const rows = Math.max(1, ...drawn.map((pool) => pool.length));
  const height = 34 + rows * (NODE.height + NODE.gap);
  const places = new Map();
  drawn.forEach((pool, column) => pool.forEach((worker, row) => places.set(worker.id, {
    x: column ? WIDTH - NODE.width - 1 : 1,
    y: 28 + row * (NODE.height + NODE.gap),
    column,
  })));
  const lines = edges.filter((e) => places.has(e.source) && places.has(e.target)).map((e) => line(e, places));
  const nodes = drawn.flat().map((worker) => node(worker, places.get(worker.id)));
  const titles = ["Prefill", "Decode"].map((name, i) =>
    svg("text", { x: i ? WIDTH - NODE.width : 2, y: 16, class: "faint" }, `${name} pool (${pools[i].length})`));
  const words = `${pools[0].length} prefill and ${pools[1].length} decode workers; ${edges.length} pairs have passed KV. The table below has the figures.`;
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": words }, ...titles, ...lines, ...nodes);
}

function line(edge, places) {
  const [from, to] = [places.get(edge.source), places.get(edge.target)];
  const key = `${edge.source} ${edge.target}`;
  const now = performance.now();
  const last = before.get(key);
  // What is there when the page opens is no movement.
  const movedAt = last === undefined ? -Infinity : edge.num_transfers > last.transfers ? now : last.movedAt;
  before.set(key, { transfers: edge.num_transfers, movedAt });
  const start = side(from, to.column >= from.column);
  const end = side(to, to.column < from.column || to.column === from.column);
  const middle = from.column === to.column ? Math.min(start.x + 90, WIDTH - 20) : (start.x + end.x) / 2;
  return svg("path", {
    class: now - movedAt < MOVING_MS ? "edge moving" : "edge",
    "stroke-width": (1 + Math.min(5, Math.log10(1 + edge.num_bytes / 1e6))).toFixed(1),
    d: `M${start.x} ${start.y} C${middle} ${start.y} ${middle} ${end.y} ${end.x} ${end.y}`,
  }, svg("title", {}, `${edge.source} to ${edge.target}: ${edge.num_transfers} transfers, ${bytes(edge.num_bytes)}`));
}

function side(place, isRight) {
  return { x: place.x + (isRight ? NODE.width : 0), y: place.y + NODE.height / 2 };
}

function node(worker, { x, y }) {
  const width = NODE.width - 24;
  const live = width * worker.kv_usage;
  return svg("g", { class: `node c-${worker.role}${worker.state === "ready" ? "" : " off"}`, transform: `translate(${x} ${y})` },
    svg("rect", { class: "box", width: NODE.width, height: NODE.height, rx: 8 }),
    svg("text", { x: 12, y: 20, "font-weight": 600 }, shorten(worker.id)),
    svg("text", { x: NODE.width - 12, y: 20, "text-anchor": "end", class: "faint" }, worker.state),
    svg("text", { x: 12, y: 40, class: "faint" }, `${worker.num_running} running, ${worker.num_waiting} waiting`),
    svg("text", { x: NODE.width - 12, y: 40, "text-anchor": "end", class: "faint" }, `KV ${percent(worker.kv_usage)}`),
    svg("rect", { class: "meter-back", x: 12, y: 52, width, height: 8, rx: 4 }),
    svg("rect", { class: "meter", x: 12, y: 52, width: live, height: 8, rx: 4 }),
    svg("rect", { class: "meter-cached", x: 12 + live, y: 52, width: Math.min(width - live, width * worker.kv_cached), height: 8, rx: 4 }),
    svg("title", {}, `${worker.id}: KV ${percent(worker.kv_usage)} live, ${percent(worker.kv_cached)} cached`));
}

function workersTable(workers) {
  const columns = [["Worker"], ["Pool"], ["State"], ["Running", true], ["Waiting", true], ["KV live", true], ["KV cached", true],
    ["Prompt tokens queued", true], ["Readers", true], ["KV on its way", true], ["Preemptions", true]];
  return table("Every worker that this router knows", columns, workers.map((w) => [
    w.id, w.role, w.state, count(w.num_running), count(w.num_waiting), percent(w.kv_usage), percent(w.kv_cached),
    count(w.queued_prefill_tokens), count(w.num_leases), count(w.num_reservations), count(w.num_preemptions)]));
}

const shorten = (name) => (name.length > 26 ? `${name.slice(0, 12)}…${name.slice(-12)}` : name);
