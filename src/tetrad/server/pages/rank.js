// Ranking: who someone is, the item, its ranks (typed, tapped or dragged), and storing it. A draft survives a reload.
import { drag } from "./drag.js";
import { $, el, reachable, speak, t, textBox, visible } from "./words.js";

const POLL = 10000;
const RETRY = 3000;
let state = null; // what /rank/item says
let draft = null; // {ranks, scores, comment, edited, open}
let busy = false;
let timer = 0;

// --- talking to the server ---

async function call(path, body, headers = {}) {
  const options = body
    ? { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } }
    : {};
  const answer = await fetch(path, { ...options, cache: "no-store" });
  const kind = answer.headers.get("content-type") || "";
  return { status: answer.status, body: kind.includes("json") ? await answer.json() : {} };
}

async function load() {
  clearTimeout(timer);
  try {
    const answer = await call("/rank/item");
    if (answer.status !== 200) throw new Error(String(answer.status));
    state = answer.body;
    banner("");
  } catch {
    banner("offline");
    timer = setTimeout(load, RETRY);
    return;
  }
  draft = state.item ? restored(state.item) : null;
  show();
  if (state.name && !state.item && !finished()) timer = setTimeout(load, POLL);
  if (state.item) cards()[0].focus({ preventScroll: true });
  scrollTo(0, 0);
}

async function enter(body) {
  const answer = await call("/rank/enter", body).catch(() => ({ status: 0, body: {} }));
  await load();
  if (answer.status !== 200) banner(body.link ? "bad_link" : "offline", answer.body.error?.message);
}

async function store(verdict) {
  if (busy || !state?.item) return;
  const ranked = verdict === "ranked";
  if (ranked && draft.ranks.some((rank) => !rank)) {
    banner("missing");
    cards()[draft.ranks.findIndex((rank) => !rank)].focus();
    return;
  }
  const body = { item: state.item.id, verdict, comment: draft.comment.trim() };
  if (ranked) {
    body.ranks = draft.ranks;
    if (draft.scores.some((score) => score !== null)) body.scores = draft.scores;
    if (draft.open && draft.edited.trim()) body.edited = draft.edited;
  }
  busy = true;
  show();
  const answer = await call("/rank/submit", body, { "X-CSRF-Token": state.csrf }).catch(() => ({ status: 0 }));
  busy = false;
  if (answer.status === 0 || answer.status >= 500 || answer.status === 429) {
    banner("retry");
    timer = setTimeout(() => store(verdict), RETRY);
  } else if (answer.status === 400 || answer.status === 413) {
    banner("", answer.body.error?.message);
  } else {
    sessionStorage.removeItem(key(state.item));
    await load();
    if (answer.status === 409) banner("conflict");
    else if (answer.status === 404) banner("gone");
    else if (answer.body.stored?.verdict === "too fast") banner("fast");
    else if (answer.status === 200) $("status").textContent = t("stored");
  }
}

// --- the draft ---

function key(item) {
  return `draft ${item.id}`;
}

function restored(item) {
  const empty = { ranks: item.answers.map(() => 0), scores: item.answers.map(() => null), comment: "", edited: "", open: false };
  const kept = sessionStorage.getItem(key(item));
  return kept ? { ...empty, ...JSON.parse(kept) } : empty;
}

function keep() {
  sessionStorage.setItem(key(state.item), JSON.stringify(draft));
}

function rankAs(index, rank) {
  draft.ranks[index] = rank;
  if (draft.ranks.every(Boolean)) banner("");
  keep();
  showRanks();
}

// --- what is seen ---

function letter(index) {
  return String.fromCharCode(65 + index);
}

function cards() {
  return [...document.querySelectorAll(".answer")];
}

function finished() {
  return state.ready && state.progress.items > 0 && state.progress.done >= state.progress.items;
}

function banner(word, text = "") {
  $("banner").textContent = word === "bad_link" || !text ? word && t(word) : visible(text);
  $("banner").hidden = !$("banner").textContent;
}

function show() {
  if (!state) return;
  const item = state.item;
  $("enter").hidden = Boolean(state.name) || state.links;
  $("item").hidden = !item;
  $("message").hidden = Boolean(item) || !$("enter").hidden;
  if (!state.name) $("message-text").textContent = t("link");
  else if (!item) $("message-text").textContent = t(finished() ? "done" : state.ready ? "wait" : "sampling");
  showProgress();
  if (item && $("item").dataset.item !== item.id + document.documentElement.lang) showItem(item);
  if (item) showRanks();
}

function showProgress() {
  const p = state.name ? state.progress : null;
  const alpha = p && p.alpha !== null ? ` · ${t("agree")} ${p.alpha.toFixed(2)}` : "";
  $("progress").textContent = p ? `${p.mine} ${t("mine")} · ${p.done} ${t("of")} ${p.items} ${t("items")}${alpha}` : "";
}

function showItem(item) {
  $("item").dataset.item = item.id + document.documentElement.lang;
  $("last-key").textContent = String(item.answers.length);
  $("turns").replaceChildren(
    ...item.turns.map((turn) => {
      const role = t(`role_${turn.role}`);
      const label = item.turns.length > 1 ? [el("div", { class: "role" }, role)] : [];
      return el("div", { class: "turn" }, ...label, textBox(turn.text, role), ...notice(turn));
    }),
  );
  $("answers").replaceChildren(...item.answers.map(card));
  $("slots").replaceChildren(...item.answers.map((_, index) => slot(index + 1)));
  $("comment").value = draft.comment;
  $("edited").value = draft.edited;
  document.querySelectorAll("#item .text").forEach(reachable);
}

