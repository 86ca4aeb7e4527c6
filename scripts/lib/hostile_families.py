"""The families of hostile images: each gives (structure, reading, write) for a handful of images.

`structure` is the code that looking at headers and tables must give, `reading` the one of reading the view if that is another;
"readable" is an image that only looks odd, or is large: it must be read right.
"""

import os
import socket
import struct

from hostile_image import (
    BACKING_FORMAT, BITMAPS, COMPRESSED, COPIED, DATA_FILE, ENCRYPTION, FEATURE_NAMES, ZERO, Image, deflated, zstd_frame,
)

FAMILIES = {}
BITS = (9, 12, 14, 16, 21)


def family(make):
    FAMILIES[make.__name__.replace("_", "-")] = make
    return make


def small(bits, **more):
    """One L2 table with two clusters of data."""
    image = Image(bits, size=8 << bits, **more)
    table = image.l2()
    image.data(table, 0)
    image.data(table, 3, 0x33)
    return image, table


def spoilt(code, change, bits=BITS, reading=None, **more):
    """The small image with one thing wrong, for several cluster sizes."""
    for bit in bits:
        image, table = small(bit, **more)
        change(image, table)
        yield code, reading, image.write


def header_field(code, at, form, values, bits=16, **more):
    for value in values:
        image, _ = small(bits, **more)
        image.field(at, form, value)
        yield code, None, image.write


def raw(code, contents):
    def writer(data):
        def write(path):
            with open(path, "wb") as file:
                file.write(data)
        return write

    for data in contents:
        yield code, None, writer(data)


# -- Files that are no images ---------------------------------------------------------------------------------------------------


@family
def no_image(chance):
    # A plain store is full of other files: they are no members.
    yield from raw("not-found", [b"", b"Q", b"QFI", b"\0" * 65536, b"KDMV" + bytes(508), b"conectix" + bytes(504),
                                 b"\x7fELF" + chance.randbytes(4096), b"#!/bin/sh\n", b"QFI\xfa" + bytes(200), chance.randbytes(70000)])


@family
def header_cut(chance):
    image, _ = small(16)
    for length in [4, 8, 20, 71, 72, 103, 104, 111, chance.randrange(24, 72)]:
        yield "truncated", None, lambda path, length=length: (image.write(path), os.truncate(path, length))


@family
def version_unknown(chance):
    return header_field("bad-header", 4, "I", [0, 1, 4, 0xFFFFFFFF, chance.randrange(5, 1 << 31)])


@family
def cluster_size_out_of_range(chance):
    return header_field("bad-header", 20, "I", [0, 8, 22, 63, 64, 0xFFFFFFFF, chance.randrange(23, 1 << 31)])


@family
def virtual_size_overflows(chance):
    return header_field("bad-header", 24, "Q", [1 << 63, (1 << 64) - 1, (1 << 63) + chance.randrange(1 << 60)])


@family
def disk_larger_than_its_table(chance):
    return header_field("bad-header", 24, "Q", [1 << 40, (1 << 63) - 1, (1 << 29) + 1, chance.randrange(1 << 35, 1 << 62)])


@family
def l1_huge(chance):
    return header_field("huge-table", 36, "I", [(4 << 20) + 1, 0xFFFFFFFF, 0x80000000, chance.randrange(5 << 20, 1 << 32)])


@family
def l1_misplaced(chance):
    return header_field("bad-header", 40, "Q", [1, 512, 1 << 56, (1 << 64) - 65536, 65536 + chance.randrange(1, 65536)])


@family
def l1_behind_the_end(chance):
    return header_field("truncated", 40, "Q", [1 << 20, 1 << 40, (1 << 56) - 65536, chance.randrange(16, 1 << 30) << 16])


@family
def refcount_table_huge(chance):
    return header_field("huge-table", 56, "I", [129, 0xFFFFFFFF, 1 << 31, chance.randrange(130, 1 << 32)])


@family
def refcount_table_missing(_):
    for bits in BITS:
        yield from header_field("bad-header", 56, "I", [0], bits)


