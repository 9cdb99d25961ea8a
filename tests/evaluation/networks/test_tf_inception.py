"""Inception with random weights against an independent description of the graph, and loading of its weights."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_scale.errors import DataError
from rdm_scale.evaluation.networks.tf_inception import InceptionFeatures, TFInception

State = dict[str, Tensor]
# The graph of 2015 by its convolutions: kernels and strides are read off the weights' shapes, but for strides and for
# the padding VALID. A branch is a chain of names; "avg", "max" and "reduce" are its pools.
MIXED_A = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "avg branch_pool")
MIXED_B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "reduce")
SEVENS = " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
MIXED_C = ("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3", SEVENS, "avg branch_pool")
MIXED_D = ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "reduce")
MIXED_E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a",
    "branch3x3_1 branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
    "{pool} branch_pool",
)
GRAPH = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), MIXED_A),
    "Mixed_6a": MIXED_B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), MIXED_C),
    "Mixed_7a": MIXED_D,
    "Mixed_7b": tuple(branch.format(pool="avg") for branch in MIXED_E),
    "Mixed_7c": tuple(branch.format(pool="max") for branch in MIXED_E),
}


def pool(x: Tensor, kind: str) -> Tensor:
    if kind == "reduce":
        return F.max_pool2d(x, 3, 2)
    if kind == "max":
        return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 1)
    window = torch.ones(x.shape[1], 1, 3, 3)
    sums, counts = (F.conv2d(v, window, padding=1, groups=x.shape[1]) for v in (x, torch.ones_like(x)))
    return sums / counts  # TensorFlow divides by the pixels within the image


def convolve(state: State, name: str, x: Tensor, stride: int, valid: bool) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    padding = (0, 0) if valid else (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(x, weight, None, stride, padding)
    mean, variance, scale, shift = (
        state[f"{name}.bn.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((y - mean) / (variance + 0.001).sqrt() * scale + shift).relu()


def chain(state: State, module: str, names: str, x: Tensor) -> Tensor:
    for name in names.split():
        if name in ("avg", "max", "reduce"):
            x = pool(x, name)
        else:
            name, _, stride = name.partition("/")
            x = convolve(state, f"{module}.{name}", x, int(stride or 1), valid=bool(stride))
    return x


def described(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features, and the first seven channels of the first branch of Mixed_6d."""
    for name, stride, valid in (("Conv2d_1a_3x3", 2, True), ("Conv2d_2a_3x3", 1, True), ("Conv2d_2b_3x3", 1, False)):
        x = convolve(state, name, x, stride, valid)
    x = convolve(state, "Conv2d_3b_1x1", pool(x, "reduce"), 1, True)
    x = pool(convolve(state, "Conv2d_4a_3x3", x, 1, True), "reduce")
    spatial = torch.empty(0)
    for module, branches in GRAPH.items():
        if module == "Mixed_6d":
            spatial = chain(state, module, branches[0], x)[:, :7]
        x = torch.cat([chain(state, module, branch, x) for branch in branches], 1)
    return x.mean((2, 3)), spatial


@pytest.fixture(scope="module")
def random_network() -> TFInception:
    torch.manual_seed(0)
    network = TFInception().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.uniform_(-0.2, 0.4)
    return network


def test_the_forward_is_that_of_the_graph(random_network: TFInception) -> None:
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = random_network(images)
    pooled, spatial = described(random_network.state_dict(), images)
    assert spatial.shape == (1, 7, 17, 17) and found.spatial.shape == (1, 2023) and found.pooled.shape == (1, 2048)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.spatial, spatial.permute(0, 2, 3, 1).reshape(1, -1), rtol=1e-3, atol=1e-4)


def test_logits_of_the_inception_score_have_no_bias(random_network: TFInception, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(random_network.state_dict(), file)
    features = InceptionFeatures(str(file))
    assert features.identity.name.startswith("inception-") and features.identity.name != "inception-2015-12-05"
    found = features.extract(torch.full((1, 1, 20, 20, 3), 7, dtype=torch.uint8))
    expected = random_network(torch.full((1, 3, 299, 299), (7 - 128) / 128))
    torch.testing.assert_close(found.pooled, expected.pooled)
    assert found.logits is not None
    torch.testing.assert_close(found.logits, found.pooled @ random_network.fc.weight.T)


def test_the_published_file_is_recognized_by_its_sha256(
    random_network: TFInception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"  # a name proves nothing
    torch.save(random_network.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert InceptionFeatures(str(file)).identity.name == f"inception-{digest[:8]}"
    monkeypatch.setattr("rdm_scale.evaluation.networks.tf_inception.KNOWN_SHA256", digest[:8])
    assert InceptionFeatures(str(file)).identity.name == "inception-2015-12-05"


def test_torchscript_with_the_same_names_is_read(random_network: TFInception, tmp_path: Path) -> None:
    """Only its tensors: this one has 1 of the 94 x 5 + 2, and the others are missing."""

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Conv2d_1a_3x3 = torch.nn.Module()
            self.Conv2d_1a_3x3.conv = random_network.Conv2d_1a_3x3.conv

    content = io.BytesIO()
    torch.jit.save(torch.jit.script(Holder()), content)
    (tmp_path / "weights.pt").write_bytes(content.getvalue())
    with pytest.raises(DataError, match=r"471 \(Conv2d_1a_3x3.bn.bias, ...\) missing, none unknown"):
        InceptionFeatures(str(tmp_path / "weights.pt"))


def test_features_are_those_of_torch_fidelity(random_network: TFInception, tmp_path: Path) -> None:
    """Resizing included, with the same random weights."""
    pytest.importorskip("torchvision", reason="torch-fidelity needs torchvision, which is not installed")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="it is not installed")
    file = tmp_path / "weights.pth"
    torch.save(random_network.state_dict(), file)
    names = ["2048", "logits_unbiased"]
    theirs = fidelity.FeatureExtractorInceptionV3("theirs", names, feature_extractor_weights_path=str(file))
    images = torch.randint(0, 256, (2, 40, 57, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pooled, logits = theirs(images.permute(0, 3, 1, 2))
    found = InceptionFeatures(str(file)).extract(images[:, None])
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-6)
