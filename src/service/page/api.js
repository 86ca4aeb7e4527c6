// The service's API. The token stays in this tab.

const KEY = "qchain-token";

export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `the service answered ${status}`);
    this.status = status;
    this.code = problem.code;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function answered(method, path, { body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (token.get()) sent.Authorization = `Bearer ${token.get()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body), signal });
  if (response.ok) return response;
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // Not from the service itself, then: its status says what there is.
  }
  throw new Refused(response.status, problem);
}

const query = (options) => {
  const given = Object.entries(options).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return given.length ? `?${new URLSearchParams(given)}` : "";
};

export const health = async () => (await fetch("/healthz")).json();
export const chains = async (options) => (await answered("GET", `/v1/chains${query(options)}`)).json();
export const map = async (member, after) => (await answered("GET", `/v1/map${query({ member, limit: 5000, after })}`)).json();
export const debt = async (options) => (await answered("GET", `/v1/debt${query(options)}`)).json();
export const jobs = async (options) => (await answered("GET", `/v1/jobs${query(options)}`)).json();
export const job = async (id) => (await answered("GET", `/v1/jobs/${id}`)).json();
export const plan = async (request) => (await answered("POST", "/v1/plans", { body: request })).json();
export const cancel = async (id) => (await answered("POST", `/v1/jobs/${id}/cancel`)).json();

// The same key for the same click: asked twice, it is one job.
export const create = async (request, key) => (await answered("POST", "/v1/jobs", { body: request, headers: { "Idempotency-Key": key } })).json();

// Calls `told` with each state of a job until it is over.
export async function watch(id, told, signal) {
  const response = await answered("GET", `/v1/jobs/${id}/events`, { headers: { Accept: "text/event-stream" }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    for (let end = waiting.indexOf("\n\n"); end >= 0; end = waiting.indexOf("\n\n")) {
      const data = waiting.slice(0, end).split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      waiting = waiting.slice(end + 2);
      if (data) told(JSON.parse(data));
    }
  }
}
