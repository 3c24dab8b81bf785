// What is known of an answer besides its annotation: time, models, and the answer itself.

import { curlCommand, pythonCode } from "./client.js";
import { $, bar, html, named, seconds } from "./elements.js";
import { hasPixels, pictureWithBoxes } from "./picture.js";

const SAVED_MS = 60_000; // a browser may begin to read what it saves long after the click

export function clearFacts() {
  $("times").replaceChildren();
  $("facts").replaceChildren();
}

/** Show the facts of an answer that came `elapsed` seconds after its request. */
export function showFacts(answer, elapsed, post) {
  $("times").replaceChildren(times(answer, elapsed));
  $("facts").replaceChildren(models(answer), sources(answer, post));
}

const card = (title, note, ...children) => html("section", { class: "card", "aria-label": title },
  html("h2", {}, title, note && html("small", {}, note)), ...children);

function times(answer, elapsed) {
  const { waiting, ...inStages } = answer.seconds;
  const stages = Object.entries(inStages);
  if (waiting !== undefined) stages.push(["waiting", waiting]);  // for processes, between the stages: it comes last
  const most = Math.max(...stages.map(([, value]) => value), 1e-6);
  return card("Time in each stage", `${seconds(elapsed)} in all, with the way here`,
    html("ol", { class: "bars" }, ...stages.map(([stage, value]) => html("li", {},
      html("span", {}, named(stage)), bar(value / most), html("span", {}, seconds(value))))));
}

function models(answer) {
  const names = answer.models.map(({ role, reference }) => [role, reference]);
  return card("Models", null,
    html("dl", {}, ...[...names, ["run", answer.run_id]].flatMap(([role, name]) =>
      [html("dt", {}, named(role)), html("dd", {}, html("code", {}, name))])),
    names.some(([, name]) => name.startsWith("nano:")) && html("p", { class: "quiet" },
      "These are the small embedded models. In images they know the emblems of 48 invented entities, and nothing of "
      + "the real world; the tagger works on any English post."));
}

function sources(answer, post) {
  const json = () => new Blob([JSON.stringify(answer, null, 2)], { type: "application/json" });
  return card("The answer itself", null,
    html("div", { class: "line" }, download("Download JSON", "annotation.json", json),
      answer.image_width && hasPixels() && download("Download picture", "annotation.png", () => pictureWithBoxes(answer))),
    source("JSON", JSON.stringify(answer, null, 2)), source("The same with Python", pythonCode(post)),
    source("The same with curl", curlCommand(post)));
}

/** A button that saves what `make` gives as a file. */
function download(title, name, make) {
  const button = html("button", { type: "button", class: "button", "data-download": name }, title);
  button.addEventListener("click", async () => {
    const url = URL.createObjectURL(await make());
    html("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), SAVED_MS);
  });
  return button;
}

function source(title, content) {
  const code = html("code", {}, content);
  const copied = html("span", { class: "quiet", role: "status" });
  const button = html("button", { type: "button", class: "button", "aria-label": `Copy: ${title}` }, "Copy");
  button.addEventListener("click", async () => { copied.textContent = await copy(code); });
  return html("details", {}, html("summary", {}, title),
    html("pre", { tabindex: 0, role: "region", "aria-label": title }, code),
    html("div", { class: "line" }, button, copied));
}

/** Over plain HTTP from elsewhere than this machine, browsers give pages no clipboard: then the text is selected. */
async function copy(node) {
  try {
    await navigator.clipboard.writeText(node.textContent);
    return "Copied.";
  } catch {
    getSelection().selectAllChildren(node);
    return "Selected: copy it with Ctrl + C.";
  }
}
