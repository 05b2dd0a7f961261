// Charts of the last minutes, one figure each, with the newest value in words.

import { byId, count, el, ms, percent, svg } from "./dom.js";

const BOX = { width: 420, height: 150, left: 46, right: 8, top: 10, bottom: 20 };

// Each: title, how a value is said, its series [name, field, colour, dashed], where its target is.
const CHARTS = [
  ["Requests", (v) => `${count(v)}/s`, [["arrived", "arrived_per_s", "router"], ["kept all targets (goodput)", "kept_per_s", "decode"]]],
  ["Output tokens", (v) => `${count(v)}/s`, [["tokens", "tokens_per_s", "decode"]]],
  ["Kept their targets", percent, [["TTFT", "ttft_attainment", "prefill"], ["ITL", "itl_attainment", "decode"]]],
  ["Time to the first token", (v) => ms(1000 * v), [["median", "ttft_p50_s", "prefill"], ["90th percentile", "ttft_p90_s", "prefill", true]], "ttft_s"],
  ["Time between tokens", (v) => ms(1000 * v), [["median", "itl_p50_s", "decode"], ["90th percentile", "itl_p90_s", "decode", true]], "itl_s"],
  ["Requests in the system", count, [["running", "num_running", "decode"], ["held back by admission", "num_queued", "router"]]],
  ["KV memory in use", percent, [["prefill pool", "prefill_kv_usage", "prefill"], ["decode pool", "decode_kv_usage", "decode"]]],
  ["Workers", count, [["prefill", "num_prefill", "prefill"], ["decode", "num_decode", "decode"]]],
];

export function drawCharts(samples, targets) {
  byId("charts").replaceChildren(...CHARTS.map((chart) => figure(chart, samples, targets)));
}

function figure([title, say, series, targetField], samples, targets) {
  const target = targetField ? targets[targetField] : 0;
  const newest = series.map(([name, field, colour, dashed]) => {
    const value = last(samples, field);
    return el("li", { class: `c-${colour}` }, el("i"), `${name}${dashed ? " (dashed)" : ""}: ${value === null ? "none yet" : say(value)}`);
  });
  if (target) newest.push(el("li", {}, `target: ${say(target)}`));
  if (title === "Kept their targets" && !targets.ttft_s && !targets.itl_s && last(samples, "ttft_attainment") === null)
    newest.push(el("li", {}, "No targets are set: give SLO classes or requests some."));
  return el("figure", {}, el("figcaption", {}, title), plot(title, say, series, samples, target), el("ul", { class: "legend" }, ...newest));
}

function plot(title, say, series, samples, target) {
  const values = series.flatMap(([, field]) => samples.map((s) => s[field])).filter((v) => v !== null);
  const most = say === percent ? 1 : nice(Math.max(target || 0, ...values, 0));
  const span = Math.max(60, samples.length ? samples.at(-1).at_s - samples[0].at_s : 0);
  const end = samples.length ? samples.at(-1).at_s : 0;
  const x = (at) => BOX.left + (BOX.width - BOX.left - BOX.right) * (1 - (end - at) / span);
  const y = (value) => BOX.top + (BOX.height - BOX.top - BOX.bottom) * (1 - Math.min(value, most) / most);
  const lines = series.flatMap(([, field, colour, dashed]) => [
    svg("path", { class: `series c-${colour}${dashed ? " dashed" : ""}`, d: path(samples, field, x, y) }),
    ...alone(samples, field).map((s) => svg("circle", { class: `point c-${colour}`, cx: x(s.at_s), cy: y(s[field]), r: 2 }))]);
  const marks = [0, most / 2, most].flatMap((value) => [
    svg("line", { class: "axis", x1: BOX.left, x2: BOX.width - BOX.right, y1: y(value), y2: y(value) }),
    svg("text", { class: "faint", x: BOX.left - 5, y: y(value) + 4, "text-anchor": "end" }, value === 0 ? "0" : say(value).replace("/s", "").replace(" ", "")),
  ]);
  if (target) marks.push(svg("line", { class: "target", x1: BOX.left, x2: BOX.width - BOX.right, y1: y(target), y2: y(target) }));
  marks.push(svg("text", { class: "faint", x: BOX.left, y: BOX.height - 4 }, `${Math.round(span / 60)} min ago`),
    svg("text", { class: "faint", x: BOX.width - BOX.right, y: BOX.height - 4, "text-anchor": "end" }, "now"));
  return svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": `${title}, the newest values are in the list below` }, ...marks, ...lines);
}

// Values between two gaps, which no line shows.
function alone(samples, field) {
  const isGap = (i) => (samples[i]?.[field] ?? null) === null;
  return samples.filter((_, i) => !isGap(i) && isGap(i - 1) && isGap(i + 1));
}

// A gap where nothing was measured.
function path(samples, field, x, y) {
  let d = "";
  let isDrawing = false;
  for (const sample of samples) {
    const value = sample[field];
    if (value === null) { isDrawing = false; continue; }
    const [px, py] = [x(sample.at_s).toFixed(1), y(value).toFixed(1)];
    d += isDrawing ? `L${px} ${py}` : `M${px} ${py}`;
    isDrawing = true;
  }
  return d;
}

function last(samples, field) {
  for (let i = samples.length - 1; i >= 0; i -= 1) if (samples[i][field] !== null) return samples[i][field];
  return null;
}

function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