@family
def refcount_table_misplaced(chance):
    return header_field("bad-header", 48, "Q", [8, 1 << 56, (1 << 64) - 1, 65536 + chance.randrange(1, 65536)])


@family
def refcount_table_behind_the_end(chance):
    for code, _, write in header_field("truncated", 48, "Q", [1 << 30, (1 << 56) - 65536, chance.randrange(16, 1 << 30) << 16]):
        yield code, "readable", write


@family
def refcount_width_unknown(chance):
    return header_field("bad-header", 96, "I", [7, 64, 0xFFFFFFFF, chance.randrange(8, 1 << 31)])


@family
def header_length_wrong(chance):
    return header_field("bad-header", 100, "I", [0, 72, 103, 108, 65544, 0xFFFFFFF8, chance.randrange(1 << 17, 1 << 28) * 8])


@family
def snapshots_too_many(chance):
    return header_field("huge-table", 60, "I", [65537, 0xFFFFFFFF, chance.randrange(65538, 1 << 32)])


@family
def snapshot_table_misplaced(chance):
    return header_field("bad-header", 64, "Q", [4, 1 << 60, chance.randrange(1, 65536)])


@family
def encrypted(_):
    yield from header_field("encrypted", 32, "I", [1, 2, 3, 0xFFFFFFFF])
    yield from spoilt("encrypted", lambda image, _: image.extension(ENCRYPTION, struct.pack(">QQ", 1 << 20, 1 << 62)), (16,))


@family
def marked_corrupt(_):
    return spoilt("marked-corrupt", lambda image, _: setattr(image, "incompatible", image.incompatible | 2))


@family
def data_file(_):
    for name in [b"/etc/passwd", b"json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", b"../../../../etc/hostname", b"", b"x" * 4000]:
        def change(image, _, name=name):
            image.incompatible |= 4
            image.extension(DATA_FILE, name)
        yield from spoilt("data-file", change, (16,))


@family
def unknown_feature(chance):
    for bit in [5, 31, 32, 63, chance.randrange(6, 63)]:
        def change(image, _, bit=bit):
            image.incompatible |= 1 << bit
            image.extension(FEATURE_NAMES, bytes([0, bit]) + b"\x1b[2J\xff" + bytes(42))
        yield from spoilt("unknown-feature", change, (16,))


@family
def compression_type_wrong(_):
    yield from header_field("bad-header", 104, "B", [1])
    yield from header_field("unknown-feature", 104, "B", [2, 255])
    yield from spoilt("bad-header", lambda image, _: setattr(image, "incompatible", 8), (12, 16))


@family
def extension_too_long(chance):
    for length in [0xFFFFFFFF, 1 << 31, 65536, chance.randrange(70000, 1 << 30)]:
        yield from spoilt("bad-header", lambda image, _, n=length: image.put(112, struct.pack(">II", 77, n)), (16,))


