// The page: what the stores hold, what could be freed, what is being done.

import * as api from "./api.js";
import { drawing, isHeld, legend } from "./chains.js";
import * as detail from "./detail.js";
import { byId, bytes, element, seconds } from "./format.js";
import * as jobs from "./jobs.js";

const PAGE = 100;
const EVERY = 5000;
let next = null;
let owed = "";
const totals = { chains: 0, members: 0, takes: 0, held: 0, frees: 0, rows: 0 };

function fail(error) {
  if (error.status === 401 || error.status === 403) {
    enter(api.token.get() ? error.message : "");
    return;
  }
  byId("trouble").textContent = error.message;
}

function enter(said) {
  byId("main").hidden = true;
  byId("leave").hidden = true;
  byId("enter").hidden = false;
  byId("refused").textContent = said;
  byId("token").focus();
}

async function health() {
  try {
    const found = await api.health();
    const bad = found.stores.filter((store) => !store.ready);
    const stores = `${found.stores.length} ${found.stores.length === 1 ? "store" : "stores"}`;
    byId("health").textContent = bad.length ? `not there: ${bad.map((store) => store.store).join(", ")}` : `${stores}, all there`;
    byId("health").dataset.state = bad.length ? "bad" : "good";
  } catch {
    byId("health").textContent = "the service does not answer";
    byId("health").dataset.state = "bad";
  }
}

function count(chains) {
  totals.chains += chains.length;
  for (const chain of chains) {
    totals.members += chain.members.length;
    totals.frees += chain.merge_frees_bytes ?? 0;
    // Only with CloudStack's rows.
    if (chain.pinned_bytes !== undefined) totals.rows += 1;
    for (const entry of chain.members) {
      totals.takes += entry.allocated_bytes;
      if (isHeld(entry)) totals.held += entry.allocated_bytes;
    }
  }
  const more = next ? " so far" : "";
  const rows = [
    ["Chains" + more, String(totals.chains)],
    ["Members" + more, String(totals.members)],
    ["Files take" + more, bytes(totals.takes)],
    ["Held by deleted members" + more, bytes(totals.held)],
  ];
  if (totals.rows) rows.push(["Merging could free" + more, bytes(totals.frees)]);
  if (owed) rows.push(["Bytes last checked", owed]);
  byId("totals").replaceChildren(...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// How old the knowledge of all bytes is, in a line.
function owes({ members, adopted, never_read: never, age_seconds: age }) {
  const parts = [];
  if (age !== null) parts.push(`the oldest ${seconds(age)} ago`);
  if (never) parts.push(`${never} never`);
  if (adopted < members) parts.push(`${members - adopted} of ${members} not adopted`);
  return parts.join(", ") || "none there";
}

async function show(after) {
  byId("trouble").textContent = "";
  try {
    const [found, debt] = await Promise.all([
      api.chains({ prefix: byId("prefix").value.trim(), state: byId("state").value, limit: PAGE, after }),
      after ? null : api.debt({ limit: 1 }),
    ]);
    if (debt) owed = owes(debt);
    const pick = (entry) => detail.open(entry, started);
    const drawn = found.chains.map((chain) => drawing(chain, pick));
    next = found.next;
    if (after) byId("list").append(...drawn);
    else {
      Object.keys(totals).forEach((key) => { totals[key] = 0; });
      byId("list").replaceChildren(...(drawn.length ? drawn : [element("li", { class: "faint" }, "No chain is like that.")]));
    }
    detail.keep();
    count(found.chains);
    if (found.rows_missing) byId("trouble").textContent = `CloudStack's rows are not shown: ${found.rows_missing}`;
    byId("more").hidden = next === null;
    byId("enter").hidden = true;
    byId("main").hidden = false;
    byId("leave").hidden = !api.token.get();
  } catch (error) {
    fail(error);
  }
}

const started = (job) => jobs.follow(job, ended);

// What it did shows in the chains.
function ended() {
  show(null);
}

function begin() {
  legend();
  byId("enter").addEventListener("submit", (event) => {
    event.preventDefault();
    api.token.set(byId("token").value.trim());
    byId("token").value = "";
    open();
  });
  byId("leave").addEventListener("click", () => {
    api.token.forget();
    jobs.forget();
    detail.close();
    enter("");
  });
  byId("filter").addEventListener("submit", (event) => {
    event.preventDefault();
    show(null);
  });
  byId("again").addEventListener("click", () => show(null));
  byId("more").addEventListener("click", () => show(next));
  byId("close").addEventListener("click", detail.close);
  byId("detail").addEventListener("keydown", (event) => { if (event.key === "Escape") detail.close(); });
  setInterval(() => {
    if (document.hidden) return;
    health();
    if (!byId("main").hidden) jobs.look(ended).catch(fail);
  }, EVERY);
  health();
  open();
}

async function open() {
  if (!api.token.get()) {
    enter("");
    return;
  }
  await show(null);
  if (!byId("main").hidden) jobs.look(ended).catch(fail);
}

begin();
