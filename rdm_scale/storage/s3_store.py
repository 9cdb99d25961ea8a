"""S3 and compatible stores as a storage backend."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem

from rdm_scale.storage.backend import HIDDEN_FOLDER, ReplacedError, Stat, Walk, stat_of
from rdm_scale.storage.context import current_retry
from rdm_scale.storage.object_store import ObjectStore
from rdm_scale.storage.retries import Failure, describe

if TYPE_CHECKING:  # importing the client takes half a second
    from rdm_scale.storage.s3_client import S3Client

_MULTIPART_BYTES = 100 * 2**20  # from this size on, s3fs uploads in parts
_CONDITION_FAILED = (404, 409, 412)  # gone, being written by another, or of another version
_NOT_IMPLEMENTED = 501
_REASONS = {  # by the code of the store's error document
    "InvalidAccessKeyId": "it does not know this AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "the AWS_SESSION_TOKEN has expired",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
}


class S3Store(ObjectStore):
    """Objects on S3: short GETs on signed URLs, conditional on the ETag, and listings a page at a time."""

    fs: "S3Client"

    def __init__(self, fs: "S3Client") -> None:
        super().__init__(fs)

    # ---- folders, which are only prefixes of keys on S3

    def is_dir(self, path: str) -> bool:
        try:  # `isdir` of s3fs would list the whole folder
            return bool(self._call(path, "info")["type"] == "directory")
        except FileNotFoundError:
            return False

    def make_dir(self, path: str) -> None:
        """Do nothing: S3 has no folders, and s3fs would create a missing bucket."""

    def walk(self, path: str) -> Walk:
        files: dict[str, Stat] = {}
        others: dict[str, str] = {}
        for name, info in self._listing(path, deep=True).items():
            parts = name.split("/")
            hidden = next((i for i, part in enumerate(parts[:-1], 1) if part.startswith(".")), 0)
            if hidden:
                others["/".join(parts[:hidden])] = HIDDEN_FOLDER
            elif info["type"] == "file":
                files[name] = stat_of(info)
        return Walk(files, others)

    def _entries(self, path: str, *, missing: bool = False) -> dict[str, Mapping[str, Any]]:
        return self._listing(path, deep=False)

    def _listing(self, path: str, deep: bool) -> dict[str, Mapping[str, Any]]:
        """Entries by their path relative to the folder. Each page is retried separately."""
        entries: dict[str, Mapping[str, Any]] = {}
        token, more = "", True
        while more:
            page = self._retried(path, "listed", partial(self.fs.list_page, path, deep, token))
            entries |= {entry["name"][len(path) + 1 :].rstrip("/"): entry for entry in page.entries}
            token, more = page.next_token, bool(page.next_token)
        entries.pop("", None)  # a marker object of the folder itself
        return entries

    # ---- files

    def _get_once(
        self, path: str, offset: int, length: int | None, version: str | None, into: memoryview | None, limit_s: float
    ) -> bytes | memoryview:
        body = self.fs.get_body(path, offset, length, version, limit_s, current_retry().stall_s, into)
        if body is None:  # only s3fs can send this request
            return super()._get_once(path, offset, length, version, into, limit_s)
        return body.content

    def _upload_client(self, size: int) -> AbstractFileSystem:
        return self.fs.retrying_client if size >= _MULTIPART_BYTES else self.fs

    def write_if(self, path: str, content: bytes, version: str | None) -> None:
        """Write by a conditional PUT; S3 compares the ETag and writes in one operation."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}
        try:
            self._retried(
                path, "written", lambda left_s: self._run(self.fs, "pipe_file", left_s, path, content, **condition)
            )
        except OSError as error:
            status = describe(error).status
            if status in _CONDITION_FAILED:
                raise ReplacedError(f"{self.url(path)} is no longer version {version}: it was replaced") from None
            if status != _NOT_IMPLEMENTED:
                raise
            super().write_if(path, content, version)

    # ---- errors

    def _at_endpoint(self) -> str:
        return f" at {self.fs.endpoint}"

    def _no_bucket(self, path: str) -> str:
        return (
            f"there is no bucket {_bucket(path)!r} for {self.url(path)} at {self.fs.endpoint}: check its name and "
            "AWS_ENDPOINT_URL"
        )

    def _refusal(self, path: str, failure: Failure) -> str:
        reason = _REASONS.get(failure.code, "the credentials are wrong, or lack the permission")
        return (
            f"bucket {_bucket(path)!r} at {self.fs.endpoint} denies access ({failure.text}): {reason}. "
            "Check the AWS_* environment variables, or data.options"
        )


def _bucket(path: str) -> str:
    return path.split("/")[0]
