"""A bucket on this machine: moto's server speaks S3."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

KEY, SECRET = "someones-key", "someones-secret"


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of its own for one test."""

    name: str
    host: str

    def address(self, path: str = "", *, name: str | None = None) -> str:
        """Address of ``path`` in this bucket, or in that called ``name``, without key and secret."""
        place = f"{name or self.name}/{path}".rstrip("/")
        return f"s3://{place}?endpoint_override={quote(self.host)}&scheme=http&region=us-east-1"

    @cached_property
    def filesystem(self) -> pafs.S3FileSystem:
        return pafs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=self.host,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def put(self, path: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.name}/{path}") as file:
            file.write(data)

    def put_folder(self, root: Path, below: str = "") -> None:
        """Copy all files below ``root`` into the bucket."""
        for path in root.rglob("*"):
            if path.is_file():
                self.put(f"{below}/{path.relative_to(root).as_posix()}".lstrip("/"), path.read_bytes())

    @contextmanager
    def closed_to_strangers(self) -> Iterator[None]:
        """While this lasts the server refuses every key, as it knows none."""
        self._count_without_keys("0")
        try:
            yield
        finally:
            self._count_without_keys("inf")

    def _count_without_keys(self, count: str) -> None:
        headers = {"Content-Type": "text/plain"}  # else the server looks for a form
        with urlopen(Request(f"http://{self.host}/moto-api/reset-auth", count.encode(), headers)) as answer:
            assert answer.status == 200


@pytest.fixture(scope="session")
def s3_host() -> Iterator[str]:
    """Host and port of a server that lives as long as the tests."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and secret in the environment, where all that opens an address finds them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def bucket(s3_host: str, s3_keys: None, request: pytest.FixtureRequest) -> Bucket:
    """An empty bucket."""
    made = Bucket(f"bucket-{abs(hash(request.node.nodeid))}", s3_host)
    made.filesystem.create_dir(made.name)
    return made
