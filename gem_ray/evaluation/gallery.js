// The page of the gallery: totals, filters and the order of the posts.

import { $, counted, html, listenToTheme, named } from "./elements.js";
import { card, data, hideTip, moveTip, posts, row, showMention } from "./gallery_cards.js";
import { certainty, judgement, JUDGED } from "./mentions.js";

// ---- Facets: what each mention can be filtered by

const hasGold = posts.some((post) => post.missed.length || post.verdicts.some(Boolean));
const facets = {
  coarse: { title: "Category", options: data.coarse.map((name) => [name, named(name)]) },
  fine: { title: "Fine category", options: [] },
  status: { title: "Post", options: [["ok", "ok"], ["degraded", "degraded"], ["rejected", "rejected"]] },
  grounded: { title: "In the image", options: Object.entries(JUDGED) },
  reranked: { title: "Route", options: [["yes", "reranked"], ["no", "not reranked"]] },
  verdict: {
    title: "Against gold",
    options: [["right", "right"], ["wrong", "wrong"], ["category", "wrong category"], ["region", "wrong region"],
      ["spurious", "not in gold"], ["missed", "missed"]],
  },
};
if (!hasGold) delete facets.verdict;
const keys = Object.keys(facets);

function verdictsOf(verdict) {
  if (!verdict) return [];
  if (!verdict.span) return ["wrong", "spurious"];
  if (verdict.category && verdict.region) return ["right"];
  return ["wrong", ...(verdict.category ? [] : ["category"]), ...(verdict.region ? [] : ["region"])];
}

// One item a mention, in the posts' order; a post without mentions is one item, so that its status can be chosen.
const items = [];
posts.forEach((post, position) => {
  const add = (values, mention) => items.push({ position, mention, values: { status: [post.status], ...values } });
  post.entities.forEach((entity, index) => add({
    coarse: [entity.coarse], fine: [entity.fine], grounded: [judgement(entity)],
    reranked: [entity.reranked ? "yes" : "no"], verdict: verdictsOf(post.verdicts[index]),
  }, index));
  post.missed.forEach((gold, index) => add({
    coarse: [gold.coarse], fine: [gold.fine], grounded: [], reranked: [], verdict: ["wrong", "missed"],
  }, post.entities.length + index));
  if (!post.entities.length && !post.missed.length) {
    add({ coarse: [], fine: [], grounded: [], reranked: [], verdict: [] }, null);
  }
});
const haystacks = posts.map((post) => [post.text, post.caption || "", post.post_id].join("\n").toLowerCase());
const parents = new Map(items.flatMap((item) => item.values.fine.map((fine) => [fine, item.values.coarse[0]])));
facets.fine.options = [...parents.keys()]
  .sort((a, b) => data.coarse.indexOf(parents.get(a)) - data.coarse.indexOf(parents.get(b)) || a.localeCompare(b))
  .map((name) => [name, named(name)]);

// ---- State, kept in the address: #status=degraded&coarse=person,event&q=rally, or #post=ID for one alone with its row

const state = { q: "", sort: "", post: null, chosen: {} };

// What orders posts, the lowest first; posts without mentions have nothing to be unsure of.
const ORDERS = {
  "": { title: "low confidence first", of: (post) => Math.min(Infinity, ...post.entities.map(certainty)) },
  entropy: { title: "high entropy first", of: (post) => -Math.max(-1, ...post.entities.map((entity) => entity.entropy)) },
  input: { title: "as in the input", of: () => 0 },
};

function readHash() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  state.q = parameters.get("q") || "";
  state.sort = parameters.get("sort") in ORDERS ? parameters.get("sort") : "";
  state.post = parameters.get("post");
  for (const key of keys) state.chosen[key] = new Set((parameters.get(key) || "").split(",").filter(Boolean));
}

