// An annotation as a person reads it: the text with its mentions, and what the system thought of each.

import { $, counted, html, named, percent } from "./elements.js";
import { certainty, details, judgement, JUDGED, markedText, pill, rowParts } from "./mentions.js";
import { clearBoxes, heat, offerZoom, showBoxes, unheat } from "./picture.js";

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
let groups = []; // mentions that say the same, as lists of their indices: a row each
let groupOf = []; // index of a mention -> of its group
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
  groupMentions(entities);
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
    markedText(answer.text, entities, (index) => ({ "data-mention": index }), (index) => named(entities[index].fine)),
    ...(entities.length ? [mentionList(), html("div", {
      id: "inspector", class: "details inspector", role: "tabpanel", tabindex: 0,
    })] : []));
  showBoxes(answer);
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

function groupMentions(entities) {
  const byWhatTheySay = new Map();
  groupOf = entities.map(({ text, fine, seen }) => {
    const key = JSON.stringify([text.toLowerCase(), fine, seen]);
    if (!byWhatTheySay.has(key)) byWhatTheySay.set(key, byWhatTheySay.size);
    return byWhatTheySay.get(key);
  });
  groups = [...byWhatTheySay.values()].map(() => []);
  groupOf.forEach((group, index) => groups[group].push(index));
}

function mentionList() {
  return html("div", { class: "mentions", role: "tablist", "aria-orientation": "vertical", "aria-label": "Entities" },
    ...groups.map((members, group) => {
      const entity = answer.entities[members[0]];
      return html("button", {
        type: "button", role: "tab", id: `mention-${group}`, "aria-controls": "inspector",
        class: `mention ${judgement(entity)}`, "data-coarse": entity.coarse, "data-mention": members[0],
      }, ...rowParts(entity.text, named(entity.fine),
        members.length > 1 && pill(`${members.length} times`), members.length > 1 && " ",
        members.some((index) => answer.entities[index].reranked) && pill("reranked"), " ",
        html("span", { class: "sure" }, range(members.map((index) => percent(certainty(answer.entities[index]))))),
        html("span", { class: "unseen" }, ` ${JUDGED[judgement(entity)]}`)));
    }));
}

function range(values) {
  const sorted = [...new Set(values)].sort((a, b) => Number.parseInt(a, 10) - Number.parseInt(b, 10));
  return sorted.length > 1 ? `${Number.parseInt(sorted[0], 10)}–${sorted.at(-1)}` : sorted[0];
}

// ---- The mention that is pointed at, or chosen

function update() {
  const alone = pointed ?? (pinned ? chosen : null);
  for (const node of document.querySelectorAll("[data-mention]")) {
    node.classList.toggle("active", alone !== null && groupOf[node.dataset.mention] === groupOf[alone]);
  }
  for (const [group, tab] of document.querySelectorAll(".mention").entries()) {
    const isChosen = group === groupOf[chosen];
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
  }
  const map = alone === null ? null : answer.entities[alone].heatmap;
  if (map && answer.image_width) heat(map);
  else unheat();
  if (answer.image_width && pointed === null) offerZoom(answer.entities[chosen].box);
  inspect(alone ?? chosen);
}

function inspect(index) {
  const entity = answer.entities[index];
  const panel = $("inspector");
  panel.dataset.coarse = entity.coarse;
  panel.setAttribute("aria-labelledby", `mention-${groupOf[index]}`);
  const hadFocus = panel.contains(document.activeElement) && document.activeElement.dataset.turn;
  panel.replaceChildren(...[turns(index), ...details(entity, answer.gamma), html("p", { class: "said" }, said(entity))]
    .filter(Boolean));
  if (hadFocus) panel.querySelector(`[data-turn="${hadFocus}"]`)?.focus();
}

/** Where an entity is mentioned several times: which mention this is, and the way to the others. */
function turns(index) {
  const members = groups[groupOf[index]];
  if (members.length === 1) return null;
  const at = members.indexOf(index);
  const turn = (step, sign, words) => {
    const button = html("button", { type: "button", class: "button", "aria-label": words, "data-turn": step }, sign);
    button.addEventListener("click", () => choose(members[(at + step + members.length) % members.length]));
    return button;
  };
  return html("span", { class: "turns" }, turn(-1, "‹", "Previous mention"),
    html("span", {}, `${at + 1} of ${counted(members.length, "mention")}`), turn(1, "›", "Next mention"));
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
    const [at, last] = [groupOf[chosen], groups.length - 1];
    const next = { ArrowDown: at === last ? 0 : at + 1, ArrowUp: at === 0 ? last : at - 1,
      Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(groups[next][0]);
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
