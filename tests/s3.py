"""An S3 for tests: moto's server in a process of its own, behind a gate that can be shut, lose answers, and count."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from app.ports import free_port
from reco.settings import Lake

KEY, SECRET = "AKIATEST", "hush-hush"


@contextmanager
def moto() -> Iterator[str]:
    """The endpoint of an empty S3 for as long as the block runs."""
    command = Path(sys.executable).with_name("moto_server")
    if not command.exists(): pytest.skip("needs moto_server: the dev extra")
    port = free_port()
    server = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try: http.client.HTTPConnection("127.0.0.1", port, timeout=1).connect()
            except OSError: time.sleep(0.05)
            else: break
        else: raise AssertionError("moto_server does not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class Gate:
    """In front of an S3. Writes pass one at a time: moto looks at a condition and writes without a lock, a real S3 does not."""

    def __init__(self, target: str):
        self.seen: list[tuple[str, str, str | None]] = [] # verb, path, condition
        self.shut, self.lose = False, 0                   # answers to writes with a condition that get lost
        gate, at, one = self, urlsplit(target).netloc, Lock()

        class Pass(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                condition = self.headers.get("If-Match") or self.headers.get("If-None-Match")
                gate.seen.append((self.command, self.path, condition))
                if gate.shut: return self.cut()
                with one:
                    link = http.client.HTTPConnection(at)
                    link.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "host"} | {"Host": at})
                    answer = link.getresponse()
                    data = answer.read()
                if gate.lose and self.command == "PUT" and condition and answer.status == 200:
                    gate.lose -= 1
                    return self.cut()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"): self.send_header(name, value)
                self.send_header("Content-Length", answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data)))
                self.end_headers()
                if self.command != "HEAD": self.wfile.write(data)

            def cut(self) -> None:
                self.close_connection = True
                with suppress(OSError): self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on
            log_message = lambda *_: None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Pass)
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str: return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def section(endpoint: str, root: str = "data/lake") -> Lake:
    return Lake(root=root, endpoint=endpoint, access_key=SecretStr(KEY), secret_key=SecretStr(SECRET))


def make_bucket(endpoint: str, name: str) -> object:
    """A client, once the bucket is there."""
    import boto3
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
    client.create_bucket(Bucket=name)
    return client
