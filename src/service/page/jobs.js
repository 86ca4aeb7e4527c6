// Jobs that run, live, and those that ended lately.

import * as api from "./api.js";
import { byId, bytes, element, fileName, seconds } from "./format.js";

const OVER = ["done", "failed", "cancelled"];
const SHOWN = 8;
const watched = new Map();

function line(job) {
  const named = (job.request?.members ?? [job.request?.member]).filter(Boolean).map((one) => fileName(typeof one === "string" ? one : one.install_path ?? ""));
  return `${job.kind}${named.length ? ` ${named.slice(0, 3).join(", ")}${named.length > 3 ? " ..." : ""}` : ""}`;
}

function told(job) {
  if (job.state === "failed") return `failed: ${job.error?.message ?? "see its record"}`;
  const pulse = job.progress;
  if (job.state !== "running" || !pulse) return job.state;
  const done = pulse.unit === "bytes" ? `${bytes(pulse.done)} of ${bytes(pulse.total)}, ${bytes(pulse.rate_per_second)}/s` : pulse.total ? `${pulse.done} of ${pulse.total}` : "";
  const left = pulse.remaining_seconds === null ? "" : `, ${seconds(pulse.remaining_seconds)} left`;
  return `${pulse.phase} ${done}${left}`;
}

function item(job) {
  const made = element("li", { class: "job", "data-job": job.id, "data-state": job.state }, element("span", {}, line(job)), element("span", { class: "said" }, told(job)));
  if (!OVER.includes(job.state)) {
    const bar = element("progress", { "aria-label": line(job) });
    if (job.progress?.total) Object.assign(bar, { max: job.progress.total, value: Math.min(job.progress.done, job.progress.total) });
    made.append(bar, element("button", { type: "button", onclick: () => api.cancel(job.id).catch(() => {}) }, "Stop"));
  }
  return made;
}

function show(job) {
  const old = byId("jobs").querySelector(`[data-job="${job.id}"]`);
  const focused = old?.contains(document.activeElement);
  const made = item(job);
  if (old) old.replaceWith(made);
  else byId("jobs").prepend(made);
  if (focused) made.querySelector("button")?.focus();
  byId("jobs").querySelector(".none")?.remove();
}

// Follows one job; `over` is called when it ended.
export function follow(job, over) {
  show(job);
  if (OVER.includes(job.state) || watched.has(job.id)) return;
  const stop = new AbortController();
  watched.set(job.id, stop);
  const see = (now) => {
    show(now);
    if (OVER.includes(now.state)) over(now);
  };
  api
    .watch(job.id, see, stop.signal)
    .catch(() => {})
    // The next look goes on with it, or sees what became of it.
    .finally(() => watched.delete(job.id));
}

export async function look(over) {
  const states = await Promise.all(["running", "queued"].map((state) => api.jobs({ state, limit: 100 })));
  const open = states.flatMap((page) => page.jobs);
  open.forEach((job) => follow(job, over));
  const items = [...byId("jobs").children].filter((one) => one.dataset.job);
  // What another instance ended, or ended while nobody watched.
  const lost = items.filter((one) => !OVER.includes(one.dataset.state) && !watched.has(one.dataset.job));
  for (const one of lost) {
    try {
      const now = await api.job(one.dataset.job);
      show(now);
      if (OVER.includes(now.state)) over(now);
    } catch (error) {
      if (error.status === 404) one.remove();
    }
  }
  items.slice(SHOWN + open.length).forEach((one) => one.remove());
  if (!items.length) byId("jobs").replaceChildren(element("li", { class: "faint none" }, "none runs"));
}

export function forget() {
  watched.forEach((stop) => stop.abort());
  byId("jobs").replaceChildren();
}
