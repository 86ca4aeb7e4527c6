"""Passes TCP connections on to a port of this host, each request so much later: a network of that round trip. Run by scripts/bench nfs."""

import socket
import sys
import threading
import time


def pump(source, sink, delay):
    try:
        while data := source.recv(1 << 20):
            if delay:
                # A connection has one small request at a time.
                time.sleep(delay)
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
