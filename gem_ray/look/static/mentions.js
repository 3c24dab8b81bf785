// Mentions of a post as a person reads them: marked in the text, as a row of a list, and in detail. A mention is an
// entity as the API and the output have it.

import { bar, fixed, html, named, percent, styled } from "./elements.js";

/** How sure the system is: calibrated where anything is. */
export const certainty = (mention) => mention.confidence ?? mention.score;

/** Whether the image shows it: a class of `.mention`, and words. */
export const judgement = ({ seen }) => (seen === null ? "unjudged" : seen ? "seen" : "absent");
export const JUDGED = { seen: "seen in the image", absent: "not seen", unjudged: "not judged" };

/** The text with mentions marked; `attributesOf(index)` gives a mark's, and `labelOf(index)` what is written at it.
    Offsets count code points, as Python does, so the text is cut into those. */
export function markedText(text, mentions, attributesOf, labelOf) {
  const characters = Array.from(text);
  const paragraph = html("p", { class: "text", dir: "auto" });
  const marks = [...mentions.entries()].sort((a, b) => a[1].start - b[1].start || a[0] - b[0]);
  let end = 0;
  for (const [index, mention] of marks) {
    if (mention.start < end) continue; // a mark cannot overlap the one before; the list shows it all the same
    paragraph.append(characters.slice(end, mention.start).join(""),
      html("mark", { "data-coarse": mention.coarse, ...attributesOf(index) },
        characters.slice(mention.start, mention.end).join(""), html("small", {}, ` ${labelOf(index)}`)));
    end = mention.end;
  }
  paragraph.append(characters.slice(end).join(""));
  return paragraph;
}

/** What stands in a row: the name, the category, and whatever else there is to say. */
export const rowParts = (name, note, ...more) => [
  html("span", { class: "name" }, html("bdi", {}, name), " ", html("small", {}, note)), ...more];

export const pill = (words) => html("span", { class: "pill" }, words);

/** What the system thought of a mention. `gamma` is the filter's threshold in nats, null where it is not known. */
export const details = (mention, gamma) => [
  html("h3", {}, mention.text),
  html("p", { class: "path" }, [...new Set([mention.coarse, mention.fine])].map(named).join(" › ")),
  html("div", { class: "columns" }, candidates(mention), readings(mention, gamma))];

const candidates = (mention) => html("div", {}, html("h4", {}, "The tagger’s candidates"),
  html("ol", { class: "bars" }, ...mention.candidates.map(({ fine, probability }) => html("li", {
    class: fine === mention.fine ? "chosen" : null,
  },
    html("span", {}, named(fine)), bar(probability), html("span", {}, fixed(probability))))));

function readings(mention, gamma) {
  const rows = [["score", fixed(mention.score)], ["confidence", mention.confidence],
    ["accepted", { true: "yes", false: "no" }[mention.accepted]],
    ...(mention.seen === null ? [["in the image", "not judged"]] : [["in the image (P_T)", fixed(mention.match_score)]]),
    ["calibrated", mention.seen_probability],
    ["box from", mention.box && (mention.box_source || "unknown")], ["box score", mention.box_score],
    ["box confidence", mention.box_confidence]];
  return html("dl", { class: "readings" },
    html("dt", {}, "entropy"), html("dd", {}, `${fixed(mention.entropy)} nats`),
    gamma !== null && gauge(mention.entropy, gamma),
    ...rows.filter(([, value]) => value !== null && value !== undefined).flatMap(([name, value]) =>
      [html("dt", {}, name), html("dd", {}, typeof value === "number" ? fixed(value) : value)]));
}

/** Entropy as a bar, γ as a line across it. */
function gauge(entropy, gamma) {
  const full = Math.max(3 * gamma, entropy, 0.1);
  const line = styled(html("b", { "data-label": `γ ${gamma}` }), { left: `${(100 * gamma) / full}%` });
  const meter = bar(entropy / full);
  meter.append(line);
  return html("dd", { class: "gauge", "aria-hidden": "true" }, meter);
}

export const sure = (mention) => html("span", { class: "sure" }, percent(certainty(mention)));
