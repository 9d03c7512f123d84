"""A client of thinkvd by hand: struct, socket and mmap, nothing of libthinkv.

Speaks include/thinkv/internal/protocol.h and shm_layout.h byte by byte, so that a test can also say
what the library never would.
"""

import array
import mmap
import os
import socket
import struct
import time

MAGIC = 0x31564B54
HELLO, WELCOME, REFUSED, REGISTER_MODEL, MODEL_REGISTERED = 1, 2, 3, 4, 5
GET_POLICY, POLICY_REPLY, GET_STATUS, STATUS_REPLY, EXTENT, BYE, POOLS = 6, 7, 8, 9, 10, 11, 12
PING, OPEN_SEQUENCE, CLOSE_SEQUENCE, SET_BUDGET, NEED_PAGES, CLIENT_STATS = 1, 2, 3, 4, 5, 6
ENGINE, OPERATOR = 1, 2

# ErrorCode of result.h
OK, INVALID_ARGUMENT, EXHAUSTED, QUOTA_EXCEEDED, NOT_FOUND, STALE = 0, 1, 2, 3, 4, 5
UNAVAILABLE, VERSION_MISMATCH, PERMISSION, UNSUPPORTED = 6, 7, 8, 9

HEADER = struct.Struct("<IHHII")
REQUEST_RING = 256
GRANT_RING = 32768
RETURN_RING = 65536


def message(kind, request_id=1, body=b"", fds=0, magic=MAGIC, size=None):
    total = HEADER.size + len(body) if size is None else size
    return HEADER.pack(magic, kind, fds, total, request_id) + body


def hello_body(name=b"raw", role=ENGINE, major=3, minor=0, reserved=b"", pool=b""):
    return struct.pack("<HHI64s16s64s40s", major, minor, role, name, b"0.1.0", pool, reserved)


def model_body(layers=4, q_heads=8, kv_heads=2, head_dim=64, value_type=0, scale=0.0):
    return struct.pack("<IIIIIf64s40s", layers, q_heads, kv_heads, head_dim, value_type, scale,
                       b"model", b"")


class Refused(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


class Control:
    """The control socket alone."""

    def __init__(self, path, timeout=5.0):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(timeout)
        self.sock.connect(path)

    def send(self, data, fds=()):
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], control)

    def receive(self):
        """(type, request id, body, fds); type None at the end of the connection."""
        data, control, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(16))
        fds = array.array("i")
        for level, kind, content in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content)
        if not data:
            return None, 0, b"", []
        _, kind, _, _, request_id = HEADER.unpack_from(data)
        return kind, request_id, data[HEADER.size:], list(fds)

    def expect(self, wanted):
        """The body and descriptors of the next message of this type; Extent messages are kept."""
        while True:
            kind, _, body, fds = self.receive()
            if kind == wanted:
                return body, fds
            if kind == EXTENT:
                self.on_extent(body, fds)
                continue
            if kind == REFUSED:
                code, _, text = struct.unpack_from("<ii504s", body)
                raise Refused(code, text.split(b"\0")[0].decode())
            raise AssertionError(f"message of type {kind} where {wanted} is expected")

    def on_extent(self, body, fds):
        for fd in fds:
            os.close(fd)

    def status_text(self):
        self.send(message(GET_STATUS))
        body, fds = self.expect(STATUS_REPLY)
        (size,) = struct.unpack_from("<Q", body)
        with os.fdopen(fds[0], "rb") as file:
            return file.read()[:size].decode()

    def close(self):
        self.sock.close()

    def __del__(self):
        if hasattr(self, "sock"):
            self.sock.close()


