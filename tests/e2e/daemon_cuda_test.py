"""thinkvd with backend cuda, on the fake driver of tests/support: GPU memory is a memfd there."""

import mmap
import os
import pathlib
import signal
import subprocess
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import raw_client as raw  # noqa: E402
from daemon_case import BIN, SOURCE, DaemonCase  # noqa: E402

EXTENT = 2 << 20
UUIDS = [f"GPU-face0000-c0de-0000-0000-00000000000{i}" for i in (1, 2)]

CONFIG = """\
pool: {{backend: cuda, device: {device}, bytes: {pool}, extent_bytes: 2MiB}}
tenants:
  - {{name: first, users: [{first}]}}
  - {{name: second, users: [{second}]}}
default_tenant: none
policies: {{directories: [{policies}]}}
metrics: {{port: off}}
"""

# An engine in its own process that fills every extent it gets, says so, and waits to be killed.
WRITER = """
import mmap, sys, time
sys.path.insert(0, sys.argv[2])
import raw_client as raw
engine = raw.Engine(sys.argv[1], name=b"writer")
model, page_class, _, _, _ = engine.register()
assert engine.call(raw.NEED_PAGES, args=(page_class, int(sys.argv[3])))[1] == raw.OK
engine.receive_extents()
for _, _, _, fd in engine.extents.values():
    memory = mmap.mmap(fd, 2 << 20)
    memory[:] = bytes([0xEE]) * (2 << 20)
print(engine.tenant, len(engine.extents), flush=True)
time.sleep(60)
"""


def memory_of(fd):
    with mmap.mmap(fd, EXTENT, prot=mmap.PROT_READ) as memory:
        return memory[:]


class CudaCase(DaemonCase):
    def setUp(self):
        super().setUp()
        self.variables = {}

    def write_config(self, device="auto", pool="8MiB", tenant="first"):
        mine, other = os.getuid(), 4_000_000_000  # a user nobody is
        first, second = (mine, other) if tenant == "first" else (other, mine)
        self.config.write_text(CONFIG.format(
            device=device, pool=pool, first=first, second=second,
            policies=SOURCE / "config" / "policies"))

    def environment(self):
        return {**super().environment(), **self.variables}

    def pages_of(self, name=b"raw", pages=100):
        """An engine that was granted pages, and the descriptors of its extents."""
        engine = raw.Engine(self.socket, name=name)
        _, page_class, _, _, _ = engine.register()
        _, status, _, _ = engine.call(raw.NEED_PAGES, args=(page_class, pages))
        self.assertEqual(status, raw.OK)
        engine.receive_extents()
        for extent in engine.extents.values():
            self.addCleanup(os.close, extent[3])
        return engine

    def refused_start(self):
        """What thinkvd says when it does not start."""
        if not self.config.exists():
            self.write_config()
        done = subprocess.run([BIN / "thinkvd", "--config", self.config, "--socket", self.socket],
                              capture_output=True, text=True, timeout=30,
                              env=self.environment(), check=False)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("cannot start: ", done.stderr)
        self.assertFalse(pathlib.Path(self.socket).exists())
        return done.stderr


