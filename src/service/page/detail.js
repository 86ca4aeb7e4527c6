// One member: its facts, the map of its view, and the plan of its deletion before anything is done.

import * as api from "./api.js";
import { KINDS, isHeld, kindOf } from "./chains.js";
import { byId, bytes, element, fileName, list, seconds } from "./format.js";

const COLOURS = ["--settled", "--incoming", "--leaving", "--hidden", "--accent", "--temporary"];
let shown = null;
let redraw = () => {};

export function close() {
  byId("detail").hidden = true;
  redraw = () => {};
  document.querySelectorAll('.member[aria-pressed="true"]').forEach((one) => {
    one.setAttribute("aria-pressed", "false");
    one.focus();
  });
  shown = null;
}

// The chains were drawn anew: its box is marked again, or it is gone.
export function keep() {
  if (shown === null) return;
  const box = document.querySelector(`.member[data-member="${CSS.escape(shown)}"]`);
  if (box) {
    box.setAttribute("aria-pressed", "true");
    return;
  }
  const inside = byId("detail").contains(document.activeElement);
  close();
  if (inside) byId("chains").focus();
}

// What is painted has the colours of its time.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

export async function open(entry, started) {
  close();
  shown = entry.member;
  document.querySelector(`.member[data-member="${CSS.escape(entry.member)}"]`)?.setAttribute("aria-pressed", "true");
  byId("detail-title").textContent = entry.member;
  const map = element("div", {}, element("p", { class: "faint" }, "reading its map"));
  const plan = element("div", { id: "plan" });
  const age = element("dd", {}, "unknown");
  const facts = list([
    ["State", `${entry.record ?? entry.state} (${KINDS[kindOf(entry)]})`],
    ["File", `${bytes(entry.file_bytes)}, takes ${bytes(entry.allocated_bytes)}`],
    ["Disk", bytes(entry.virtual_bytes)],
    ["Clusters", bytes(entry.cluster_bytes)],
    ["Stands on", entry.parent ?? "nothing: a full base"],
    ["Read by", entry.children.length ? entry.children.map(fileName).join(", ") : "none: the newest"],
  ]);
  facts.append(element("div", {}, element("dt", {}, "Bytes last checked"), age));
  byId("facts").replaceChildren(facts, element("h3", {}, "Where its disk lies"), map, element("h3", {}, "Delete"), offer(entry, plan, started), plan);
  byId("detail").hidden = false;
  byId("detail-title").focus();
  await Promise.all([
    wholeMap(entry.member).then((found) => {
      redraw = () => map.replaceChildren(...strip(found, entry));
      redraw();
    }, (error) => map.replaceChildren(element("p", { role: "alert" }, error.message))),
    api.debt({ member: entry.member }).then((found) => { age.textContent = said(found); }, () => { age.textContent = "unknown"; }),
  ]);
}

function said(found) {
  const one = found.debt[0];
  if (!one || !one.adopted) return "never: it is not adopted";
  return one.age_seconds === null ? "never since it was adopted" : `the oldest ${seconds(one.age_seconds)} ago`;
}

// As much of the map as is worth drawing.
async function wholeMap(member) {
  const found = await api.map(member);
  for (let more = 0; found.next !== null && more < 3; more += 1) {
    const page = await api.map(member, found.next);
    found.runs.push(...page.runs);
    found.next = page.next;
  }
  return found;
}

// A strip as wide as the disk; each member that holds some of it has a colour.
function strip(found, entry) {
  const holders = [...new Set(found.runs.map((run) => run.member).filter(Boolean))];
  const style = getComputedStyle(document.documentElement);
  const colour = new Map(holders.map((member, at) => [member, style.getPropertyValue(COLOURS[at % COLOURS.length]).trim()]));
  const canvas = element("canvas", { class: "map", width: 1200, height: 40, role: "img", "aria-label": `allocation map of ${fileName(entry.member)}` });
  const context = canvas.getContext("2d");
  const size = Math.max(1, entry.virtual_bytes);
  const taken = new Map();
  for (const run of found.runs) {
    if (run.kind === "zero") continue;
    taken.set(run.member, (taken.get(run.member) ?? 0) + run.length);
    context.fillStyle = colour.get(run.member);
    context.fillRect((run.start / size) * 1200, 0, Math.max(1, (run.length / size) * 1200), 40);
  }
  const rows = holders.map((member) => {
    const mark = element("span", { "aria-hidden": "true" }, "■ ");
    mark.style.color = colour.get(member);
    return element("tr", {}, element("td", {}, mark, fileName(member)), element("td", { class: "number" }, bytes(taken.get(member))));
  });
  const table = element("table", {}, element("tbody", {}, ...rows));
  const whole = found.next === null ? [] : [element("p", { class: "faint" }, "The map is longer than what is drawn.")];
  return [canvas, table, ...whole];
}

function offer(entry, place, started) {
  const tip = entry.children.length === 0;
  const end = element("input", { type: "checkbox", id: "end" });
  const sure = element("input", { type: "checkbox", id: "sure" });
  const form = element(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        const request = { kind: "delete", members: [entry.member], assume_deleted: sure.checked, end_of_chain: end.checked };
        await plan(request, place, started);
      },
    },
    element("label", {}, sure, " CloudStack has given it up"),
    ...(tip ? [element("label", {}, end, " the chain has been ended")] : []),
    element("button", {}, "Plan"),
  );
  sure.checked = isHeld(entry);
  return form;
}

async function plan(request, place, started) {
  place.replaceChildren(element("p", { role: "status" }, "planning"));
  try {
    const found = await api.plan(request);
    if (shown === request.members[0]) place.replaceChildren(...proposal(found, request, place, started));
  } catch (error) {
    place.replaceChildren(element("p", { role: "alert" }, error.message));
  }
}

function proposal(found, request, place, started) {
  const rows = found.plan.map((entry) =>
    element(
      "tr",
      {},
      element("td", { "data-name": "What" }, entry.into ? `${entry.members.map(fileName).join(", ")} into ${fileName(entry.into)}` : `${entry.members.map(fileName).join(", ")} goes`),
      element("td", { "data-name": "How" }, `${entry.mode}: ${entry.reason}`),
      element("td", { class: "number", "data-name": "Writes" }, bytes(entry.bytes_to_write)),
      element("td", { class: "number", "data-name": "Frees" }, bytes(entry.bytes_to_free)),
      element("td", { "data-name": "Can be undone" }, entry.undoable ? "yes" : "no"),
    ),
  );
  const refused = found.refused.map((one) => element("p", { role: "alert" }, `${one.members.map(fileName).join(", ")}: ${one.error.message}`));
  if (!rows.length) return refused;
  const head = ["What", "How", "Writes", "Frees", "Can be undone"].map((title, at) => element("th", { scope: "col", class: at === 2 || at === 3 ? "number" : null }, title));
  // One key for this proposal: confirmed twice, it is done once.
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const confirm = element("button", { type: "button", class: "primary", id: "confirm" }, "Delete as planned");
  confirm.addEventListener("click", async () => {
    confirm.disabled = true;
    try {
      const made = await api.create(request, key);
      place.replaceChildren(element("p", { role: "status" }, `job ${made.id.slice(0, 8)} was made; its progress is above`));
      started(made);
    } catch (error) {
      confirm.disabled = false;
      place.append(element("p", { role: "alert" }, error.message));
    }
  });
  const table = element("table", { class: "plan" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  return [...refused, element("div", { class: "scroll" }, table), element("p", {}, confirm)];
}
