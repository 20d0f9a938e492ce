// Dragging an answer by its handle onto a rank, with a mouse, a pen or a finger.
import { el } from "./words.js";

export function drag(event, card, drop) {
  if (event.button !== 0) return;
  event.preventDefault();
  const handle = event.currentTarget;
  const ghost = el("div", { class: "ghost", "aria-hidden": "true" }, handle.textContent);
  const place = (at) => {
    ghost.style.left = `${at.clientX + 12}px`;
    ghost.style.top = `${at.clientY - 14}px`;
    const over = document.elementFromPoint(at.clientX, at.clientY)?.closest(".slot");
    for (const node of document.querySelectorAll(".slot")) node.classList.toggle("over", node === over);
    return over;
  };
  const end = (at) => {
    const over = at.type === "pointerup" ? place(at) : null;
    handle.removeEventListener("pointermove", place);
    ghost.remove();
    card.classList.remove("dragging");
    for (const node of document.querySelectorAll(".slot")) node.classList.remove("over");
    if (over) drop(Number(over.dataset.rank));
  };
  document.body.append(ghost);
  card.classList.add("dragging");
  handle.setPointerCapture(event.pointerId);
  handle.addEventListener("pointermove", place);
  handle.addEventListener("pointerup", end, { once: true });
  handle.addEventListener("pointercancel", end, { once: true });
  place(event);
}
