"""Measures `qchain copy` from a service beside rsync of the flattened image. Run through scripts/bench copy."""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import time

from bench_common import describe, machine, run, save


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "json", "command"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--mebibytes", type=int, default=2048)
    return parser.parse_args()


class Zone:
    """A store, and what its program is called with."""

    def __init__(self, options, directory, name):
        self.qchain, self.directory = options.qchain, os.path.join(directory, name)
        self.store = os.path.join(self.directory, "s")
        shutil.rmtree(self.directory, ignore_errors=True)
        os.makedirs(os.path.join(self.store, "snapshots"))
        self.config = os.path.join(self.directory, "qchain.toml")
        self.know("")
        self.call("init")

    def know(self, more):
        with open(self.config, "w") as out:
            out.write(f'[[stores]]\npath = "{self.store}"\n[safety]\nsettle = "0s"\nreader_grace = "0s"\nretention = "0s"\n{more}')

    def call(self, *arguments):
        return json.loads(run(self.qchain, "--json", "--config", self.config, *arguments))


def make_members(zone, mebibytes):
    """A base of random data, and an increment with a hundredth of it in single blocks."""
    directory = os.path.join(zone.store, "snapshots", "2", "7")
    os.makedirs(directory)
    raw, base, tip = (os.path.join(directory, name) for name in ("raw", "base", "tip"))
    with open(raw, "wb") as out:
        for _ in range(mebibytes):
            out.write(os.urandom(1 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base)
    os.remove(raw)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", tip)
    # A block each, all of them different.
    change = os.path.join(directory, "change")
    blocks = mebibytes * 16 // 100
    with open(change, "wb") as out:
        for _ in range(blocks):
            out.write(os.urandom(64 << 10))
    with open(change, "rb") as source:
        block = os.path.join(directory, "block")
        for step in range(blocks):
            with open(block, "wb") as out:
                out.write(source.read(64 << 10))
            run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {block} {step * 100 * 65536} 64k", tip)
    os.remove(change)
    os.remove(block)


class Line:
    def __init__(self, directory, port, trip, rate):
        self.counter = os.path.join(directory, f"line-{port}-{trip}-{secrets.token_hex(4)}")
        script = os.path.join(os.path.dirname(__file__), "bench_line.py")
        command = ["python3", script, str(port), str(trip), str(rate), self.counter]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def came(self):
        time.sleep(0.3)
        with open(self.counter) as file:
            return int(file.read())

    def end(self):
        self.process.kill()
        self.process.wait()


def rsync_daemon(directory, root):
    port = 20000 + (os.getpid() * 7) % 20000
    config = os.path.join(directory, "rsyncd.conf")
    with open(config, "w") as out:
        out.write(f"use chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\n[m]\npath = {root}\nread only = yes\n")
    log = os.path.join(directory, "rsyncd.log")
    command = ["rsync", "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}", f"--config={config}", f"--log-file={log}"]
    process = subprocess.Popen(command)
    time.sleep(0.5)
    return process, port


def timed(way):
    begun = time.monotonic()
    way()
    return time.monotonic() - begun


def main():
    options = arguments()
    facts = machine()
    describe(facts)
    directory = os.path.join(options.mount, "copy")
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    east = Zone(options, directory, "east")
    make_members(east, options.mebibytes)
    token = secrets.token_hex(24)
    tokens = os.path.join(east.directory, "tokens")
    with open(os.open(tokens, os.O_CREAT | os.O_WRONLY, 0o600), "w") as out:
        out.write(f"west peer {token}\n")
    east.know(f'[server]\ntokens = "{tokens}"\n')
    east.call("adopt", "--now")
    served = os.path.join(directory, "served")
    os.makedirs(served)
    run(options.qchain, "--store", east.store, "flatten", "tip", os.path.join(served, "flat.qcow2"), "--layout", "canonical")
    log = open(os.path.join(directory, "log"), "wb")
    service = subprocess.Popen([options.qchain, "--config", east.config, "serve", "--listen", "127.0.0.1:0"],
                               stdout=subprocess.PIPE, stderr=log, text=True)
    port = int(service.stdout.readline().split(":")[-1])
    daemon, rsync_port = rsync_daemon(directory, served)
    full = options.mebibytes << 20
    runs = []
    try:
        for what, trip, rate in (("loopback", 0, 0), ("1 Gbit/s, 150 ms", 150, 1000)):
            for pair in range(options.pairs):
                ways = ["qchain", "rsync"]
                for name in ways[:: 1 if pair % 2 == 0 else -1]:
                    target_port = port if name == "qchain" else rsync_port
                    line = Line(directory, target_port, trip, rate) if trip else None
                    at = line.port if line else target_port
                    came = (lambda: line.came()) if line else (lambda: 0)
                    if name == "qchain":
                        west = Zone(options, directory, "west")
                        secret = os.path.join(west.directory, "token")
                        with open(os.open(secret, os.O_CREAT | os.O_WRONLY, 0o600), "w") as out:
                            out.write(token)
                        west.know(f'[zones.east]\nurl = "http://127.0.0.1:{at}"\ntoken_file = "{secret}"\n')
                        before = 0
                        for step, member in (("first", "base"), ("increment", "tip"), ("repeat", "tip")):
                            path = f"snapshots/2/7/{member}"
                            report = []

                            def way():
                                report.append(west.call("copy", "--from", "east", path))
                                run("sync", "--file-system", west.store)

                            seconds = timed(way)
                            sent = report[0]["bytes_on_wire"] if not line else came() - before
                            before += sent
                            runs.append({"line": what, "way": f"qchain, {step}", "seconds": seconds, "bytes": sent})
                        run("qemu-img", "compare", os.path.join(served, "flat.qcow2"), os.path.join(west.store, "snapshots/2/7/tip"))
                        shutil.rmtree(west.directory)
                    else:
                        out = os.path.join(directory, "taken.qcow2")

                        def way():
                            run("rsync", "--whole-file", "--inplace", f"rsync://127.0.0.1:{at}/m/flat.qcow2", out)
                            run("sync", "--file-system", directory)

                        seconds = timed(way)
                        runs.append({"line": what, "way": "rsync --whole-file", "seconds": seconds, "bytes": came()})
                        os.remove(out)
                    if line:
                        line.end()
    finally:
        for process in (service, daemon):
            process.terminate()
            process.wait(30)
    print(f"\n  {options.mebibytes} MiB of random data, an increment with 1 % of its blocks; medians of {options.pairs}; the line alone takes "
          f"{full * 8 / 1e9:.1f} s at 1 Gbit/s")
    for line in dict.fromkeys(one["line"] for one in runs):
        for way in dict.fromkeys(one["way"] for one in runs if one["line"] == line):
            mine = [one for one in runs if one["line"] == line and one["way"] == way]
            seconds = sorted(one["seconds"] for one in mine)
            sent = sorted(one["bytes"] for one in mine)[len(mine) // 2]
            middle = seconds[len(seconds) // 2]
            print(f"  {line:<18}{way:<22}{middle:>8.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}) {sent / 2**20:>9.2f} MiB on the wire, "
                  f"{sent / full:.4f} of all", flush=True)
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "mebibytes": options.mebibytes, "runs": runs})
    shutil.rmtree(directory)


main()