class Engine(Control):
    """An admitted engine with its two regions mapped."""

    def __init__(self, path, name=b"raw", pidfd=None, pool=b""):
        super().__init__(path)
        self.extents = {}
        fds = [] if pidfd is None else [pidfd]
        self.send(message(HELLO, body=hello_body(name, pool=pool), fds=len(fds)), fds)
        body, fds = self.expect(WELCOME)
        (self.major, self.minor, _, self.epoch, self.client_id, out_bytes,
         in_bytes) = struct.unpack_from("<HHIQQQQ", body)
        self.tenant = body[40:104].split(b"\0")[0].decode()
        self.device_uuid = body[136:152]
        (self.extent_bytes,) = struct.unpack_from("<Q", body, 152)
        self.pool = body[160:224].split(b"\0")[0].decode()
        self.daemon_fd, self.client_fd, self.bell = fds
        self.out = mmap.mmap(self.daemon_fd, out_bytes, prot=mmap.PROT_READ)
        self.mine = mmap.mmap(self.client_fd, in_bytes)
        self.requests = self.completions = 0
        self.grants = [0, 0, 0]
        self.returns = [0, 0, 0]

    def on_extent(self, body, fds):
        extent_id, page_class, page_bytes, page_count = struct.unpack_from("<IIII", body)
        self.extents[extent_id] = (page_class, page_bytes, page_count, fds[0])

    def receive_extents(self):
        """Takes the Extent messages that have arrived; they come before the pages."""
        self.sock.setblocking(False)
        try:
            while True:
                kind, _, body, fds = self.receive()
                if kind != EXTENT:
                    raise AssertionError(f"message of type {kind} where an extent is expected")
                self.on_extent(body, fds)
        except BlockingIOError:
            self.sock.settimeout(5.0)

    def register(self, **geometry):
        self.send(message(REGISTER_MODEL, body=model_body(**geometry)))
        body, _ = self.expect(MODEL_REGISTERED)
        return struct.unpack_from("<IIIII", body)

    def policy(self, name):
        self.send(message(GET_POLICY, body=struct.pack("<48s16s", name.encode(), b"")))
        body, _ = self.expect(POLICY_REPLY)
        return struct.unpack_from("<I", body)[0], body[64:]

    def word(self, region, offset, size=8):
        return int.from_bytes(region[offset:offset + size], "little")

    def ring_bell(self, always=False):
        if always or self.word(self.out, 128, 4):
            os.write(self.bell, (1).to_bytes(8, "little"))

    def push_request(self, op, handle=0, args=(), user_data=7, raw=None):
        body = raw or struct.pack("<HBBIQQ4QQ", op, 0, 64, 0, user_data, handle,
                                  *(list(args) + [0] * (4 - len(args))), 0)
        at = 1408 + 64 * (self.requests % REQUEST_RING)
        self.mine[at:at + 64] = body
        self.requests += 1
        self.set_word(256, self.requests)

    def set_word(self, offset, value):
        self.mine[offset:offset + 8] = (value & (2**64 - 1)).to_bytes(8, "little")

    def wait(self, condition, seconds=5.0, what="condition"):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds} s")
            time.sleep(0.001)

    def completion(self, seconds=5.0):
        self.wait(lambda: self.word(self.out, 640) > self.completions, seconds, "completion")
        at = 1536 + 64 * (self.completions % REQUEST_RING)
        user_data, status, detail, *result = struct.unpack_from("<QiI5Q", self.out, at)
        self.completions += 1
        self.set_word(384, self.completions)
        return user_data, status, detail, result

    def call(self, op, handle=0, args=()):
        self.push_request(op, handle, args)
        self.ring_bell()
        return self.completion()

    def take_grants(self, page_class):
        tail = self.word(self.out, 768 + 128 * page_class)
        base = 17920 + 4 * GRANT_RING * page_class
        pages = []
        while self.grants[page_class] < tail:
            at = base + 4 * (self.grants[page_class] % GRANT_RING)
            pages.append(self.word(self.out, at, 4))
            self.grants[page_class] += 1
        self.set_word(512 + 128 * page_class, self.grants[page_class])
        return pages

    def give_back(self, page_class, pages):
        base = 17792 + 4 * RETURN_RING * page_class
        for page in pages:
            at = base + 4 * (self.returns[page_class] % RETURN_RING)
            self.mine[at:at + 4] = page.to_bytes(4, "little")
            self.returns[page_class] += 1
        self.set_word(896 + 128 * page_class, self.returns[page_class])
        self.ring_bell(always=True)

    def closing(self):
        return self.word(self.out, 384, 4)
