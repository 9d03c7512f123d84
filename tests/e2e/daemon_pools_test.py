"""One thinkvd with several pools: on the host, and on the two GPUs of the fake driver."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import unittest
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import raw_client as raw  # noqa: E402
from daemon_case import SOURCE, DaemonCase, free_port  # noqa: E402

UUIDS = [f"GPU-face0000-c0de-0000-0000-00000000000{i}" for i in (1, 2)]
COMMON = """\
tenants: [{{name: default, limit: {limit}}}]
policies: {{directories: [{policies}]}}
metrics: {{port: {metrics}}}
"""
HOST = """\
pools:
  - {name: left, bytes: 4MiB, extent_bytes: 2MiB}
  - {name: right, bytes: 8MiB, extent_bytes: 2MiB}
"""
GPUS = f"""\
pools:
  - {{name: gpu0, backend: cuda, device: {UUIDS[0]}, bytes: 4MiB, extent_bytes: 2MiB}}
  - {{name: gpu1, backend: cuda, device: {UUIDS[1]}, bytes: 4MiB, extent_bytes: 2MiB}}
"""

# An engine in its own process that takes pages of a pool, says so, and waits to be killed.
HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import raw_client as raw
engines = []
for pool in sys.argv[3:]:
    engine = raw.Engine(sys.argv[1], name=b"holder", pool=pool.encode())
    page_class = engine.register()[1]
    assert engine.call(raw.NEED_PAGES, args=(page_class, 1000))[1] == raw.OK
    engines.append(engine)
print("holding", flush=True)
time.sleep(60)
"""


def used(status):
    return {pool["name"]: pool["bytes_used"] for pool in status["pools"]}


def assigned(status):
    return {pool["name"]: pool["extents"]["assigned"] for pool in status["pools"]}


