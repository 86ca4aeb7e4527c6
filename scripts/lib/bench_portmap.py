"""A portmapper on 127.0.0.1:111 that knows two ports: for QEMU, whose nfs:// URLs cannot name any."""

import contextlib
import socket
import struct
import threading

NFS, MOUNT = 100003, 100005
GETPORT = 3


def answer(call, ports):
    xid, _, _, _, _, procedure = struct.unpack(">6I", call[:24])
    at = 24
    for _ in range(2):
        # Credentials, and their verifier.
        at += 8 + (struct.unpack(">I", call[at + 4 : at + 8])[0] + 3) // 4 * 4
    result = b""
    if procedure == GETPORT:
        (program,) = struct.unpack(">I", call[at : at + 4])
        result = struct.pack(">I", ports.get(program, 0))
    return struct.pack(">6I", xid, 1, 0, 0, 0, 0) + result


def whole(client, length):
    data = b""
    while len(data) < length:
        more = client.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def talk(client, ports):
    with client, contextlib.suppress(OSError, EOFError):
        while True:
            (head,) = struct.unpack(">I", whole(client, 4))
            reply = answer(whole(client, head & 0x7FFFFFFF), ports)
            client.sendall(struct.pack(">I", 1 << 31 | len(reply)) + reply)


@contextlib.contextmanager
def portmapper(nfs, mount):
    """It listens within this context. None if the port is somebody else's."""
    try:
        listener = socket.create_server(("127.0.0.1", 111))
    except OSError as error:
        yield error
        return
    ports = {NFS: int(nfs), MOUNT: int(mount)}

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=talk, args=(client, ports), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield None
    finally:
        # Wakes who accepts, too.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
