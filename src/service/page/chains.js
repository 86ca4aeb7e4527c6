// The chains as a drawing: a member a box, base first, as wide as its file, coloured by its state.

import { byId, bytes, element, fileName } from "./format.js";

export const KINDS = {
  settled: "in use",
  hidden: "deleted, its space still held",
  leaving: "deleted, has its name until the grace ends",
  incoming: "still being made",
  damaged: "damaged",
  stub: "stands in for a deleted one",
  temporary: "CloudStack's temporary file",
};
const GONE = ["Hidden", "Destroyed"];

// A member with a row has that row's state, in small letters, unless something is the case with its file.
export const kindOf = (entry) => (Object.hasOwn(KINDS, entry.state) ? entry.state : isHeld(entry) ? "hidden" : "settled");
export const isHeld = (entry) => GONE.includes(entry.record) || entry.state === "leaving";

export function legend() {
  byId("legend").replaceChildren(
    ...Object.entries(KINDS).map(([kind, said]) => element("li", { "data-kind": kind }, element("i", { "data-kind": kind, "aria-hidden": "true" }), said)),
  );
  byId("state").append(...Object.keys(KINDS).map((kind) => element("option", { value: kind }, kind)));
}

// Rows of boxes: a chain's trunk, then one row for each branch.
function branches(members) {
  const known = new Map(members.map((entry) => [entry.member, entry]));
  const rows = [];
  const follow = (entry, from) => {
    const row = { from, members: [] };
    rows.push(row);
    for (let at = entry; at; ) {
      row.members.push(at);
      const [next, ...others] = at.children.map((name) => known.get(name)).filter(Boolean);
      others.forEach((other) => follow(other, at));
      at = next;
    }
  };
  members.filter((entry) => !known.has(entry.parent)).forEach((root) => follow(root, null));
  return rows;
}

function box(entry, widest, open) {
  const kind = kindOf(entry);
  const name = fileName(entry.member);
  const made = element(
    "button",
    {
      type: "button",
      class: "member",
      "data-kind": kind,
      "data-held": String(isHeld(entry)),
      "data-member": entry.member,
      "aria-pressed": "false",
      "aria-label": `${name}, ${KINDS[kind]}, takes ${bytes(entry.allocated_bytes)}`,
      title: entry.member,
      onclick: () => open(entry),
      onkeydown: step,
    },
    element("b", {}, name),
    element("span", {}, bytes(entry.allocated_bytes)),
  );
  made.style.setProperty("--share", (entry.allocated_bytes / Math.max(1, widest)).toFixed(4));
  return made;
}

// Arrow keys go from member to member.
function step(event) {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!by) return;
  const all = [...document.querySelectorAll(".member")];
  const next = all[all.indexOf(event.currentTarget) + by];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}

export function drawing(chain, open) {
  const { members } = chain;
  const held = members.filter(isHeld).reduce((sum, entry) => sum + entry.allocated_bytes, 0);
  const all = members.reduce((sum, entry) => sum + entry.allocated_bytes, 0);
  const base = members[0].member;
  const said = [`${base.slice(0, base.lastIndexOf("/") + 1)} · ${members.length} ${members.length === 1 ? "member" : "members"} · ${bytes(all)}`];
  if (held) said.push(`${bytes(held)} held by deleted members`);
  if (chain.merge_frees_bytes) said.push(`merging frees ${bytes(chain.merge_frees_bytes)}`);
  if (chain.pinned_bytes && chain.merge_frees_bytes === null) said.push("cannot be merged as it is");
  const found = branches(members);
  // One scale for all rows of a chain: the one that takes most is as wide as there is room.
  const widest = Math.max(...found.map((row) => row.members.reduce((sum, entry) => sum + entry.allocated_bytes, 0)));
  const rows = found.map((row, at) =>
    element(
      "div",
      { class: at ? "branch above" : "branch" },
      ...(row.from ? [element("span", { class: "from" }, `on ${fileName(row.from.member).slice(0, 8)}`)] : []),
      ...row.members.map((entry) => box(entry, widest, open)),
    ),
  );
  return element("li", { class: "chain" }, element("p", {}, said.join(" · ")), ...rows);
}
