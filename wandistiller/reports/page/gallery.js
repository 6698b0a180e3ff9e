"use strict";
// Sorts and filters the cards, and shows one sample picture at a time; without it everything is there, unsorted.
document.documentElement.classList.remove("plain");
const find = (id) => document.getElementById(id);
const cards = [...document.querySelectorAll(".card")];

function sortCards() {
  const key = find("order").value.replaceAll("_", "-");
  const badness = (card) => {
    const value = card.getAttribute(`data-${key}`);
    return value === "" ? -Infinity : key === "number" ? -Number(value) : Number(value);
  };
  const order = new Map(cards.map((card) => [card, badness(card)]));
  // Equally bad ones stay in the order of the file; Infinity - Infinity would be no number.
  const sorted = [...cards].sort((a, b) => (order.get(a) === order.get(b) ? 0 : order.get(b) - order.get(a)));
  find("cards").append(...sorted);
}

function filterCards() {
  const words = find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const text = card.querySelector("h3").textContent.toLowerCase();
    card.hidden = !words.every((word) => text.includes(word));
    shown += card.hidden ? 0 : 1;
  }
  find("count").textContent = shown === cards.length ? `${shown} prompts` : `${shown} of ${cards.length} prompts`;
}

function showFrame() {
  const frames = [...document.querySelectorAll(".frame")];
  const slider = find("frame");
  const chosen = Number(slider.value);
  frames.forEach((frame, index) => { frame.hidden = index !== chosen; });
  find("step").textContent = frames[chosen].dataset.step;
  slider.setAttribute("aria-valuetext", `step ${frames[chosen].dataset.step}`);
}

find("order").addEventListener("change", sortCards);
find("filter").addEventListener("input", filterCards);
find("size").addEventListener("input", () => {
  document.documentElement.style.setProperty("--tile", `${find("size").value}px`);
});
document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());
if (find("frame")) {
  find("frame").addEventListener("input", showFrame);
  showFrame();
}
// A page that is loaded again keeps what was typed into it:
sortCards();
filterCards();
