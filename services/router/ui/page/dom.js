// Small helpers: elements, numbers for people, requests with the API key.

const SVG = "http://www.w3.org/2000/svg";
const KEY = "baton-api-key";

export const byId = (id) => document.getElementById(id);

// An HTML element. Text is set as text: nothing that a model or a worker says is ever parsed.
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function table(caption, columns, rows) {
  const head = columns.map(([name, isNumber]) => el("th", { scope: "col", class: isNumber ? "number" : null }, name));
  const body = rows.map((cells) => el("tr", {}, ...cells.map((cell, i) =>
    el("td", { class: columns[i][1] ? "number" : null }, cell ?? ""))));
  return el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
}

export function ms(value) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0 ms";
  if (value < 10) return `${value.toFixed(2)} ms`;
  if (value < 1000) return `${value.toFixed(0)} ms`;
  return `${(value / 1000).toFixed(2)} s`;
}

export function count(value) {
  if (value === null || value === undefined) return "";
  if (value >= 10000) return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
  return Number.isInteger(value) ? String(value) : value.toFixed(value < 10 ? 2 : 1);
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (value >= 1024 && i < units.length - 1) { value /= 1024; i += 1; }
  return `${i ? value.toFixed(1) : value} ${units[i]}`;
}

export const percent = (share) => (share === null || share === undefined ? "" : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`);

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export class HttpError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// A response with status below 400; otherwise an HttpError with the server's own words.
export async function ask(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not ours: a proxy's page, say. The status has to do.
  }
  throw new HttpError(response.status, message);
}
