"""One merge by qchain, by qemu-img rebase and by qemu-img commit, in turn. Run through scripts/bench merge."""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess

from bench_common import describe, drop_caches, machine, measured, save

CONTESTANTS = ["qchain", "rebase", "commit"]

# What waits for a server on a network mount, whoever calls it.
REMOTE_CALLS = (
    "read,pread64,preadv,preadv2,write,pwrite64,pwritev,pwritev2,copy_file_range,openat,openat2,newfstatat,statx,getdents64,"
    "fsync,fdatasync,ftruncate,fallocate,linkat,rename,renameat,renameat2,unlink,unlinkat"
)


class Bench:
    def __init__(self, options, pattern):
        self.options = options
        self.pattern = pattern
        kept = os.path.join(options.cache, f"chain-{pattern}")
        with open(os.path.join(kept, "made.json")) as file:
            self.members = [member["member"] for member in json.load(file)["members"]]
        # The kept chain has to lie on the same file system to be cloned from.
        self.pristine = os.path.join(options.mount, "pristine")
        self.store = os.path.join(options.mount, "store")
        for place in (self.pristine, self.store):
            shutil.rmtree(place, ignore_errors=True)
        subprocess.run(["cp", "--recursive", "--reflink=never", os.path.join(kept, "store"), self.pristine], check=True)
        self.compared = set()

    def copied(self, names, how):
        for name in names:
            source, target = os.path.join(self.pristine, name), os.path.join(self.store, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            subprocess.run(["cp", "--recursive", "--preserve", f"--reflink={how}", source, target], check=True)

    def restore(self):
        """The chain as it was. The base stays: no contestant has a reason to write to it."""
        how = "always" if self.options.restore == "reflink" else "never"
        base, *above = self.members
        if os.path.exists(os.path.join(self.store, base)):
            then, now = (os.stat(os.path.join(place, base)) for place in (self.pristine, self.store))
            assert (then.st_size, then.st_mtime_ns) == (now.st_size, now.st_mtime_ns), "the base was written to"
        else:
            self.copied([base], how)
        for name in above:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.store, name))
        for name in ("checkpoints", ".qchain"):
            shutil.rmtree(os.path.join(self.store, name), ignore_errors=True)
        self.copied([*above, "checkpoints"], how)
        subprocess.run([self.options.qchain, "--store", self.store, "init"], check=True, stdout=subprocess.DEVNULL)

    def run(self, contestant):
        """One run; returns its facts."""
        self.restore()
        base, deleted, survivor = (os.path.join(self.store, member) for member in self.members)
        mode = "clone" if self.options.fs != "ext4" else "in-place"
        commands = {
            "qchain": [
                [self.options.qchain, "--store", self.store, "delete", self.members[1], "--assume-deleted", "--yes", "--mode", mode, "--json"]
                + ["--grace", "0s", "--retention", "0s"]
            ],
            "rebase": [["qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", os.path.basename(base), survivor], ["rm", deleted]],
            "commit": [["qemu-img", "commit", "-q", "-d", "-f", "qcow2", survivor], ["mv", deleted, survivor]],
        }[contestant]
        if self.options.latency:
            delay = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={REMOTE_CALLS}"]
            delay += ["-e", f"inject={REMOTE_CALLS}:delay_exit={self.options.latency * 1000}"]
            commands = [[*delay, *command] for command in commands]
        drop_caches()
        seconds, peak, output = measured(commands, synced=self.store)
        facts = {"pattern": self.pattern, "contestant": contestant, "seconds": seconds, "peak_bytes": peak}
        if contestant == "qchain":
            result = json.loads(output)["results"][0]
            for key in ("mode", "bytes_written", "metadata_bytes_written", "bytes_cloned"):
                facts[key] = result.get(key)
        if os.path.exists(deleted):
            raise SystemExit(f"bench: {contestant} left {deleted}")
        if contestant not in self.compared:
            before = os.path.join(self.pristine, self.members[2])
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", survivor], check=True)
            subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", before, survivor], check=True)
            self.compared.add(contestant)
        return facts


def table(runs, pattern):
    seconds = {name: [run["seconds"] for run in runs if run["contestant"] == name] for name in CONTESTANTS}
    print(f"\n{pattern}")
    print(f"  {'':<16}{'median':>9}{'least':>9}{'most':>9}   {'ratio to qchain, pair by pair':<32}{'median':>8}")
    ratios = {}
    for name in CONTESTANTS:
        times = seconds[name]
        line = f"  {'qchain delete' if name == 'qchain' else 'qemu-img ' + name:<16}"
        line += "".join(f"{value:>7.2f} s" for value in (statistics.median(times), min(times), max(times)))
        if name != "qchain":
            each = [theirs / ours for theirs, ours in zip(times, seconds["qchain"])]
            ratios[name] = {"each": each, "of_medians": statistics.median(times) / statistics.median(seconds["qchain"])}
            line += f"   {' '.join(f'{ratio:.1f}' for ratio in each):<32}{ratios[name]['of_medians']:>7.1f}x"
        print(line)
    own = next(run for run in runs if run["contestant"] == "qchain")
    print(
        f"  qchain: mode {own['mode']}, {own['bytes_cloned'] or 0:,} bytes shared, {own['bytes_written'] or 0:,} of data and "
        f"{own['metadata_bytes_written'] or 0:,} of tables written, at most "
        f"{max(run['peak_bytes'] for run in runs if run['contestant'] == 'qchain') / 2**20:.0f} MiB of memory",
        flush=True,
    )
    return ratios


def main():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "cache", "fs", "restore", "json", "command"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--latency", type=int, default=0)
    parser.add_argument("patterns", nargs="+")
    options = parser.parse_args()

    facts = machine()
    describe(facts)
    if options.latency:
        print(f"every call of a file takes {options.latency} ms more, for all contestants alike (injected by strace, whose own cost is in the times)")
    came = "plain copies" if options.restore == "copy" else "reflinks of the kept chain"
    print(
        f"base 2 GiB <- P 2 GiB <- C 0.5 GiB, 8 GiB virtual, 64 KiB clusters; P is deleted. {options.fs} on a loop device; the chain "
        f"came as {came};\n{options.pairs} pairs; caches dropped before each run, start of the processes and sync included; results compared by qemu-img",
        flush=True,
    )
    runs, ratios = [], {}
    for pattern in options.patterns:
        bench = Bench(options, pattern)
        for pair in range(options.pairs):
            for contestant in CONTESTANTS if pair % 2 == 0 else reversed(CONTESTANTS):
                runs.append({"pair": pair, **bench.run(contestant)})
        ratios[pattern] = table([run for run in runs if run["pattern"] == pattern], pattern)
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "fs": options.fs, "restore": options.restore, "runs": runs, "ratios": ratios})


main()
