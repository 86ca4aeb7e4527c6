"""Reading everything once, by qchain verify --level data and adopt, and by b3sum; and a merge with and without manifests. Run through
scripts/bench verify."""

import argparse
import json
import os
import shutil
import statistics
import subprocess

from bench_common import describe, drop_caches, machine, measured, save


class Bench:
    def __init__(self, options, pattern):
        self.options = options
        kept = os.path.join(options.cache, f"chain-{pattern}")
        with open(os.path.join(kept, "made.json")) as file:
            self.members = [member["member"] for member in json.load(file)["members"]]
        self.pristine = os.path.join(options.mount, "pristine")
        self.store = os.path.join(options.mount, "store")
        for place in (self.pristine, self.store):
            shutil.rmtree(place, ignore_errors=True)
        subprocess.run(["cp", "--recursive", "--reflink=never", os.path.join(kept, "store"), self.pristine], check=True)
        self.restore()

    def qchain(self, *arguments):
        return [self.options.qchain, "--json", "--store", self.store, *arguments]

    def restore(self):
        shutil.rmtree(self.store, ignore_errors=True)
        subprocess.run(["cp", "--recursive", "--preserve", "--reflink=always", self.pristine, self.store], check=True)
        subprocess.run(self.qchain("init"), check=True, stdout=subprocess.DEVNULL)

    def files(self):
        return [os.path.join(self.store, name) for name in self.members]

    def timed(self, command, cold):
        if cold:
            drop_caches()
        return measured([command])

    def pair(self, command, cold, before=None):
        """The command and b3sum, one after the other, in that order and the other way round in turn."""
        ours, theirs = [], []
        peak = 0
        for turn in range(self.options.pairs):
            for contestant in (0, 1) if turn % 2 else (1, 0):
                if contestant:
                    seconds, _, _ = self.timed([self.options.b3sum, *self.files()], cold)
                    theirs.append(seconds)
                else:
                    if before:
                        before()
                    seconds, used, _ = self.timed(command, cold)
                    ours.append(seconds)
                    peak = max(peak, used)
        return ours, theirs, peak

    def forget(self):
        shutil.rmtree(os.path.join(self.store, ".qchain"))
        subprocess.run(self.qchain("init"), check=True, stdout=subprocess.DEVNULL)

    def merge(self, adopted):
        self.restore()
        if adopted:
            subprocess.run(self.qchain("adopt", "--now"), check=True, stdout=subprocess.DEVNULL)
        drop_caches()
        name = self.members[1]
        arguments = ("delete", name, "--yes", "--now", "--assume-deleted", "--grace", "0s", "--retention", "0s")
        seconds, _, output = measured([self.qchain(*arguments)], self.options.mount)
        claims = [claim["claim"] for claim in json.loads(output)["results"][0]["claims"]]
        assert ("digest" in claims) == adopted, claims
        return seconds


def show(what, ours, theirs, bound, peak=None):
    ratios = [a / b for a, b in zip(ours, theirs)]
    memory = f", {peak / 2**20:.0f} MiB" if peak else ""
    print(
        f"  {what}: {statistics.median(ours):.2f} s beside {statistics.median(theirs):.2f} s: {statistics.median(ratios):.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f}; {bound}){memory}",
        flush=True,
    )
    return {"what": what, "seconds": ours, "beside": theirs, "ratios": ratios}


def main():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "cache", "json", "command", "b3sum"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("patterns", nargs="+")
    options = parser.parse_args()
    facts = machine()
    describe(facts)
    document = {"command": options.command, "machine": facts, "patterns": {}}
    for pattern in options.patterns:
        bench = Bench(options, pattern)
        total = sum(os.path.getsize(path) for path in bench.files())
        print(f"\n{pattern}: {len(bench.members)} files, {total / 2**30:.1f} GiB, on XFS; b3sum reads the same files")
        runs = []
        subprocess.run(bench.qchain("adopt", "--now"), check=True, stdout=subprocess.DEVNULL)
        verify = bench.qchain("verify", "--level", "data")
        for cold in (True, False):
            where = "cold" if cold else "warm"
            runs.append(show(f"verify --level data, {where}", *bench.pair(verify, cold)[:2], "at most 1.11"))
        for cold in (True, False):
            where, bound = ("cold", "at most 1.2") if cold else ("warm", "at most 2.2")
            ours, theirs, peak = bench.pair(bench.qchain("adopt", "--now"), cold, bench.forget)
            runs.append(show(f"adopt, {where}", ours, theirs, bound, peak))
        ours, theirs = [], []
        for turn in range(options.pairs):
            for adopted in (True, False) if turn % 2 else (False, True):
                (ours if adopted else theirs).append(bench.merge(adopted))
        runs.append(show("merge of adopted members, cold, beside one without manifests", ours, theirs, "at most 1.5"))
        document["patterns"][pattern] = runs
    save(options.json, document)


main()
