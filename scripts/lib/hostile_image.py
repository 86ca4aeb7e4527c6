"""A qcow2 image in the making: sound until it is spoilt on purpose."""

import os
import struct
import zlib

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
ENCRYPTION = 0x0537BE77
DATA_FILE = 0x44415441


class Image:
    """Clusters are handed out in order: header, refcount table, L1 table, then what is asked for; refcount blocks last."""

    def __init__(self, bits=16, size=1 << 24, version=3, extended=False, order=4, zstd=False, table_clusters=1):
        self.bits, self.size, self.version, self.extended, self.order = bits, size, version, extended, order
        self.cluster = 1 << bits
        self.words = self.cluster // (16 if extended else 8)
        self.pokes, self.extensions, self.backing = [], [], b""
        self.incompatible = (16 if extended else 0) | (8 if zstd else 0)
        self.autoclear, self.zstd = 0, zstd
        self.l1_entries = -(-size // (self.words * self.cluster))
        self.next, self.counts, self.bytes, self.fields = 1, {0: 1}, {}, {}
        self.table = self.take(table_clusters)
        self.table_clusters = table_clusters
        self.l1 = self.take(-(-self.l1_entries * 8 // self.cluster) or 1)
        self.length = None

    def take(self, clusters=1, counted=True):
        """Clusters behind the last ones; their offset."""
        first = self.next
        self.next += clusters
        if counted:
            self.counts.update((cluster, 1) for cluster in range(first, self.next))
        return first * self.cluster

    def count(self, offset, more=1):
        cluster = offset >> self.bits
        self.counts[cluster] = self.counts.get(cluster, 0) + more

    def put(self, offset, data):
        self.pokes.append((offset, data))

    def word(self, offset, *values):
        self.put(offset, struct.pack(f">{len(values)}Q", *values))

    def l1_entry(self, index, value):
        self.word(self.l1 + 8 * index, value)

    def entry(self, table, index, value, bitmap=0):
        width = 16 if self.extended else 8
        self.word(table + width * index, value, *([bitmap] if self.extended else []))

    def l2(self, index=0):
        """A new L2 table for an L1 entry."""
        table = self.take()
        self.l1_entry(index, table | COPIED)
        return table

    def data(self, table, index, byte=0x5A):
        """A new cluster of data behind an L2 entry."""
        host = self.take()
        self.put(host, bytes([byte]) * min(self.cluster, 4096))
        self.entry(table, index, host | COPIED, 0xFFFFFFFF)
        return host

    def descriptor(self, host, stored):
        """The entry of a compressed cluster."""
        shift = 62 - (self.bits - 8)
        return COMPRESSED | (((host % 512 + stored - 1) // 512) << shift) | host

    def compressed(self, table, index, stored=None):
        """A new compressed cluster, at a cluster's start."""
        stored = deflated(self.cluster) if stored is None else stored
        host = self.take()
        self.put(host, stored)
        self.entry(table, index, self.descriptor(host, len(stored)))
        return host

    def extension(self, kind, data):
        self.extensions.append((kind, data))

    def field(self, at, form, value):
        """Overwrites a field of the header."""
        self.fields[at] = struct.pack(">" + form, value)

    def refcounts(self):
        """The refcount blocks, each counted itself, and the table."""
        width = 1 << self.order
        per_block = self.cluster * 8 // width
        blocks = {}
        while missing := {cluster // per_block for cluster in self.counts} - blocks.keys():
            for index in sorted(missing):
                blocks[index] = self.take()
        found = [(self.table + 8 * index, struct.pack(">Q", host)) for index, host in blocks.items()]
        contents = {}
        for cluster, count in self.counts.items():
            host = blocks[cluster // per_block]
            slot = cluster % per_block
            block = contents.setdefault(host, {})
            if width >= 8:
                block[slot * width // 8] = min(count, (1 << width) - 1).to_bytes(width // 8, "big")
            else:
                at = slot * width // 8
                old = block.get(at, b"\0")[0]
                block[at] = bytes([old | min(count, (1 << width) - 1) << (slot * width % 8)])
        for host, block in contents.items():
            found += [(host + at, data) for at, data in block.items()]
        self.blocks = blocks
        return found

    def header(self):
        start = 72 if self.version == 2 else 112
        tail = b"".join(
            struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in self.extensions
        ) + bytes(8)
        at = start + len(tail) if self.backing else 0
        head = struct.pack(
            ">4sIQIIQIIQQIIQ", b"QFI\xfb", self.version, at, len(self.backing), self.bits, self.size, 0, self.l1_entries,
            self.l1, self.table, self.table_clusters, 0, 0,
        )
        if self.version > 2:
            head += struct.pack(">QQQII8s", self.incompatible, 0, self.autoclear, self.order, 112, bytes([self.zstd]) + bytes(7))
        return head + tail + self.backing

    def write(self, path):
        pokes = self.refcounts() + [(0, self.header())] + self.pokes + sorted(self.fields.items())
        length = self.length if self.length is not None else self.next * self.cluster
        with open(path, "wb") as file:
            os.truncate(path, length)
            for offset, data in pokes:
                if offset < length:
                    file.seek(offset)
                    file.write(data[: length - offset])


def deflated(length, byte=0x41):
    """A raw deflate stream of that many bytes, in QEMU's window."""
    encoder = zlib.compressobj(9, zlib.DEFLATED, -12)
    return encoder.compress(bytes([byte]) * length) + encoder.flush()


def zstd_frame(length, byte=0x41, window=None):
    """A zstd frame of RLE blocks; with `window` a header that wants a window of 2^window bytes."""
    if window is None:
        head = b"\x28\xb5\x2f\xfd" + b"\xa0" + struct.pack("<I", length)
    else:
        head = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(window - 10) << 3])
    blocks = b""
    while length > 0:
        part = min(length, 128 << 10)
        length -= part
        blocks += struct.pack("<I", part << 3 | 1 << 1 | (length == 0))[:3] + bytes([byte])
    return head + blocks
