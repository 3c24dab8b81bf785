"use strict";
// The cards of the gallery: text, mentions, picture, and what the system thought of a mention.
// Posts are hostile text: they enter the page through textContent, setAttribute and JSON.parse only.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const posts = data.posts;

// ---- Small tools

function create(namespace, tag, attributes, children) {
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const html = (tag, attributes = {}, ...children) => create("http://www.w3.org/1999/xhtml", tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => create("http://www.w3.org/2000/svg", tag, attributes, children);
const named = (category) => category.replaceAll("_", " ");
const percent = (ratio) => `${Math.round(100 * ratio)}%`;
const fixed = (value) => (value === null ? "unknown" : value.toFixed(3));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// ---- Cards

/** One post. `isDim(n)` says whether the filters pass by its n-th mention; the missed come after those found. */
function card(position, isDim) {
  const post = posts[position];
  const label = `Post ${post.id}`;
  return html("article", { class: "card", "data-post": position, "data-status": post.status, "aria-label": label },
    picture(post, position),
    html("div", { class: "body" },
      html("div", { class: "meta" }, html("code", { title: post.id }, post.id),
        post.status === "ok" ? null : html("span", { class: `badge ${post.status}` }, post.status)),
      text(post, isDim),
      ...post.problems.map((problem) => html("p", { class: "problem" },
        html("b", {}, `${named(problem.kind)}, in ${named(problem.stage)}`), problem.message)),
      mentionList(post, isDim)));
}

/** The text with its mentions marked. Offsets count code points, as Python does, so the text is cut into those. */
function text(post, isDim) {
  const characters = Array.from(post.text);
  const paragraph = html("p", { class: "text", dir: "auto" });
  const marks = [...post.entities, ...post.missed].map((mention, index) => ({ mention, index }))
    .sort((a, b) => a.mention.start - b.mention.start || a.index - b.index);
  let end = 0;
  for (const { mention, index } of marks) {
    if (mention.start < end) continue; // a mark cannot overlap the one before; the list below shows it all the same
    const missed = index >= post.entities.length;
    paragraph.append(characters.slice(end, mention.start).join(""), html("mark", {
      class: [missed && "missed", isDim(index) && "dim"].filter(Boolean).join(" ") || null,
      "data-coarse": mention.coarse, "data-label": (missed ? "missed: " : "") + named(mention.fine),
      "data-mention": missed ? null : index,
    }, characters.slice(mention.start, mention.end).join("")));
    end = mention.end;
  }
  paragraph.append(characters.slice(end).join(""));
  return paragraph;
}

const surface = (post, mention) => Array.from(post.text).slice(mention.start, mention.end).join("");

function mentionList(post, isDim) {
  const rows = post.entities.map((entity, index) => html("li", {}, html("button", {
    type: "button", "data-coarse": entity.coarse, "data-mention": index,
    class: `mention${entity.seen ? " seen" : ""}${entity.seen === null ? " unjudged" : ""}${isDim(index) ? " dim" : ""}`,
  },
    html("span", { class: "name" }, html("bdi", {}, surface(post, entity)), html("small", {}, named(entity.fine))),
    entity.reranked ? html("span", { class: "routed" }, "reranked") : html("span"),
    html("span", { class: "sure" }, percent(entity.score)), verdictMark(entity.verdict))));
  post.missed.forEach((gold, index) => rows.push(html("li", {}, html("div", {
    class: `mention lost${isDim(post.entities.length + index) ? " dim" : ""}`, "data-coarse": gold.coarse,
  },
    html("span", { class: "name" },
      html("bdi", {}, surface(post, gold)), html("small", {}, `missed ${named(gold.fine)}`)),
    html("span"), html("span"), html("span", { class: "mark wrong", role: "img", "aria-label": "missed" }, "✗")))));
  return rows.length ? html("ul", { class: "mentions", "aria-label": "Mentions" }, ...rows) : null;
}

function verdictMark(verdict) {
  if (!verdict) return html("span");
  const right = verdict.span && verdict.category && verdict.region;
  const word = right ? "right" : "wrong";
  return html("span", { class: `mark ${word}`, role: "img", "aria-label": word }, right ? "✓" : "✗");
}

// ---- Pictures

function picture(post, position) {
  const holder = $(`picture-${position}`);
  if (!holder) return html("div", { class: "picture" }, html("div", { class: "absent" }, absentSign(), "no image"));
  const image = html("img", { alt: post.caption || "The post's image", decoding: "async",
    src: `data:image/jpeg;base64,${holder.textContent}` });
  const size = [Number(holder.dataset.width), Number(holder.dataset.height)]; // of the original, as boxes are
  const stage = html("div", { class: size[0] > 1.3 * size[1] ? "stage wide" : "stage" }, image,
    html("canvas", { "aria-hidden": "true" }), overlay(post, size), ...tags(post, size));
  stage.style.setProperty("--ratio", size.join(" / "));
  return html("div", { class: "picture" }, stage);
}

const absentSign = () => svg("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" },
  svg("path", { d: "M4 6h24v20H4zM4 22l7-7 6 6 4-4 7 7M4 2l24 28" }));

const rectangle = ([x1, y1, x2, y2], name) => svg("rect",
  { x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: name });

/** Boxes in the original image's pixels: solid for what was found, dashed for gold. */
function overlay(post, [width, height]) {
  const layer = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const golds = (boxes, coarse, index) => boxes.length ? [svg("g", { "data-coarse": coarse, "data-part": index },
    ...boxes.flatMap((box) => [rectangle(box, "gold under"), rectangle(box, "gold")]))] : [];
  post.missed.forEach((gold) => layer.append(...golds(gold.boxes, gold.coarse, null)));
  const area = ({ box }) => (box ? (box[2] - box[0]) * (box[3] - box[1]) : 0);
  const bySize = [...post.entities.entries()].sort((a, b) => area(b[1]) - area(a[1])); // small boxes stay within reach
  bySize.forEach(([index, entity]) => {
    if (entity.verdict) layer.append(...golds(entity.verdict.boxes, entity.coarse, index));
    if (!entity.box) return;
    const [x1, y1, x2, y2] = entity.box;
    const outside = `M0 0H${width}V${height}H0ZM${x1} ${y1}H${x2}V${y2}H${x1}Z`;
    layer.append(svg("g", { "data-coarse": entity.coarse, "data-mention": index, "data-part": index },
      svg("path", { class: "veil", "fill-rule": "evenodd", d: outside }),
      rectangle(entity.box, "halo"), rectangle(entity.box, "box"),
      entity.point && svg("circle", { class: "peak", cx: entity.point[0], cy: entity.point[1], r: width / 60 })));
  });
  return layer;
}

function tags(post, [width, height]) {
  return post.entities.flatMap((entity, index) => {
    if (!entity.box) return [];
    const [left, top] = [(100 * entity.box[0]) / width, (100 * entity.box[1]) / height];
    const attributes = { class: "tag", "data-coarse": entity.coarse, "data-part": index, "aria-hidden": "true" };
    const tag = html("span", attributes, surface(post, entity));
    tag.style.left = `${Math.min(70, left)}%`;
    tag.style.top = `calc(${top}% ${top > 9 ? "- 18px" : "+ 2px"})`; // over the box, or in it at the image's edge
    return [tag];
  });
}

const RAMP = [[20, 22, 90], [110, 30, 150], [225, 70, 90], [255, 160, 50], [255, 245, 160]];

function drawHeat(canvas, [width, height, encoded]) {
  const values = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const image = new ImageData(width, height);
  values.forEach((value, cell) => {
    const place = (value / 255) * (RAMP.length - 1);
    const low = Math.min(RAMP.length - 2, Math.floor(place));
    for (let channel = 0; channel < 3; channel += 1) {
      const [from, to] = [RAMP[low][channel], RAMP[low + 1][channel]];
      image.data[4 * cell + channel] = from + (place - low) * (to - from);
    }
    image.data[4 * cell + 3] = 60 + 0.62 * value;
  });
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// ---- The mention under the pointer or the focus

let shown = null;

function showMention(target) {
  const node = target.closest("[data-mention]");
  const owner = target.closest(".card");
  if (!node || !owner) return hideTip();
  const key = `${owner.dataset.post}/${node.dataset.mention}`;
  if (shown && shown.key === key) return undefined;
  hideTip();
  const entity = posts[owner.dataset.post].entities[node.dataset.mention];
  shown = { key, owner, node };
  const index = node.dataset.mention;
  const parts = owner.querySelectorAll(`[data-mention="${index}"], [data-part="${index}"]`);
  parts.forEach((part) => part.classList.add("active"));
  const canvas = owner.querySelector("canvas");
  if (entity.heat && canvas) {
    drawHeat(canvas, entity.heat);
    canvas.parentNode.classList.add("heated");
  }
  const button = owner.querySelector(`button[data-mention="${index}"]`);
  button.setAttribute("aria-describedby", "tip");
  fillTip(posts[owner.dataset.post], entity);
  placeTip(shown);
  return undefined;
}

function hideTip() {
  $("tip").hidden = true;
  if (!shown) return;
  shown.owner.querySelectorAll(".active").forEach((part) => part.classList.remove("active"));
  shown.owner.querySelectorAll(".heated").forEach((part) => part.classList.remove("heated"));
  shown.owner.querySelectorAll("[aria-describedby]").forEach((part) => part.removeAttribute("aria-describedby"));
  shown = null;
}

function fillTip(post, entity) {
  const rows = [["score", fixed(entity.score)], ["entropy", `${fixed(entity.entropy)} nats`],
    ["route", entity.reranked ? "hard, reranked" : "not reranked"]];
  rows.push(entity.seen === null ? ["in the image", "not judged"] : ["in the image (P_T)", fixed(entity.match)]);
  if (entity.box) rows.push(["box from", entity.source || "unknown"]);
  if (entity.boxScore !== null) rows.push(["box score", fixed(entity.boxScore)]);
  $("tip").dataset.coarse = entity.coarse;
  $("tip").replaceChildren(
    html("h3", {}, surface(post, entity)),
    html("p", { class: "path" }, [...new Set([entity.coarse, entity.fine])].map(named).join(" › ")),
    html("ol", {}, ...entity.candidates.map(([fine, probability]) => candidate(entity, fine, probability))),
    html("dl", {}, ...rows.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)])),
    entity.verdict ? said(entity.verdict) : "");
}

