"""Passes TCP connections on to a port of this host, what is sent there so much later: a network of that round trip, in which any number
of requests can be under way. Run by scripts/bench nfs."""

import queue
import socket
import sys
import threading
import time


def take(source, line, delay):
    try:
        while data := source.recv(1 << 20):
            line.put((time.monotonic() + delay, data))
    except OSError:
        pass
    line.put((0, b""))


def pump(source, sink, delay):
    line = queue.Queue(256)
    threading.Thread(target=take, args=(source, line, delay), daemon=True).start()
    try:
        while True:
            due, data = line.get()
            if not data:
                break
            time.sleep(max(0, due - time.monotonic()))
            sink.sendall(data)
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