function writeHash() {
  const parameters = new URLSearchParams();
  for (const key of keys) if (state.chosen[key].size) parameters.set(key, [...state.chosen[key]].join(","));
  if (state.q) parameters.set("q", state.q);
  if (state.sort) parameters.set("sort", state.sort);
  if (state.post !== null) parameters.set("post", state.post);
  const hash = parameters.toString().replaceAll("%2C", ",");
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

// ---- Filtering: one pass over the items, which also counts what every other choice would give

function filter() {
  const query = state.q.trim().toLowerCase();
  const active = keys.filter((key) => state.chosen[key].size);
  const counts = Object.fromEntries(keys.map((key) => [key, new Map()]));
  const countedPost = new Map(); // status counts posts, not mentions
  const matches = new Map(); // position of a post -> its mentions that match
  const found = query ? haystacks.map((text) => text.includes(query)) : null;
  let mentions = 0;
  for (const item of items) {
    if (found && !found[item.position]) continue;
    if (state.post !== null && posts[item.position].post_id !== state.post) continue;
    const failed = active.filter((key) => !item.values[key].some((value) => state.chosen[key].has(value)));
    if (failed.length > 1) continue;
    for (const key of failed.length ? failed : keys) {
      for (const value of item.values[key]) {
        if (key === "status") {
          if (countedPost.get(value) === item.position) continue;
          countedPost.set(value, item.position);
        }
        counts[key].set(value, (counts[key].get(value) || 0) + 1);
      }
    }
    if (failed.length) continue;
    if (!matches.has(item.position)) matches.set(item.position, new Set());
    if (item.mention !== null) {
      matches.get(item.position).add(item.mention);
      mentions += 1;
    }
  }
  const places = posts.map(ORDERS[state.sort].of);
  const order = [...matches.keys()].sort((a, b) => (places[a] === places[b] ? a - b : places[a] - places[b]));
  return { order, matches, counts, mentions, onMentions: active.some((key) => key !== "status") };
}

let result = null;

function update() {
  result = filter();
  const [all, found] = [counted(posts.length, "post"), result.order.length];
  $("count").textContent = found === posts.length
    ? all
    : `${found.toLocaleString("en")} of ${all}, ${counted(result.mentions, "mention")}`;
  $("clear").hidden = !state.q && state.post === null && keys.every((key) => !state.chosen[key].size);
  $("empty").hidden = result.order.length > 0;
  showCounts();
  hideTip();
  $("grid").replaceChildren();
  appendCards();
  if (state.post !== null) $("grid").append(...result.order.map(row));
}

// ---- Controls

function buildControls() {
  $("sort").append(...Object.entries(ORDERS).map(([value, { title }]) => html("option", { value }, title)));
  for (const key of keys) {
    const facet = facets[key];
    $("facets").append(key === "fine" ? fineMenu(facet) : choices(key, facet));
  }
}

function choices(key, facet) {
  const group = html("fieldset", {}, html("legend", {}, facet.title));
  for (const [value, title] of facet.options) {
    const input = html("input", { type: "checkbox", value, "data-facet": key });
    input.addEventListener("change", () => {
      state.chosen[key][input.checked ? "add" : "delete"](value);
      changed();
    });
    const coarse = key === "coarse" && value;
    group.append(html("label", { class: "choice", "data-coarse": coarse }, input, title, html("span")));
  }
  return group;
}

function fineMenu(facet) {
  const every = html("option", { value: "" }, "every fine category");
  const menu = html("select", { id: "fine", "aria-label": facet.title }, every);
  for (const coarse of data.coarse) {
    const group = facet.options.filter(([value]) => parents.get(value) === coarse);
    if (!group.length) continue;
    menu.append(html("optgroup", { label: named(coarse) },
      ...group.map(([value, title]) => html("option", { value, "data-title": title }, title))));
  }
  menu.addEventListener("change", () => {
    state.chosen.fine = new Set(menu.value ? [menu.value] : []);
    changed();
  });
  return menu;
}

function showCounts() {
  for (const input of document.querySelectorAll("input[data-facet]")) {
    const count = result.counts[input.dataset.facet].get(input.value) || 0;
    input.checked = state.chosen[input.dataset.facet].has(input.value);
    input.nextSibling.nextSibling.textContent = count.toLocaleString("en");
    input.parentNode.classList.toggle("none", !count);
  }
  for (const option of document.querySelectorAll("#fine option[data-title]")) {
    option.textContent = `${option.dataset.title} (${result.counts.fine.get(option.value) || 0})`;
  }
  $("fine").value = [...state.chosen.fine][0] || "";
  $("sort").value = state.sort;
  if (document.activeElement !== $("q")) $("q").value = state.q;
}

function changed() {
  writeHash();
  update();
  showBeginning();
}

function showBeginning() {
  const top = $("grid").getBoundingClientRect().top + scrollY - document.querySelector(".bar").offsetHeight - 20;
  if (scrollY > top) scrollTo(0, top);
}

// ---- Cards, appended as the reader comes near the end

const PAGE = 24;

function appendCards() {
  const shown = $("grid").querySelectorAll("article").length;
  $("grid").append(...result.order.slice(shown, shown + PAGE).map((position) => {
    const mentions = result.matches.get(position);
    return card(position, (mention) => result.onMentions && !mentions.has(mention));
  }));
}
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) appendCards();
}, { rootMargin: "1200px" }).observe($("sentinel"));

// ---- Start

function totals() {
  const entities = posts.flatMap((post) => post.entities);
  const count = (status) => posts.filter((post) => post.status === status).length;
  const rows = [
    ["posts", posts.length],
    ["mentions", entities.length],
    ["seen in the image", entities.filter((entity) => entity.seen).length],
    ["not seen", entities.filter((entity) => entity.seen === false).length],
    ["not judged", entities.filter((entity) => entity.seen === null).length],
    ["reranked", entities.filter((entity) => entity.reranked).length],
    ["degraded", count("degraded")],
    ["rejected", count("rejected")],
  ];
  $("totals").append(...rows.map(([name, value]) => html("li", {},
    html("b", {}, value.toLocaleString("en")), html("span", {}, name))));
  $("summary").textContent = hasGold
    ? "Point at a mention to see where it was found. Solid boxes are the system's, dashed ones are gold."
    : "Point at a mention to see where it was found in the image, and how sure the system is.";
}

function listen() {
  let timer = 0;
  $("q").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { state.q = $("q").value; changed(); }, 80);
  });
  $("clear").addEventListener("click", () => {
    state.q = $("q").value = "";
    state.post = null;
    for (const key of keys) state.chosen[key].clear();
    changed();
  });
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; changed(); });
  $("toggle").addEventListener("click", () => openFilters($("facets").hidden));
  listenToTheme();
  for (const name of ["pointerover", "focusin", "click"]) {
    $("grid").addEventListener(name, (event) => showMention(event.target));
  }
  $("grid").addEventListener("pointerleave", hideTip);
  $("grid").addEventListener("focusout", hideTip);
  addEventListener("scroll", () => { moveTip(); }, { passive: true });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
    if (event.key === "/" && document.activeElement !== $("q")) { event.preventDefault(); $("q").focus(); }
  });
  addEventListener("hashchange", () => { readHash(); update(); showBeginning(); });
}

function openFilters(open) {
  $("facets").hidden = !open;
  $("toggle").setAttribute("aria-expanded", open);
}

readHash();
buildControls();
totals();
openFilters(matchMedia("(min-width: 700px)").matches);
listen();
update();
