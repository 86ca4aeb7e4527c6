"""Passes TCP connections on to a port of this host over a line of that round trip and rate, which all connections share in each direction: what is
sent waits for its turn and arrives half a round trip later. Prints its port; counts what came from the server into a file. Run by scripts/bench copy."""

import collections
import os
import socket
import sys
import threading
import time


class Direction:
    """One way of the line."""

    def __init__(self, delay, rate):
        self.delay, self.rate = delay, rate
        self.lock = threading.Lock()
        self.free = 0.0
        self.bytes = 0

    def send(self, count):
        """When so many bytes arrive that are sent now."""
        with self.lock:
            self.bytes += count
            now = time.monotonic()
            self.free = max(self.free, now) + (count / self.rate if self.rate else 0)
            return self.free + self.delay


def pump(source, sink, direction, first):
    """Reads as fast as the line takes it; a thread of its own gives it on when it has arrived."""
    waiting, changed = collections.deque(), threading.Condition()

    def deliver():
        while True:
            with changed:
                while not waiting:
                    changed.wait()
                arrives, data = waiting.popleft()
            time.sleep(max(0, arrives - time.monotonic()))
            try:
                if data is None:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return

    threading.Thread(target=deliver, daemon=True).start()
    late = first
    while True:
        try:
            data = source.recv(256 << 10)
        except OSError:
            data = b""
        arrives = direction.send(len(data)) + late
        late = 0
        with changed:
            waiting.append((arrives, data or None))
            changed.notify()
        if not data:
            return
        # No more than a moment's worth lies on the line before it.
        time.sleep(max(0, direction.free - time.monotonic() - 0.02))


def main():
    port, trip, rate, counter = int(sys.argv[1]), float(sys.argv[2]) / 1000, float(sys.argv[3]) * 1e6 / 8, sys.argv[4]
    up, down = Direction(trip / 2, rate), Direction(trip / 2, rate)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def count():
        while True:
            with open(counter + ".new", "w") as out:
                out.write(str(down.bytes))
            os.replace(counter + ".new", counter)
            time.sleep(0.1)

    threading.Thread(target=count, daemon=True).start()
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A connection takes a round trip to be made.
        threading.Thread(target=pump, args=(client, server, up, trip), daemon=True).start()
        threading.Thread(target=pump, args=(server, client, down, 0), daemon=True).start()


main()
