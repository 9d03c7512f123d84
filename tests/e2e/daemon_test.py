"""thinkvd as a process: start, stop, reload, status, metrics."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import unittest
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import raw_client  # noqa: E402
from daemon_case import BIN, SOURCE, DaemonCase, free_port  # noqa: E402


class StartStop(DaemonCase):
    def test_sigterm_ends_cleanly_and_removes_the_socket(self):
        self.start()
        engine = raw_client.Engine(self.socket)
        self.assertEqual(self.stop(), 0)
        self.assertFalse(os.path.exists(self.socket))
        self.assertEqual(engine.closing(), raw_client.UNAVAILABLE)
        with self.assertRaises(raw_client.Refused) as refused:
            engine.expect(raw_client.WELCOME)
        self.assertEqual(refused.exception.code, raw_client.UNAVAILABLE)

    def test_sigint_ends_cleanly(self):
        self.start()
        self.daemon.send_signal(signal.SIGINT)
        self.assertEqual(self.daemon.wait(10), 0)

    def test_second_daemon_is_refused_and_the_first_unaffected(self):
        self.start()
        engine = raw_client.Engine(self.socket)
        second = subprocess.run(
            [BIN / "thinkvd", "--config", self.config, "--socket", self.socket],
            capture_output=True, text=True, timeout=10, env=self.environment(), check=False)
        self.assertEqual(second.returncode, 1)
        self.assertIn(f"another thinkvd (pid {self.daemon.pid}) owns {self.socket}", second.stderr)
        self.assertEqual(engine.call(raw_client.PING)[1], raw_client.OK)

    def test_restart_after_sigkill_replaces_the_stale_socket(self):
        self.start()
        self.daemon.kill()
        self.daemon.wait()
        self.assertTrue(os.path.exists(self.socket))
        self.log.unlink()
        self.start()
        self.assertEqual(self.status()["pool"]["bytes_used"], 0)

    def refused_start(self):
        self.write_config()
        done = subprocess.run(
            [BIN / "thinkvd", "--config", self.config, "--socket", self.socket],
            capture_output=True, text=True, timeout=10, env=self.environment(), check=False)
        self.assertEqual(done.returncode, 1)
        return done.stderr

    def test_a_file_at_the_path_is_left_alone(self):
        pathlib.Path(self.socket).write_text("mine")
        self.assertIn("is not a socket", self.refused_start())
        self.assertEqual(pathlib.Path(self.socket).read_text(), "mine")

    def test_a_symlink_at_the_path_is_left_alone(self):
        os.symlink("/nowhere", self.socket)
        self.assertIn("is not a socket", self.refused_start())
        self.assertTrue(os.path.islink(self.socket))

    def test_a_living_socket_of_another_program_is_left_alone(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.bind(self.socket)
            other.listen()
            self.assertIn("another program listens", self.refused_start())
            self.assertTrue(os.path.exists(self.socket))

    def test_runs_without_a_configuration_file(self):
        environment = {**self.environment(), "THINKV_SOCKET": self.socket}
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen([BIN / "thinkvd"], stderr=log, stdout=log,
                                           env=environment)
        self.addCleanup(self.kill)
        self.wait_for("serving on")
        names = [policy["name"] for policy in self.status()["policies"]]
        self.assertIn("thinkv", names)
        self.assertEqual(self.stop(), 0)


class CommandLine(DaemonCase):
    def thinkvd(self, *arguments):
        return subprocess.run([BIN / "thinkvd", *arguments], capture_output=True, text=True,
                              timeout=10, env=self.environment(), check=False)

    def test_version(self):
        self.assertRegex(self.thinkvd("--version").stdout, r"^thinkvd \d+\.\d+\.\d+, protocol 3\.")

    def test_check_config_accepts_the_shipped_file(self):
        done = self.thinkvd("--config", str(SOURCE / "config/thinkvd.yaml"), "--check-config")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_check_config_names_line_key_and_what_is_allowed(self):
        self.config.write_text("pool:\n  bytes: 512MB\n")
        done = self.thinkvd("--config", str(self.config), "--check-config")
        self.assertEqual(done.returncode, 2)
        self.assertIn(f"{self.config}:2: pool.bytes: \"512MB\": a size with its unit", done.stderr)

    def test_absent_configuration_file(self):
        done = self.thinkvd("--config", "/nowhere.yaml", "--check-config")
        self.assertEqual(done.returncode, 2)
        self.assertIn("/nowhere.yaml: cannot be read: No such file", done.stderr)

    def test_unknown_log_level(self):
        self.assertNotEqual(self.thinkvd("--log-level", "loud").returncode, 0)


class Reload(DaemonCase):
    def hup(self, expected):
        self.daemon.send_signal(signal.SIGHUP)
        self.wait_for(expected)

    def test_bad_file_keeps_the_old_configuration_and_says_why(self):
        self.start(metrics=free_port())
        good = self.config.read_text()
        self.config.write_text(good + "limits: {clients: none}\n")
        self.hup("reload refused")
        self.assertIn(f"{self.config}:7: limits.clients:", self.log_text())
        config = self.status()["config"]
        self.assertFalse(config["last_reload_successful"])
        self.assertIn("limits.clients", config["problems"])
        self.assertEqual(raw_client.Engine(self.socket).call(raw_client.PING)[1], 0)
        with urllib.request.urlopen(self.metrics_url(), timeout=5) as reply:
            text = reply.read().decode()
        self.assertIn("thinkv_config_last_reload_successful 0", text)
        self.config.write_text(good)
        self.hup("configuration reloaded")
        self.assertTrue(self.status()["config"]["last_reload_successful"])

    def test_keys_that_need_a_restart_are_named(self):
        self.start()
        self.write_config(pool="32MiB")
        self.hup("reload refused")
        self.assertIn("pool.bytes: a change needs a restart", self.log_text())
        self.assertEqual(self.status()["pool"]["bytes_total"], 16 << 20)

    def test_new_policy_and_tenant_limit_are_taken(self):
        self.start()
        folder = self.folder / "policies"
        folder.mkdir()
        text = (SOURCE / "config/policies/full-f16.yaml").read_text()
        (folder / "mine.yaml").write_text(text.replace("name: full-f16", "name: mine"))
        self.write_config(limit="4MiB")
        self.config.write_text(self.config.read_text().replace(
            "directories: [", f"directories: [{folder}, "))
        self.hup("configuration reloaded")
        status = self.status()
        self.assertIn("mine", [policy["name"] for policy in status["policies"]])
        self.assertEqual(status["tenants"][0]["limit_bytes"], 4 << 20)


class Metrics(DaemonCase):
    def test_families(self):
        self.start(metrics=free_port())
        engine = raw_client.Engine(self.socket)
        engine.register()
        engine.call(raw_client.PING)

        def scraped():
            with urllib.request.urlopen(self.metrics_url(), timeout=5) as reply:
                return reply.read().decode()

        text = ""
        pings = 'thinkv_requests_total{pool="default",op="ping",code="ok"} 1'
        engine.wait(lambda: pings in scraped(),
                    what="the ping in the metrics")
        text = scraped()
        for family in ("thinkv_build_info", "thinkv_start_time_seconds", "thinkv_pool_bytes",
                       "thinkv_extents", "thinkv_pages", "thinkv_tenant_bytes",
                       "thinkv_tenant_quota_bytes", "thinkv_clients", "thinkv_client_exits_total",
                       "thinkv_ring_depth", "thinkv_ring_full_total", "thinkv_doorbells_total",
                       "thinkv_event_loop_lag_seconds", "thinkv_config_last_reload_successful",
                       "thinkv_connections_rejected_total", "thinkv_protocol_violations_total"):
            self.assertRegex(text, rf"(?m)^{family}(\{{.*\}})? \d")
        self.assertIn('thinkv_pool_bytes{pool="default",state="total"} 16777216', text)
        self.assertIn('thinkv_clients{pool="default",tenant="default"} 1', text)

    def test_a_taken_port_does_not_stop_the_daemon(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            self.start(metrics=taken.getsockname()[1])
            self.assertIn("is the port taken?", self.log_text())
            self.assertTrue(self.status()["metrics"].startswith("failed"))


class Ctl(DaemonCase):
    def test_status_shows_pool_tenant_and_client(self):
        self.start()
        engine = raw_client.Engine(self.socket, name=b"engine-a")
        engine.register()
        done = self.run_ctl("status")
        self.assertEqual(done.returncode, 0)
        for text in ("Pool on backend host", "16.00 MiB", "default", "engine-a"):
            self.assertIn(text, done.stdout)
        status = json.loads(self.run_ctl("status", "--json").stdout)
        self.assertEqual(status["clients"][0]["pid"], os.getpid())
        self.assertEqual(status["clients"][0]["models"][0]["head_dim"], 64)

    def test_hostile_client_name_cannot_move_the_cursor(self):
        self.start()
        with self.assertRaises(raw_client.Refused) as refused:
            raw_client.Engine(self.socket, name=b"\x1b[2J")
        self.assertIn("name is not text", refused.exception.text)

    def test_name_that_is_not_utf8(self):
        self.start()
        engine = raw_client.Engine(self.socket, name=b"\xff\xfe")
        self.assertEqual(json.loads(self.run_ctl("status", "--json").stdout)["clients"][0]["id"],
                         engine.client_id)

    def test_top_once_and_policies(self):
        self.start()
        top = self.run_ctl("top", "--once")
        self.assertEqual(top.returncode, 0)
        self.assertIn("pool (host)", top.stdout)
        self.assertNotIn("\x1b", top.stdout)
        self.assertIn("thinkv-paper", self.run_ctl("policies").stdout)

    def test_absent_daemon(self):
        done = self.run_ctl("status")
        self.assertEqual(done.returncode, 3)
        self.assertIn(f"no thinkvd answers on {self.socket}", done.stderr)

    def test_unknown_command(self):
        self.assertNotEqual(self.run_ctl("restart").returncode, 0)


if __name__ == "__main__":
    unittest.main()