class PoolsCase(DaemonCase):
    pools = HOST

    def write_config(self, limit="100%", metrics="off", pools=None):
        self.config.write_text((pools or self.pools) + COMMON.format(
            limit=limit, policies=SOURCE / "config" / "policies", metrics=metrics))

    def engine(self, pool, pages=0, head_dim=64):
        engine = raw.Engine(self.socket, pool=pool.encode())
        self.assertEqual(engine.pool, pool)
        engine.page_class = engine.register(head_dim=head_dim)[1]
        if pages:
            self.assertEqual(self.need(engine, pages), raw.OK)
        return engine

    def need(self, engine, pages):
        return engine.call(raw.NEED_PAGES, args=(engine.page_class, pages))[1]

    def hold(self, *pools):
        holder = subprocess.Popen(
            [sys.executable, "-B", "-c", HOLDER, self.socket, str(HERE), *pools],
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(holder.stdout.close)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        self.assertEqual(holder.stdout.readline(), "holding\n")
        return holder


class Isolation(PoolsCase):
    def test_exhausting_one_pool_leaves_the_other_untouched(self):
        self.start()
        # Two page sizes, so that both extents of the left pool are taken below the tenant's limit.
        small, large = self.engine("left", 100), self.engine("left", 100, head_dim=128)
        right = self.engine("right", 100, head_dim=128)
        before = self.status()
        self.assertEqual(self.need(large, 500), raw.EXHAUSTED)
        self.assertEqual(used(self.status())["right"], used(before)["right"])
        self.assertEqual(self.need(right, 1200), raw.OK)
        status = self.status()
        self.assertGreaterEqual(used(status)["right"], 1200 * 4608)
        pools = {pool["name"]: pool for pool in status["pools"]}
        self.assertEqual(pools["left"]["counters"]["failed_exhausted"], 1)
        self.assertEqual(pools["right"]["counters"]["failed_exhausted"], 0)
        self.assertEqual(small.call(raw.PING)[1], raw.OK)
        self.assertEqual(status["pool"]["bytes_used"], sum(used(status).values()))
        self.assertEqual({c["pool"] for c in status["clients"]}, {"left", "right"})

    def test_the_limit_of_a_tenant_holds_in_each_pool(self):
        self.start(limit="50%")
        left, right = self.engine("left"), self.engine("right")
        self.assertEqual(self.need(left, 1000), raw.QUOTA_EXCEEDED)  # 2.2 MiB of 2
        self.assertEqual(self.need(right, 1700), raw.OK)             # 3.7 MiB of 4
        self.assertEqual(self.need(left, 700), raw.OK)               # a limit of its own
        limits = {t["pool"]: t["limit_bytes"] for t in self.status()["tenants"]}
        self.assertEqual(limits, {"left": 2 << 20, "right": 4 << 20})

    def test_sigkill_returns_memory_to_the_right_pool(self):
        self.start()
        mine = self.engine("right", 500)
        holder = self.hold("left")
        held = self.status()
        self.assertGreaterEqual(used(held)["left"], 1000 * 2304)
        holder.kill()
        status = self.wait_status(lambda s: assigned(s)["left"] == 0)
        self.assertEqual(used(status)["left"], 0)
        self.assertEqual(used(status)["right"], used(held)["right"])
        pools = {pool["name"]: pool["counters"] for pool in status["pools"]}
        self.assertEqual(pools["left"]["clients_ended"]["killed"], 1)
        self.assertEqual(pools["right"]["clients_ended"]["killed"], 0)
        self.assertEqual(mine.call(raw.PING)[1], raw.OK)

    def test_memory_of_an_ended_engine_is_made_anew_in_its_own_pool(self):
        self.start()
        mine = self.engine("left", 100)
        holder = self.hold("right")
        holder.kill()
        self.wait_status(lambda s: assigned(s)["right"] == 0)
        again = self.engine("right", 1000)
        self.assertEqual(assigned(self.status()), {"left": 1, "right": 2})
        self.assertEqual(again.call(raw.PING)[1], raw.OK)
        self.assertEqual(self.need(mine, 1500), raw.OK)
        self.assertNotIn("cannot be made", self.log_text())

    def test_one_process_in_both_pools_gives_both_back(self):
        self.start()
        holder = self.hold("left", "right")
        self.assertEqual(self.status()["pool"]["extents"]["assigned"], 4)
        holder.kill()
        self.wait_status(lambda s: assigned(s) == {"left": 0, "right": 0} and not s["clients"])

    def test_pages_of_another_pool_cannot_be_given_back(self):
        self.start()
        left, right = self.engine("left", 100), self.engine("right", 100)
        mine = right.take_grants(right.page_class)
        theirs = left.take_grants(left.page_class)
        free = self.status()["pools"][0]["bytes_free"]
        # Ids are of one pool: what the left client returns is taken from the left ledger alone.
        left.give_back(left.page_class, [mine[-1] + (3 << 20)])
        left.wait(left.closing, what="closing")
        self.assertEqual(right.call(raw.PING)[1], raw.OK)
        status = self.wait_status(lambda s: used(s)["left"] == 0)
        self.assertEqual(status["pools"][0]["counters"]["violations"], 1)
        self.assertEqual(status["pools"][1]["counters"]["violations"], 0)
        self.assertGreater(status["pools"][0]["bytes_free"], free)
        self.assertTrue(theirs)


class Choice(PoolsCase):
    def test_hello_without_a_name_is_told_the_pools(self):
        self.start()
        control = raw.Control(self.socket)
        control.send(raw.message(raw.HELLO, request_id=9, body=raw.hello_body()))
        kind, request_id, body, _ = control.receive()
        self.assertEqual((kind, request_id, body[0]), (raw.POOLS, 9, 2))
        names = [body[16 + 96 * i:][:64].split(b"\0")[0] for i in range(3)]
        self.assertEqual(names, [b"left", b"right", b""])
        self.assertEqual(control.receive()[0], None)  # closed
        self.assertEqual(sum(self.status()["server"]["rejected"].values()), 0)

    def test_unknown_pool_is_refused_with_the_list(self):
        self.start()
        with self.assertRaises(raw.Refused) as refused:
            raw.Engine(self.socket, pool=b"middle")
        self.assertEqual(refused.exception.code, raw.NOT_FOUND)
        self.assertEqual(refused.exception.text,
                         "no pool 'middle'; there are: left (host), right (host)")
        self.assertEqual(self.status()["server"]["rejected"]["pool"], 1)

    def test_the_only_pool_needs_no_name(self):
        self.start(pools="pools: [{name: one, bytes: 4MiB, extent_bytes: 2MiB}]\n")
        self.assertEqual(raw.Engine(self.socket).pool, "one")
        self.assertEqual(raw.Engine(self.socket, pool=b"one").pool, "one")


class Operation(PoolsCase):
    def test_reload_is_taken_by_all_pools_or_none(self):
        self.start()
        engine = self.engine("left")
        self.write_config(limit="2MiB")
        self.daemon.send_signal(signal.SIGHUP)
        self.wait_for("configuration reloaded")
        limits = {t["pool"]: t["limit_bytes"] for t in self.status()["tenants"]}
        self.assertEqual(limits, {"left": 2 << 20, "right": 2 << 20})
        self.assertEqual(self.need(engine, 1000), raw.QUOTA_EXCEEDED)
        self.write_config(limit="6MiB")  # more than the left pool has
        self.daemon.send_signal(signal.SIGHUP)
        self.wait_for("reload refused")
        limits = {t["pool"]: t["limit_bytes"] for t in self.status()["tenants"]}
        self.assertEqual(limits, {"left": 2 << 20, "right": 2 << 20})
        self.assertIn('is more than the bytes of pool "left" (4MiB)', self.log_text())

    def test_a_reload_that_one_pool_cannot_take_changes_no_other(self):
        # A tenant that was removed keeps its place while it has a client: after 32 of them in the
        # right pool there is no place for a new one there, and there is on the left.
        def reload(number):
            self.config.write_text(self.config.read_text().replace(
                f"name: t{number - 1},", f"name: t{number},").replace(
                f"default_tenant: t{number - 1}", f"default_tenant: t{number}"))
            before = self.status()["config"]
            self.daemon.send_signal(signal.SIGHUP)
            return self.wait_status(lambda s: s["config"]["reloads"] > before["reloads"] or
                                    s["config"]["reloads_failed"] > before["reloads_failed"])

        self.write_config()
        self.config.write_text(self.config.read_text().replace("name: default,", "name: t0,") +
                               "default_tenant: t0\n")
        self.start()
        engines = []
        for number in range(1, 33):
            engines.append(raw.Engine(self.socket, pool=b"right"))
            status = reload(number)
            self.assertEqual(status["config"]["reloads_failed"], 1 if number == 32 else 0)
        self.assertIn("pool 'right': too many tenants", status["config"]["problems"])
        left = [tenant["name"] for tenant in status["tenants"] if tenant["pool"] == "left"]
        self.assertEqual(left, ["t31"])

    def test_pools_are_fixed_until_a_restart(self):
        self.start()
        self.write_config(pools=HOST.replace("right", "other"))
        self.daemon.send_signal(signal.SIGHUP)
        self.wait_for("reload refused")
        self.assertIn("pools: a change needs a restart", self.log_text())

    def test_every_pool_is_shown(self):
        self.start(metrics=free_port())
        engine = self.engine("right", 100)
        text = self.run_ctl("status").stdout
        for words in ("Pools", "left", "right", "4.00 MiB", "8.00 MiB", "raw"):
            self.assertIn(words, text)
        top = self.run_ctl("top", "--once").stdout
        for words in ("left (host)", "right (host)", "  default"):
            self.assertIn(words, top)
        status = json.loads(self.run_ctl("status", "--json").stdout)
        self.assertEqual([pool["name"] for pool in status["pools"]], ["left", "right"])
        with urllib.request.urlopen(self.metrics_url()) as reply:
            metrics = reply.read().decode()
        self.assertIn('thinkv_pool_bytes{pool="left",state="total"} 4194304', metrics)
        self.assertIn('thinkv_pool_bytes{pool="right",state="total"} 8388608', metrics)
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)

    def test_shutdown_ends_the_clients_of_every_pool(self):
        self.start()
        engines = [self.engine("left"), self.engine("right")]
        self.assertEqual(self.stop(), 0)
        for engine in engines:
            self.assertEqual(engine.closing(), raw.UNAVAILABLE)


