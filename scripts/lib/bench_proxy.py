"""Passes TCP connections on to a port of this host, what is sent there so much later: a network of that round trip, in which any number
of requests can be under way. The bytes do not come by here: the kernel moves them through pipes. Run by scripts/bench nfs."""

import fcntl
import os
import queue
import socket
import sys
import threading
import time

STEP = 1 << 20
# Pieces of one direction that are under way.
PIECES = 48


def pipe():
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, STEP)
    return ends


def give(ends, sink, count):
    while count:
        count -= os.splice(ends[0], sink.fileno(), count)


def take(source, line, idle, delay):
    made = 0
    try:
        while True:
            if idle.empty() and made < PIECES:
                idle.put(pipe())
                made += 1
            ends = idle.get()
            count = os.splice(source.fileno(), ends[1], STEP)
            line.put((time.monotonic() + delay, count, ends))
            if not count:
                return
    except OSError:
        line.put((0, 0, None))


def late(source, sink, delay):
    line, idle = queue.Queue(), queue.Queue()
    threading.Thread(target=take, args=(source, line, idle, delay), daemon=True).start()
    while True:
        due, count, ends = line.get()
        if not count:
            return
        time.sleep(max(0, due - time.monotonic()))
        give(ends, sink, count)
        idle.put(ends)


def at_once(source, sink):
    ends = pipe()
    while count := os.splice(source.fileno(), ends[1], STEP):
        give(ends, sink, count)


def pump(source, sink, delay):
    try:
        if delay:
            late(source, sink, delay)
        else:
            at_once(source, sink)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def main():
    port, delay = int(sys.argv[1]), float(sys.argv[2]) / 1000
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for ends in ((client, server, delay), (server, client, 0)):
            threading.Thread(target=pump, args=ends, daemon=True).start()


main()
