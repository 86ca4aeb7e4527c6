"""Measures `qchain list`, reading, writing and flattening over NFS without a mount, beside the directory itself, nfs-cp and qemu-img. Run
through scripts/bench nfs."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys

from bench_common import describe, machine, measured, run, save
from bench_portmap import portmapper
from bench_store import CHAIN, make, pattern_of

FILE_BYTES = 1 << 30
# In memory: not the disk is measured.
COPY = "/dev/shm/qchain-bench-copy"


@contextlib.contextmanager
def proxy(port, milliseconds):
    """The port of a proxy that makes every call so much longer; the server's own for no delay."""
    if not milliseconds:
        yield port
        return
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench_proxy.py")
    with subprocess.Popen([sys.executable, script, port, str(milliseconds)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def list_runs(options, runs):
    store = os.path.join(options.directory, "store")
    make(store, options.members, *pattern_of(options.directory))
    print(f"{options.members:,} members in chains of {CHAIN}, with checkpoint files; nfs-ganesha on this host\n", flush=True)
    print(f"  {'qchain list --json, first run':<40}{'seconds':>9}{'peak':>12}")
    url = "nfs://127.0.0.1:{}/export/store?mountport=" + options.mount_port
    delays = [(f"NFS, each call {delay} ms longer", delay) for delay in (1, 2)]
    for name, delay in [("the directory itself", None), ("NFS", 0), *delays]:
        with proxy(options.port, delay) as port:
            place = store if delay is None else url.format(port)
            # Nothing is known from before.
            command = ["env", f"XDG_CACHE_HOME={options.directory}/none", options.qchain, "--store", place, "list", "--json"]
            for _ in range(3):
                subprocess.run(["rm", "-rf", f"{options.directory}/none"], check=True)
                seconds, peak, output = measured([command])
                document = json.loads(output)
                listed = sum(len(chain["members"]) for chain in document["chains"])
                if listed != options.members or document["findings"]:
                    raise SystemExit(f"bench: {listed} of {options.members} members listed, {document['findings'][:3]}")
                runs.append({"run": f"list, {name}", "seconds": seconds, "peak_bytes": peak})
        of_name = [run for run in runs if run["run"] == f"list, {name}"]
        seconds = statistics.median(run["seconds"] for run in of_name)
        print(f"  {name:<40}{seconds:>7.2f} s{max(run['peak_bytes'] for run in of_name) / 2**20:>8.0f} MiB", flush=True)


def image_of(options):
    """One image whose view is one run of random data, beside nothing else: digest looks through its store first."""
    place = os.path.join(options.directory, "reading")
    raw, image = (os.path.join(place, name) for name in ("raw", "image"))
    if os.path.exists(image):
        return image
    os.mkdir(place)
    with open(raw, "wb") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    os.unlink(raw)
    return image


def title(text):
    print(f"\n  {text:<62}{'median':>9}{'spread':>16}{'CPU':>9}{'MiB/s':>8}", flush=True)


def contest(options, runs, contestants, delay, made):
    """Runs all in turn, a few times, and prints the medians. What they make goes before each, as nfs-cp replaces nothing, and at the end."""
    suffix = f", each call {delay} ms longer" if delay else ""
    try:
        for turn in range(options.pairs):
            names = list(contestants)
            for name in names if turn % 2 == 0 else reversed(names):
                subprocess.run(["rm", "-f", *made], check=True)
                before = os.times()
                seconds, peak, _ = measured([contestants[name]])
                after = os.times()
                cpu = after.children_user + after.children_system - before.children_user - before.children_system
                runs.append({"run": name + suffix, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak})
    finally:
        subprocess.run(["rm", "-f", *made], check=True)
    for name in contestants:
        of_name = [run for run in runs if run["run"] == name + suffix]
        seconds, cpu = (statistics.median(run[key] for run in of_name) for key in ("seconds", "cpu_seconds"))
        spread = f"{min(run['seconds'] for run in of_name):.2f} to {max(run['seconds'] for run in of_name):.2f}"
        print(f"  {name + suffix:<62}{seconds:>7.2f} s{spread:>16}{cpu:>7.2f} s{(FILE_BYTES >> 20) / seconds:>8.0f}", flush=True)


def read_runs(options, runs):
    """What qchain digest reads is what nfs-cp copies."""
    image_of(options)
    title("1 GiB of random data, cached, read")
    for delay in (0, 1, 5):
        with proxy(options.port, delay) as port:
            url = f"nfs://127.0.0.1:{port}/export/reading"
            store = f"{url}?mountport={options.mount_port}"
            theirs = f"nfs://127.0.0.1/export/reading/image?version=3&nfsport={port}&mountport={options.mount_port}"
            contestants = {
                "qchain digest (reads, hashes)": qchain(options) + ["--store", store, "digest", "image"],
                "nfs-cp to /dev/shm (reads, writes)": ["nfs-cp", theirs, COPY],
            }
            contest(options, runs, contestants, delay, [COPY])


def qchain(options):
    return ["env", f"XDG_CACHE_HOME={options.directory}/none", options.qchain, "--quiet"]


def write_runs(options, runs):
    """What qchain copy and qchain flatten bring to an export is what nfs-cp brings there: the image of read_runs."""
    given, taken = (os.path.join(options.directory, name) for name in ("given", "taken"))
    for store in (given, taken):
        os.makedirs(os.path.join(store, "snapshots/2/7"))
    os.link(image_of(options), os.path.join(given, "snapshots/2/7/image"))
    for store in (given, taken):
        run(*qchain(options), "--store", store, "init")
    run(*qchain(options), "--store", given, "adopt", "--now")
    template = "template/tmpl/2/201"
    os.makedirs(os.path.join(taken, template))
    made = [os.path.join(taken, name) for name in ("snapshots/2/7/image", "copied", f"{template}/t.qcow2", f"{template}/template.properties")]
    title("the same, from a directory to the export")
    for delay in (0, 5):
        with proxy(options.port, delay) as port:
            ports = f"mountport={options.mount_port}"
            store = f"nfs://127.0.0.1:{port}/export/taken?{ports}"
            contestants = {
                "qchain copy (reads, hashes, writes, proves)": qchain(options) + ["--store", store, "copy", "--from", given, "image"],
                "qchain flatten --template (reads, checks, writes, proves)": qchain(options)
                + ["--store", given, "--store", f"{store},id=taken", "flatten", "given:snapshots/2/7/image", "--template", "taken:2/201/t"],
                "nfs-cp (reads, writes)": ["nfs-cp", os.path.join(given, "snapshots/2/7/image")]
                + [f"nfs://127.0.0.1/export/taken/copied?version=3&nfsport={port}&{ports}"],
            }
            contest(options, runs, contestants, delay, made)


def flatten_runs(options, runs):
    """To a raw file in memory: what qemu-img convert reads by libnfs, where its module loads."""
    image_of(options)
    missing = os.environ.get("QEMU_NFS_MISSING")
    title("the same, flattened to /dev/shm")
    for delay in (0, 5):
        with proxy(options.port, delay) as port, portmapper(port, options.mount_port) as taken:
            store = f"nfs://127.0.0.1:{port}/export/reading?mountport={options.mount_port}"
            contestants = {"qchain flatten -O raw": qchain(options) + ["--store", store, "flatten", "image", COPY, "-O", "raw"]}
            if missing or taken:
                print(f"  (not beside qemu-img: {missing or taken})")
            else:
                theirs = "nfs://127.0.0.1/export/reading/image"
                contestants["qemu-img convert -O raw"] = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", theirs, COPY]
                # What it may do out of order is faster.
                best = ["qemu-img", "convert", "-W", "-m", "16", "-f", "qcow2", "-O", "raw", theirs, COPY]
                contestants["qemu-img convert -W -m 16 -O raw"] = best
            contest(options, runs, contestants, delay, [COPY])


PARTS = {"list": list_runs, "read": read_runs, "write": write_runs, "flatten": flatten_runs}


def main():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "directory", "port", "mount-port", "part", "json", "command"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("members", "pairs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    facts = machine()
    describe(facts)
    runs = []
    for name, part in PARTS.items():
        if options.part in (name, "all"):
            part(options, runs)
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "members": options.members, "runs": runs})


main()
