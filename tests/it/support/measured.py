"""Runs commands with what each took: a JSON list of [seconds of CPU allowed, arguments...] on standard input; a JSON document a line
with `exit` (negative: the signal), `cpu` in seconds, `rss` in bytes at its most, and `out`."""

import json
import os
import resource
import sys
import tempfile

for seconds, *arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile(dir="/dev/shm") as out, open(os.devnull, "r+b") as null:
        child = os.fork()
        if child == 0:
            for target, file in enumerate((null, out, null)):
                os.dup2(file.fileno(), target)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.execv(arguments[0], arguments)
        _, status, used = os.wait4(child, 0)
        out.seek(0)
        print(json.dumps({
            "exit": os.waitstatus_to_exitcode(status),
            "cpu": used.ru_utime + used.ru_stime,
            "rss": used.ru_maxrss * 1024,
            # A map may be long.
            "out": out.read(8 << 20).decode(),
        }), flush=True)
