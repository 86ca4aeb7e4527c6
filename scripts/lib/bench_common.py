"""What the measuring scripts share. Run through scripts/bench, which prepares the place and cleans up."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3\n")


def measured(commands, synced=None):
    """Runs commands in turn, then syncs the file system that holds `synced`. Returns seconds, the peak resident bytes of the
    largest process, and the output of the last command."""
    peak = 0
    output = b""
    before = time.monotonic()
    for command in commands:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            output = process.stdout.read()
            # wait4 tells the memory of this one process; RUSAGE_CHILDREN would tell the largest of all so far.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"bench: {' '.join(command)}: exit code {process.returncode}: {output.decode(errors='replace').strip()}")
        peak = max(peak, usage.ru_maxrss * 1024)
    if synced:
        subprocess.run(["sync", "--file-system", synced], check=True)
    return time.monotonic() - before, peak, output


def machine():
    """What the figures were measured on."""
    model = ""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    return {
        "date": datetime.date.today().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "qemu": qemu,
        "load_before": os.getloadavg()[0],
    }


def describe(facts):
    gib = facts["memory_bytes"] / 2**30
    print(f"{facts['date']} · {facts['cpus']} CPUs ({facts['cpu']}), {gib:.0f} GiB · Linux {facts['kernel']} · qemu-img {facts['qemu']}")
    if facts["load_before"] > 0.7:
        print(f"NOTE: something else is running here (load {facts['load_before']:.1f}); the times are longer than they should be")


def save(path, document):
    if path:
        with open(path, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")


def run(*command):
    """What a command said; the end of the measurement if it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout
