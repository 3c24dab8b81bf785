// Boxes, labels and heat maps over an image; every place is a share of the image, so it holds at any size.

import { html, styled, svg } from "./elements.js";

const RAMP = [[20, 22, 90], [110, 30, 150], [225, 70, 90], [255, 160, 50], [255, 245, 160]];

const rectangle = ({ x1, y1, x2, y2 }, name) =>
  svg("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: name });

/** The boxes of mentions in pixels of the upright original, solid for what was found and dashed for `gold`, and their
    labels. `mentions`: { mention, index, gold }, where `index` null is nothing that can be pointed at. */
export function drawBoxes([width, height], mentions) {
  const area = ({ mention: { box } }) => (box ? (box.x2 - box.x1) * (box.y2 - box.y1) : 0);
  const bySize = [...mentions].sort((a, b) => area(b) - area(a)); // small boxes stay within reach
  const layer = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const { mention, index, gold = [] } of bySize) {
    const { box, coarse, point } = mention;
    if (gold.length) {
      layer.append(svg("g", { "data-coarse": coarse, "data-mention": index },
        ...gold.flatMap((each) => [rectangle(each, "halo"), rectangle(each, "gold")])));
    }
    if (!box) continue;
    const outside = `M0 0H${width}V${height}H0ZM${box.x1} ${box.y1}H${box.x2}V${box.y2}H${box.x1}Z`;
    layer.append(svg("g", { "data-coarse": coarse, "data-mention": index },
      svg("path", { class: "veil", "fill-rule": "evenodd", d: outside }), rectangle(box, "halo"), rectangle(box, "box"),
      point && svg("circle", { class: "peak", cx: point.x, cy: point.y, r: Math.max(width, height) / 80 })));
  }
  const tags = bySize.filter(({ mention }) => mention.box).map(({ mention: { box, coarse, text }, index }) =>
    html("span", {
      class: "tag", "data-coarse": coarse, "data-mention": index, "aria-hidden": "true",
      "data-at": [box.x1 / width, box.y1 / height, box.x2 / width, box.y2 / height].join(" "),
    }, text));
  return [layer, ...tags];
}

/** Put each label of a stage at its box, inside the image and over no other: they keep their size at any zoom. One that
    finds no room is shown while its mention is chosen. */
export function placeTags(stage) {
  const { clientWidth: width, clientHeight: height } = stage;
  const taken = [];
  for (const node of stage.querySelectorAll(".tag")) {
    const [x1, y1, x2, y2] = node.dataset.at.split(" ").map(Number);
    const [wide, high] = [node.offsetWidth, node.offsetHeight];
    const [left, top, right, bottom] = [x1 * width, y1 * height, x2 * width, y2 * height];
    const places = [[left, top - high - 1], [left, bottom + 1], [right - wide, top - high - 1],
      [right - wide, bottom + 1], [left + 3, top + 3], [left + 3, bottom - high - 3]]
      .map(([x, y]) => [Math.max(0, Math.min(x, width - wide)), y])
      .filter(([, y]) => y >= 0 && y + high <= height);
    const isFree = ([x, y]) => taken.every((other) =>
      x >= other.x + other.wide || other.x >= x + wide || y >= other.y + other.high || other.y >= y + high);
    const free = places.find(isFree);
    const [x, y] = free ?? places[0] ?? [0, 0];
    if (free) taken.push({ x, y, wide, high });
    node.classList.toggle("covered", !free);
    styled(node, { translate: `${x}px ${y}px` });
  }
}

const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => placeTags(target)));

/** Keep the labels of a stage at their places when its size changes. */
export const keepTags = (stage) => sizes.observe(stage);

/** Draw a heat map: `height` × `width` bytes, row by row, in base64. */
export function drawHeat(canvas, { height, width, data }) {
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
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(image, 0, 0);
}
