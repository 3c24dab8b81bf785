// The page: a post goes in by hand, drop, paste or example; its annotation or a kind word comes out.

import { annotate, Failure, fetchExamples, fetchImage, fetchLimits, fetchTaxonomy, useKey } from "./client.js";
import { $, bytes, counted, html, listenToTheme, svg } from "./elements.js";
import { clearFacts, showFacts } from "./facts.js";
import { hideImage, imageSize, listenToZoom, showImage } from "./picture.js";
import { clearResult, listenToMentions, showResult, showTaxonomy } from "./result.js";

let image = null; // the file to send
let limits = {};
let running = null; // the AbortController of the request on its way

// ---- The post

async function setImage(file) {
  image = file;
  clearAll();
  const isShown = await showImage(file);
  if (image !== file) return; // another was chosen meanwhile
  const size = imageSize();
  $("file-name").textContent = [file.name || "pasted image", size && `${size[0]} × ${size[1]}`, bytes(file.size)]
    .filter(Boolean).join(", ") + (isShown ? "" : "; this browser cannot show it");
  $("change").hidden = $("remove").hidden = false;
}

function removeImage() {
  image = null;
  $("file-name").textContent = "";
  $("change").hidden = $("remove").hidden = true;
  hideImage();
  clearAll();
}

function clearAll() {
  tried = null;
  cancel();
  if (document.querySelector(".totals")) clearResult();
  clearFacts();
  showFailure(null);
  $("context").hidden = true;
}

function takeFile(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) || files[0];
  if (file) setImage(file);
  return Boolean(file);
}

/** The fields besides text and image, as they are named there and in the API. */
const MORE = ["caption", "knowledge", "tokens"];

const postNow = () => ({
  text: $("text").value, caption: $("caption").value.trim(), knowledge: $("knowledge").value.trim(),
  tokens: $("tokens").value.split(/\s+/).filter(Boolean), image,
});

function countCharacters() {
  const count = Array.from($("text").value).length;
  const over = limits.max_text_chars && count > limits.max_text_chars;
  $("length").textContent = counted(count, "character")
    + (over ? `, ${(count - limits.max_text_chars).toLocaleString("en")} too many` : "");
  $("length").classList.toggle("over", Boolean(over));
}

// ---- Annotating

async function run() {
  if (running) return;
  tried = null;
  const post = postNow();
  const refusal = refusalOf(post.text);
  if (refusal) {
    showFailure(refusal);
    $("text").focus();
    return;
  }
  const request = new AbortController();
  running = request;
  setBusy(true);
  showFailure(null);
  $("status").textContent = "Annotating…";
  const started = performance.now();
  try {
    const answer = await annotate(post, request.signal);
    if (running !== request) return;
    $("status").textContent = showResult(answer);
    showFacts(answer, (performance.now() - started) / 1000, post);
    showContext(answer);
    $("key-form").hidden = true;
    reveal();
  } catch (error) {
    if (running !== request) return; // cancelled
    $("status").textContent = "";
    showFailure(error);
  } finally {
    if (running === request) cancel();
  }
}

/** What the tagger was told besides the text. */
function showContext({ caption, knowledge }) {
  $("context").textContent = [caption && `Caption: ${caption}`, knowledge && `Knowledge: ${knowledge}`]
    .filter(Boolean).join("\n");
  $("context").hidden = !$("context").textContent;
}

/** Wait no longer for the request on its way, if there is one. */
function cancel() {
  running?.abort();
  running = null;
  setBusy(false);
}

/** What the service would refuse anyway, said without sending it. */
function refusalOf(text) {
  if (!text.trim()) return new Failure(422, "Write a post first", "An image alone has no entities to look for.");
  const count = Array.from(text).length;
  if (limits.max_text_chars && count > limits.max_text_chars) {
    return new Failure(413, "The post is too long", `It has ${counted(count, "character")}; this service takes `
      + `${limits.max_text_chars.toLocaleString("en")}.`);
  }
  const most = Math.min(limits.max_image_bytes ?? Infinity, limits.max_body_bytes ?? Infinity);
  if (image && image.size > most) {
    return new Failure(413, "The image is too large",
      `It has ${bytes(image.size)}; this service takes ${bytes(most)}.`);
  }
  return null;
}

function setBusy(isBusy) {
  $("annotate").textContent = isBusy ? "Cancel" : "Annotate";
  $("annotate").toggleAttribute("data-busy", isBusy);
  $("form").setAttribute("aria-busy", isBusy);
}

/** On a phone the result is below the fold: bring it into sight, and leave the focus where it is. */
function reveal() {
  if ($("result").getBoundingClientRect().top < innerHeight - 160) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("result").scrollIntoView({ block: "start", behavior: still ? "auto" : "smooth" });
}

// ---- Failures

let waiting = 0; // the timer of a countdown

