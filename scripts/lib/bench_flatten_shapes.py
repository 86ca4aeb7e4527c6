"""Measures `qchain flatten` of chains that QEMU does not open or would take long to make, and compressed. Called by scripts/bench."""

import argparse
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import tarfile
from pathlib import Path

from bench_common import describe, drop_caches, machine, measured, save

CLUSTER = 1 << 16


def member(path, size, clusters, backing=None):
    """A qcow2 image (version 3, 64 KiB clusters) with random bytes in those clusters of the guest: one L1 entry a 512 MiB."""
    per_table = CLUSTER // 8
    tables = -(-size // (CLUSTER * per_table))
    used = sorted({cluster // per_table for cluster in clusters})
    l1_clusters = max(1, -(-tables * 8 // CLUSTER))
    first_l2 = 3 + l1_clusters
    first_data = first_l2 + len(used)
    total = first_data + len(clusters)
    assert total <= CLUSTER // 2, "one refcount block is enough"
    l2 = {table: first_l2 + at for at, table in enumerate(used)}
    data = {cluster: first_data + at for at, cluster in enumerate(sorted(clusters))}
    name = backing.encode() if backing else b""
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 128 if name else 0, len(name), 16, size, 0, tables, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104)
    with open(path, "wb") as file:
        file.write((header + struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2")).ljust(128, b"\0") + name if name else header)
        file.seek(CLUSTER)
        file.write(struct.pack(">Q", 2 * CLUSTER))
        file.seek(2 * CLUSTER)
        file.write(struct.pack(">H", 1) * total)
        file.seek(3 * CLUSTER)
        file.write(b"".join(struct.pack(">Q", l2[table] * CLUSTER | 1 << 63 if table in l2 else 0) for table in range(tables)))
        for table in used:
            file.seek(l2[table] * CLUSTER)
            entries = (table * per_table + at for at in range(per_table))
            file.write(b"".join(struct.pack(">Q", data[one] * CLUSTER | 1 << 63 if one in data else 0) for one in entries))
        file.seek(first_data * CLUSTER)
        for _ in clusters:
            file.write(os.urandom(CLUSTER))


def flatten(args, store, name, out, *more):
    """Seconds of one flatten from cold caches, sync included, and its peak memory."""
    out.unlink(missing_ok=True)
    drop_caches()
    seconds, peak, _ = measured([[args.qchain, "--store", str(store), "flatten", name, str(out), *more]], synced=args.mount)
    return seconds, peak


def many(args, mount):
    """The same data in 1,000 members and in one. Gives the seconds of both, pair by pair."""
    size, count, each = 4 << 30, 1000, 16
    numbers = random.Random(1)
    clusters = numbers.sample(range(size // CLUSTER), count * each)
    long, short = mount / "many" / "snapshots/2/7", mount / "one" / "snapshots/2/7"
    long.mkdir(parents=True)
    short.mkdir(parents=True)
    for at in range(count):
        member(long / f"m{at:04}", size, clusters[at * each : at * each + each], f"m{at - 1:04}" if at else None)
    member(short / "all", size, clusters)
    pairs = []
    for _ in range(args.pairs):
        chain, peak = flatten(args, mount / "many", f"m{count - 1:04}", mount / "out")
        single, _ = flatten(args, mount / "one", "all", mount / "out")
        pairs.append((chain, single, peak))
    ratio = statistics.median(chain / single for chain, single, _ in pairs)
    print(
        f"many: {count} members of {each} scattered clusters, 1,000 MiB in all: {statistics.median(pair[0] for pair in pairs):.2f} s, the same in one "
        f"member {statistics.median(pair[1] for pair in pairs):.2f} s; ratio {ratio:.2f} (at most 1.5), {max(pair[2] for pair in pairs) >> 20} MiB of memory"
    )
    return {"pairs": pairs, "ratio": ratio}


def sparse(args, mount):
    """A stream of 16 TiB with 1 GiB of data: seconds to its first byte, and memory at its end of a range."""
    store = mount / "sparse" / "snapshots/2/7"
    store.mkdir(parents=True)
    size = 16 << 40
    quiet = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*quiet, str(store / "base"), str(size)], check=True)
    subprocess.run([*quiet, "-F", "qcow2", "-b", "base", str(store / "tip"), str(size)], check=True)
    for at in range(32):
        name = "base" if at % 2 else "tip"
        where = (size // 32) * at
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {at + 1} {where} 32M", str(store / name)], check=True, stdout=subprocess.DEVNULL)
    found = {}
    for form in ("qcow2", "raw"):
        first, peaks = [], []
        for _ in range(args.pairs + 1):
            call = [args.qchain, "--store", str(mount / "sparse"), "flatten", "tip", "-", "-O", form]
            seconds, _, _ = measured([["sh", "-c", '"$@" 2>/dev/null | head -c 1 >/dev/null', "sh", *call]])
            first.append(seconds)
            # All of the qcow2 image; of the raw one, whose zeros alone would take hours, 1 GiB in the middle.
            part = [] if form == "qcow2" else ["--range", f"{size // 2}-{size // 2 + (1 << 30) - 1}"]
            _, peak, _ = measured([["sh", "-c", 'exec "$@" >/dev/null', "sh", *call, *part]])
            peaks.append(peak)
        # The first run read the headers.
        found[form] = {"first_byte_seconds": first[1:], "peak_bytes": peaks}
        print(
            f"sparse: 16 TiB with 1 GiB of data as {form}: first byte after {statistics.median(first[1:]) * 1000:.0f} ms, start of the process included "
            f"(at most 100), {max(peaks) >> 20} MiB of memory (below 256)"
        )
    return found


def real_data(place, most):
    """Shared libraries and text of this machine, in one file."""
    total = 0
    with tarfile.open(place, "w") as archive:
        for root in ("/usr/lib", "/usr/share/doc", "/usr/include", "/usr/share/perl", "/usr/lib/python3"):
            for path in sorted(Path(root).rglob("*")):
                if path.is_file() and not path.is_symlink() and total < most:
                    total += path.stat().st_size
                    archive.add(path)
    return total


def compressed(args, mount):
    """zstd and zlib beside qemu-img, on real data."""
    store = mount / "compressed" / "snapshots/2/7"
    store.mkdir(parents=True)
    raw = mount / "data.raw"
    real_data(raw, 600 << 20)
    subprocess.run(["truncate", "--size=%64K", str(raw)], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(store / "all")], check=True)
    raw.unlink()
    out = mount / "out"
    found = {}
    for kind, (faster, larger) in {"zstd": (1.5, 1.05), "zlib": (4, 4 / 3)}.items():
        pairs = []
        for _ in range(args.pairs):
            own, _ = flatten(args, mount / "compressed", "all", out, "--compress", kind)
            own_bytes = out.stat().st_size
            out.unlink()
            drop_caches()
            call = ["qemu-img", "convert", "-m", "16", "-W", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", str(store / "all"), str(out)]
            theirs, _, _ = measured([call], synced=args.mount)
            pairs.append((own, theirs, own_bytes / out.stat().st_size))
        ratio = statistics.median(theirs / own for own, theirs, _ in pairs)
        print(
            f"compressed: {kind}: {statistics.median(pair[0] for pair in pairs):.2f} s, qemu-img {statistics.median(pair[1] for pair in pairs):.2f} s: "
            f"{ratio:.2f} times faster (at least {faster}), size {pairs[0][2]:.3f} of its (at most {larger:.2f})"
        )
        found[kind] = {"pairs": pairs, "ratio": ratio}
    return found


def main():
    parser = argparse.ArgumentParser()
    for name in ("--qchain", "--mount", "--json", "--command"):
        parser.add_argument(name, default="")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("shapes", nargs="+")
    args = parser.parse_args()
    facts = machine()
    describe(facts)
    mount = Path(args.mount)
    found = {}
    for shape in args.shapes:
        found[shape] = {"many": many, "sparse": sparse, "compressed": compressed}[shape](args, mount)
        for left in mount.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    save(args.json, {"schema": 1, "command": args.command, "machine": facts, "results": found})


main()
