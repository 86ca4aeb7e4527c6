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


def read_runs(options, runs):
    """One image whose view is one run of random data: what qchain digest reads is what nfs-cp copies."""
    # Beside nothing else: digest looks through its store first.
    place = os.path.join(options.directory, "reading")
    os.mkdir(place)
    raw, image = (os.path.join(place, name) for name in ("raw", "image"))
    with open(raw, "wb") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    os.unlink(raw)
    print(f"\n  {'1 GiB of random data, cached':<40}{'median':>9}{'MiB/s':>9}")
    for delay in (0, 1):
        with proxy(options.port, delay) as port:
            url = f"nfs://127.0.0.1:{port}/export/reading"
            store = f"{url}?mountport={options.mount_port}"
            theirs = f"nfs://127.0.0.1/export/reading/image?version=3&nfsport={port}&mountport={options.mount_port}"
            contestants = {
                "qchain digest over NFS (reads, hashes)": ["env", f"XDG_CACHE_HOME={options.directory}/none"]
                + [options.qchain, "--quiet", "--store", store, "digest", "image"],
                "nfs-cp to /dev/shm (reads, writes)": ["nfs-cp", theirs, COPY],
            }
            contest(runs, contestants, delay, [COPY])


def contest(runs, contestants, delay, made):
    """Runs all in turn, a few times, and prints the medians. What they make goes before each, as nfs-cp replaces nothing, and at the end."""
    suffix = f", each call {delay} ms longer" if delay else ""
    try:
        for _ in range(3 if delay else 5):
            for name, command in contestants.items():
                subprocess.run(["rm", "-f", *made], check=True)
                seconds, peak, _ = measured([command])
                runs.append({"run": name + suffix, "seconds": seconds, "peak_bytes": peak})
    finally:
        subprocess.run(["rm", "-f", *made], check=True)
    for name in contestants:
        seconds = statistics.median(run["seconds"] for run in runs if run["run"] == name + suffix)
        print(f"  {name + suffix:<62}{seconds:>7.2f} s{(FILE_BYTES >> 20) / seconds:>9.0f} MiB/s", flush=True)


def write_runs(options, runs):
    """What qchain copy brings to an export is what nfs-cp brings there: the image of read_runs."""
    given, taken = (os.path.join(options.directory, name) for name in ("given", "taken"))
    for store in (given, taken):
        os.makedirs(os.path.join(store, "snapshots/2/7"))
    os.link(os.path.join(options.directory, "reading", "image"), os.path.join(given, "snapshots/2/7/image"))
    qchain = ["env", f"XDG_CACHE_HOME={options.directory}/none", options.qchain, "--quiet"]
    for store in (given, taken):
        run(*qchain, "--store", store, "init")
    run(*qchain, "--store", given, "adopt", "--now")
    made = [os.path.join(taken, name) for name in ("snapshots/2/7/image", "copied")]
    print(f"\n  {'the same, written':<40}{'median':>31}{'MiB/s':>14}")
    for delay in (0, 5):
        with proxy(options.port, delay) as port:
            ports = f"mountport={options.mount_port}"
            contestants = {
                "qchain copy to NFS (reads, hashes, writes, proves)": qchain
                + ["--store", f"nfs://127.0.0.1:{port}/export/taken?{ports}", "copy", "--from", given, "image"],
                "nfs-cp (reads, writes)": ["nfs-cp", os.path.join(given, "snapshots/2/7/image")]
                + [f"nfs://127.0.0.1/export/taken/copied?version=3&nfsport={port}&{ports}"],
            }
            contest(runs, contestants, delay, made)


def flatten_runs(options, runs):
    """To a raw file in memory: what qemu-img convert reads by libnfs, where its module loads."""
    print(f"\n  {'the same, flattened':<40}{'median':>31}{'MiB/s':>14}")
    for delay in (0, 5):
        with proxy(options.port, delay) as port:
            ports = f"mountport={options.mount_port}"
            theirs = f"nfs://127.0.0.1/export/reading/image?version=3&nfsport={port}&{ports}"
            store = f"nfs://127.0.0.1:{port}/export/reading?{ports}"
            contestants = {
                "qchain flatten -O raw": ["env", f"XDG_CACHE_HOME={options.directory}/none", options.qchain, "--quiet"]
                + ["--store", store, "flatten", "image", COPY, "-O", "raw"]
            }
            # Its module takes neither ports nor a version: it finds the server by a portmapper on port 111, or not at all.
            tried = subprocess.run(["qemu-img", "info", theirs.split("?")[0]], capture_output=True, text=True)
            if tried.returncode == 0 and port == "2049":
                contestants["qemu-img convert -O raw"] = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", theirs.split("?")[0], COPY]
            else:
                said = tried.stderr.strip().splitlines()[-1:] or ["it would open another server than the one that is measured"]
                print(f"  (not beside qemu-img: {said[0]})")
            contest(runs, contestants, delay, [COPY])


def main():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "directory", "port", "mount-port", "json", "command"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--members", type=int, required=True)
    options = parser.parse_args()
    facts = machine()
    describe(facts)
    runs = []
    list_runs(options, runs)
    read_runs(options, runs)
    write_runs(options, runs)
    flatten_runs(options, runs)
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "members": options.members, "runs": runs})


main()
