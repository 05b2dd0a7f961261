// Chat over the same route that everybody else uses, read as it streams.

import { ask, byId, count, el, ms } from "./dom.js";

let history = [];
let running = null;

export function startChat(onUnauthorized) {
  const input = byId("chat-input");
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && input.value.trim()) send(input, onUnauthorized);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("chat-form").requestSubmit();
    }
  });
  byId("chat-stop").addEventListener("click", () => running?.abort());
  byId("chat-clear").addEventListener("click", () => {
    running?.abort();
    history = [];
    byId("chat-log").replaceChildren();
    input.focus();
  });
}

export async function loadModels() {
  const select = byId("chat-model");
  if (select.options.length) return;
  const models = (await (await ask("v1/models")).json()).data;
  if (!select.options.length) select.append(...models.map((model) => el("option", {}, model.id)));
}

async function send(input, onUnauthorized) {
  const question = input.value;
  history.push({ role: "user", content: question });
  show("user", "You").text.textContent = question;
  input.value = "";
  const answer = show("assistant", byId("chat-model").value || "Model");
  running = new AbortController();
  setBusy(true);
  try {
    await stream(answer, running.signal);
  } catch (error) {
    if (error.name === "AbortError") answer.foot.append(" Stopped.");
    else {
      answer.box.classList.add("error");
      answer.foot.append(error.message);
      // A question without an answer is asked again by hand, not sent along with the next one.
      if (!answer.text.textContent) {
        history.pop();
        input.value = question;
      }
      if (error.status === 401) onUnauthorized();
    }
  }
  if (answer.text.textContent) history.push({ role: "assistant", content: answer.text.textContent });
  running = null;
  setBusy(false);
  input.focus();
}

async function stream(answer, signal) {
  await loadModels();
  const began = performance.now();
  const response = await ask("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body()),
  });
  let id = "";
  let first = null;
  let usage = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    id ||= chunk.id;
    usage = chunk.usage ?? usage;
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      first ??= performance.now();
      append(answer.text, text);
    }
  }
  const end = performance.now();
  const parts = [];
  if (first !== null) parts.push(`first token ${ms(first - began)}`);
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && first !== null && end > first) parts.push(`${count((1000 * usage.completion_tokens) / (end - first))} tokens/s`);
  answer.foot.append(parts.join(" · "), " ");
  if (id) answer.foot.append(el("a", { href: `#request/${encodeURIComponent(id)}`, class: "time-line" }, "Time line"));
}

function body() {
  const system = byId("chat-system").value.trim();
  return {
    model: byId("chat-model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: Number(byId("chat-temperature").value),
    max_tokens: Number(byId("chat-max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The data of server-sent events; a read may hold parts of several.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += value;
    const lines = pending.split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

function show(role, who) {
  const text = el("div", { class: "text" });
  const foot = el("div", { class: "foot" });
  const box = el("article", { class: `message ${role}` }, el("div", { class: "who" }, who), text, foot);
  byId("chat-log").append(box);
  box.scrollIntoView({ block: "end" });
  return { box, text, foot };
}

function append(node, text) {
  const log = byId("chat-log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  node.append(text);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function setBusy(isBusy) {
  byId("chat-send").disabled = isBusy;
  byId("chat-stop").disabled = !isBusy;
  byId("chat-log").setAttribute("aria-busy", String(isBusy));
}
