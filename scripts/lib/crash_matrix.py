"""Prints what scripts/crash-matrix found: qchain's tables, and qemu-img's rebase and commit killed in the same way."""

import argparse
import csv
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

# The system calls by which qemu-img changes a file.
CALLS = ["pwrite64", "pwritev", "fdatasync", "fsync", "fallocate", "ftruncate"]
MIB = 1 << 20


def run(*arguments):
    return subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def must(*arguments):
    done = run(*arguments)
    if done.returncode:
        sys.exit(f"crash-matrix: {' '.join(map(str, arguments))}: {done.stdout}")


class Chain:
    """base <- a <- b on a disk of 16 MiB, and what each of them shows."""

    def __init__(self, folder):
        self.made, self.place = folder / "made", folder / "place"
        self.made.mkdir()
        writes = {
            "base": ["write -P 1 0 8M"],
            "a": ["write -P 2 1M 1M", "write -P 3 5M 192k", "write -z 6M 64k", "write -P 4 12M 64k"],
            "b": ["write -P 5 1536k 256k", "write -P 6 9M 64k"],
        }
        below = None
        for name, commands in writes.items():
            backing = ["-b", below, "-F", "qcow2"] if below else []
            must("qemu-img", "create", "-q", "-f", "qcow2", *backing, self.made / name, "16M")
            must("qemu-io", *[word for command in commands for word in ("-c", command)], self.made / name)
            below = name
        for name in writes:
            must("qemu-img", "convert", "-O", "raw", self.made / name, folder / f"{name}.raw")
        self.truth = {name: folder / f"{name}.raw" for name in writes}

    def fresh(self):
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.made, self.place)

    def shows(self, name, truth):
        return run("qemu-img", "compare", "-F", "raw", "-f", "qcow2", self.place / name, self.truth[truth]).returncode == 0

    def check(self):
        """The worst of: 0 sound, 3 leaks, anything else errors."""
        codes = [run("qemu-img", "check", "-q", self.place / name).returncode for name in self.truth]
        return next((code for code in codes if code not in (0, 3)), max(codes))


def killed(chain, command, log):
    """Kills the command at each of its calls that can be met; gives for each what was wrong.

    strace counts the calls of each thread by itself, and qemu-img has several. So the n-th call is asked for of each kind, each two
    kinds, and all; how many calls were made, and which was the last, tells which point of the whole that was. Each counts once."""
    chain.fresh()
    traced = ["strace", "-f", "-o", str(log), "-e", f"trace={','.join(CALLS)}"]
    must(*traced, *command)
    # A call that was interrupted by another thread's has two lines.
    calls = [line for line in log.read_text().splitlines() if re.search(rf"^\d+ +({'|'.join(CALLS)})\(", line)]
    points = {}
    used = sorted({re.match(r"\d+ +(\w+)", line).group(1) for line in calls})
    kinds = [[call] for call in used] + [list(pair) for pair in itertools.combinations(used, 2)] + [used]
    for kind in kinds:
        number = 0
        while True:
            number += 1
            chain.fresh()
            done = run(*traced, "-e", f"inject={','.join(kind)}:signal=KILL:when={number}", *command)
            lines = [line for line in log.read_text().splitlines() if re.search(rf"^\d+ +({'|'.join(CALLS)})\(", line)]
            if done.returncode != 137 and done.returncode != -9:
                break
            # Without the thread: which one makes a call is chance.
            point = (len(lines), lines[-1].split(None, 1)[1])
            if point in points:
                continue
            points[point] = (chain.check(), {
                "b": chain.shows("b", "b"),
                "base": chain.shows("base", "base") or ("commit" in command and chain.shows("base", "a")),
            })
    return len(calls), points


def qemu(folder):
    chain = Chain(folder)
    place = chain.place
    commands = {
        "qemu-img rebase": ["qemu-img", "rebase", "-f", "qcow2", "-b", "base", "-F", "qcow2", str(place / "b")],
        "qemu-img commit": ["qemu-img", "commit", "-q", "-f", "qcow2", str(place / "a")],
    }
    for name, command in commands.items():
        calls, points = killed(chain, command, folder / "strace")
        wrong = sum(not shows["b"] or not shows["base"] for code, shows in points.values())
        silent = sum((not shows["b"] or not shows["base"]) and code in (0, 3) for code, shows in points.values())
        yield {
            "what": f"{name}, killed",
            "points": len(points),
            "before": wrong,
            "silent": silent,
            "after": "-",
            "leaks": sum(code == 3 for code, _ in points.values()),
            "note": f"{calls} calls in a clean run",
        }


def tables(folder):
    """The lines of qchain's own tables, with the table's name."""
    for path in sorted(folder.glob("crash-*.tsv")):
        with open(path, newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield path.stem, row


def qchain(rows):
    groups = {}
    for table, row in rows:
        kind = {"kill": "killed", "sequels": "killed", "errors": "errors", "foreign": "others"}.get(table.split("-")[1], table)
        verb = "recover" if row["verb"].startswith("recover") else row["verb"]
        verb = "delete" if kind == "others" else verb
        group = groups.setdefault((kind, verb, row["mode"], row["fs"].partition("-")[0]), dict(points=0, before=0, after=0, leaks=0))
        group["points"] += 1
        for field in ("before", "after", "leaks"):
            group[field] += bool(row[field])
    for (kind, verb, mode, fs), group in sorted(groups.items()):
        yield {"what": f"{verb} {mode} {fs}, {kind}", "silent": group["before"] + group["after"], "note": "", **group}


def main():
    parser = argparse.ArgumentParser(prog="crash-matrix")
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--least", type=int, default=0, help="distinct (mode, file system, shape, call) of killed deletions wanted")
    options = parser.parse_args()
    rows = list(tables(options.tables))
    own = list(qchain(rows))
    form = "{:<44} {:>7} {:>15} {:>14} {:>14} {:>6}  {}"
    print(form.format("", "points", "wrong before", "wrong after", "silently wrong", "leaks", ""))
    for line in own + list(qemu(options.scratch)):
        print(form.format(line["what"], line["points"], line["before"], line["after"], line["silent"], line["leaks"], line["note"]))
    distinct = {
        (row["mode"], row["fs"], row["shape"], row["number"])
        for table, row in rows
        if row["verb"] == "delete" and table.startswith("crash-kill")
    }
    bad = sum(bool(row["before"] or row["after"] or row["leaks"]) for _, row in rows)
    print(f"\nqchain: {len(rows)} points, {bad} wrong; {len(distinct)} distinct (mode, file system, shape, call) of killed deletions")
    if bad or not rows or len(distinct) < options.least:
        sys.exit(1)


if __name__ == "__main__":
    main()
