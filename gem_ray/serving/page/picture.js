// The post's image as it will be annotated, with boxes, labels and heat maps over it.

import { drawBoxes, drawHeat, keepTags, placeTags } from "./boxes.js";
import { $, styled } from "./elements.js";

const MAX_SIDE = 2048; // of what is shown; the file itself is sent as it is
const MOST_ZOOM = 12;
const SMALL = 0.3; // of the image's longer side: a box under it is worth a closer look

let shown = 0; // counts what was to be shown, so that what is decoded late does not replace what came after it
let size = null; // of the upright original, in pixels; null when it is not known
let decoded = false; // whether this browser can show the image

/** Show an image file: the first frame, upright, on white, as the service sees it. False if this browser cannot. */
export async function showImage(file) {
  clearBoxes();
  size = null;
  decoded = false;
  const mine = ++shown;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (mine !== shown) {
    bitmap?.close();
    return false;
  }
  decoded = bitmap !== null;
  if (bitmap) {
    size = [bitmap.width, bitmap.height];
    const scale = Math.min(1, MAX_SIDE / Math.max(...size));
    const pixels = $("pixels");
    [pixels.width, pixels.height] = size.map((side) => Math.max(1, Math.round(scale * side)));
    const context = pixels.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, pixels.width, pixels.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, pixels.width, pixels.height);
    bitmap.close();
  }
  setStage();
  return decoded;
}

/** Show no image. */
export function hideImage() {
  shown += 1;
  clearBoxes();
  size = null;
  decoded = false;
  setStage();
}

export const imageSize = () => size;
export const hasPixels = () => decoded;

function setStage() {
  $("window").hidden = size === null;
  $("invite").hidden = size !== null;
  if (size) styled($("window"), { "--ratio": size.join(" / ") });
}

export function clearBoxes() {
  $("boxes").replaceChildren();
  unheat();
  offerZoom(null);
}

/** Draw the boxes of an annotation; its pixels are those of the upright original. */
export function showBoxes(answer) {
  clearBoxes();
  if (!answer.image_width) return;
  const upright = [answer.image_width, answer.image_height];
  if (String(size) !== String(upright)) { // the boxes stand on an empty ground of its shape
    if (size) $("file-name").append("; this browser turns it another way");
    $("pixels").width = $("pixels").height = 1;
    size = upright;
    decoded = false;
    setStage();
  }
  const mentions = answer.entities.map((mention, index) => ({ mention, index }));
  $("boxes").append(...drawBoxes(upright, mentions));
  placeTags($("stage"));
}
keepTags($("stage"));

// ---- A closer look at a small box

let zoomed = null; // the box that may be looked at

/** Offer a closer look at a box, if it is small; null: at none. A look that is taken goes on, at the new box. */
export function offerZoom(box) {
  zoomed = box && Math.max((box.x2 - box.x1), (box.y2 - box.y1)) < SMALL * Math.max(...size) ? box : null;
  $("zoom").hidden = !zoomed;
  zoom(zoomed !== null && $("zoom").getAttribute("aria-pressed") === "true");
}

function zoom(isClose) {
  $("zoom").setAttribute("aria-pressed", isClose);
  const [scale, x, y] = isClose ? closeUp(zoomed) : [1, 0, 0];
  styled($("stage"), { "--zoom": scale, "--x": x, "--y": y });
}

/** The scale at which a box takes half the window, and the window's place in the image, in shares of the window. */
function closeUp({ x1, y1, x2, y2 }) {
  const [width, height] = size;
  const scale = Math.min(MOST_ZOOM, width / (2 * (x2 - x1)), height / (2 * (y2 - y1)));
  const within = (middle) => Math.max(0, Math.min(scale - 1, scale * middle - 0.5));
  return [scale, within((x1 + x2) / 2 / width), within((y1 + y2) / 2 / height)];
}

export function listenToZoom() {
  $("zoom").addEventListener("click", () => zoom($("zoom").getAttribute("aria-pressed") !== "true"));
}

// ---- Heat

export function heat(map) {
  drawHeat($("heat"), map);
  $("stage").classList.add("heated");
}

export function unheat() {
  $("stage").classList.remove("heated");
}

// ---- The picture as a file

/** The image with its boxes and labels, as a PNG `Blob`. */
export function pictureWithBoxes(answer) {
  const [from, picture] = [$("pixels"), document.createElement("canvas")];
  [picture.width, picture.height] = [from.width, from.height];
  const context = picture.getContext("2d");
  context.drawImage(from, 0, 0);
  const scale = from.width / answer.image_width;
  const line = Math.max(2, Math.max(from.width, from.height) / 250);
  context.font = `600 ${6 * line}px system-ui, sans-serif`;
  for (const rectangle of $("boxes").querySelectorAll(".box")) {
    const { text, box } = answer.entities[rectangle.parentNode.dataset.mention];
    const place = [scale * box.x1, scale * box.y1, scale * (box.x2 - box.x1), scale * (box.y2 - box.y1)];
    for (const [stroke, width] of [["#fff", 2 * line], [getComputedStyle(rectangle).stroke, line]]) {
      Object.assign(context, { strokeStyle: stroke, lineWidth: width });
      context.strokeRect(...place);
    }
    const wide = Math.min(context.measureText(text).width + 3 * line, picture.width);
    const [x, y] = [Math.min(place[0], picture.width - wide), Math.max(0, place[1] - 9 * line)];
    context.fillStyle = getComputedStyle(rectangle).stroke;
    context.fillRect(x, y, wide, 8 * line);
    context.fillStyle = "#fff";
    context.fillText(text, x + 1.5 * line, y + 6 * line, wide - 3 * line);
  }
  return new Promise((done) => { picture.toBlob(done, "image/png"); });
}
