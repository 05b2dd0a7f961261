// The list of requests, and one request as a waterfall.

import { ask, byId, bytes, count, el, ms, svg, table } from "./dom.js";

const COLOURS = { "queue in router": "router", "prefill queue": "faint", prefill: "prefill", "kv transfer": "transfer", decode: "decode" };
const BOX = { width: 900, left: 250, right: 70, row: 30, top: 26 };

export function drawRequests(requests) {
  const list = byId("request-list");
  const columns = [["Request"], ["Arrived"], ["State"], ["Prompt", true], ["Cached", true], ["Output", true], ["First token", true],
    ["Between tokens", true], ["Total", true], ["Workers"]];
  const focused = document.activeElement?.dataset?.request;
  list.replaceChildren(requests.length ? table("Newest first", columns, requests.map((r) => [
    el("a", { href: `#request/${encodeURIComponent(r.id)}`, "data-request": r.id }, shorten(r.id)),
    new Date(1000 * r.arrived_at_s).toLocaleTimeString(), r.state, count(r.prompt_tokens), count(r.cached_tokens), count(r.output_tokens),
    ms(r.ttft_ms), ms(r.itl_ms), ms(r.total_ms), r.workers.join(", ")])) : el("p", { class: "hint" }, "No requests yet. Send one on the page Chat."));
  // The list is drawn anew every second: who walks it by keyboard stays where they were.
  if (focused) list.querySelector(`[data-request="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

export async function showRequest(id) {
  const shown = await (await ask(`ui/data/requests/${encodeURIComponent(id)}`)).json();
  byId("request-title").textContent = `Time line of ${shown.request.id}`;
  byId("request-detail").replaceChildren(summary(shown), waterfall(shown), rowsTable(shown), notes(shown));
  return shown.request.is_running;
}

function summary({ request: r }) {
  const facts = [["State", r.state], ["Model", r.model], ["Prompt", `${count(r.prompt_tokens)} tokens, ${count(r.cached_tokens)} cached`],
    ["Output", `${count(r.output_tokens)} tokens`], ["First token", ms(r.ttft_ms)], ["Between tokens", ms(r.itl_ms)], ["Total", ms(r.total_ms)]];
  return el("dl", { class: "tiles" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value || "–"))));
}

function waterfall({ request, rows, first_token_ms: first }) {
  if (!rows.length) return el("p", { class: "hint" }, "Nothing has been reported yet.");
  const end = Math.max(request.total_ms, ...rows.map((row) => row.end_ms), 0.1);
  const height = BOX.top + rows.length * BOX.row + 8;
  const x = (at) => BOX.left + (BOX.width - BOX.left - BOX.right) * (at / end);
  const bars = rows.map((row, i) => {
    const y = BOX.top + i * BOX.row;
    const words = `${row.name} on ${row.place}: from ${ms(row.start_ms)} to ${ms(row.end_ms)}`;
    return svg("g", { class: `c-${COLOURS[row.name] ?? "router"}` },
      svg("text", { x: 4, y: y + 15 }, row.name),
      svg("text", { x: 110, y: y + 15, class: "faint" }, shorten(row.place, 20)),
      svg("rect", { class: "bar-shape", x: x(row.start_ms), y: y + 3, width: Math.max(1.5, x(row.end_ms) - x(row.start_ms)), height: 17, rx: 3 }, svg("title", {}, words)),
      svg("text", { x: x(row.end_ms) + 5, y: y + 15, class: "faint" }, ms(row.end_ms - row.start_ms)));
  });
  const marks = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
    svg("line", { class: "axis", x1: x(share * end), x2: x(share * end), y1: BOX.top - 4, y2: height }),
    svg("text", { class: "faint", x: x(share * end), y: 14, "text-anchor": "middle" }, ms(share * end))]);
  if (first !== null) marks.push(svg("line", { class: "first-token", x1: x(first), x2: x(first), y1: BOX.top - 4, y2: height }, svg("title", {}, `first token at ${ms(first)}`)));
  return el("figure", {}, el("figcaption", {}, "Where the time went"),
    svg("svg", { viewBox: `0 0 ${BOX.width} ${height}`, role: "img", "aria-label": "Waterfall of the request; the table below has the same figures", id: "waterfall" }, ...marks, ...bars),
    el("ul", { class: "legend" }, el("li", {}, first === null ? "no token yet" : `dashed line: first token at ${ms(first)}`)));
}

function rowsTable({ rows }) {
  const columns = [["What"], ["Where"], ["From", true], ["To", true], ["Took", true], ["Detail"]];
  return el("details", {}, el("summary", {}, "As a table"), el("div", { class: "scroll" }, table("Since the request arrived", columns, rows.map((row) => [
    row.name, row.place, ms(row.start_ms), ms(row.end_ms), ms(row.end_ms - row.start_ms), detail(row)]))));
}

function detail({ detail: d }) {
  const parts = [];
  if (d.engine_steps) parts.push(`${d.engine_steps} engine steps, ${ms(1000 * d.engine_seconds)} of them its own`);
  if (d.kv_reads) parts.push(`${bytes(d.kv_bytes)} in ${d.kv_reads} reads, ${ms(1000 * d.kv_transfer_exposed_seconds)} after the prompt was done`);
  return parts.join("; ");
}

function notes(shown) {
  const lines = [["Placement", shown.placement], ["Error", shown.error], ...shown.failures.map((text) => ["Given up", text]), ...shown.moves.map((text) => ["Move", text])];
  const given = lines.filter(([, text]) => text);
  return el("dl", {}, ...given.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
}

const shorten = (name, most = 30) => (name.length > most ? `${name.slice(0, most / 2 - 1)}…${name.slice(1 - most / 2)}` : name);
