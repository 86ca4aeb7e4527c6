"""Measures `qchain flatten` beside qemu-img, cp and cat. Called by scripts/bench."""

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path


def timed(mount, call, cold=True):
    """Seconds until all is on the disk."""
    subprocess.run(["sync"], check=True)
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    start = time.monotonic()
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL, shell=isinstance(call, str))
    subprocess.run(["sync", "-f", mount], check=True)
    return time.monotonic() - start


def main():
    parser = argparse.ArgumentParser()
    for name in ("--qchain", "--mount", "--cache", "--json", "--command"):
        parser.add_argument(name, default="")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("patterns", nargs="+")
    args = parser.parse_args()
    mount = Path(args.mount)
    results = []
    for pattern in args.patterns:
        store = mount / pattern
        shutil.copytree(Path(args.cache) / f"flatten-{pattern}" / "store", store)
        names = json.loads((Path(args.cache) / f"flatten-{pattern}" / "made.json").read_text())["members"]
        tip = store / (names[-1]["member"] if isinstance(names[-1], dict) else names[-1])
        out, ready = mount / "out", mount / "ready"
        flatten = [args.qchain, "--store", str(store), "flatten", str(tip.relative_to(store))]
        convert = ["qemu-img", "convert", "-O", "qcow2"]
        subprocess.run([*flatten, str(ready), "--layout", "canonical"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "compare", "-q", str(tip), str(ready)], check=True)
        contestants = {
            "qchain flatten": [*flatten, str(out)],
            "convert": [*convert, str(tip), str(out)],
            "convert -m 16 -W": [*convert, "-m", "16", "-W", str(tip), str(out)],
            "convert -C": [*convert, "-C", str(tip), str(out)],
            "cp --reflink=never": ["cp", "--reflink=never", str(ready), str(out)],
        }
        pipes = {
            "cat to a pipe": f"cat {ready} | cat",
            "qchain flatten to a pipe": " ".join([*flatten, "-"]) + " | cat",
        }
        times = {name: [] for name in [*contestants, *pipes]}
        for _ in range(args.pairs):
            for name, call in contestants.items():
                out.unlink(missing_ok=True)
                times[name].append(timed(mount, call))
            for name, call in pipes.items():
                subprocess.run(call, shell=True, check=True, stdout=subprocess.DEVNULL)
                times[name].append(timed(mount, call, cold=False))
        for name, seconds in times.items():
            print(f"{pattern:12}{name:28}{statistics.median(seconds):8.2f} s")
            results.append({"pattern": pattern, "what": name, "seconds": seconds})
        out.unlink(missing_ok=True)
        ready.unlink()
        shutil.rmtree(store)
    if args.json:
        Path(args.json).write_text(json.dumps({"command": args.command, "results": results}, indent=1))


main()