class Memory(CudaCase):
    def test_clients_get_zeroed_extents_of_the_gpu(self):
        self.start()
        engine = self.pages_of()
        self.assertEqual(engine.device_uuid.hex(), UUIDS[0][4:].replace("-", ""))
        self.assertEqual(engine.extent_bytes, EXTENT)
        self.assertTrue(engine.extents)
        for page_class, page_bytes, _, fd in engine.extents.values():
            self.assertEqual((page_class, page_bytes), (0, 2304))
            self.assertEqual(os.fstat(fd).st_size, EXTENT)
            self.assertEqual(memory_of(fd), bytes(EXTENT))
        self.assertEqual(self.status()["pool"]["backend"], "cuda")
        self.assertIn(f"GPU Fake GPU 0 ({UUIDS[0]}), driver for CUDA 12.4", self.log_text())

    def test_gpu_by_its_uuid(self):
        self.start(device=UUIDS[1])
        self.assertEqual(self.pages_of().device_uuid.hex(), UUIDS[1][4:].replace("-", ""))

    def test_another_tenant_reads_zeros_where_the_first_wrote(self):
        self.start(pool="4MiB")
        # Both extents of the pool, so that the second tenant must get one of them.
        writer = subprocess.Popen(
            [sys.executable, "-B", "-c", WRITER, self.socket, str(HERE), "1000"],
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(writer.stdout.close)
        self.addCleanup(writer.wait)
        self.addCleanup(writer.kill)
        self.assertEqual(writer.stdout.readline(), "first 2\n")
        writer.kill()
        self.wait_status(lambda s: s["pool"]["bytes_used"] == 0 and not s["clients"])
        self.write_config(pool="4MiB", tenant="second")
        self.daemon.send_signal(signal.SIGHUP)
        self.wait_for("configuration reloaded")
        engine = self.pages_of(pages=1000)
        self.assertEqual(engine.tenant, "second")
        self.assertEqual(len(engine.extents), 2)
        for extent in engine.extents.values():
            self.assertEqual(memory_of(extent[3]), bytes(EXTENT))

    def test_memory_outlives_a_killed_daemon_with_its_descriptor(self):
        self.start()
        engine = self.pages_of()
        fd = next(iter(engine.extents.values()))[3]
        pattern = bytes(range(256)) * (EXTENT // 256)
        with mmap.mmap(fd, EXTENT) as memory:
            memory[:] = pattern
        self.daemon.kill()
        self.daemon.wait()
        self.assertEqual(memory_of(fd), pattern)
        self.log.unlink()  # start() waits for the new daemon's words
        # The next daemon makes memory of its own, and leaves that alone.
        self.start()
        later = self.pages_of()
        for extent in later.extents.values():
            self.assertEqual(memory_of(extent[3]), bytes(EXTENT))
        self.assertEqual(memory_of(fd), pattern)

    def test_gpu_without_memory_refuses_pages_and_goes_on(self):
        self.variables["FAKE_CUDA_FAIL"] = "cuMemCreate:2:2"
        self.start()
        engine = self.pages_of(pages=100)
        _, status, _, _ = engine.call(raw.NEED_PAGES, args=(0, 2000))
        self.assertEqual(status, raw.EXHAUSTED)
        self.assertEqual(engine.call(raw.PING)[1], raw.OK)
        self.assertIn("cuMemCreate: out of memory (CUDA error 2)", self.log_text())


class Start(CudaCase):
    def test_without_a_driver(self):
        # A file that is no library: found first, also where the machine has a real driver.
        (self.folder / "libcuda.so.1").write_text("no ELF file")
        self.variables["LD_LIBRARY_PATH"] = str(self.folder)
        text = self.refused_start()
        self.assertIn("pool.backend is cuda: no CUDA driver on this machine", text)
        self.assertIn("use the host backend", text)

    def test_without_a_gpu(self):
        self.variables["FAKE_CUDA_DEVICES"] = "0"
        self.assertIn("finds no GPU", self.refused_start())

    def test_with_an_old_driver(self):
        self.variables["FAKE_CUDA_VERSION"] = "11040"
        self.assertIn("supports CUDA 11.4, ThinKV needs 12.0 or newer", self.refused_start())

    def test_gpu_that_is_not_there(self):
        self.write_config(device="GPU-00000000-0000-0000-0000-000000000009")
        text = self.refused_start()
        self.assertIn("no GPU-00000000-0000-0000-0000-000000000009 here", text)
        self.assertIn(UUIDS[1], text)

    def test_gpu_that_is_too_small_or_exclusive(self):
        self.variables["FAKE_CUDA_BYTES"] = str(4 << 20)
        self.assertIn("pool.bytes is 8 MiB, the GPU has 4 MiB free", self.refused_start())
        self.variables = {"FAKE_CUDA_COMPUTE_MODE": "3"}
        self.assertIn("EXCLUSIVE_PROCESS", self.refused_start())

    def test_advice_is_logged_and_the_daemon_serves(self):
        (self.folder / "control").write_text("")
        self.variables = {"FAKE_NVML_PERSISTENCE": "0",
                          "CUDA_MPS_PIPE_DIRECTORY": str(self.folder)}
        self.start()
        self.assertIn(f"MPS is in force ({self.folder}/control)", self.log_text())
        self.assertIn("persistence mode is off on Fake GPU 0", self.log_text())

    def test_check_config_needs_no_gpu(self):
        self.write_config()
        self.variables["FAKE_CUDA_DEVICES"] = "0"
        done = subprocess.run([BIN / "thinkvd", "--config", self.config, "--check-config"],
                              capture_output=True, text=True, timeout=30,
                              env=self.environment(), check=False)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_device_is_fixed_until_a_restart(self):
        self.start()
        self.write_config(device=UUIDS[1])
        self.daemon.send_signal(signal.SIGHUP)
        self.wait_for("reload refused")
        self.assertIn("pool.device: a change needs a restart", self.log_text())


if __name__ == "__main__":
    unittest.main()
