"""Makes a store of many members and measures `qchain list`. Run through scripts/bench list."""

import json
import os
import shutil
import time

from bench_common import describe, drop_caches, machine, measured, save
from bench_store import CHAIN, arguments, make, pattern_of

def main():
    options = arguments()

    facts = machine()
    describe(facts)
    store = os.path.join(options.mount, "store")
    before = time.monotonic()
    make(store, options.members, *pattern_of(options.mount))
    os.sync()
    # What changed in the last two seconds is not kept in the cache of headers.
    time.sleep(3)
    print(f"{options.members:,} members in chains of {CHAIN}, with checkpoint files; XFS on a loop device; made in {time.monotonic() - before:.0f} s\n", flush=True)

    cache = os.path.join(os.environ["XDG_CACHE_HOME"], "qchain")
    list_command = [options.qchain, "--store", store, "list", "--json"]
    rows = [
        ("cold, first run", True, True),
        ("cold, headers known", True, False),
        ("warm, headers known", False, False),
        ("warm, first run", False, True),
    ]
    print(f"  {'qchain list --json':<24}{'seconds':>9}{'peak':>12}")
    runs = []
    for name, cold, forget in rows:
        for _ in range(3):
            if forget:
                shutil.rmtree(cache, ignore_errors=True)
            if cold:
                drop_caches()
            seconds, peak, output = measured([list_command])
            document = json.loads(output)
            listed = sum(len(chain["members"]) for chain in document["chains"])
            if listed != options.members or document["findings"]:
                raise SystemExit(f"bench: {listed} of {options.members} members listed, {len(document['findings'])} findings")
            runs.append({"run": name, "seconds": seconds, "peak_bytes": peak})
        of_name = [run for run in runs if run["run"] == name]
        seconds = sorted(run["seconds"] for run in of_name)[1]
        print(f"  {name:<24}{seconds:>7.2f} s{max(run['peak_bytes'] for run in of_name) / 2**20:>8.0f} MiB", flush=True)
    print("  medians of three; largest peak")
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "members": options.members, "runs": runs})


main()
