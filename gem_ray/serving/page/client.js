// The calls of the HTTP API, and what to tell a person when one fails. Addresses are relative: the page may be mounted
// under any path.

let apiKey = "";

export function useKey(key) {
  apiKey = key;
}

/** What went wrong, for a person. `status` is 0 when there was no answer; after `retryAfter` seconds the same request may
    go well, null is never. */
export class Failure extends Error {
  constructor(status, title, detail, retryAfter = null) {
    super(title);
    Object.assign(this, { status, title, detail, retryAfter });
  }
}

async function ask(path, options = {}) {
  const headers = headersNow();
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The service does not answer",
      "It may have stopped, or you may be offline. Your post is still here.", 0);
  }
  if (!response.ok) throw failure(response, await response.json().catch(() => ({})));
  return response;
}

const call = async (path, options) => (await ask(path, options)).json();

function headersNow() {
  try {
    return new Headers(apiKey ? { Authorization: `Bearer ${apiKey}` } : {});
  } catch {
    throw new Failure(401, "That cannot be an API key", "It holds characters that no key has.");
  }
}

const TITLES = {
  403: "This service may not be used from here",
  413: "That is more than this service takes",
  415: "This service does not take that kind of file",
  422: "This post cannot be annotated as it is",
  429: "The service is busy",
  503: "The service is not ready",
  504: "That took too long",
};

function failure(response, problem) {
  const { status } = response;
  if (status === 401) {
    return apiKey
      ? new Failure(status, "The service does not know this API key", "Compare it with the one that you were given.")
      : new Failure(status, "This service asks for an API key", "Whoever runs it can give you one.");
  }
  const mayPass = status === 408 || status === 429 || status >= 500;
  const retryAfter = waitOf(response.headers.get("Retry-After")) ?? (mayPass ? 0 : null);
  const title = TITLES[status] || (status >= 500 ? "Something went wrong in the service" : problem.title)
    || `The service refused (${status})`;
  const detail = typeof problem.detail === "string" ? problem.detail : problem.title;
  return new Failure(status, title, detail || "", retryAfter);
}

/** Seconds of a `Retry-After` header, which holds seconds or a date. */
function waitOf(value) {
  if (!value) return null;
  const wait = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(1, Math.ceil(wait)) : null;
}

export const fetchTaxonomy = () => call("v1/taxonomy");
export const fetchLimits = () => call("v1/limits");
export const fetchExamples = () => call("examples.json");
export const fetchImage = async (name) => (await ask(name)).blob();

/** Annotate a post: { text, caption, knowledge, tokens, image }, where all but the text may be empty, and the image is a
    `File` or null. */
export async function annotate(post, signal) {
  const boundary = `gem-ray-${Math.random().toString(36).slice(2)}`;
  const part = (name, value) => [`--${boundary}\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n`, value, "\r\n"];
  const parts = fieldsOf(post).flatMap(([name, value]) => part(name, value));
  if (post.image) parts.push(...part('image"; filename="image', await bytesOf(post.image)));
  // A `FormData` would send each line feed as two characters: offsets and answers would not be those of the text.
  const body = new Blob([...parts, `--${boundary}--\r\n`], { type: `multipart/form-data; boundary=${boundary}` });
  return call("v1/annotate?heatmaps=true", { method: "POST", body, signal });
}

/** Read before it is sent: a file that has changed since it was chosen would end the request as a lost network does. */
async function bytesOf(file) {
  try {
    return await file.arrayBuffer();
  } catch {
    throw new Failure(0, "The image cannot be read", "Its file has changed or is gone, or it is a folder. Choose it again.");
  }
}

/** Pairs of name and text; each token is one. */
const fieldsOf = ({ text, caption, knowledge, tokens }) => [["text", text],
  ...Object.entries({ caption, knowledge }).filter(([, value]) => value),
  ...tokens.map((token) => ["tokens", token])];

/** The same call for a terminal. `--form-string`, because `-F` reads files where a text begins with @ or <. */
export function curlCommand(post) {
  const quoted = (value) => `'${value.replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${quoted(new URL("v1/annotate", document.baseURI).href)}`];
  if (apiKey) parts.push('-H "Authorization: Bearer $GEM_RAY_API_KEY"');
  for (const [name, value] of fieldsOf(post)) parts.push(`--form-string ${quoted(`${name}=${value}`)}`);
  if (post.image) parts.push(`-F ${quoted(`image=@"${post.image.name.replaceAll(/["\\]/g, "\\$&")}"`)}`);
  return parts.join(" \\\n  ");
}

/** The same call in Python. A JSON string is a string of Python, too. */
export function pythonCode(post) {
  const { text, caption, knowledge, tokens, image } = post;
  const given = { image: image && image.name, caption, knowledge, tokens: tokens.length && tokens };
  const options = Object.entries(given).filter(([, value]) => value).map(([name, value]) =>
    `    ${name}=${JSON.stringify(value)},\n`);
  const address = JSON.stringify(new URL(".", document.baseURI).href);
  return `${apiKey ? "import os\n\n" : ""}from gem_ray_client import Client  # where gem-ray itself is installed: from gem_ray\n\n`
    + `client = Client(${address}${apiKey ? ', api_key=os.environ["GEM_RAY_API_KEY"]' : ""})\n`
    + `annotation = client.annotate(\n    ${JSON.stringify(text)},\n${options.join("")})\n`
    + "for entity in annotation.entities:\n    print(entity.text, entity.fine, entity.score, entity.box)\n";
}