function showFailure(failure) {
  clearInterval(waiting);
  $("error").replaceChildren();
  if (!failure) return;
  if (!(failure instanceof Failure)) {
    showFailure(new Failure(0, "This page failed", String(failure)));
    throw failure;
  }
  const wait = failure.retryAfter ? html("p", {}, waitFor(failure.retryAfter)) : null;
  $("error").append(html("div", { class: "card notice" }, html("b", {}, failure.title),
    failure.detail && html("p", {}, failure.detail), wait));
  if (wait) countDown(wait, failure.retryAfter);
  else if (failure.retryAfter === 0) offerRetry();
  if (failure.status === 401) askForKey();
}

function offerRetry() {
  const button = html("button", { type: "button", class: "button" }, "Try again");
  button.addEventListener("click", () => { $("text").focus(); run(); });
  $("error").firstElementChild.append(button);
}

const waitFor = (seconds) => `Please try again in ${counted(seconds, "second")}. Your post is still here.`;

/** Seen by the second, spoken at the beginning and the end. */
function countDown(node, seconds) {
  const end = Date.now() + 1000 * seconds;
  node.setAttribute("aria-live", "off");
  waiting = setInterval(() => {
    const left = Math.ceil((end - Date.now()) / 1000);
    node.textContent = left > 0 ? waitFor(left) : "You can try again now.";
    if (left > 0) return;
    clearInterval(waiting);
    $("status").textContent = node.textContent;
    offerRetry();
  }, 500);
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

// ---- Beginning

async function greet() {
  countCharacters();
  try {
    const [taxonomy, stated] = await Promise.all([fetchTaxonomy(), fetchLimits()]);
    limits = stated;
    if (!$("result").hasChildNodes()) showTaxonomy(taxonomy);
    countCharacters();
  } catch (error) {
    showFailure(error);
  }
}

async function offerExamples() {
  const examples = await fetchExamples();
  $("examples").append(...examples.map((example) => {
    const sign = example.image
      ? html("img", { src: example.image, alt: "", width: 40, height: 40 })
      : svg("svg", { viewBox: "0 0 22 22", "aria-hidden": "true" }, svg("path", { d: "M2 5h18M2 11h18M2 17h11" }));
    const button = html("button", { type: "button", class: "example" },
      sign, html("span", { dir: "auto" }, example.text));
    button.addEventListener("click", () => tryExample(example));
    return html("li", {}, button);
  }));
}

let tried = null; // the example that is on its way, until something else is done to the post

async function tryExample(example) {
  tried = example;
  const { text, image: name } = example;
  let blob = null;
  try {
    blob = name && await fetchImage(name);
  } catch (error) {
    // Without a button to try again, which would send the post that is there.
    if (tried === example) showFailure(new Failure(error.status, error.title, error.detail));
    return;
  }
  if (tried !== example) return;
  removeImage();
  $("text").value = text;
  for (const name of MORE) $(name).value = "";
  countCharacters();
  if (blob) await setImage(new File([blob], name, { type: blob.type }));
  run();
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) return run();
    cancel();
    $("status").textContent = "Cancelled.";
    return undefined;
  });
  $("annotate").addEventListener("click", (event) => {
    if (event.detail > 1) event.preventDefault(); // a double click does not cancel what it has begun
  });
  $("form").addEventListener("input", () => { tried = null; });
  $("text").addEventListener("input", countCharacters);
  $("file").addEventListener("change", () => {
    takeFile($("file").files);
    $("file").value = ""; // or the same file, chosen after another was dropped, would be no change
  });
  $("file").addEventListener("keydown", (event) => { // some browsers open it by the space bar alone
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    $("file").click();
  });
  $("remove").addEventListener("click", () => { removeImage(); $("file").focus(); });
  $("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    useKey($("key").value.trim());
    $("key-form").hidden = true;
    showFailure(null);
    await greet();
    if ($("text").value.trim()) run();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  });
  document.addEventListener("paste", (event) => {
    // What comes with text is text, also where an office program adds its picture.
    if (event.clipboardData.types.includes("text/plain")) return;
    if (takeFile(event.clipboardData.files)) event.preventDefault();
  });
  listenToDrops();
  listenToMentions();
  listenToTheme();
  listenToZoom();
}

function listenToDrops() {
  const carriesSomething = ({ dataTransfer }) =>
    ["Files", "text/uri-list"].some((type) => dataTransfer.types.includes(type));
  const mark = (isOver) => $("drop").classList.toggle("over", isOver);
  document.addEventListener("dragover", (event) => {
    if (!carriesSomething(event)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
  document.addEventListener("drop", (event) => {
    mark(false);
    if (!carriesSomething(event)) return;
    event.preventDefault();
    if (takeFile(event.dataTransfer.files)) return;
    showFailure(new Failure(0, "That is a link, not a file", "This page fetches nothing from elsewhere: save the image, "
      + "then drop the file."));
  });
}

listen();
greet();
offerExamples().catch(showFailure);
