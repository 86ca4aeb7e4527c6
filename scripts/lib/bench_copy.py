"""Measures `qchain copy` from a service beside rsync, scp, and rclone over HTTP, of the flattened image. Run through scripts/bench copy."""

import argparse
import getpass
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import time

from bench_common import describe, machine, run, save


# How long any copy may take.
LONGEST = 900
TICKS = os.sysconf("SC_CLK_TCK")


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("qchain", "mount", "json", "command"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--mebibytes", type=int, default=2048)
    parser.add_argument("--lines", default="both")
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


class Server:
    """A process that serves on loopback."""

    def __init__(self, command, port, **more):
        self.process = subprocess.Popen(command, **more)
        self.port = port or int(self.process.stdout.readline().split(":")[-1])
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"bench: {command[0]} does not answer")

    def cpu(self):
        """Seconds of CPU of it, and of its children that ended."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return sum(int(field) for field in fields[11:15]) / TICKS

    def end(self):
        self.process.terminate()
        self.process.wait(30)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def written(directory, name, text):
    path = os.path.join(directory, name)
    with open(path, "w") as out:
        out.write(text)
    return path


def rsync_daemon(directory, root):
    port = free_port()
    config = written(directory, "rsyncd.conf", f"use chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\n[m]\npath = {root}\nread only = yes\n")
    return Server(["rsync", "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}", f"--config={config}",
                   f"--log-file={directory}/rsyncd.log"], port)


def sshd(directory):
    """With keys of its own, on a port of its own; and the options that its client needs."""
    for name in ("host", "client"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", os.path.join(directory, name))
    port = free_port()
    config = written(directory, "sshd.conf", f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/client.pub\n"
                     "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\nSubsystem sftp internal-sftp\n")
    os.makedirs("/run/sshd", exist_ok=True)
    # By its whole path: it runs itself anew for each connection.
    server = Server([shutil.which("sshd"), "-D", "-f", config, "-E", f"{directory}/sshd.log"], port)
    client = ["-i", f"{directory}/client", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
              "-o", "BatchMode=yes", "-F", "none"]
    return server, client


def nginx(directory, root):
    port = free_port()
    temporary = "".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config = written(directory, "nginx.conf", f"daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log;"
                     f"events {{}} http {{ {temporary} access_log off; sendfile on; tcp_nopush on;"
                     f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n")
    return Server(["nginx", "-p", directory, "-c", config], port, stderr=subprocess.DEVNULL)


def child_cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Bench:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.served = os.path.join(directory, "served")
        self.flat = os.path.join(self.served, "flat.qcow2")
        self.taken = os.path.join(directory, "taken.qcow2")
        self.east, self.token, self.runs, self.servers = Zone(options, directory, "east"), secrets.token_hex(24), [], {}

    def prepare(self):
        make_members(self.east, self.options.mebibytes)
        tokens = os.path.join(self.east.directory, "tokens")
        with open(os.open(tokens, os.O_CREAT | os.O_WRONLY, 0o600), "w") as out:
            out.write(f"west peer {self.token}\n")
        self.east.know(f'[server]\ntokens = "{tokens}"\n')
        self.east.call("adopt", "--now")
        os.makedirs(self.served)
        run(self.options.qchain, "--store", self.east.store, "flatten", "tip", self.flat, "--layout", "canonical")
        self.log = open(os.path.join(self.directory, "log"), "wb")
        self.servers["qchain"] = Server([self.options.qchain, "--config", self.east.config, "serve", "--listen", "127.0.0.1:0"], None,
                                        stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.servers["rsync"] = rsync_daemon(self.directory, self.served)
        self.servers["scp"], self.ssh = sshd(self.directory)
        self.servers["rclone"] = nginx(self.directory, self.served)

    def measure(self, name, line, what, came, way):
        """Runs it until all is on the disk: seconds, seconds of CPU of both sides, and the bytes that came over a line of ours."""
        server = self.servers[name]
        before, used = came(), child_cpu() + server.cpu()
        begun = time.monotonic()
        way()
        run("sync", "--file-system", self.directory)
        seconds = time.monotonic() - begun
        self.runs.append({"line": line, "way": what, "seconds": seconds, "cpu": child_cpu() + server.cpu() - used, "bytes": came() - before})

    def qchain(self, line, at, came):
        west = Zone(self.options, self.directory, "west")
        secret = os.path.join(west.directory, "token")
        with open(os.open(secret, os.O_CREAT | os.O_WRONLY, 0o600), "w") as out:
            out.write(self.token)
        west.know(f'[zones.east]\nurl = "http://127.0.0.1:{at}"\ntoken_file = "{secret}"\n')
        for step, member in (("first", "base"), ("increment", "tip"), ("repeat", "tip")):
            report = []
            self.measure("qchain", line, f"qchain, {step}", came, lambda: report.append(west.call("copy", "--from", "east", f"snapshots/2/7/{member}")))
            # Without a line of ours its own word counts.
            self.runs[-1]["bytes"] = self.runs[-1]["bytes"] or report[0]["bytes_on_wire"]
        run("qemu-img", "compare", self.flat, os.path.join(west.store, "snapshots/2/7/tip"))
        shutil.rmtree(west.directory)

    def others(self, name, line, at, came):
        command = {
            "rsync": ["rsync", "--whole-file", "--inplace", f"rsync://127.0.0.1:{at}/m/flat.qcow2", self.taken],
            "scp": ["scp", "-q", *self.ssh, "-P", str(at), f"{getpass.getuser()}@127.0.0.1:{self.flat}", self.taken],
            "rclone": ["rclone", "copyto", "--config", "/dev/null", f":http,url='http://127.0.0.1:{at}':flat.qcow2", self.taken],
        }[name]
        what = {"rsync": "rsync --whole-file", "scp": "scp", "rclone": "rclone, HTTP"}[name]
        self.measure(name, line, what, came, lambda: run("timeout", str(LONGEST), *command))
        run("cmp", self.flat, self.taken)
        os.remove(self.taken)

    def pair(self, number, what, trip, rate):
        names = ["qchain", "rsync", "scp", "rclone"]
        for name in names[:: 1 if number % 2 == 0 else -1]:
            # scp's window is 2 MiB: over a long line once is enough.
            if name == "scp" and trip and number > 0:
                continue
            port = self.servers[name].port
            line = Line(self.directory, port, trip, rate) if trip else None
            at, came = (line.port, line.came) if line else (port, lambda: 0)
            if name == "qchain":
                self.qchain(what, at, came)
            else:
                self.others(name, what, at, came)
            if line:
                line.end()

    def tell(self):
        full = self.options.mebibytes << 20
        print(f"\n  {self.options.mebibytes} MiB of random data, an increment with 1 % of its blocks; medians of {self.options.pairs}; the line alone takes "
              f"{full * 8 / 1e9:.1f} s at 1 Gbit/s")
        middle = lambda values: sorted(values)[len(values) // 2]
        for line in dict.fromkeys(one["line"] for one in self.runs):
            for way in dict.fromkeys(one["way"] for one in self.runs if one["line"] == line):
                mine = [one for one in self.runs if one["line"] == line and one["way"] == way]
                seconds = sorted(one["seconds"] for one in mine)
                sent = middle([one["bytes"] for one in mine])
                wire = f"{sent / 2**20:>9.2f} MiB on the wire, {sent / full:.4f} of all" if sent else ""
                print(f"  {line:<18}{way:<22}{middle(seconds):>8.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), CPU of both sides "
                      f"{middle([one['cpu'] for one in mine]):>6.2f} s {wire}", flush=True)


def main():
    options = arguments()
    facts = machine()
    describe(facts)
    directory = os.path.join(options.mount, "copy")
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    bench = Bench(options, directory)
    try:
        bench.prepare()
        for what, trip, rate in (("loopback", 0, 0), ("1 Gbit/s, 150 ms", 150, 1000)):
            if trip and options.lines == "loopback":
                continue
            for number in range(options.pairs):
                bench.pair(number, what, trip, rate)
    finally:
        for server in bench.servers.values():
            server.end()
    bench.tell()
    save(options.json, {"schema": 1, "command": options.command, "machine": facts, "mebibytes": options.mebibytes, "runs": bench.runs})
    shutil.rmtree(directory)


main()
