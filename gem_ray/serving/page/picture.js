// The post's image as it will be annotated, with boxes, labels and heat maps over it.

import { $, html, styled, svg } from "./elements.js";

const MAX_SIDE = 2048; // of what is shown; the file itself is sent as it is
const RAMP = [[20, 22, 90], [110, 30, 150], [225, 70, 90], [255, 160, 50], [255, 245, 160]];

let tags = []; // pairs of a label and the box it names
let shown = 0; // counts what was to be shown, so that what is decoded late does not replace what came after it
let size = null; // of the upright original, in pixels; null when it is not known

/** Show an image file: the first frame, upright, on white, as the service sees it. False if this browser cannot. */
export async function showImage(file) {
  clearBoxes();
  size = null;
  const mine = ++shown;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (mine !== shown) {
    bitmap?.close();
    return false;
  }
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
  return bitmap !== null;
}

/** Show no image. */
export function hideImage() {
  shown += 1;
  clearBoxes();
  size = null;
  setStage();
}

export const imageSize = () => size;

function setStage() {
  $("stage").hidden = size === null;
  $("invite").hidden = size !== null;
  if (size) styled($("stage"), { "--ratio": size.join(" / ") });
}

export function clearBoxes() {
  $("boxes").replaceChildren();
  tags = [];
  unheat();
}

/** Draw the boxes of an annotation; its pixels are those of the upright original. */
export function drawBoxes(answer) {
  clearBoxes();
  if (!answer.image_width) return;
  if (!size) { // an image that this browser cannot show: the boxes stand on an empty ground of its shape
    $("pixels").width = $("pixels").height = 1;
    size = [answer.image_width, answer.image_height];
    setStage();
  }
  const [width, height] = [answer.image_width, answer.image_height];
  const layer = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  const area = ({ box }) => (box.x2 - box.x1) * (box.y2 - box.y1);
  const boxed = [...answer.entities.entries()].filter(([, entity]) => entity.box);
  boxed.sort((a, b) => area(b[1]) - area(a[1])); // small boxes stay within reach
  for (const [index, { box, coarse, point }] of boxed) {
    const rectangle = { x: box.x1, y: box.y1, width: box.x2 - box.x1, height: box.y2 - box.y1 };
    const outside = `M0 0H${width}V${height}H0ZM${box.x1} ${box.y1}H${box.x2}V${box.y2}H${box.x1}Z`;
    layer.append(svg("g", { "data-coarse": coarse, "data-mention": index },
      svg("path", { class: "veil", "fill-rule": "evenodd", d: outside }),
      svg("rect", { ...rectangle, class: "halo" }), svg("rect", { ...rectangle, class: "box" }),
      point && svg("circle", { class: "peak", cx: point.x, cy: point.y, r: Math.max(width, height) / 80 })));
  }
  tags = boxed.map(([index, { box, coarse, text }]) => {
    const node = html("span", { class: "tag", "data-coarse": coarse, "data-mention": index }, text);
    return [node, [box.x1 / width, box.y1 / height, box.x2 / width, box.y2 / height]];
  });
  $("boxes").append(layer, ...tags.map(([node]) => node));
  placeTags();
}

/** Put each label at its box, inside the image, and where it can be over no other: they keep their size at any zoom. */
function placeTags() {
  const { clientWidth: width, clientHeight: height } = $("stage");
  const taken = [];
  for (const [node, [x1, y1, x2, y2]] of tags) {
    const [wide, high] = [node.offsetWidth, node.offsetHeight];
    const [left, top, right, bottom] = [x1 * width, y1 * height, x2 * width, y2 * height];
    const places = [[left, top - high - 1], [left, bottom + 1], [right - wide, top - high - 1],
      [right - wide, bottom + 1], [left + 3, top + 3], [left + 3, bottom - high - 3]]
      .map(([x, y]) => [Math.max(0, Math.min(x, width - wide)), y])
      .filter(([, y]) => y >= 0 && y + high <= height);
    const isFree = ([x, y]) => taken.every((other) =>
      x >= other.x + other.wide || other.x >= x + wide || y >= other.y + other.high || other.y >= y + high);
    const [x, y] = places.find(isFree) ?? places[0] ?? [0, 0];
    taken.push({ x, y, wide, high });
    styled(node, { translate: `${x}px ${y}px` });
  }
}
new ResizeObserver(placeTags).observe($("stage"));

/** Lay a heat map over the image: `height` × `width` bytes, row by row, in base64. */
export function heat({ height, width, data }) {
  const values = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
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
  const canvas = $("heat");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  $("stage").classList.add("heated");
}

export function unheat() {
  $("stage").classList.remove("heated");
}
