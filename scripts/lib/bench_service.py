"""Loads `qchain serve` on loopback, and measures a whole download beside qemu-img and nginx. Run through scripts/bench service."""

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request

from bench_common import describe, drop_caches, machine, run, save

CHAINS = 8
MEMBERS = 12


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "json", "command"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    return parser.parse_args()


def make_chain(store, volume, members, mebibytes, first):
    """A chain of members that each write random data over a part of a disk; gives the paths on the store, base first."""
    directory = os.path.join(store, "snapshots", "2", str(volume))
    os.makedirs(directory)
    data = os.path.join(store, "..", "data")
    paths = []
    for number in range(members):
        path = os.path.join(directory, f"v{volume}m{number}")
        size = first if number == 0 else mebibytes
        backing = ["-u", "-F", "qcow2", "-b", os.path.basename(paths[-1])] if paths else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, f"{first * 2}M")
        with open(data, "wb") as out:
            for _ in range(size):
                out.write(os.urandom(1 << 20))
        at = random.Random(volume * 100 + number).randrange(0, first * 2 - size + 1) if number else 0
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {data} {at}M {size}M", path)
        paths.append(path)
    os.remove(data)
    return [os.path.relpath(path, store) for path in paths]


class Service:
    def __init__(self, qchain, directory, store):
        self.token = secrets.token_hex(24)
        tokens = os.path.join(directory, "tokens")
        with open(os.open(tokens, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as out:
            out.write(f"bench operate {self.token}\n")
        config = os.path.join(directory, "qchain.toml")
        with open(config, "w") as out:
            out.write(f'[[stores]]\npath = "{store}"\n[safety]\nsettle = "0s"\nreader_grace = "0s"\nretention = "0s"\n'
                      f'[limits]\njobs = {CHAINS}\n[server]\ntokens = "{tokens}"\n')
        log = open(os.path.join(directory, "log"), "wb")
        self.process = subprocess.Popen([qchain, "--config", config, "serve", "--listen", "127.0.0.1:0"],
                                        stdout=subprocess.PIPE, stderr=log, text=True)
        self.base = self.process.stdout.readline().split()[-1]
        self.port = int(self.base.rsplit(":", 1)[1])

    def call(self, path, body=None):
        request = urllib.request.Request(self.base + path, headers={"Authorization": f"Bearer {self.token}"})
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def peak(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

    def end(self):
        self.process.terminate()
        self.process.wait(60)


async def ask(port, path, range_of=None):
    """One request on a connection of its own; status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
        head += f"Range: bytes={range_of[0]}-{range_of[1] - 1}\r\n" if range_of else ""
        writer.write((head + "\r\n").encode())
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
        return int(lines[0].split()[1]), await reader.readexactly(length)
    finally:
        writer.close()


async def load(options, service, given, truth):
    figures = {"requests": 0, "bytes": 0, "errors": [], "health": []}
    end = time.monotonic() + options.seconds

    async def client(number):
        dice = random.Random(number)
        while time.monotonic() < end:
            start = dice.randrange(given["length"] - 1)
            stop = min(start + dice.randrange(64 << 10, 4 << 20), given["length"])
            try:
                status, body = await asyncio.wait_for(ask(service.port, given["path"], (start, stop)), 120)
                truth.seek(start)
                if status != 206 or body != truth.read(stop - start):
                    raise ValueError(f"{status}, other bytes")
                figures["requests"] += 1
                figures["bytes"] += len(body)
            except Exception as error:  # any of them is one too many
                figures["errors"].append(repr(error))

    await asyncio.gather(health(service, end, figures), *(client(number) for number in range(options.clients)))
    return figures


async def health(service, end, figures):
    """From a thread of its own, so that what this program does with the bytes does not count as the service's time."""

    def watch():
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                with urllib.request.urlopen(service.base + "/healthz", timeout=30) as answer:
                    answer.read()
                figures["health"].append(time.monotonic() - begun)
            except OSError as error:
                figures["errors"].append(f"healthz {error!r}")
            time.sleep(0.05)

    await asyncio.to_thread(watch)


def merge_all(service, chains, end, done, errors):
    """Eight at once, each on a chain of its own, member after member from the second on."""

    def one(chain):
        for member in chain[1:-1]:
            if time.monotonic() > end:
                return
            try:
                body = {"kind": "delete", "members": [member], "assume_deleted": True, "now": True, "mode": "copy"}
                job = service.call("/v1/jobs", body)
                while job["state"] in ("queued", "running"):
                    time.sleep(0.2)
                    job = service.call(f"/v1/jobs/{job['id']}")
                if job["state"] != "done":
                    raise ValueError(f"{job['state']}: {job['error']}")
                done.append(member)
            except Exception as error:
                errors.append(f"merge of {member}: {error!r}")
                return

    threads = [threading.Thread(target=one, args=(chain,)) for chain in chains]
    for thread in threads:
        thread.start()
    return threads


def nginx(directory, root):
    """An nginx of our own on a free port of loopback; the process and the port."""
    port = 20000 + os.getpid() % 20000
    config = os.path.join(directory, "nginx.conf")
    temporary = "".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    with open(config, "w") as out:
        out.write(f"daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log;"
                  f"events {{}} http {{ {temporary} access_log off; sendfile on; tcp_nopush on;"
                  f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n")
    process = subprocess.Popen(["nginx", "-p", directory, "-c", config], stderr=subprocess.DEVNULL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
        except urllib.error.HTTPError:
            return process, port
        except OSError:
            time.sleep(0.05)
    raise SystemExit("bench: nginx does not answer")


def fetch(url):
    run("curl", "--fail", "--silent", "--output", "/dev/null", url)


# How a whole download is measured, and what each form includes.
FORMS = {
    "warm": "nothing dropped: the members are in memory; what convert writes stays there, and nginx sends it from there",
    "cold members": "caches dropped first: the members are read from the disk; what convert writes stays in memory, and nginx sends it from there",
    "over the store": "caches dropped first; convert ends when the store has its file on the disk (sync -f, as NFS at close); then caches are dropped "
                      "again, as another host serves the file and has read none of it",
}
QCHAIN, CONVERT, FLAT = "qchain", "qemu-img convert, then nginx", "nginx, of the flat file"


def timed(step):
    begun = time.monotonic()
    step()
    return time.monotonic() - begun


def processor(pid):
    """Seconds of processor that a process has taken so far."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def whole(options, service, store, tip, directory):
    """Seconds of a whole download, in its three ways, in turns, in each form."""
    served = os.path.join(directory, "served")
    os.makedirs(served)
    flat = os.path.join(served, "flat.qcow2")
    run(options.qchain, "--store", store, "flatten", tip, flat, "--layout", "canonical")
    given = service.call("/v1/downloads", {"member": tip, "format": "qcow2"})
    server, port = nginx(directory, served)
    converted = os.path.join(served, "converted.qcow2")

    def by_qemu(form):
        seconds = timed(lambda: run("qemu-img", "convert", "-O", "qcow2", os.path.join(store, tip), converted))
        if form == "over the store":
            seconds += timed(lambda: run("sync", "--file-system", converted))
            drop_caches()
        return seconds + timed(lambda: fetch(f"http://127.0.0.1:{port}/converted.qcow2"))

    ways = {
        QCHAIN: lambda _: timed(lambda: fetch(service.base + given["path"])),
        CONVERT: by_qemu,
        FLAT: lambda _: timed(lambda: fetch(f"http://127.0.0.1:{port}/flat.qcow2")),
    }
    runs = []
    try:
        for form in FORMS:
            for pair in range(options.pairs):
                for name, way in list(ways.items())[:: 1 if pair % 2 == 0 else -1]:
                    if os.path.exists(converted):
                        os.remove(converted)
                    if form == "warm":
                        way(form)
                        if os.path.exists(converted):
                            os.remove(converted)
                    else:
                        drop_caches()
                    before = processor(service.process.pid)
                    seconds = way(form)
                    runs.append({"form": form, "way": name, "seconds": seconds, "bytes": given["length"],
                                 "service_processor_seconds": processor(service.process.pid) - before})
    finally:
        server.terminate()
        server.wait(30)
    tell(options, runs, given["length"])
    return runs


def tell(options, runs, length):
    print(f"\n  a whole download of {length / 2**20:.0f} MiB by curl; medians of {options.pairs}")
    for form, said in FORMS.items():
        print(f"  {form}: {said}")
        median = {}
        for name in (QCHAIN, CONVERT, FLAT):
            median[name] = sorted(one["seconds"] for one in runs if (one["form"], one["way"]) == (form, name))[options.pairs // 2]
        for name, seconds in median.items():
            print(f"    {name:<32}{seconds:>8.2f} s {length / 2**20 / seconds:>8.0f} MiB/s {seconds / median[QCHAIN]:>6.2f} times qchain's", flush=True)
        own = [one["service_processor_seconds"] for one in runs if (one["form"], one["way"]) == (form, QCHAIN)]
        print(f"    the service took {sorted(own)[options.pairs // 2]:.2f} s of processor for it", flush=True)


def main():
    options = arguments()
    facts = machine()
    describe(facts)
    directory = os.path.join(options.mount, "service")
    shutil.rmtree(directory, ignore_errors=True)
    store = os.path.join(directory, "store")
    os.makedirs(store)
    big = make_chain(store, 1, 4, 96, 512)
    chains = [make_chain(store, 10 + number, MEMBERS, 24, 64) for number in range(CHAINS)]
    run(options.qchain, "--store", store, "init")
    run(options.qchain, "--store", store, "adopt", "--now")
    truth = os.path.join(directory, "truth")
    run(options.qchain, "--store", store, "flatten", big[-1], truth, "-O", "raw")
    service = Service(options.qchain, directory, store)
    try:
        given = service.call("/v1/downloads", {"member": big[-1], "format": "raw"})
        merged, errors = [], []
        threads = merge_all(service, chains, time.monotonic() + options.seconds, merged, errors)
        with open(truth, "rb") as file:
            figures = asyncio.run(load(options, service, given, file))
        for thread in threads:
            thread.join()
        errors += figures["errors"]
        health = sorted(figures["health"])
        p99 = health[len(health) * 99 // 100]
        peak = service.peak()
        print(f"{options.clients} clients, {options.seconds} s: {figures['requests']} ranges, {figures['bytes'] / 2**20:.0f} MiB, every byte compared; "
              f"{len(merged)} merges on {CHAINS} chains; {len(errors)} errors")
        print(f"peak memory of the service {peak / 2**20:.0f} MiB; /healthz p50 {health[len(health) // 2] * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, "
              f"longest {health[-1] * 1000:.0f} ms of {len(health)}", flush=True)
        for error in errors[:10]:
            print(f"  {error}")
        runs = whole(options, service, store, big[-1], directory)
        save(options.json, {"schema": 1, "command": options.command, "machine": facts, "requests": figures["requests"], "bytes": figures["bytes"],
                            "merges": len(merged), "errors": errors, "peak_bytes": peak, "health_seconds": health, "runs": runs})
    finally:
        service.end()
    if errors:
        raise SystemExit(1)


main()