@family
def extensions_without_end(_):
    # As many empty extensions as fit: read, and not for long.
    for bits in (12, 16, 21):
        image, _ = small(bits)
        image.put(112, struct.pack(">II", 0x1234, 0) * ((image.cluster - 112) // 8))
        yield "readable", None, image.write


@family
def small_subclusters(_):
    for bits in (9, 12, 13):
        image, _ = small(bits)
        image.incompatible |= 16
        # Tables of entries twice as wide hold half as much.
        image.size //= 2
        yield "bad-header", None, image.write


@family
def bitmaps_huge(chance):
    for count, length in [(0, 64), (65536, 64), (1, (65535 << 10) + 1), (0xFFFFFFFF, 1 << 63), (chance.randrange(65536, 1 << 31), 24)]:
        def change(image, _, count=count, length=length):
            image.autoclear = 1
            image.extension(BITMAPS, struct.pack(">IIQQ", count, 0, length, image.take()))
        code = "bad-header" if count == 0 else "huge-table"
        yield from spoilt(code, change, (16,))


# -- Names ----------------------------------------------------------------------------------------------------------------------


def named(code, names, form=b"qcow2"):
    for name in names:
        image = Image(16)
        image.backing = name
        if form:
            image.extension(BACKING_FORMAT, form)
        yield code, None, image.write


@family
def name_json(_):
    return named("outside-name", [b'json:{"driver":"file","filename":"/etc/passwd"}', b'json:{"driver":"nbd","host":"127.0.0.1"}', b"json:",
                                  b"json:{" + b"{" * 900])


@family
def name_protocol(_):
    return named("outside-name", [b"nbd:127.0.0.1:10809", b"nbd+unix:///?socket=/run/x", b"http://127.0.0.1/latest/meta-data", b"ssh://root@localhost/etc",
                                  b"fat:rw:/etc", b"file:/etc/passwd", b"rbd:pool/image", b"host_device:/dev/sda", b"blkdebug::x", b"nfs://h/x"])


@family
def name_absolute(_):
    return named("missing-parent", [b"/etc/passwd", b"/dev/sda", b"/proc/self/mem", b"/dev/stdin", b"/mnt/a/snapshots/2/7/x"])


@family
def name_that_escapes(_):
    return named("outside-name", [b"../../../../../../../../../../../../../../../../../../etc/passwd", b"..", b"a/../../../../../../../../../../x", b"./../../../../../../../../../y",
                                  b"/../../snapshots/x", b"../" * 341])


@family
def name_with_nul(_):
    return named("outside-name", [b"base\0", b"\0", b"ba\0se", b"/etc/passwd\0.qcow2", b"\0" * 1023])


@family
def name_with_controls(_):
    return named("outside-name", [b"base\n", b"\x1b[2J\x1b[1;1H", b"a\rb", b"\x7f", b"x\ty", b"\xc2\x9b31m"])


@family
def name_not_utf8(chance):
    return named("outside-name", [b"\xff\xfe", b"a\xc0\xafb", b"\xed\xa0\x80", bytes(chance.randrange(128, 256) for _ in range(40)) + b"\xff"])


@family
def name_of_1023_bytes(_):
    yield from named("missing-parent", [b"a/" * 511 + b"b", b"/snapshots" * 102 + b"/ab", b"./" * 511 + b"x"])
    yield from named("outside-name", [b"a" * 1023, b"/" * 1023, b"/"])


@family
def name_too_long(chance):
    for length in [1024, 4096, 0xFFFFFFFF, chance.randrange(1025, 60000)]:
        def change(image, _, length=length):
            image.backing = b"a" * min(length, 60000)
            image.field(16, "I", length)
        yield from spoilt("bad-header", change, (16,))


@family
def name_outside_the_header(chance):
    for at in [65536, (1 << 64) - 1, (1 << 64) - 8, 65536 - 3, chance.randrange(1 << 17, 1 << 60)]:
        def change(image, _, at=at):
            image.backing = b"base"
            image.field(8, "Q", at)
        yield from spoilt("bad-header", change, (16,))


@family
def name_missing(_):
    return named("missing-parent", [b"nobody", b"a/b/c", b"image.old", "größe".encode(), b"%s%n", b"$(id)", b"'; DROP"])


@family
def name_of_another_format(_):
    yield from named("wrong-format", [b"image"], b"raw")
    yield from named("wrong-format", [b"image"], b"vmdk")
    yield from named("wrong-format", [b"image"], b"host_device")
    yield from named("wrong-format", [b"image"], b"\x1b[2J")
    yield from named("bad-header", [b"image"], b"a" * 16)


def ring(before, length):
    """image -> m0 .. -> the first of a circle of `length`."""
    def write(path):
        names = ["image"] + [f"m{index:03}" for index in range(before + length - 1)]
        for index, name in enumerate(names):
            image = Image(12, size=1 << 20)
            image.backing = (names[index + 1] if index + 1 < len(names) else names[before]).encode()
            image.extension(BACKING_FORMAT, b"qcow2")
            image.write(os.path.join(os.path.dirname(path), name))
    return write


@family
def cycle(chance):
    for before, length in [(0, 1), (0, 2), (0, 3), (0, 50), (0, chance.randrange(4, 20))]:
        yield "cycle", None, ring(before, length)


@family
def above_a_cycle(chance):
    # Only members of the circle have the finding; who stands on it is refused with the same code.
    for before, length in [(1, 1), (2, 2), (10, chance.randrange(3, 10))]:
        yield "readable-above-cycle", "cycle", ring(before, length)


@family
def deep_chain(_):
    def write(path):
        for index in range(400):
            name = path if index == 0 else os.path.join(os.path.dirname(path), f"m{index:03}")
            image = Image(9, size=1 << 15)
            image.data(image.l2(), index % 64, index % 251 + 1)
            if index < 399:
                image.backing = f"m{index + 1:03}".encode()
                image.extension(BACKING_FORMAT, b"qcow2")
            image.write(name)
    yield "readable", None, write


# -- What is no regular file ----------------------------------------------------------------------------------------------------


@family
def symlink(_):
    for target in ["/etc/passwd", "../../../../../etc/shadow", "image", "/dev/zero", "/", "nowhere"]:
        yield "special-file", "not-found", lambda path, target=target: os.symlink(target, path)


@family
def fifo(_):
    yield "special-file", "not-found", os.mkfifo


@family
def unix_socket(_):
    def write(path):
        here = os.getcwd()
        os.chdir(os.path.dirname(path))
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("image")
        os.chdir(here)
    yield "special-file", "not-found", write


# -- Tables ---------------------------------------------------------------------------------------------------------------------


@family
def l1_bad_entries(chance):
    for value in [1, 1 << 62, 1 << 56, 0x200 | COPIED, (1 << 64) - 1, 0xDEADBEEF, chance.getrandbits(64) | 1]:
        yield from spoilt("bad-entry", lambda image, _, value=value: image.l1_entry(0, value), (16,))


@family
def l2_bad_entries(chance):
    for value in [2, 1 << 56, 0x10200 | COPIED, 0x1FE, 1 << 61, COMPRESSED | COPIED, chance.getrandbits(62) | 6]:
        yield from spoilt("bad-entry", lambda image, table, value=value: image.entry(table, 1, value), (16,))


@family
def zero_flag_in_version_2(_):
    return spoilt("bad-entry", lambda image, table: image.entry(table, 1, ZERO), version=2)


@family
def subclusters_that_contradict(chance):
    for value, bitmap in [(0, 1), (0, 0xFFFFFFFF), (0, 0x1_0000_0001), (0, (1 << 64) - 1), (ZERO, 0), (COMPRESSED | 65536, chance.getrandbits(64) | 1)]:
        yield from spoilt("bad-entry", lambda image, table, v=value, b=bitmap: image.entry(table, 1, v, b), (16,), extended=True)


@family
def table_shared(_):
    for bits, entries in [(9, 64), (12, 4096), (16, 64), (16, 32768), (21, 4096)]:
        image = Image(bits, size=entries << (2 * bits - 3))
        table = image.l2()
        for index in range(1, entries):
            image.l1_entry(index, table | COPIED)
        image.data(table, 0)
        yield "shared-cluster", None, image.write


@family
def data_shared(_):
    for bits in BITS:
        image, table = small(bits)
        image.size = image.words << bits
        host = image.take()
        image.put(table, b"".join(struct.pack(">Q", host | COPIED) for _ in range(image.words)))
        image.put(host, b"A" * 512)
        yield "shared-cluster", None, image.write


@family
def data_shared_and_counted(_):
    # The counts allow for it: qemu-img check finds nothing.
    for bits in (12, 14, 16):
        image = Image(bits, size=64 << bits)
        table = image.l2()
        host = image.data(table, 0)
        image.count(host, 31)
        for index in range(32):
            image.entry(table, index, host)
        yield "shared-cluster", "readable" if bits > 16 else None, image.write


@family
def amplification(_):
    # A file of some 700 KiB claims terabytes: every L1 entry shares the table, every entry of that the cluster.
    for bits, size in [(16, 16 << 40), (16, 1 << 50), (12, 1 << 30), (21, 1 << 60)]:
        image = Image(bits, size=min(size, (4 << 20) << (2 * bits - 3)))
        table, host = image.take(), image.take()
        for cluster in (table, host):
            image.count(cluster, 65534)
        image.put(image.l1, struct.pack(">Q", table) * image.l1_entries)
        image.put(table, struct.pack(">Q", host) * image.words)
        image.put(host, b"A" * 4096)
        yield "shared-cluster", None, image.write


@family
def l2_is_the_header(_):
    # An offset of 0 is no table at all, whatever the flag says.
    return spoilt("bad-entry", lambda image, _: image.l1_entry(0, COPIED), reading="readable")


@family
def l2_is_the_l1(_):
    return spoilt("overlap", lambda image, _: image.l1_entry(0, image.l1 | COPIED), reading="any")


@family
def l2_is_the_refcount_table(_):
    return spoilt("overlap", lambda image, _: image.l1_entry(0, image.table | COPIED), reading="any")


@family
def l2_refers_to_itself(_):
    return spoilt("overlap", lambda image, table: image.entry(table, 1, table | COPIED), reading="any")


@family
def data_is_metadata(_):
    for place in ["l1", "table"]:
        yield from spoilt("overlap", lambda image, table: image.entry(table, 1, getattr(image, place) | COPIED), reading="readable")


@family
def l1_is_the_header(_):
    return spoilt("overlap", lambda image, _: image.field(40, "Q", 0), reading="any")


@family
def l1_is_the_refcount_table(_):
    return spoilt("overlap", lambda image, _: image.field(40, "Q", image.table), reading="any")


@family
def refcount_table_is_the_header(_):
    return spoilt("overlap", lambda image, _: image.field(48, "Q", 0), reading="readable")


@family
def refcount_table_is_the_l1(_):
    return spoilt("overlap", lambda image, _: image.field(48, "Q", image.l1), reading="readable")


@family
def refcount_block_is_the_table(_):
    return spoilt("overlap", lambda image, _: image.word(image.table, image.table), reading="readable")


@family
def refcount_block_is_data(_):
    return spoilt("overlap", lambda image, table: image.word(image.table, table), reading="readable")


@family
def refcount_blocks_shared(_):
    return spoilt("overlap", lambda image, table: image.word(image.table, *[image.table + image.cluster] * 32), reading="readable")


@family
def refcount_blocks_bad(chance):
    for value in [1, 0x1FF, 1 << 56, (1 << 64) - 1, 0x10200, chance.getrandbits(64) | 3]:
        yield from spoilt("bad-entry", lambda image, _, v=value: image.word(image.table + 64, v), (16,), reading="readable")


@family
def refcount_blocks_behind_the_end(_):
    return spoilt("truncated", lambda image, _: image.word(image.table + 64, 1 << 40), reading="readable")


@family
def refcounts_too_low(_):
    return spoilt("refcount-too-low", lambda image, table: image.count(table, -1), reading="readable")


@family
def refcounts_too_high(_):
    # A leak is no damage.
    return spoilt("readable", lambda image, _: image.take(7))


@family
def copied_flag_lies(_):
    return spoilt("copied-flag", lambda image, table: image.entry(table, 0, 4 << image.bits, 0xFFFFFFFF), reading="any")


@family
def l2_behind_the_end(chance):
    for host in [1 << 40, (1 << 56) - 65536, chance.randrange(1 << 10, 1 << 30) << 16]:
        yield from spoilt("truncated", lambda image, _, host=host: image.l1_entry(0, host | COPIED), (16,))


@family
def data_behind_the_end(chance):
    for host in [1 << 40, (1 << 56) - 65536, chance.randrange(1 << 10, 1 << 30) << 16]:
        yield from spoilt("truncated", lambda image, table, host=host: image.entry(table, 1, host | COPIED), (16,), reading="readable")


@family
def tail_cut(chance):
    for bits in BITS:
        image, _ = small(bits)
        keep = image.table + chance.randrange(1, image.cluster) + (2 << bits)
        yield "truncated", "any", lambda path, image=image, keep=keep: (image.write(path), os.truncate(path, keep))


# -- Size -----------------------------------------------------------------------------------------------------------------------


@family
def l1_of_32_mib(_):
    # The largest that QEMU opens, empty: a disk of 2 EiB without a byte.
    for bits in (9, 16, 20):
        image = Image(bits, size=min((4 << 20) << (2 * bits - 3), (1 << 63) - 1), table_clusters=8)
        yield "readable", None, image.write


@family
def l1_full_of_holes(_):
    # Tables at different places of a file that is one hole: zeros without end.
    for bits, code in [(16, "refcount-too-low"), (21, "refcount-too-low")]:
        image = Image(bits, size=(2 << 20) << (2 * bits - 3) if bits < 20 else 1 << 60)
        image.put(image.l1, struct.pack(f">{image.l1_entries}Q", *((1 << 30) + (index << bits) for index in range(image.l1_entries))))
        image.length = (1 << 30) + (image.l1_entries << bits)
        yield code, "any", image.write


@family
def l1_noise(chance):
    for bits in (9, 12, 16):
        image = Image(bits, size=(1 << 20) << (2 * bits - 3))
        image.put(image.l1, chance.randbytes(8 << 20))
        yield "bad-entry", None, image.write


@family
def l2_noise(chance):
    for bits in BITS:
        image, table = small(bits)
        image.size = image.words << bits
        image.put(table, chance.randbytes(image.cluster))
        yield "bad-entry", None, image.write


@family
def refcount_table_noise(chance):
    for bits in (9, 16, 21):
        image, _ = small(bits, table_clusters=(8 << 20) >> bits)
        image.put(image.table + 4096, chance.randbytes((8 << 20) - 4096))
        yield "bad-entry", "readable", image.write


@family
def refcount_table_full_of_holes(_):
    for bits in (9, 16, 21):
        image, _ = small(bits, table_clusters=(8 << 20) >> bits)
        blocks = (1 << 20) - 4096
        image.put(image.table + 32768, struct.pack(f">{blocks}Q", *((1 << 30) + (index << bits) for index in range(blocks))))
        image.length = (1 << 30) + (blocks << bits)
        yield "refcount-too-low", "readable", image.write


@family
def sparse_giants(_):
    # A file of exabytes that is a hole behind its first clusters.
    for bits, length in [(16, 1 << 43), (21, 1 << 43), (9, 1 << 42), (16, (1 << 42) + 1)]:
        image, table = small(bits)
        image.length = length
        yield "readable", None, image.write


@family
def references_far_apart(chance):
    # Each reference in another corner of a sparse file, so that whoever counts them has most to keep.
    for bits in (9, 12, 16, 21):
        tables = max((1 << 20) >> bits, 1)
        image = Image(bits, size=tables * (1 << (2 * bits - 3)))
        hosts = chance.sample(range(1 << min(41 - bits, 28), 1 << min(42 - bits, 30)), tables * image.words)
        for index in range(tables):
            some = hosts[index * image.words:][: image.words]
            image.put(image.l2(index), struct.pack(f">{image.words}Q", *(host << bits for host in some)))
        image.length = 1 << 42
        yield "refcount-too-low", "any", image.write


@family
def shuffled(chance):
    # Sound, with no two clusters in a row.
    for bits in (12, 16):
        tables = (1 << 19) >> bits
        image = Image(bits, size=tables << (2 * bits - 3))
        places = [image.l2(index) for index in range(tables)]
        hosts = [image.take() for _ in range(tables * image.words)]
        chance.shuffle(hosts)
        for index, table in enumerate(places):
            some = hosts[index * image.words:][: image.words]
            image.put(table, struct.pack(f">{image.words}Q", *(host | COPIED for host in some)))
        yield "readable", None, image.write


@family
def tables_in_a_hole(_):
    # Sound: every L2 table has its refcount, and none a byte on the disk.
    for bits, tables in [(16, 1 << 17), (21, 1 << 16)]:
        image = Image(bits, size=tables << (2 * bits - 3), order=0)
        image.put(image.l1, struct.pack(f">{tables}Q", *(image.take() | COPIED for _ in range(tables))))
        yield "readable", None, image.write


# -- Compression ----------------------------------------------------------------------------------------------------------------


@family
def compressed_garbage(chance):
    for zstd in (False, True):
        for stored in [b"\xff" * 512, bytes(512), chance.randbytes(512)]:
            image, table = small(16, zstd=zstd)
            image.compressed(table, 1, stored)
            yield "readable", "bad-compression", image.write


@family
def compressed_too_short(_):
    for bits in (12, 16, 21):
        for zstd in (False, True):
            image, table = small(bits, zstd=zstd)
            image.compressed(table, 1, (zstd_frame if zstd else deflated)((1 << bits) - 1))
            yield "readable", "bad-compression", image.write


@family
def compressed_bomb(_):
    # Streams of far more than a cluster: only the first is made of deflate, a frame too large is refused.
    for bits in (12, 16, 21):
        image, table = small(bits)
        image.compressed(table, 1, deflated(32 << bits)[: 1 << bits])
        yield "readable", None, image.write
        image, table = small(bits, zstd=True)
        image.compressed(table, 1, zstd_frame(32 << bits)[: 1 << bits])
        yield "readable", "bad-compression", image.write


@family
def compressed_window(_):
    # Frames that want a window of up to 2 TiB.
    for window in (27, 31, 37, 41):
        image, table = small(16, zstd=True)
        image.compressed(table, 1, zstd_frame(65536, window=window))
        yield "readable", "any", image.write


@family
def compressed_frames(_):
    # Empty and skippable frames in front of the data, and nothing else at all.
    empty, skip = zstd_frame(0) + b"", struct.pack("<II", 0x184D2A50, 8) + bytes(8)
    for frames in [empty * 20 + zstd_frame(65536), skip * 20 + zstd_frame(65536), empty * 40, skip * 60, struct.pack("<II", 0x184D2A50, 0xFFFFFFFF)]:
        image, table = small(16, zstd=True)
        image.compressed(table, 1, frames)
        yield "readable", "any", image.write


@family
def compressed_shared(_):
    # One stream behind every entry: with clusters of 2 MiB a file of 8 MiB claims half a terabyte.
    for bits, counted in [(16, 8192), (21, 8192), (21, 65535)]:
        image = Image(bits, size=1 << (2 * bits - 3))
        table = image.l2()
        host = image.compressed(table, 0)
        image.count(host, min(counted, image.words) - 1)
        image.put(table, struct.pack(">Q", image.descriptor(host, len(deflated(image.cluster)))) * min(counted, image.words))
        # A map need not come to the end.
        yield "shared-cluster", None, image.write


@family
def compressed_behind_the_end(_):
    for bits in (12, 16, 21):
        image, table = small(bits)
        image.entry(table, 1, image.descriptor(1 << 40, 512))
        yield "truncated", "bad-compression", image.write


@family
def compressed_is_metadata(_):
    for place in ["l1", "table"]:
        for bits in (12, 16):
            image, table = small(bits)
            image.entry(table, 1, image.descriptor(getattr(image, place), 512))
            yield "overlap", "any", image.write


# -- Internal snapshots and bitmaps ---------------------------------------------------------------------------------------------


def snapshot(l1, entries, extra=16):
    return struct.pack(">QIHHIIQII", l1, entries, 1, 1, 0, 0, 0, 0, extra) + bytes(min(extra, 1024)) + b"1a" + bytes(6)


def snapshots(image, entries, count=None):
    table = image.take(-(-sum(map(len, entries)) // image.cluster))
    image.put(table, b"".join(entries))
    image.field(64, "Q", table)
    image.field(60, "I", len(entries) if count is None else count)


@family
def snapshot_l1_bad(chance):
    for l1, entries, code in [(1, 1, "bad-entry"), (1 << 60, 1, "bad-entry"), (1 << 40, 1, "truncated"), (65536, (4 << 20) + 1, "huge-table"),
                              (65536, 0xFFFFFFFF, "huge-table"), (chance.randrange(1 << 20) * 2 + 1, 1, "bad-entry")]:
        yield from spoilt(code, lambda image, _, l1=l1, n=entries: snapshots(image, [snapshot(l1, n)]), (16,), reading="readable")


@family
def snapshot_table_long(_):
    for extra in (1025, 0xFFFFFFFF):
        yield from spoilt("huge-table", lambda image, _, extra=extra: snapshots(image, [snapshot(image.l1, 1, extra)]), (12, 16), reading="readable")


@family
def snapshots_in_nothing(_):
    # 65,536 snapshots of zeros, behind the end of the file.
    for bits in (9, 16, 21):
        image, _ = small(bits)
        image.field(64, "Q", 1 << 50)
        image.field(60, "I", 65536)
        yield "truncated", "readable", image.write


@family
def snapshots_share_an_l1(_):
    # Tens of thousands of snapshots with one full L1 table of the largest size: terabytes of tables to walk.
    for count, entries in [(1000, 1 << 16), (20000, 1 << 20), (65536, 4 << 20)]:
        image, table = small(16)
        l1 = image.take(entries * 8 >> 16)
        image.put(l1, struct.pack(">Q", table) * min(entries, 1 << 17))
        snapshots(image, [snapshot(l1, entries)] * count)
        yield "overlap", "readable", image.write


@family
def snapshots_multiply(_):
    # Sound but for the counts, each with an L1 table of its own and the same L2 tables.
    for count, tables in [(500, 200), (2000, 64)]:
        image = Image(16, size=tables << 29)
        shared = [image.l2(index) for index in range(tables)]
        for table in shared:
            image.put(table, struct.pack(">Q", ZERO) * 8192)
        entries = []
        for _ in range(count):
            l1 = image.take()
            image.put(l1, struct.pack(f">{tables}Q", *shared))
            entries.append(snapshot(l1, tables))
        snapshots(image, entries)
        yield "refcount-too-low", "readable", image.write


@family
def bitmaps_broken(chance):
    def directory(entry, count=1):
        def change(image, _):
            image.autoclear = 1
            host = image.take()
            image.put(host, entry(image) * count)
            image.extension(BITMAPS, struct.pack(">IIQQ", count, 0, 32 * count, host))
        return change

    def entry(table, entries, name=4, extra=0):
        return lambda image: struct.pack(">QIIBBHI", table(image), entries, 0, 1, 16, name, extra) + b"nameabcd"

    sane = lambda image: image.take()  # noqa: E731
    for bad in [entry(lambda _: 8, 1), entry(sane, 0xFFFFFFFF), entry(sane, 1, 65535), entry(sane, 1, 4, 0xFFFFFFFF)]:
        yield from spoilt("bad-entry", directory(bad), (16,), reading="readable")
    yield from spoilt("truncated", directory(entry(lambda _: 1 << 50, 1 << 20)), (16,), reading="readable")
    yield from spoilt("overlap", directory(entry(lambda image: image.l1, 1)), (16,), reading="readable")
    yield from spoilt("overlap", directory(entry(lambda image: image.l1, 8192), 1000), (16,), reading="readable")


@family
def bitmap_tables_of_holes(_):
    for entries in (1 << 20, 1 << 27):
        def change(image, _, entries=entries):
            image.autoclear = 1
            host = image.take()
            image.put(host, struct.pack(">QIIBBHI", 1 << 40, entries, 0, 1, 16, 4, 0) + b"nameabcd")
            image.extension(BITMAPS, struct.pack(">IIQQ", 1, 0, 32, host))
            image.length = 1 << 42
        yield from spoilt("refcount-too-low", change, (16,), reading="readable")


# -- Chance ---------------------------------------------------------------------------------------------------------------------


@family
def random_words(chance):
    # "any": a code or a right reading, the same every time.
    for _ in range(20):
        image, _ = small(chance.choice(BITS), version=chance.choice((2, 3)))
        for _ in range(chance.randrange(1, 12)):
            image.word(chance.randrange(0, 5 << image.bits) & ~7, chance.getrandbits(64) >> chance.randrange(64))
        yield "any", "any", image.write
