// The cards of the gallery: text, mentions, picture, and what the system thought of a mention.
// Posts are hostile text: they enter the page through textContent, setAttribute and JSON.parse only.

import { drawBoxes, drawHeat, keepTags } from "./boxes.js";
import { $, fixed, html, named, svg } from "./elements.js";
import { details, judgement, JUDGED, markedText, pill, rowParts, sure } from "./mentions.js";

export const data = JSON.parse($("data").textContent);
export const posts = data.posts;

/** One post. `isDim(n)` says whether the filters pass by its n-th mention; the missed come after those found. */
export function card(position, isDim) {
  const post = posts[position];
  return html("article", {
    class: "card", "data-post": position, "data-status": post.status, "aria-label": `Post ${post.post_id}`,
  },
    picture(post, position),
    html("div", { class: "body" },
      html("div", { class: "meta" }, html("code", { title: post.post_id }, post.post_id),
        post.status !== "ok" && html("span", { class: `badge ${post.status}` }, post.status),
        html("a", { href: `#${new URLSearchParams({ post: post.post_id })}`, "aria-label": `${rowName(post)}, ${post.post_id}` },
          rowName(post))),
      text(post, isDim),
      ...post.problems.map((problem) => html("p", { class: "problem" }, problem.message,
        html("small", {}, `${named(problem.kind)}, in ${named(problem.stage)}`))),
      mentionList(post, isDim)));
}

const FILE = 2 ** 32; // `row_id` is the number of the file times this, plus the row's position in it

function rowName({ row_id: id }) {
  if (id === null) return "row";
  return id < FILE ? `row ${id}` : `file ${Math.floor(id / FILE)}, row ${id % FILE}`;
}

/** The output row of a post, as it is, and how to ask for it. */
export function row(position) {
  const { verdicts, missed, ...annotation } = posts[position];
  const query = `SELECT * FROM '${data.annotations}/**/*.parquet' WHERE row_id = ${annotation.row_id}`;
  return html("section", { class: "card row", "aria-label": "Output row" }, html("h2", {}, "Its output row"),
    data.annotations && annotation.row_id !== null && html("p", { class: "quiet" }, html("code", {}, query)),
    html("pre", { tabindex: 0, role: "region", "aria-label": "Output row" }, JSON.stringify(annotation, null, 2)));
}

function text(post, isDim) {
  const found = post.entities.length;
  const mentions = [...post.entities, ...post.missed];
  return markedText(post.text, mentions, (index) => ({
    class: [index >= found && "missed", isDim(index) && "dim"].filter(Boolean).join(" ") || null,
    "data-mention": index < found ? index : null,
  }), (index) => (index < found ? "" : "missed: ") + named(mentions[index].fine));
}

function mentionList(post, isDim) {
  const found = post.entities.map((entity, index) => html("li", {}, html("button", {
    type: "button", "data-coarse": entity.coarse, "data-mention": index,
    class: `mention ${judgement(entity)}${isDim(index) ? " dim" : ""}`,
  }, ...rowParts(entity.text, named(entity.fine), entity.reranked && pill("reranked"), sure(entity),
    html("span", { class: "unseen" }, ` ${JUDGED[judgement(entity)]}`), verdictMark(post.verdicts[index])))));
  const missed = post.missed.map((gold, index) => html("li", {}, html("div", {
    class: `mention lost${isDim(post.entities.length + index) ? " dim" : ""}`, "data-coarse": gold.coarse,
  }, ...rowParts(gold.text, `missed ${named(gold.fine)}`, sign(false, "missed")))));
  const rows = [...found, ...missed];
  return rows.length > 0 && html("ul", { class: "mentions", "aria-label": "Mentions" }, ...rows);
}

const sign = (isRight, word) =>
  html("span", { class: `mark ${isRight ? "right" : "wrong"}`, role: "img", "aria-label": word }, isRight ? "✓" : "✗");

function verdictMark(verdict) {
  if (!verdict) return null;
  const right = verdict.span && verdict.category && verdict.region;
  return sign(right, right ? "right" : "wrong");
}

// ---- Pictures

