// One answer as it grows: its text in pieces that know their log-probabilities, and what stands below it.
import { el, t, visible } from "./words.js";

const STEPS = [-4, -2, -1, -0.25]; // natural logarithms: the classes p0 to p4 lie between

function shade(logprob) {
  return `p${STEPS.filter((step) => logprob >= step).length}`;
}

function signed(number, digits) {
  return number.toFixed(digits).replace("-", "−");
}

function percent(logprob) {
  const share = Math.exp(logprob);
  return share >= 0.001 ? `${(100 * share).toFixed(1)} %` : "< 0.1 %";
}

function decoder() {
  return new TextDecoder("utf-8", { ignoreBOM: true });
}

export class Reply {
  constructor(model, again) {
    this.model = model;
    this.box = el("div", { class: "text", dir: "auto", tabindex: "0", role: "group" });
    this.box.addEventListener("keydown", (event) => this.walk(event));
    this.box.addEventListener("click", (event) => this.choose(event.target.closest(".token")));
    this.detail = el("div", { class: "detail", role: "status", hidden: true });
    this.meta = el("span", {});
    this.score = el("span", { class: "reward" });
    this.fault = el("span", { class: "fault", role: "alert" });
    this.button = el("button", { type: "button", class: "quiet again", disabled: true, onclick: () => again(model) });
    const under = el("div", { class: "under" }, this.score, this.meta, this.fault, this.button);
    this.node = el("article", { class: "reply card" }, el("div", { class: "who" }, model), this.box, this.detail, under);
    this.begin(0);
  }

  begin(seed) {
    Object.assign(this, { seed, text: "", reason: "", message: "", tokens: 0, pending: [], value: null });
    this.decoder = decoder();
    this.box.replaceChildren();
    this.detail.hidden = true;
    this.node.classList.add("growing");
    this.show();
  }

  // A part of the stream. Text may come later than its tokens, where a character is made of several.
  add({ text, tokens, reason }) {
    this.pending.push(...tokens);
    this.tokens += tokens.length;
    this.reason = reason || this.reason;
    if (!text) return;
    this.text += text;
    for (const piece of this.split(text)) {
      const span = el("span", { class: "token" });
      span.textContent = visible(piece.text);
      span.tokens = piece.tokens;
      if (piece.tokens.length) span.classList.add(shade(Math.min(...piece.tokens.map((one) => one.logprob))));
      this.box.append(span);
    }
  }

  // The text of each token, by its bytes; in one piece where these do not make the text, as before a stop text.
  split(text) {
    const pieces = [];
    let rest = text;
    let held = [];
    for (const token of this.pending) {
      held.push(token);
      const part = this.decoder.decode(new Uint8Array(token.bytes || []), { stream: true });
      if (part && !rest.startsWith(part)) break;
      if (part) pieces.push({ text: part, tokens: held });
      if (part) held = [];
      rest = rest.slice(part.length);
    }
    const whole = { text, tokens: this.pending };
    this.pending = rest ? [] : held;
    if (rest) this.decoder = decoder();
    return rest ? [whole] : pieces;
  }

  end(reason, message = "") {
    this.reason = reason || this.reason;
    this.message = message;
    this.node.classList.remove("growing");
    this.show();
  }

  reward(value, message = "") {
    this.value = value;
    this.message = this.message || message;
    this.show();
  }

  show() {
    const ended = { length: t("cut_length"), stopped: t("stopped") }[this.reason];
    this.meta.textContent = [`${this.tokens} ${t("tokens")}`, `${t("seed")} ${this.seed}`, ended].filter(Boolean).join(" · ");
    this.score.textContent = this.value === null ? "" : `${t("reward")} ${this.value >= 0 ? "+" : ""}${signed(this.value, 3)}`;
    this.fault.textContent = this.reason === "stopped" ? "" : visible(this.message);
    this.button.textContent = t("again");
    this.box.setAttribute("aria-label", `${this.model}: ${t("answer")}`);
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !document.body.classList.contains("coloured")) return;
    event.preventDefault();
    const all = [...this.box.querySelectorAll(".token")];
    const here = all.findIndex((piece) => piece.classList.contains("chosen"));
    this.choose(all[Math.max(0, Math.min(all.length - 1, here + step))]);
  }

  choose(piece) {
    this.box.querySelector(".chosen")?.classList.remove("chosen");
    const tokens = document.body.classList.contains("coloured") ? piece?.tokens || [] : [];
    this.detail.hidden = !tokens.length;
    if (!tokens.length) return;
    piece.classList.add("chosen");
    const shown = (one) => el("bdi", {}, `“${visible(one.token)}” ${signed(one.logprob, 2)} (${percent(one.logprob)})`);
    this.detail.replaceChildren(...tokens.map((one) => {
      const others = (one.top_logprobs || []).filter((other) => other.token !== one.token).slice(0, 4);
      const list = others.length ? [el("div", { class: "others" }, `${t("instead")}:`, ...others.map(shown))] : [];
      return el("div", {}, shown(one), ...list);
    }));
  }
}
