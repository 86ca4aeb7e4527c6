"""Makes a store of many members with rows, every other one Hidden, and measures what `qchain reclaim` needs to plan. Run through
scripts/bench reclaim."""

import json
import os
import subprocess

from bench_common import describe, drop_caches, machine, measured, save
from bench_store import CHAIN, arguments, make, pattern_of

URL = "nfs://192.0.2.1/export/sec1"
COLUMNS = "store_uuid store_url store_role snapshot_id snapshot_uuid snapshot_name account_id volume_id hypervisor_type snapshot_status ref_state install_path parent_snapshot_id end_of_chain size physical_size kvm_checkpoint_path created"


def write_rows(path, members):
    """The export of CloudStack's rows: the base of each chain and every second member above it is Hidden, the newest is not."""
    with open(path, "w") as file:
        print(COLUMNS.replace(" ", "\t"), file=file)
        for number, (account, volume, name, at) in enumerate(members, 1):
            hidden = at % 2 == 0 and at < CHAIN - 1
            place = f"{account}/{volume}/{name}"
            fields = ["store-1", URL, "Image", number, f"api-{number}", f"snapshot {number}", account, volume, "KVM"]
            fields += ["Destroyed" if hidden else "BackedUp", "Hidden" if hidden else "Ready", f"snapshots/{place}"]
            fields += [number - 1 if at else 0, 0, 10 << 30, 458752, f"/mnt/x/checkpoints/{place}", "2026-01-01 00:00:00"]
            print("\t".join(map(str, fields)), file=file)
    return sum(1 for *_, at in members if at % 2 == 0 and at < CHAIN - 1)


def main():
    options = arguments()

    facts = machine()
    describe(facts)
    store, rows = (os.path.join(options.mount, name) for name in ("store", "rows.tsv"))
    hidden = write_rows(rows, make(store, options.members, *pattern_of(options.mount)))
    call = [options.qchain, "--store", f"{store},url={URL}", "--json"]
    subprocess.run([*call, "init"], check=True, stdout=subprocess.DEVNULL)
    print(f"{options.members:,} members and rows, {hidden:,} of them Hidden; chains of {CHAIN}; XFS on a loop device\n", flush=True)
    runs = []
    for cold in (True, False, False):
        if cold:
            drop_caches()
        seconds, peak, output = measured([[*call, "reclaim", "--records", rows, "--dry-run"]])
        document = json.loads(output)
        planned = sum(len(entry["members"]) for entry in document["plan"])
        if planned != hidden or document["findings"]:
            raise SystemExit(f"bench: {planned} of {hidden} planned, {len(document['findings'])} findings: {document['findings'][:3]}")
        runs.append({"cold": cold, "seconds": seconds, "peak_bytes": peak})
        print(f"  qchain reclaim --dry-run, {'cold' if cold else 'warm'} caches: {seconds:.1f} s, {peak / 2**20:.0f} MiB", flush=True)
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "members": options.members, "runs": runs})


main()