function picture(post, position) {
  const holder = $(`picture-${position}`);
  if (!holder) return html("div", { class: "picture" }, html("div", { class: "absent" }, absentSign(), "no image"));
  const image = html("img", { alt: post.caption || "The post’s image", class: "pixels", decoding: "async",
    src: `data:image/jpeg;base64,${holder.textContent}` });
  const size = [Number(holder.dataset.width), Number(holder.dataset.height)]; // of the original, as boxes are
  const mentions = [...post.entities.map((mention, index) => ({ mention, index, gold: post.verdicts[index]?.boxes })),
    ...post.missed.map((mention) => ({ mention, index: null, gold: mention.boxes }))];
  const stage = html("div", { class: "stage" }, image,
    html("canvas", { class: "heat", "aria-hidden": "true" }),
    html("div", { class: "boxes" }, ...drawBoxes(size, mentions)));
  stage.style.setProperty("--ratio", size.join(" / "));
  keepTags(stage);
  return html("div", { class: "picture" }, stage);
}

const absentSign = () => svg("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" },
  svg("path", { d: "M4 6h24v20H4zM4 22l7-7 6 6 4-4 7 7M4 2l24 28" }));

// ---- The mention under the pointer or the focus

let shown = null;

export function showMention(target) {
  const node = target.closest("[data-mention]");
  const owner = target.closest(".card");
  if (!node || !owner) return hideTip();
  const index = node.dataset.mention;
  const key = `${owner.dataset.post}/${index}`;
  if (shown && shown.key === key) return undefined;
  hideTip();
  const post = posts[owner.dataset.post];
  shown = { key, owner, node };
  owner.querySelectorAll(`[data-mention="${index}"]`).forEach((part) => part.classList.add("active"));
  const canvas = owner.querySelector("canvas");
  if (post.entities[index].heatmap && canvas) {
    drawHeat(canvas, post.entities[index].heatmap);
    canvas.parentNode.classList.add("heated");
  }
  owner.querySelector(`button[data-mention="${index}"]`).setAttribute("aria-describedby", "tip");
  $("tip").dataset.coarse = post.entities[index].coarse;
  $("tip").replaceChildren(...details(post.entities[index], data.gamma), ...said(post.verdicts[index]));
  placeTip(shown);
  return undefined;
}

export function hideTip() {
  $("tip").hidden = true;
  if (!shown) return;
  for (const name of ["active", "heated"]) {
    shown.owner.querySelectorAll(`.${name}`).forEach((part) => part.classList.remove(name));
  }
  shown.owner.querySelectorAll("[aria-describedby]").forEach((part) => part.removeAttribute("aria-describedby"));
  shown = null;
}

/** What gold says to it. */
function said(verdict) {
  if (!verdict) return [];
  const line = (right, sentence) => html("span", {},
    html("span", { class: `mark ${right ? "right" : "wrong"}` }, right ? "✓ " : "✗ "), sentence);
  if (!verdict.span) return [html("p", { class: "said" }, line(false, "no gold mention has these words"))];
  const differs = verdict.iou === null
    ? `gold ${verdict.boxes.length ? "sees it in the image" : "does not see it"}` : "too little overlap";
  const overlap = verdict.iou === null ? "" : ` (IoU ${fixed(verdict.iou)})`;
  return [html("p", { class: "said" },
    line(verdict.category, verdict.category ? "category as in gold" : `gold category: ${named(verdict.gold)}`),
    line(verdict.region, (verdict.region ? "region as in gold" : `region differs: ${differs}`) + overlap))];
}

export const moveTip = () => shown && placeTip(shown);

/** Beside the card if there is room, so that the image stays in sight; else under the mention, or over it. */
function placeTip({ owner, node }) {
  const tip = $("tip");
  tip.hidden = false;
  const [place, at] = [owner.getBoundingClientRect(), node.getBoundingClientRect()];
  const { offsetWidth: width, offsetHeight: height } = tip;
  const clamp = (value, size, room) => Math.max(12, Math.min(value, room - size - 12));
  const beside = [place.right + 8, place.left - width - 8].find((left) => left >= 12 && left + width <= innerWidth - 12);
  const under = at.bottom + height + 8 > innerHeight ? at.top - height - 8 : at.bottom + 8;
  tip.style.left = `${beside ?? clamp(at.left, width, innerWidth)}px`;
  tip.style.top = `${clamp(beside === undefined ? under : place.top, height, innerHeight)}px`;
}
