// An annotation as a person reads it: the text with its mentions, and what the system thought of each.

import { $, bar, fixed, html, named, percent, styled } from "./elements.js";
import { clearBoxes, drawBoxes, heat, unheat } from "./picture.js";

const EXPLAINED = {
  image_missing: "There is no image: only the text was annotated.",
  image_unreadable: "The image could not be read: only the text was annotated.",
  image_too_large: "The image is too large: only the text was annotated.",
  image_forbidden: "The image may not be fetched: only the text was annotated.",
  text_too_long: "The text is too long to annotate.",
  bad_record: "The post is not complete.",
  knowledge_failed: "The post was annotated without explaining it first.",
  stage_failed: "A stage failed on this post; what the others found is here.",
};

let answer = null;
let chosen = 0; // the mention that the inspector shows when none is pointed at
let pinned = false; // whether the image shows the chosen mention alone
let pointed = null; // the mention under the pointer

export function clearResult() {
  answer = null;
  $("result").replaceChildren();
  clearBoxes();
}

/** Show an answer of the API, and give back a sentence that says what is in it. */
export function showResult(newAnswer) {
  answer = newAnswer;
  [chosen, pinned, pointed] = [0, false, null];
  const { entities } = answer;
  const unjudged = entities.filter((entity) => entity.seen === null).length;
  const counts = [[entities.length, entities.length === 1 ? "entity" : "entities"],
    [entities.filter((entity) => entity.seen).length, "seen in the image"],
    ...(unjudged ? [[unjudged, "not judged"]] : []),
    [entities.filter((entity) => entity.reranked).length, "reranked"]];
  $("result").replaceChildren(
    html("h2", { class: "unseen" }, "Result"),
    html("div", { class: "totals" }, ...counts.map(([count, noun]) =>
      html("span", {}, html("b", {}, count), ` ${noun}`))),
    ...answer.problems.map(problem),
    markedText(),
    ...(entities.length ? [mentionList(), html("div", {
      id: "inspector", class: "inspector", role: "tabpanel", tabindex: 0,
    })] : []));
  drawBoxes(answer);
  if (entities.length) update();
  else $("result").append(html("p", { class: "said" }, "No entity was found in this text."));
  return [...answer.problems.map(({ kind }) => EXPLAINED[kind] || named(kind)),
    `${counts.map(([count, noun]) => `${count} ${noun}`).join(", ")}.`].join(" ");
}

const problem = ({ kind, stage, message }) => html("p", {
  class: kind === "image_missing" ? "problem mild" : "problem",
},
  EXPLAINED[kind] || named(kind),
  kind !== "image_missing" && html("small", {}, `${message} (${named(kind)}, in ${named(stage)})`));

/** The text with its mentions marked. Offsets count code points, as Python does, so the text is cut into those. */
function markedText() {
  const characters = Array.from(answer.text);
  const paragraph = html("p", { class: "text", dir: "auto" });
  let end = 0;
  const marks = [...answer.entities.entries()].sort((a, b) => a[1].start - b[1].start);
  for (const [index, entity] of marks) {
    if (entity.start < end) continue; // a mark cannot overlap the one before; the list shows it all the same
    paragraph.append(characters.slice(end, entity.start).join(""),
      html("mark", { "data-coarse": entity.coarse, "data-mention": index },
        characters.slice(entity.start, entity.end).join(""), html("small", {}, ` ${named(entity.fine)}`)));
    end = entity.end;
  }
  paragraph.append(characters.slice(end).join(""));
  return paragraph;
}

function mentionList() {
  return html("div", { class: "mentions", role: "tablist", "aria-orientation": "vertical", "aria-label": "Entities" },
    ...answer.entities.map((entity, index) => html("button", {
      type: "button", role: "tab", id: `mention-${index}`, "aria-controls": "inspector",
      class: `mention${entity.seen ? " seen" : ""}${entity.seen === null ? " unjudged" : ""}`, "data-coarse": entity.coarse, "data-mention": index,
    },
      html("span", { class: "name" }, html("bdi", {}, entity.text), " ", html("small", {}, named(entity.fine))),
      entity.reranked ? html("span", { class: "pill" }, "reranked") : html("span"), " ",
      html("span", { class: "sure" }, percent(entity.score)),
      html("span", { class: "unseen" }, { true: " seen in the image", null: " not judged" }[entity.seen] ?? ""))));
}

// ---- The mention that is pointed at, or chosen

function update() {
  const alone = pointed ?? (pinned ? chosen : null);
  for (const node of document.querySelectorAll("[data-mention]")) {
    node.classList.toggle("active", Number(node.dataset.mention) === alone);
  }
  for (const tab of document.querySelectorAll(".mention")) {
    const isChosen = Number(tab.dataset.mention) === chosen;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
  }
  const map = alone === null ? null : answer.entities[alone].heatmap;
  if (map && answer.image_width) heat(map);
  else unheat();
  inspect(alone ?? chosen);
}

