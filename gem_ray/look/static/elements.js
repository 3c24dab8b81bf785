// Elements, and values written for people. Posts are hostile text: they enter the page through text nodes and
// attributes only.

export const $ = (id) => document.getElementById(id);

function create(namespace, tag, attributes, children) {
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
export const html = (tag, attributes = {}, ...children) =>
  create("http://www.w3.org/1999/xhtml", tag, attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  create("http://www.w3.org/2000/svg", tag, attributes, children);

/** An element whose style is set from here: the content security policy forbids style attributes. */
export function styled(node, properties) {
  for (const [name, value] of Object.entries(properties)) node.style.setProperty(name, value);
  return node;
}

export const bar = (ratio) => html("span", { class: "meter", "aria-hidden": "true" },
  styled(html("i"), { width: `${100 * Math.min(1, Math.max(0, ratio))}%` }));

export const named = (category) => category.replaceAll("_", " ");
export const percent = (ratio) => `${Math.round(100 * ratio)}%`;
export const fixed = (value) => (value === null || value === undefined ? "unknown" : value.toFixed(3));
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
export const seconds = (value) =>
  (value < 1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`);

export function bytes(count) {
  if (count < 1e6) return `${Math.max(1, Math.round(count / 1e3))} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

/** The button `#theme` switches between light and dark. */
export function listenToTheme() {
  $("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    dataset.theme = dark ? "light" : "dark";
  });
}
