"""Clients of thinkvd that die, cheat or ask for too much; the daemon and the others go on."""

import fcntl
import mmap
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import raw_client as raw  # noqa: E402
from daemon_case import DaemonCase  # noqa: E402

# An engine in its own process: takes pages, says so, then waits to be killed.
HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import raw_client as raw
engine = raw.Engine(sys.argv[1], name=b"holder")
model, page_class, _, _, _ = engine.register()
policy, _ = engine.policy("thinkv")
for _ in range(100):
    assert engine.call(raw.OPEN_SEQUENCE, args=(model, policy, 0))[1] == raw.OK
engine.call(raw.NEED_PAGES, args=(page_class, 500))
print(len(engine.take_grants(page_class)), flush=True)
time.sleep(60)
"""


class Deaths(DaemonCase):
    def holder(self):
        process = subprocess.Popen([sys.executable, "-B", "-c", HOLDER, self.socket, str(HERE)],
                                   stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertGreaterEqual(int(process.stdout.readline()), 500)
        return process

    def test_everything_comes_back_after_sigkill(self):
        self.start()
        process = self.holder()
        held = self.status()["pool"]
        self.assertGreaterEqual(held["bytes_used"], 500 * 2304)
        self.assertEqual(held["sequences"], 100)
        process.kill()
        killed = time.monotonic()
        status = self.wait_status(lambda s: s["pool"]["bytes_used"] == 0 and not s["clients"])
        self.assertLess(time.monotonic() - killed, 1.0)
        self.assertEqual(status["pool"]["sequences"], 0)
        self.assertEqual(status["counters"]["clients_ended"]["killed"], 1)
        self.wait_status(lambda s: s["pool"]["extents"]["assigned"] == 0)

    def test_sigstop_keeps_its_pages_and_stops_nobody(self):
        self.start()
        process = self.holder()
        process.send_signal(signal.SIGSTOP)
        other = raw.Engine(self.socket)
        self.assertEqual(other.call(raw.PING)[1], raw.OK)
        self.assertGreaterEqual(self.status()["pool"]["bytes_used"], 500 * 2304)
        process.send_signal(signal.SIGCONT)

    def test_death_while_a_child_keeps_the_socket_open(self):
        self.start()
        fork = "import os\nif os.fork() == 0: time.sleep(60)\nprint(len"
        code = HOLDER.replace("print(len", fork)
        process = subprocess.Popen([sys.executable, "-B", "-c", code, self.socket, str(HERE)],
                                   stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(os.killpg, process.pid, signal.SIGKILL)
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        self.wait_status(lambda s: s["pool"]["bytes_used"] == 0 and not s["clients"])

    def test_bye_counts_as_clean_and_eof_as_killed(self):
        self.start()
        clean = raw.Engine(self.socket)
        clean.send(raw.message(raw.BYE))
        raw.Engine(self.socket).close()
        ended = self.wait_status(lambda s: not s["clients"])["counters"]["clients_ended"]
        self.assertEqual((ended["clean"], ended["killed"]), (1, 1))


class Control(DaemonCase):
    def refused(self, *packets, fds=()):
        control = raw.Control(self.socket)
        self.addCleanup(control.close)
        with self.assertRaises(raw.Refused) as caught:
            for packet in packets:
                control.send(packet, fds)
            for _ in packets:
                control.expect(raw.WELCOME)
        return caught.exception

    def test_hellos_in_another_order_than_the_connections(self):
        self.start()
        first = raw.Control(self.socket)
        second = raw.Engine(self.socket)
        first.send(raw.message(raw.HELLO, body=raw.hello_body()))
        self.assertEqual(first.receive()[0], raw.WELCOME)
        self.assertEqual(second.call(raw.PING)[1], raw.OK)
        self.assertEqual(len(self.status()["clients"]), 2)

    def test_wrong_protocol_version_says_which_side_to_upgrade(self):
        self.start()
        newer = self.refused(raw.message(raw.HELLO, body=raw.hello_body(major=4)))
        self.assertEqual(newer.code, raw.VERSION_MISMATCH)
        self.assertIn("libthinkv speaks protocol 4", newer.text)
        self.assertIn("upgrade the daemon", newer.text)
        # A Hello of another version may have another size.
        older = self.refused(raw.message(raw.HELLO, body=b"\0" * 20))
        self.assertEqual(older.code, raw.VERSION_MISMATCH)
        self.assertIn("upgrade the library", older.text)
        self.assertEqual(self.status()["server"]["rejected"]["version"], 2)

    def test_messages_that_break_the_protocol(self):
        self.start()
        hello = raw.message(raw.HELLO, body=raw.hello_body())
        cases = {
            "magic": raw.message(raw.HELLO, body=raw.hello_body(), magic=1),
            "too short": b"abc",
            "not as long as it says": raw.message(raw.HELLO, body=raw.hello_body(), size=999),
            "wrong size": raw.message(raw.HELLO, body=raw.hello_body() + b"x"),
            "role": raw.message(raw.HELLO, body=raw.hello_body(role=3)),
            "reserved bytes": raw.message(raw.HELLO, body=raw.hello_body(reserved=b"x")),
            "not text": raw.message(raw.HELLO, body=raw.hello_body(name=b"x" * 64)),
            "unknown message type": raw.message(99),
            "only the daemon": raw.message(raw.WELCOME, body=b"\0" * 192),
            "first message": raw.message(raw.REGISTER_MODEL, body=raw.model_body()),
            "as many descriptors": raw.message(raw.HELLO, body=raw.hello_body(), fds=1),
            "longer than 4096": hello + b"\0" * 5000,
        }
        for text, packet in cases.items():
            with self.subTest(text):
                self.assertIn(text, self.refused(packet).text)
        with self.subTest("unsolicited descriptors"):
            self.assertIn("descriptors", self.refused(hello, fds=[0, 1]).text)
        with self.subTest("Hello twice"):
            self.assertIn("said before", self.refused(hello, hello).text)
        self.assertEqual(self.status()["pool"]["bytes_used"], 0)

    def test_the_pidfd_of_another_process_is_refused(self):
        self.start()
        pidfd = os.pidfd_open(os.getpid())
        self.addCleanup(os.close, pidfd)
        self.assertEqual(raw.Engine(self.socket, pidfd=pidfd).call(raw.PING)[1], raw.OK)
        other = os.pidfd_open(self.daemon.pid)
        self.addCleanup(os.close, other)
        refused = self.refused(raw.message(raw.HELLO, body=raw.hello_body(), fds=1), fds=[other])
        self.assertEqual(refused.code, raw.PERMISSION)
        self.assertIn("not that of the connected process", refused.text)
        null = os.open("/dev/null", os.O_RDONLY)
        self.addCleanup(os.close, null)
        refused = self.refused(raw.message(raw.HELLO, body=raw.hello_body(), fds=1), fds=[null])
        self.assertEqual(refused.code, raw.PERMISSION)

    def test_unknown_policy_lists_the_known_ones(self):
        self.start()
        engine = raw.Engine(self.socket)
        with self.assertRaises(raw.Refused) as refused:
            engine.policy("no-such-policy")
        self.assertEqual(refused.exception.code, raw.NOT_FOUND)
        for name in ("no-such-policy", "full-f16", "thinkv-paper"):
            self.assertIn(name, refused.exception.text)
        self.assertEqual(engine.policy("thinkv")[1][:6], b"thinkv")

    def test_unsupported_geometry(self):
        self.start()
        engine = raw.Engine(self.socket)
        for code, geometry in ((raw.UNSUPPORTED, {"head_dim": 96}),
                               (raw.INVALID_ARGUMENT, {"layers": 0}),
                               (raw.INVALID_ARGUMENT, {"q_heads": 7}),
                               (raw.INVALID_ARGUMENT, {"value_type": 9}),
                               (raw.INVALID_ARGUMENT, {"scale": float("nan")})):
            with self.subTest(geometry), self.assertRaises(raw.Refused) as refused:
                engine.register(**geometry)
            self.assertEqual(refused.exception.code, code)
        self.assertEqual(engine.register()[2], 2304)  # the connection is still good

    def test_operators_only_read(self):
        self.start()
        control = raw.Control(self.socket)
        self.addCleanup(control.close)
        control.send(raw.message(raw.HELLO, body=raw.hello_body(role=raw.OPERATOR)))
        control.expect(raw.WELCOME)
        control.send(raw.message(raw.REGISTER_MODEL, body=raw.model_body()))
        with self.assertRaises(raw.Refused) as refused:
            control.expect(raw.MODEL_REGISTERED)
        self.assertEqual(refused.exception.code, raw.PERMISSION)
        self.assertIn('"pool"', control.status_text())

    def test_a_flood_of_messages_is_slowed_and_delays_nobody(self):
        self.start()
        flood = raw.Control(self.socket)
        self.addCleanup(flood.close)
        flood.sock.setblocking(False)
        other = raw.Engine(self.socket)
        slowest = 0.0
        for _ in range(50):
            try:
                for _ in range(200):
                    flood.send(raw.message(raw.GET_STATUS))
            except BlockingIOError:
                pass
            try:
                while flood.sock.recv(65536):  # a client that reads nothing would be let go
                    pass
            except BlockingIOError:
                pass
            began = time.monotonic()
            self.assertEqual(other.call(raw.PING)[1], raw.OK)
            slowest = max(slowest, time.monotonic() - began)
        self.assertLess(slowest, 1.0)
        server = self.status()["server"]
        self.assertGreater(server["throttled"], 0)
        self.assertEqual(other.call(raw.PING)[1], raw.OK)

    def test_too_many_clients_of_one_user(self):
        self.write_config(extra="limits: {clients_per_user: 2}\n")
        self.start()
        first = raw.Engine(self.socket)
        second = raw.Engine(self.socket)
        with self.assertRaises(raw.Refused) as refused:
            raw.Engine(self.socket)
        self.assertEqual(refused.exception.code, raw.EXHAUSTED)
        self.assertIn("limits.clients_per_user", refused.exception.text)
        first.send(raw.message(raw.BYE))
        self.wait_status(lambda s: len(s["clients"]) < 2)
        raw.Engine(self.socket)
        self.assertEqual(second.call(raw.PING)[1], raw.OK)

    def test_no_tenant_for_this_user(self):
        self.write_config(extra="default_tenant: none\n")
        others = self.config.read_text().replace("default,", "others, users: [12345],")
        self.config.write_text(others)
        self.start()
        with self.assertRaises(raw.Refused) as refused:
            raw.Engine(self.socket)
        self.assertEqual(refused.exception.code, raw.PERMISSION)
        self.assertEqual(self.status()["clients"], [])


class Rings(DaemonCase):
    def engine(self, **config):
        if self.daemon is None:
            self.start(**config)
        engine = raw.Engine(self.socket)
        model, page_class, _, _, high = engine.register()
        return engine, model, page_class, high

    def expect_end(self, engine, text):
        with self.assertRaises(raw.Refused) as refused:
            engine.expect(raw.WELCOME)
        self.assertIn(text, refused.exception.text)
        self.assertNotEqual(engine.closing(), 0)
        self.wait_status(lambda s: s["pool"]["bytes_used"] == 0 and not s["clients"])
        self.assertEqual(raw.Engine(self.socket).call(raw.PING)[1], raw.OK)

    def test_round_trips_and_leases(self):
        engine, model, page_class, high = self.engine()
        self.assertEqual(engine.call(raw.PING)[:2], (7, raw.OK))
        engine.wait(lambda: engine.word(engine.out, 768 + 128 * page_class) >= high, what="lease")
        pages = engine.take_grants(page_class)
        self.assertEqual(len(pages), len(set(pages)))
        engine.give_back(page_class, pages[:10])
        policy, _ = engine.policy("thinkv")
        _, code, _, result = engine.call(raw.OPEN_SEQUENCE, args=(model, policy, 0))
        self.assertEqual(code, raw.OK)
        self.assertEqual(engine.call(raw.CLOSE_SEQUENCE, handle=result[0])[1], raw.OK)
        self.assertNotEqual(engine.call(raw.CLOSE_SEQUENCE, handle=result[0])[1], raw.OK)
        self.assertTrue(engine.extents)

    def test_parked_daemon_wakes_by_the_bell(self):
        engine, _, _, _ = self.engine()
        for _ in range(20):
            engine.wait(lambda: engine.word(engine.out, 128, 4) == 1, what="parked")
            self.assertEqual(engine.call(raw.PING)[1], raw.OK)

    def test_many_requests_in_one_batch(self):
        engine, _, _, _ = self.engine()
        for i in range(raw.REQUEST_RING):
            engine.push_request(raw.PING, user_data=i)
        engine.ring_bell(always=True)
        answers = [engine.completion()[0] for _ in range(raw.REQUEST_RING)]
        self.assertEqual(answers, list(range(raw.REQUEST_RING)))

    def test_quota_exceeded_and_pool_full_are_errors_of_the_request(self):
        engine, _, page_class, _ = self.engine(limit="25%")
        answer = engine.call(raw.NEED_PAGES, args=(page_class, 3000))
        self.assertEqual(answer[1], raw.QUOTA_EXCEEDED)
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)
        self.stop()
        self.config.unlink()
        self.daemon = None
        self.log.unlink()
        engine, _, page_class, _ = self.engine()
        # Within the limit in bytes, but the ends of 8 extents are too short for a page.
        fits = (16 << 20) // 2304
        self.assertEqual(engine.call(raw.NEED_PAGES, args=(page_class, fits))[1], raw.EXHAUSTED)
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)

    def test_unknown_operation_and_dirty_descriptor_are_errors_of_the_request(self):
        engine, _, _, _ = self.engine()
        self.assertEqual(engine.call(99)[1], raw.UNSUPPORTED)
        engine.push_request(raw.PING, raw=b"\xff" * 64)
        engine.ring_bell(always=True)
        self.assertNotEqual(engine.completion()[1], raw.OK)
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)

    def test_request_tail_far_ahead(self):
        engine, _, _, _ = self.engine()
        engine.set_word(256, 1 << 40)
        engine.ring_bell(always=True)
        self.expect_end(engine, "index of a ring")

    def test_completion_head_ahead_of_what_was_written(self):
        engine, _, _, _ = self.engine()
        engine.set_word(384, 100)
        engine.push_request(raw.PING)
        engine.ring_bell(always=True)
        self.expect_end(engine, "index of a ring")

    def test_grant_head_moved_backwards(self):
        engine, _, page_class, high = self.engine()
        engine.wait(lambda: engine.word(engine.out, 768 + 128 * page_class) >= high, what="lease")
        engine.take_grants(page_class)
        engine.call(raw.PING)
        engine.set_word(512 + 128 * page_class, 1)
        engine.ring_bell(always=True)
        self.expect_end(engine, "index of a ring")

    def test_pages_that_were_never_granted(self):
        for page in (0xFFFFFFFF, 0x00012345, 0xABCDEF01):
            engine, _, page_class, _ = self.engine()
            engine.give_back(page_class, [page])
            with self.assertRaises(raw.Refused):
                engine.expect(raw.WELCOME)
            self.wait_status(lambda s: s["pool"]["bytes_used"] == 0)
        self.assertEqual(self.status()["counters"]["violations"], 3)

    def test_the_same_page_returned_twice(self):
        engine, _, page_class, high = self.engine()
        engine.wait(lambda: engine.word(engine.out, 768 + 128 * page_class) >= high, what="lease")
        page = engine.take_grants(page_class)[0]
        engine.give_back(page_class, [page, page])
        with self.assertRaises(raw.Refused):
            engine.expect(raw.WELCOME)
        self.wait_status(lambda s: s["pool"]["bytes_used"] == 0)

    def test_a_page_of_another_client(self):
        first, _, page_class, high = self.engine()
        first.wait(lambda: first.word(first.out, 768 + 128 * page_class) >= high, what="lease")
        stolen = first.take_grants(page_class)[0]
        second, _, page_class, _ = self.engine()
        second.give_back(page_class, [stolen])
        with self.assertRaises(raw.Refused):
            second.expect(raw.WELCOME)
        self.assertEqual(first.call(raw.PING)[1], raw.OK)
        first.give_back(page_class, [stolen])
        self.assertEqual(first.call(raw.PING)[1], raw.OK)

    def test_a_reader_that_never_takes_its_completions(self):
        self.write_config(extra="limits: {slow_client: 500ms}\n")
        engine, _, _, _ = self.engine()
        for _ in range(raw.REQUEST_RING):
            engine.push_request(raw.PING)
        engine.ring_bell(always=True)
        engine.wait(lambda: engine.word(engine.out, 640) == raw.REQUEST_RING, what="completions")
        engine.push_request(raw.PING)
        engine.ring_bell(always=True)
        self.expect_end(engine, "limits.slow_client")

    def test_a_bell_made_blocking_does_not_stop_the_daemon(self):
        engine, _, _, _ = self.engine()
        flags = fcntl.fcntl(engine.bell, fcntl.F_GETFL)
        fcntl.fcntl(engine.bell, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        engine.ring_bell(always=True)
        other = raw.Engine(self.socket)
        self.assertEqual(other.call(raw.PING)[1], raw.OK)
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)

    def test_regions_are_sealed(self):
        engine, _, _, _ = self.engine()
        with self.assertRaises(PermissionError):
            mmap.mmap(engine.daemon_fd, 4096)  # writable
        for fd in (engine.daemon_fd, engine.client_fd):
            with self.assertRaises(PermissionError):
                os.ftruncate(fd, 0)
            with self.assertRaises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with self.assertRaises(PermissionError):
            os.write(engine.daemon_fd, b"x")


class Descriptors(DaemonCase):
    def test_a_storm_of_connections_leaves_old_clients_served(self):
        self.write_config()
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", self.binary(), "--config",
                 self.config, "--socket", self.socket],
                stderr=log, stdout=log, env=self.environment())
        self.addCleanup(self.kill)
        self.wait_for("serving on")
        engine = raw.Engine(self.socket)
        storm = []
        for _ in range(100):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            self.addCleanup(sock.close)
            try:
                sock.connect(self.socket)
            except BlockingIOError:
                pass
            storm.append(sock)
        self.wait_for("cannot accept a connection")
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)
        with open(f"/proc/{self.daemon.pid}/stat", encoding="ascii") as file:
            before = sum(int(x) for x in file.read().split()[13:15])
        time.sleep(0.5)
        with open(f"/proc/{self.daemon.pid}/stat", encoding="ascii") as file:
            used = sum(int(x) for x in file.read().split()[13:15]) - before
        self.assertLess(used, 15, "ticks of 10 ms in half a second: the accept loop spins")
        for sock in storm:
            sock.close()
        self.wait_status(lambda s: s["server"]["connections"] <= 2)

    def binary(self):
        return os.path.join(os.environ["THINKV_BIN_DIR"], "thinkvd")


if __name__ == "__main__":
    unittest.main()