class Gpus(PoolsCase):
    pools = GPUS

    def environment(self):
        return {**super().environment(), **getattr(self, "variables", {})}

    def test_each_pool_is_on_its_gpu(self):
        self.start()
        for i, uuid in enumerate(UUIDS):
            engine = self.engine(f"gpu{i}", 100)
            self.assertEqual(engine.device_uuid.hex(), uuid[4:].replace("-", ""))
            engine.receive_extents()
            fd = next(iter(engine.extents.values()))[3]
            self.assertIn(f"fake-cuda-{i} ", os.readlink(f"/proc/self/fd/{fd}"))
        self.assertEqual([pool["device"] for pool in self.status()["pools"]], UUIDS)

    def test_a_pool_is_found_by_the_uuid_of_its_gpu(self):
        self.start()
        self.assertEqual(raw.Engine(self.socket, pool=UUIDS[1].encode()).pool, "gpu1")

    def test_memory_that_ends_on_one_gpu_is_there_on_the_other(self):
        self.variables = {"FAKE_CUDA_BYTES": str(4 << 20)}
        self.start()
        first = [self.engine("gpu0", 100), self.engine("gpu0", 100, head_dim=128)]
        self.assertEqual(self.need(first[1], 500), raw.EXHAUSTED)
        second = self.engine("gpu1", 1500)
        self.assertGreaterEqual(used(self.status())["gpu1"], 1500 * 2304)
        self.assertEqual(second.call(raw.PING)[1], raw.OK)

    def test_a_gpu_that_is_missing_names_its_pool(self):
        self.write_config()
        self.variables = {"FAKE_CUDA_DEVICES": "1"}
        done = subprocess.run(
            [pathlib.Path(os.environ["THINKV_BIN_DIR"]) / "thinkvd", "--config", self.config,
             "--socket", self.socket], capture_output=True, text=True, timeout=30,
            env=self.environment(), check=False)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn(f"pool 'gpu1': pool.backend is cuda: no {UUIDS[1]} here", done.stderr)


if __name__ == "__main__":
    unittest.main()
