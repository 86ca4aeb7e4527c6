"""A large store of small chains, in CloudStack's layout. For the measuring scripts."""

import argparse
import os
import random
import struct
import subprocess
import time
import uuid

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
    """Writes the members, and gives (account, volume, name, place in the chain from 0) of each, base first."""
    numbers = random.Random(1)
    now = time.time()
    made = []
    volume = 0
    while len(made) < members:
        volume += 1
        place = f"{2 + volume // VOLUMES}/{volume}"
        for kind in ("snapshots", "checkpoints"):
            os.makedirs(os.path.join(store, kind, place))
        parent = None
        for at in range(min(CHAIN, members - len(made))):
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
                file.write(CHECKPOINT.format(name=name, parent=element, created=1_700_000_000 + len(made), volume=volume))
            parent = name
            made.append((2 + volume // VOLUMES, volume, name, at))
    return made


def arguments():
    """What scripts/bench gives to whatever measures such a store."""
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "json", "command"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--members", type=int, required=True)
    return parser.parse_args()