function notice(part) {
  return part.cut ? [el("p", { class: "note" }, t("cut"))] : [];
}

function card(answer, index) {
  const name = `${t("answer")} ${letter(index)}`;
  const ranks = draft.ranks.map((_, at) =>
    el("button", {
      type: "button", tabindex: "-1", "data-rank": String(at + 1), "aria-pressed": "false",
      "aria-label": `${t("rank_of")} ${letter(index)}: ${at + 1}`, onclick: () => rankAs(index, at + 1),
    }, String(at + 1)));
  const handle = el("div", { class: "handle", title: t("drag"), "aria-hidden": "true" }, letter(index));
  handle.addEventListener("pointerdown", (event) => drag(event, cards()[index], (rank) => rankAs(index, rank)));
  const under = el("div", { class: "under" }, el("div", { class: "ranks" }, ...ranks), ...scoreOf(index));
  return el("li", { class: "answer card", tabindex: "0", "aria-label": name, "data-index": String(index) },
    handle, textBox(answer.text, name), ...notice(answer), under);
}

function scoreOf(index) {
  if (!state.scale.length) return [];
  const [low, high] = state.scale;
  const field = el("input", {
    type: "number", min: String(low), max: String(high), step: "any", id: `score-${index}`, placeholder: `${low}–${high}`,
    oninput: (event) => {
      draft.scores[index] = event.target.value === "" ? null : event.target.valueAsNumber;
      keep();
    },
  });
  if (draft.scores[index] !== null) field.value = String(draft.scores[index]);
  return [el("div", { class: "score" }, el("label", { for: `score-${index}` }, t("score")), field)];
}

function slot(rank) {
  const word = rank === 1 ? [el("span", { class: "word" }, ` · ${t("best")}`)] : [];
  const label = el("span", {}, String(rank), ...word);
  return el("div", { class: "slot", "data-rank": String(rank) }, label, el("span", { class: "chips" }));
}

function showRanks() {
  cards().forEach((node, index) => {
    node.classList.toggle("ranked", Boolean(draft.ranks[index]));
    for (const button of node.querySelectorAll(".ranks button"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.rank) === draft.ranks[index]));
  });
  for (const node of document.querySelectorAll(".slot")) {
    const letters = draft.ranks.map((rank, index) => (rank === Number(node.dataset.rank) ? letter(index) : ""));
    node.querySelector(".chips").replaceChildren(...letters.filter(Boolean).map((one) => el("span", { class: "chip" }, one)));
  }
  const best = bestAnswer();
  $("edit").hidden = !draft.open;
  $("open-edit").setAttribute("aria-pressed", String(draft.open));
  $("open-edit").disabled = best === null || best.cut;
  for (const id of ["bad", "skip", "next"]) $(id).disabled = busy;
}

function bestAnswer() {
  const given = draft.ranks.filter(Boolean);
  return given.length ? state.item.answers[draft.ranks.indexOf(Math.min(...given))] : null;
}

// --- the keyboard ---

function focusCard(index) {
  const all = cards();
  reach(all[Math.max(0, Math.min(all.length - 1, index))]);
}

// Focus, above the bar.
function reach(node) {
  node.focus();
  node.scrollIntoView({ block: "nearest" });
}

function openEdit(open) {
  draft.open = open;
  if (open && !draft.edited) draft.edited = bestAnswer().text;
  $("edited").value = draft.edited;
  keep();
  showRanks();
  if (open) reach($("edited"));
}

function onKey(event) {
  if (!state?.item || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, textarea");
  if (event.key === "Escape" && typing) focusCard(0);
  if (typing || (event.key === "Enter" && event.target.closest("button, summary"))) return;
  const size = state.item.answers.length;
  const here = event.target.closest(".answer");
  const index = here ? Number(here.dataset.index) : -1;
  const rank = "123456789".indexOf(event.key) + 1;
  const actions = {
    ArrowDown: () => focusCard(index + 1),
    ArrowUp: () => focusCard(index < 0 ? 0 : index - 1),
    ArrowLeft: () => index >= 0 && rankAs(index, Math.max(1, (draft.ranks[index] || 2) - 1)),
    ArrowRight: () => index >= 0 && rankAs(index, Math.min(size, (draft.ranks[index] || 0) + 1)),
    Enter: () => store("ranked"),
    b: () => store("all bad"),
    s: () => store("skip"),
    e: () => bestAnswer() && !bestAnswer().cut && openEdit(true),
    c: () => reach($("comment")),
  };
  if (event.target.closest(".text[tabindex='0']") && event.key.startsWith("Arrow")) return; // it scrolls
  if (rank && rank <= size) {
    const at = Math.max(0, index);
    rankAs(at, rank);
    const open = draft.ranks.findIndex((one, i) => !one && i > at);
    if (open >= 0) focusCard(open);
  } else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

// --- start ---

document.addEventListener("keydown", onKey);
$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  enter({ name: $("name").value });
});
$("item").addEventListener("submit", (event) => {
  event.preventDefault();
  store("ranked");
});
$("bad").addEventListener("click", () => store("all bad"));
$("skip").addEventListener("click", () => store("skip"));
$("open-edit").addEventListener("click", () => openEdit(!draft.open));
for (const id of ["comment", "edited"])
  $(id).addEventListener("input", () => {
    draft[id] = $(id).value;
    keep();
  });
addEventListener("hashchange", () => location.reload());
speak(show);
const link = location.hash.slice(1);
if (link) {
  history.replaceState(null, "", location.pathname);
  enter({ link });
} else load();