function candidate(entity, fine, probability) {
  const bar = html("i");
  bar.style.width = percent(probability);
  return html("li", { class: fine === entity.fine ? "chosen" : null },
    html("span", {}, named(fine)), html("span", { class: "meter" }, bar), html("span", {}, fixed(probability)));
}

function said(verdict) {
  const line = (right, sentence) => html("span", {},
    html("span", { class: `mark ${right ? "right" : "wrong"}` }, right ? "✓ " : "✗ "), sentence);
  if (!verdict.span) return html("p", { class: "said" }, line(false, "no gold mention has these words"));
  const seen = verdict.boxes.length ? "gold sees it in the image" : "gold does not see it";
  return html("p", { class: "said" },
    line(verdict.category, verdict.category ? "category as in gold" : `gold category: ${named(verdict.gold)}`),
    line(verdict.region, verdict.region ? "region as in gold" : `region differs: ${seen}`));
}

/** Beside the card if there is room, so that the image stays in sight; else under the mention, or over it. */
function placeTip({ owner, node }) {
  const tip = $("tip");
  tip.hidden = false;
  const [card, at] = [owner.getBoundingClientRect(), node.getBoundingClientRect()];
  const { offsetWidth: width, offsetHeight: height } = tip;
  const clamp = (value, size, room) => Math.max(12, Math.min(value, room - size - 12));
  const beside = [card.right + 8, card.left - width - 8].find((left) => left >= 12 && left + width <= innerWidth - 12);
  const under = at.bottom + height + 8 > innerHeight ? at.top - height - 8 : at.bottom + 8;
  tip.style.left = `${beside ?? clamp(at.left, width, innerWidth)}px`;
  tip.style.top = `${clamp(beside === undefined ? under : card.top, height, innerHeight)}px`;
}
