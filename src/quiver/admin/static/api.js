// What the server is asked, and the key that is shown to it. The key stays in this tab: no cookie, nothing on disk.

const KEY = "quiver-key";

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function forget() {
  sessionStorage.removeItem(KEY);
}

export function remember(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

const TRIES = 4;
const wait = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

// Ask, and ask again where the server says that it cannot tell now: what only reads, and what was not let in yet.
export async function call(path, body, options = {}) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await ask(path, body, options);
    } catch (error) {
      const isUndone = error.code === "auth_unavailable" || (error.status === 503 && body === undefined);
      if (tries === TRIES || !isUndone) throw error;
      await wait(Math.min(error.retryMs || 500, 2000));
    }
  }
}

async function ask(path, body, { signal, key = sessionStorage.getItem(KEY) }) {
  const headers = { accept: "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let reply;
  try {
    reply = await fetch(new URL(`api/${path}`, document.baseURI), {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer.");
  }
  const said = await reply.json().catch(() => ({}));
  if (reply.ok) return said;
  const refusal = new Refusal(reply.status, said.error?.message ?? `The server answered ${reply.status}.`);
  Object.assign(refusal, { code: said.error?.code, retryMs: Number(reply.headers.get("retry-after-ms")) });
  if (reply.status === 401 || (reply.status === 403 && path === "status")) {
    document.dispatchEvent(new CustomEvent("locked", { detail: refusal }));
  }
  throw refusal;
}
