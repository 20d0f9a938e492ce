// The chat page: one conversation with each chosen model, streamed, with log-probabilities and rewards.
import { Reply } from "./reply.js";
import { answers, score } from "./stream.js";
import { $, el, speak, t, textBox } from "./words.js";

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens"];
let config = { models: [], reward: false };
let rounds = []; // {text, replies: {model: Reply}}
let stopping = null; // an AbortController while answers stream

// --- settings ---

function chosen() {
  const boxes = [...document.querySelectorAll("#models input:checked")].map((box) => box.value);
  return boxes.length ? boxes : config.models.slice(0, 1).map((model) => model.id);
}

function sampling() {
  const values = SAMPLING.map((name) => [name, $(name).valueAsNumber]).filter(([, value]) => Number.isFinite(value));
  const stops = $("stops").value.split("\n").filter(Boolean);
  return { ...Object.fromEntries(values), ...(stops.length ? { stop: stops } : {}) };
}

function showModels() {
  $("models").hidden = config.models.length < 2;
  const boxes = config.models.map((model, index) => {
    const box = el("input", { type: "checkbox", value: model.id, checked: index < 2, onchange: showHint });
    return el("label", {}, box, model.id);
  });
  $("models").append(...boxes);
}

function showHint() {
  const models = chosen();
  document.body.classList.toggle("several", models.length > 1);
  const single = models.length && !config.models.find((model) => model.id === models[0]).turns;
  const hints = [
    ...(rounds.length ? [] : [t(config.models.length ? "empty" : "no_model")]),
    ...(models.length > 1 && !rounds.length ? [t("compare")] : []),
    ...(single && !rounds.length ? [t("one_turn")] : []),
  ];
  $("hint").textContent = hints.join(" ");
  $("hint").hidden = !hints.length;
}

// --- talking ---

// What the model reads before this round: only the message itself, if it answers one at a time.
function messages(model, until) {
  const turns = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  const remembers = config.models.find((one) => one.id === model).turns;
  for (const round of remembers ? rounds.slice(0, until) : []) {
    const reply = round.replies[model];
    if (reply?.text) turns.push({ role: "user", content: round.text }, { role: "assistant", content: reply.text });
  }
  return [...turns, { role: "user", content: rounds[until].text }];
}

async function ask(number, models, seed) {
  const round = rounds[number];
  stopping = new AbortController();
  busy(true);
  await Promise.all(models.map((model) => grow(round.replies[model], messages(model, number), seed, stopping.signal)));
  stopping = null;
  busy(false);
  $("message").focus();
}

async function grow(reply, turns, seed, signal) {
  const body = { model: reply.model, messages: turns, seed, logprobs: true, top_logprobs: 5, stream: true, ...sampling() };
  reply.begin(seed);
  try {
    for await (const part of answers(body, signal)) reply.add(part);
    reply.end("");
  } catch (error) {
    reply.end(error.name === "AbortError" ? "stopped" : "fault", error.message);
  }
  if (config.reward && reply.text) {
    try {
      reply.reward(await score(turns, reply.text, reply.reason !== "length" && reply.reason !== "stopped"));
    } catch (error) {
      reply.reward(null, error.message);
    }
  }
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  for (const button of document.querySelectorAll(".again")) button.disabled = on;
}

function send() {
  const text = $("message").value;
  if (!text.trim() || stopping || !config.models.length) return;
  $("message").value = "";
  grown();
  const models = chosen();
  const number = rounds.length;
  const again = (model) => {
    const reply = rounds[number].replies[model];
    if (!stopping) ask(number, [model], reply.seed + 1);
  };
  const replies = Object.fromEntries(models.map((model) => [model, new Reply(model, again)]));
  rounds.push({ text, replies });
  const message = el("div", { class: "message" }, textBox(text, t("you")));
  $("log").append(message, el("div", { class: "answers" }, ...Object.values(replies).map((reply) => reply.node)));
  showHint();
  message.scrollIntoView({ block: "start", behavior: "smooth" });
  ask(number, models, $("seed").valueAsNumber || 0);
}

function grown() {
  $("message").style.height = "auto";
  $("message").style.height = `${Math.min(192, $("message").scrollHeight + 2)}px`;
}

function toggle(button, state, on) {
  button.setAttribute(state, String(on));
  return on;
}

// --- start ---

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("input", grown);
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stopping?.abort());
$("stop").addEventListener("click", () => stopping?.abort());
$("fresh").addEventListener("click", () => {
  stopping?.abort();
  rounds = [];
  $("log").replaceChildren();
  showHint();
  $("message").focus();
});
$("open-settings").addEventListener("click", () => {
  $("settings").hidden = !toggle($("open-settings"), "aria-expanded", $("settings").hidden);
});
$("colour").addEventListener("click", () => {
  const on = toggle($("colour"), "aria-pressed", !document.body.classList.contains("coloured"));
  document.body.classList.toggle("coloured", on);
  $("legend").hidden = !on;
});
speak(() => {
  showHint();
  for (const round of rounds) for (const reply of Object.values(round.replies)) reply.show();
});
try {
  config = await (await fetch("/pages/config", { cache: "no-store" })).json();
} catch {
  $("banner").textContent = t("offline");
  $("banner").hidden = false;
}
showModels();
showHint();
$("message").focus();
