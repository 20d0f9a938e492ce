// What the pages say, in both languages, and the few helpers that both pages share.

const WORDS = {
  en: {
    chat: "Chat", rank: "Rank", language: "中文", send: "Send", stop: "Stop", settings: "Settings", fresh: "New chat",
    say: "Message", write: "Write a message…", system: "System message", temperature: "Temperature", top_p: "Top p",
    top_k: "Top k (0: off)", min_p: "Min p", max_tokens: "Max new tokens", seed: "Seed", stops: "Stop sequences, one per line",
    models: "Models", again: "Another seed", logprobs: "Log-probs", you: "You", reward: "reward", tokens: "tokens",
    cut_length: "cut off at the limit", stopped: "stopped", likely: "likely", unlikely: "unlikely",
    empty: "Ask the model something.", compare: "The same message goes to each model, with the same seed.",
    one_turn: "This model answers one message at a time: it does not see what was said before.",
    token_help: "Colour shows how likely each token was. Arrow keys walk through the tokens.",
    instead: "instead", keys_chat: "Enter sends, Shift+Enter starts a new line, Esc stops.", offline: "The server does not answer.",
    no_model: "No model is served here.", name: "Your name", start: "Start", name_help: "It is stored with each ranking.",
    link: "Open the personal link that you were given.", bad_link: "This link is not valid, or no longer.",
    prompt: "Prompt", role_instruction: "Instruction", role_input: "Input", role_system: "System", role_user: "User",
    role_assistant: "Assistant", answers: "Answers", order: "Put them in order: 1 is best, equal numbers are ties.",
    rank_of: "Rank of answer", answer: "Answer", all_bad: "All bad", skip: "Skip", next: "Save and continue",
    comment: "Comment", edit: "Edit the best", edited: "The best answer, as it should be", score: "Score",
    best: "best", drag: "Drag to a rank", clear: "Clear", stored: "Saved.", retry: "Not saved yet, retrying.",
    conflict: "You answered this one before; the saved answer stays.", gone: "This one was given to someone else.",
    fast: "That was very fast; it is kept apart.", wait: "Nothing to rank right now. This page refreshes by itself.",
    sampling: "Answers are being sampled. This page refreshes by itself.", done: "All done. Thank you!",
    cut: "Only the first 50,000 characters are shown.", mine: "by you", of: "of", items: "done", agree: "agreement α",
    keys: "Keys", key_rank: "rank the answer in focus", key_move: "next or previous answer", key_side: "better or worse",
    key_next: "save and continue", key_bad: "all bad", key_skip: "skip", key_edit: "edit the best answer",
    key_comment: "comment", key_leave: "leave a text", missing: "Each answer needs a rank.",
  },
  zh: {
    chat: "对话", rank: "排序", language: "English", send: "发送", stop: "停止", settings: "设置", fresh: "新对话",
    say: "消息", write: "输入消息……", system: "系统提示", temperature: "温度", top_p: "Top p",
    top_k: "Top k（0 为关闭）", min_p: "Min p", max_tokens: "最多新词元数", seed: "随机种子", stops: "停止文本，每行一个",
    models: "模型", again: "换个种子", logprobs: "对数概率", you: "你", reward: "奖励", tokens: "个词元",
    cut_length: "达到长度上限", stopped: "已停止", likely: "高概率", unlikely: "低概率",
    empty: "向模型提问吧。", compare: "同一条消息会以相同的种子发给每个模型。",
    one_turn: "这个模型每次只回答一条消息，看不到之前的内容。",
    token_help: "颜色表示每个词元的概率，用方向键逐个查看。",
    instead: "其他候选", keys_chat: "Enter 发送，Shift+Enter 换行，Esc 停止。", offline: "服务器没有响应。",
    no_model: "这里没有可用的模型。", name: "你的名字", start: "开始", name_help: "名字会随每条排序一起保存。",
    link: "请打开发给你的个人链接。", bad_link: "这个链接无效，或已失效。",
    prompt: "提示", role_instruction: "指令", role_input: "输入", role_system: "系统", role_user: "用户",
    role_assistant: "助手", answers: "回答", order: "请排出名次：1 为最好，数字相同表示并列。",
    rank_of: "名次：回答", answer: "回答", all_bad: "都不好", skip: "跳过", next: "保存并继续",
    comment: "备注", edit: "修改最好的", edited: "最好的回答应当是这样", score: "评分",
    best: "最好", drag: "拖到某个名次", clear: "清除", stored: "已保存。", retry: "尚未保存，正在重试。",
    conflict: "这一题你已回答过，已保存的结果保持不变。", gone: "这一题已分给别人。",
    fast: "答得太快，已单独存放。", wait: "暂时没有可排的题目，页面会自动刷新。",
    sampling: "正在生成回答，页面会自动刷新。", done: "全部完成，谢谢！",
    cut: "只显示前 50,000 个字符。", mine: "由你完成", of: "/", items: "已完成", agree: "一致性 α",
    keys: "快捷键", key_rank: "给当前回答定名次", key_move: "下一个或上一个回答", key_side: "名次升或降",
    key_next: "保存并继续", key_bad: "都不好", key_skip: "跳过", key_edit: "修改最好的",
    key_comment: "备注", key_leave: "离开文本框", missing: "每个回答都要有名次。",
  },
};

let language = localStorage.getItem("language") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

export function t(key) {
  return WORDS[language][key];
}

export function $(id) {
  return document.getElementById(id);
}

// An element with attributes; what begins with "on" is a listener. Children that are text become text nodes, never markup.
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// Control characters as pictures (␛), so that none acts; line ends and tabs stay.
export function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, (c) => {
    const code = c.charCodeAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : "\u2421";
  });
}

// A box of someone's text: as it is written, isolated, in its own direction, and to be scrolled with the keyboard.
export function textBox(text, label) {
  const box = el("div", { class: "text", dir: "auto", tabindex: "-1", role: "group", "aria-label": label });
  box.textContent = visible(text);
  return box;
}

// A box that scrolls can be reached with Tab.
export function reachable(box) {
  box.tabIndex = box.scrollHeight > box.clientHeight ? 0 : -1;
}

function say() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
}

// The language of the browser, or the one chosen with the button; `changed` is called after each change.
export function speak(changed) {
  $("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    localStorage.setItem("language", language);
    say();
    changed();
  });
  say();
  changed();
}
