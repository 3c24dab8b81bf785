// The calls of the HTTP API, and what to tell a person when one fails. Addresses are relative: the page may be mounted
// under any path.

let apiKey = "";

export function useKey(key) {
  apiKey = key;
}

/** What went wrong, for a person. `status` is 0 when there was no answer; `retryAfter` is in seconds, or null. */
export class Failure extends Error {
  constructor(status, title, detail, retryAfter = null) {
    super(title);
    Object.assign(this, { status, title, detail, retryAfter });
  }
}

async function call(path, options = {}) {
  const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The service does not answer",
      "It may have stopped, or you may be offline. Your post is still here: try again in a moment.");
  }
  if (!response.ok) throw failure(response, await response.json().catch(() => ({})));
  return response.json();
}

const TITLES = {
  401: "This service asks for an API key",
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
  const retryAfter = waitOf(response.headers.get("Retry-After"));
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

/** Annotate a post: its text, and its image as a `File` or null. */
export function annotate(text, image, signal) {
  const body = new FormData();
  body.append("text", text);
  if (image) body.append("image", image, image.name);
  return call("v1/annotate?heatmaps=true", { method: "POST", body, signal });
}

/** The same call for a terminal. `--form-string`, because `-F` reads files where a text begins with @ or <. */
export function curlCommand(text, image) {
  const quoted = (value) => `'${value.replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${quoted(new URL("v1/annotate", document.baseURI).href)}`];
  if (apiKey) parts.push('-H "Authorization: Bearer $GEM_RAY_API_KEY"');
  parts.push(`--form-string ${quoted(`text=${text}`)}`);
  if (image) parts.push(`-F ${quoted(`image=@"${image.name.replaceAll(/["\\]/g, "\\$&")}"`)}`);
  return parts.join(" \\\n  ");
}
