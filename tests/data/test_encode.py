"""From real digit scans to shards: order, holdout, content, and what happens when something is wrong."""

import io
import shutil
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from rdm_scale import rng
from rdm_scale.data.codecs import load_codec, normalise
from rdm_scale.data.encode import Holdout, encode_images, load_batches, split
from rdm_scale.data.images import find_images
from rdm_scale.data.manifest import Manifest, read_manifest
from rdm_scale.data.shards import read_member, sample_id
from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

COUNT = 150


def scan_png(scan: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((scan * 15).astype(np.uint8)).resize((32, 32)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digit scans in folders of their classes."""
    root = tmp_path_factory.mktemp("digits")
    for index, (scan, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if index == COUNT:
            break
        (root / str(label)).mkdir(exist_ok=True)
        (root / f"{label}/{index:05d}.png").write_bytes(scan_png(scan.reshape(8, 8)))
    return root


@pytest.fixture(scope="module")
def tar(folder, tmp_path_factory):
    """The same images with the same keys as two webdataset tars."""
    root = tmp_path_factory.mktemp("tars")
    for half in (0, 1):
        with tarfile.open(root / f"digits-{half}.tar", "w") as archive:
            for path in sorted(folder.rglob("*.png"))[half::2]:
                name = path.relative_to(folder)
                for suffix, content in ((".png", path.read_bytes()), (".cls", name.parts[0].encode())):
                    info = tarfile.TarInfo(str(name.with_suffix(suffix)))
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return root


def run(source, out, codec="identity", kind="mode", dtype="float32", seed=0, batch_size=16, **options):
    return encode_images(
        find_images(str(source)),
        load_codec(codec),
        Location(str(out)),
        size=options.pop("size", 32),
        kind=kind,
        dtype=dtype,
        seed=seed,
        batch_size=batch_size,
        **options,
    )


def read_all(out) -> tuple[Manifest, dict[str, torch.Tensor]]:
    manifest, folder = read_manifest(str(out))
    members = [
        read_member(folder, manifest, s, m)
        for s, shard in enumerate(manifest.shards)
        for m in range(len(shard.members))
    ]
    return manifest, {name: torch.cat([member[name] for member in members]) for name in members[0]}


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_image_is_there_with_its_label_in_keyed_order(folder, tmp_path):
    done: list[int] = []
    encoded = run(folder, tmp_path / "out", progress=done.append)
    manifest, data = read_all(tmp_path / "out")
    assert encoded.train == manifest and encoded.holdout is None
    assert sum(done) == manifest.samples == COUNT
    assert manifest.shape == (3, 1, 32, 32) and manifest.codec.name == "identity"
    assert manifest.class_names == tuple("0123456789")

    by_id = {sample_id(f"{path.parent.name}/{path.stem}"): path for path in folder.rglob("*.png")}
    order = sorted(by_id.values(), key=lambda path: rng.key(0, "shuffle", f"{path.parent.name}/{path.stem}"))
    assert [by_id[i] for i in data["ids"].tolist()] == order
    pixels = np.stack([np.asarray(Image.open(path)) for path in order])
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1
    torch.testing.assert_close(data["latents"], expected, rtol=0, atol=0)
    assert data["labels"].tolist() == [int(path.parent.name) for path in order]
    assert encoded.mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert encoded.std == pytest.approx(expected.std(correction=0).item(), abs=1e-5)


def test_a_class_sorted_input_is_well_mixed(folder):
    labels = [image.label for image in split(find_images(str(folder)).images, 0, 0.0)[0]]
    # in class order 9 of 149 neighbours differ; independent draws differ in about 9 of 10
    assert sum(a != b for a, b in pairwise(labels)) > 120


@pytest.mark.parametrize("codec", ["identity", "digits"])
def test_tars_and_folders_and_repetition_give_the_same_bytes(folder, tar, tmp_path, codec):
    for name, source in (("a", folder), ("b", folder), ("c", tar), ("d", tar / "*.tar")):
        run(source, tmp_path / name, codec, "moments", "float16")
    first = contents(tmp_path / "a")
    assert {"manifest.json", "shard-000000.tar"} <= set(first)
    assert contents(tmp_path / "b") == contents(tmp_path / "c") == contents(tmp_path / "d") == first


def test_the_seed_changes_the_order(folder):
    images = find_images(str(folder)).images
    orders = [[image.key for image in split(images, seed, 0.0)[0]] for seed in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_mode_and_moments(folder, tmp_path):
    mode = run(folder, tmp_path / "mode", "digits")
    moments = run(folder, tmp_path / "moments", "digits", "moments")
    (_, a), (manifest, b) = read_all(tmp_path / "mode"), read_all(tmp_path / "moments")
    assert manifest.shape == (4, 1, 8, 8) and b["latents"].shape == (COUNT, 8, 1, 8, 8)
    torch.testing.assert_close(a["latents"], b["latents"][:, :4], rtol=0, atol=0)

    mean, log_variance = b["latents"].double().chunk(2, dim=1)
    codec = load_codec("digits")
    unit = normalise(mean, codec.record)
    assert mode.std == pytest.approx(unit.std(correction=0).item(), rel=1e-5)
    # the variance of samples is that of the means plus the mean posterior variance, in normalised units
    scale = torch.tensor(codec.record.scale, dtype=torch.float64).view(-1, 1, 1, 1)
    variance = unit.var(correction=0) + (log_variance.exp() * scale**2).mean()
    assert moments.std == pytest.approx(variance.sqrt().item(), rel=1e-5)
    assert moments.mean == pytest.approx(unit.mean().item(), abs=1e-5)


def test_the_holdout_is_exact_and_stable(folder, tmp_path):
    encoded = run(folder, tmp_path / "out", holdout=Holdout(Location(str(tmp_path / "held")), 0.2))
    (_, train), (manifest, held) = read_all(tmp_path / "out"), read_all(tmp_path / "held")
    assert encoded.holdout == manifest and manifest.class_names == encoded.train.class_names
    keys = [f"{path.parent.name}/{path.stem}" for path in folder.rglob("*.png")]
    expected = {sample_id(key) for key in keys if rng.key(0, "holdout", key) / 2**63 < 0.2}
    assert set(held["ids"].tolist()) == expected and 15 <= len(expected) <= 45
    assert set(train["ids"].tolist()) == {sample_id(key) for key in keys} - expected
    # The statistics are those of the training side.
    assert encoded.mean == pytest.approx(train["latents"].mean().item(), abs=1e-5)
    # With fewer or more data around it, a sample stays on its side.
    images = find_images(str(folder)).images
    all_held = {image.key for image in split(images, 0, 0.2)[1]}
    assert {image.key for image in split(images[::3], 0, 0.2)[1]} == all_held & {image.key for image in images[::3]}


def test_a_file_system_without_folders(folder):
    encoded = run(folder / "0", "memory://encode_test/out")
    manifest, data = read_all("memory://encode_test/out")
    assert manifest == encoded.train and set(data["labels"].tolist()) == {-1}
    with pytest.raises(DataError, match="already holds"):
        run(folder / "0", "memory://encode_test/out")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_corrupt_image_is_named_and_leaves_nothing(folder, tmp_path, existing):
    source = shutil.copytree(folder, tmp_path / "in")
    worst = split(find_images(str(source)).images, 0, 0.0)[0][-1]  # when all others have been encoded
    path = source / f"{worst.key}.png"
    path.write_bytes(path.read_bytes()[:60])
    out, held = tmp_path / "out", tmp_path / "held"
    if existing:
        out.mkdir()
    with pytest.raises(DataError, match=f"{worst.key}.png"):
        run(source, out, holdout=Holdout(Location(str(held)), 0.2))
    assert not out.exists() and not held.exists()


def test_an_interrupt_leaves_nothing(folder, tmp_path):
    def interrupt(samples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_folders_in_use_are_not_touched(folder, tmp_path):
    run(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="already holds encoded data"):
        run(folder, tmp_path / "out")
    with pytest.raises(DataError, match="already holds encoded data"):
        run(folder, tmp_path / "new", holdout=Holdout(Location(str(tmp_path / "out")), 0.2))
    assert contents(tmp_path / "out") == before and not (tmp_path / "new").exists()

    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("ten years of work")
    with pytest.raises(DataError, match=r"not empty \(it holds thesis.tex\)"):
        run(folder, tmp_path / "other")
    with pytest.raises(DataError, match="is a file"):
        run(folder, tmp_path / "other/thesis.tex")
    assert (tmp_path / "other/thesis.tex").read_text() == "ten years of work"


def test_the_two_outputs_must_be_apart(folder, tmp_path):
    for held in ("out", "out/held", "."):
        with pytest.raises(DataError, match="must be two folders"):
            run(folder, tmp_path / "out", holdout=Holdout(Location(str((tmp_path / held).resolve())), 0.2))
    assert not list(tmp_path.iterdir())


def test_wrong_sizes_and_shares(folder, tmp_path):
    with pytest.raises(DataError, match=r"30 x 30 pixels do not fit the codec digits: .* multiples of 4"):
        run(folder, tmp_path / "out", "digits", size=30)
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(DataError, match=f"of {COUNT} images: both sides need at least one"):
            run(folder, tmp_path / "out", holdout=Holdout(Location(str(tmp_path / "held")), share))
    assert not list(tmp_path.iterdir())


def test_latents_beyond_the_range_of_their_dtype(folder, tmp_path):
    codec = load_codec("digits")
    weight = codec._vae.quant_conv.weight
    weight.data[0] *= 1e6
    source = find_images(str(folder))
    options = {"size": 32, "kind": "mode", "seed": 0, "batch_size": 16}
    with pytest.raises(DataError, match=r"\.png that are not finite in torch.float16"):
        encode_images(source, codec, Location(str(tmp_path / "half")), dtype="float16", **options)
    assert not (tmp_path / "half").exists()
    encode_images(source, codec, Location(str(tmp_path / "single")), dtype="float32", **options)


def test_no_more_than_a_batch_is_read_ahead(folder, tmp_path):
    source = shutil.copytree(folder / "0", tmp_path / "in")
    images = find_images(str(source)).images
    batches = load_batches(images, 32, 4)
    assert next(batches)[1].shape == (4, 3, 32, 32)
    (source / f"{images[4].key}.png").unlink()
    with pytest.raises(DataError, match=f"{images[4].key}.png"):
        next(batches)
