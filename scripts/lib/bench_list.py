"""Makes a store of many members and measures `qchain list`. Run through scripts/bench list."""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import time
import uuid

from bench_common import describe, drop_caches, machine, measured, save

# Members of a chain, CloudStack's default of snapshot.delta.max; volumes of an account.
CHAIN, VOLUMES = 16, 25
DAY = 86_400

CHECKPOINT = """<domaincheckpoint>
  <name>{name}</name>
{parent}  <creationTime>{created}</creationTime>
  <disks>
    <disk name='vda' checkpoint='bitmap' bitmap='{name}'/>
  </disks>
  <domain type='kvm'>
    <name>i-2-{volume}-VM</name>
    <devices>
      <disk type='file' device='disk'>
        <source file='/var/lib/libvirt/images/{volume}'/>
      </disk>
    </devices>
  </domain>
</domaincheckpoint>
"""


def pattern_of(mount):
    """The bytes of two small images by qemu-img: without and with a backing file whose name is as long as a member's."""
    placeholder = str(uuid.UUID(int=0))
    base, delta = os.path.join(mount, placeholder), os.path.join(mount, "delta")
    quiet = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*quiet, base, "10G"], check=True)
    subprocess.run([*quiet, "-F", "qcow2", "-b", placeholder, delta], check=True)
    images = []
    for path in (base, delta):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 64k 64k", path], check=True, stdout=subprocess.DEVNULL)
        with open(path, "rb") as file:
            images.append(file.read())
    for path in (base, delta):
        os.unlink(path)
    offset, length = struct.unpack(">QI", images[1][8:20])
    assert images[1][offset : offset + length].decode() == placeholder
    return images, offset


def make(store, members, images, offset):
    numbers = random.Random(1)
    now = time.time()
    made = 0
    volume = 0
    while made < members:
        volume += 1
        place = f"{2 + volume // VOLUMES}/{volume}"
        for kind in ("snapshots", "checkpoints"):
            os.makedirs(os.path.join(store, kind, place))
        parent = None
        for at in range(min(CHAIN, members - made)):
            name = str(uuid.UUID(int=numbers.getrandbits(128), version=4))
            image = bytearray(images[1 if parent else 0])
            if parent:
                image[offset : offset + len(parent)] = parent.encode()
            path = os.path.join(store, "snapshots", place, name)
            with open(path, "wb") as file:
                file.write(image)
            # One a day, the newest of each volume a day old: most files of a store are not of today.
            age = DAY * (CHAIN - at)
            os.utime(path, (now - age, now - age))
            element = f"  <parent>\n    <name>{parent}</name>\n  </parent>\n" if parent else ""
            with open(os.path.join(store, "checkpoints", place, name), "w") as file:
                file.write(CHECKPOINT.format(name=name, parent=element, created=1_700_000_000 + made, volume=volume))
            parent = name
            made += 1


def main():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "json", "command"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--members", type=int, required=True)
    options = parser.parse_args()

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
