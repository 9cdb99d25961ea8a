"""Inputs of the encoder on a real S3 server: folders, tars with videos, lists, and a text encoder's folder."""

import io
import json
import tarfile

import av
import numpy as np
import pytest
import s3fs
from PIL import Image

from rdm_scale.encoding.images import image_size
from rdm_scale.encoding.inputs import find_media
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.encoding.videos import read_video_metadata
from rdm_scale.errors import DataError


@pytest.fixture
def put(s3_environment, prefix):
    """A function that writes objects by their path below the folder of the test and returns its URL."""
    server = s3_environment
    fs = s3fs.S3FileSystem(key=server.access_key, secret=server.secret_key, endpoint_url=server.endpoint)

    def write(objects: dict[str, bytes]) -> str:
        for path, content in objects.items():
            fs.pipe_file(f"latents/{prefix}/{path}", content)
        return f"s3://latents/{prefix}"

    return write


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def movie(frames: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for i in range(frames):
            frame = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_folder_with_captions_some_of_them_empty(put):
    objects = {"in/cat/a.png": png(3), "in/cat/a.txt": b"a cat", "in/dog/b.png": png(5), "in/dog/b.txt": b""}
    found = find_media(f"{put(objects)}/in")
    assert [(file.key, file.label, file.caption) for file in found.files] == [("cat/a", 0, "a cat"), ("dog/b", 1, "")]
    assert [image_size(file.read(), file.name) for file in found.files] == [(8, 3), (8, 5)]


def test_videos_in_tars_are_read_in_place(put):
    tars = {f"in/{i}.tar": tar_of({f"{i}-{k}.mp4": movie(3 + i + k) for k in range(3)}) for i in range(3)}
    url = put(tars)
    for place in (f"{url}/in", f"{url}/in/*.tar", f"{url}/in/[012].tar"):
        found = find_media(place)
        assert found.kind == "video" and len(found.files) == 9
    for file in found.files:
        with file.open() as video:
            i, k = map(int, file.key.split("-"))
            assert read_video_metadata(video, file.name, None).frames == 3 + i + k


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_beside_the_images_and_elsewhere(put, tmp_path, kind):
    url = put({"in/x/1.png": png(3), "2.png": png(5)})
    rows = [{"path": "x/1.png", "caption": "one"}, {"path": f"{url}/2.png", "caption": "two"}]
    if kind == "jsonl":
        content = "\n".join(map(json.dumps, rows)).encode()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list")
        content = (tmp_path / "list").read_bytes()
    put({f"in/list.{kind}": content})
    (tmp_path / "local.jsonl").write_text(json.dumps({"path": f"{url}/in/x/1.png"}))
    found = find_media(f"{url}/in/list.{kind}")
    assert [file.key for file in found.files] == ["x/1", f"{url}/2"]
    assert [image_size(file.read(), file.name) for file in found.files] == [(8, 3), (8, 5)]
    (file,) = find_media(str(tmp_path / "local.jsonl")).files
    assert file.read() == png(3) and file.name == f"{url}/in/x/1.png"
    put({f"in/list.{kind}": content.replace(b"2.png", b"3.png")})
    missing = find_media(f"{url}/in/list.{kind}").files[1]
    with pytest.raises(DataError, match=r"cannot read .*3\.png"):
        missing.read()


def test_missing_inputs_are_named(put):
    url = put({"a.txt": b""})
    with pytest.raises(DataError, match="does not exist"):
        find_media(f"{url}/nothing/*.tar")
    with pytest.raises(DataError, match="nosuchbucket"):
        find_media("s3://nosuchbucket-anywhere/in")
    with pytest.raises(DataError, match="nothing"):
        TextEncoder(f"{url}/nothing")