function inspect(index) {
  const entity = answer.entities[index];
  const panel = $("inspector");
  panel.dataset.coarse = entity.coarse;
  panel.setAttribute("aria-labelledby", `mention-${index}`);
  panel.replaceChildren(
    html("h3", {}, entity.text),
    html("p", { class: "path" }, [...new Set([entity.coarse, entity.fine])].map(named).join(" › ")),
    html("div", { class: "columns" }, candidates(entity), readings(entity)),
    html("p", { class: "said" }, said(entity)));
}

const candidates = (entity) => html("div", {}, html("h4", {}, "The tagger’s candidates"),
  html("ol", { class: "bars" }, ...entity.candidates.map(({ fine, probability }) => html("li", {
    class: fine === entity.fine ? "chosen" : null,
  },
    html("span", {}, named(fine)), bar(probability), html("span", {}, fixed(probability))))));

function readings(entity) {
  const rows = [["score", fixed(entity.score)]];
  rows.push(entity.seen === null ? ["in the image", "not judged"] : ["in the image (P_T)", fixed(entity.match_score)]);
  if (entity.box) rows.push(["box from", entity.box_source || "unknown"]);
  if (entity.box_score !== null) rows.push(["box score", fixed(entity.box_score)]);
  return html("dl", { class: "readings" },
    html("dt", {}, "entropy"), html("dd", {}, `${fixed(entity.entropy)} nats`), gauge(entity.entropy, answer.gamma),
    ...rows.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]));
}

/** Entropy as a bar, γ as a line across it. */
function gauge(entropy, gamma) {
  const full = Math.max(3 * gamma, entropy, 0.1);
  const line = styled(html("b", { "data-label": `γ ${gamma}` }), { left: `${(100 * gamma) / full}%` });
  const meter = bar(entropy / full);
  meter.append(line);
  return html("dd", { class: "gauge", "aria-hidden": "true" }, styled(meter, { display: "block" }));
}

const unjudgedBecause = () => (answer.problems.some(({ stage }) => stage === "ground")
  ? "Whether the image shows it was not judged: the grounder failed on this post."
  : "Whether the image shows it was not judged: it is none of the entities and images that these models know, or there "
    + "is no grounder.");

/** In words: the route it took, and what the image had to do with it. */
function said(entity) {
  const gamma = `γ = ${answer.gamma}`;
  let route = `Easy: its entropy is not above ${gamma}, so the tagger’s choice stands.`;
  if (entity.reranked) {
    route = `Hard: its entropy is above ${gamma}, so the reranker looked at the image and chose ${named(entity.fine)}.`;
  } else if (entity.entropy > answer.gamma) {
    const why = answer.image_width ? "" : " without an image";
    route = `Hard: its entropy is above ${gamma}, but it was not reranked${why}. The tagger’s choice stands.`;
  }
  if (!answer.image_width) return route;
  if (entity.seen === null) return `${route} ${unjudgedBecause()}`;
  if (!entity.seen) return `${route} The image does not show it.`;
  return entity.heatmap ? `${route} Its heat map, shown while it is chosen, is where the matcher saw it; the dot is the peak.` : route;
}

const mentionOf = (target) => {
  const node = target instanceof Element && answer && target.closest("[data-mention]");
  return node ? Number(node.dataset.mention) : null;
};

function choose(index) {
  [chosen, pinned, pointed] = [index, true, null];
  update();
}

function point(index) {
  if (!answer || pointed === index) return;
  pointed = index;
  if (answer.entities.length) update();
}

/** Pointer and keys on mentions, wherever they are shown. */
export function listenToMentions() {
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse") point(mentionOf(event.target));
  });
  document.documentElement.addEventListener("pointerleave", () => point(null));
  document.addEventListener("click", (event) => {
    const index = mentionOf(event.target);
    if (index !== null) choose(index);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && answer && pinned) {
      [pinned, pointed] = [false, null];
      update();
    }
  });
  $("result").addEventListener("keydown", (event) => {
    if (!event.target.matches(".mention")) return;
    const last = answer.entities.length - 1;
    const next = { ArrowDown: chosen === last ? 0 : chosen + 1, ArrowUp: chosen === 0 ? last : chosen - 1,
      Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(next);
    $(`mention-${next}`).focus();
  });
  $("result").addEventListener("focusin", (event) => {
    if (event.target.matches(".mention:focus-visible") && !pinned) choose(chosen);
  });
}

/** Before the first result: the categories, in their colours. */
export function showTaxonomy({ coarse }) {
  const names = Object.entries(coarse);
  const count = names.reduce((sum, [, fine]) => sum + fine.length, 0);
  $("result").replaceChildren(html("h2", {}, `What it finds: ${count} categories`),
    html("dl", { class: "taxonomy" }, ...names.map(([name, fine]) => html("div", { "data-coarse": name },
      html("dt", { class: "swatch" }, named(name)), html("dd", {}, fine.map(named).join(", "))))));
}
