"""Measures of features against values that are known exactly, or from another computation."""

import numpy as np
import pytest
import torch

from rdm_scale.errors import DataError
from rdm_scale.evaluation.feature_moments import FeatureMoments, Gaussian
from rdm_scale.evaluation.measures import (
    expected_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    share_inside,
)


def gaussian_of(features: np.ndarray) -> Gaussian:
    moments = FeatureMoments(features.shape[1])
    moments.add(torch.from_numpy(features))
    return moments.gaussian()


def random_features() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(0)
    x = draw.randn(500, 64) @ draw.randn(64, 64)
    return x, draw.randn(400, 64) @ draw.randn(64, 64) + 0.3


def test_the_distance_of_diagonal_gaussians() -> None:
    """1 + 4 + 9 from the means, and (1 - 2)^2 + (2 - 1)^2 + (3 - 3)^2 from the standard deviations."""
    first = Gaussian(np.array([1.0, 2, 3]), np.diag([1.0, 4, 9]))
    second = Gaussian(np.zeros(3), np.diag([4.0, 1, 9]))
    assert frechet_distance(first, second) == pytest.approx(16, abs=1e-12)


def test_the_distance_of_random_features() -> None:
    x, y = random_features()
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(2222.56395867, abs=1e-7)


def test_a_set_has_no_distance_from_itself_with_fewer_samples_than_features() -> None:
    x = random_features()[0][:20]
    assert frechet_distance(gaussian_of(x), gaussian_of(x)) < 1e-9


@pytest.mark.parametrize("samples", [512, 2048, 8192])
def test_the_expected_bias_is_that_of_gaussian_samples(samples: int) -> None:
    d = 64
    exact = Gaussian(np.zeros(d), np.eye(d))
    expected = d / samples + d * (d + 1) / (4 * samples)
    assert expected_bias(exact.covariance, samples) == pytest.approx(expected, rel=1e-12)
    draw = np.random.default_rng(samples)
    found = [frechet_distance(gaussian_of(draw.standard_normal((samples, d))), exact) for _ in range(6)]
    # The mean of six draws varies by about 2 %; terms of higher order add some d/4N of it.
    assert np.mean(found) == pytest.approx(expected, rel=0.06 + d / samples / 2)


def test_two_finite_sets_add_their_biases() -> None:
    covariance = np.diag([4.0, 1.0, 0.0])
    # By hand: tr S = 5; (1/2) (2 * 16/8 + 2 * 1/2 + 2 * 4/5) = 3.3.
    assert expected_bias(covariance, 10, 40) == pytest.approx(8.3 * (1 / 10 + 1 / 40))
    assert expected_bias(np.zeros((3, 3)), 10) == 0


def test_inception_scores_that_are_known() -> None:
    labels = np.arange(1000) % 10
    one_hot = np.eye(10)[labels]
    assert inception_score(one_hot).mean == pytest.approx(10)
    assert inception_score(np.full((1000, 10), 0.1)).mean == pytest.approx(1)
    likely = np.where(one_hot == 1, 0.7, 0.3 / 9)
    assert inception_score(likely).mean == pytest.approx(2.80822727, abs=1e-8)


def test_splits_of_samples_in_class_order_are_shuffled_by_key() -> None:
    ordered = np.eye(10)[np.repeat(np.arange(10), 100)]
    score = inception_score(ordered, splits=10)
    assert 9 < score.mean < 10 and score.std > 0  # without a shuffle each split holds one class, and scores 1
    assert inception_score(ordered, splits=10) == score
    assert inception_score(ordered, splits=10, seed=1) != score
    with pytest.raises(DataError, match="10 splits needs at least as many samples, not 9"):
        inception_score(ordered[:9], splits=10)


def precision_and_recall(real: np.ndarray, generated: np.ndarray, half: bool = False) -> tuple[float, float]:
    return (
        share_inside(generated, real, half_precision=half),
        share_inside(real, generated, half_precision=half),
    )


@pytest.mark.parametrize("half", [False, True])
def test_precision_and_recall_on_a_line(half: bool) -> None:
    real = np.arange(10.0)[:, None]
    generated = np.array([2.5, 4, 20, 21, 22])[:, None]
    assert precision_and_recall(real, generated, half) == pytest.approx((0.4, 1.0))
    assert precision_and_recall(generated, real, half) == pytest.approx((1.0, 0.4))
    with pytest.raises(DataError, match="more than 3 samples of each set, not 3"):
        share_inside(generated, real[:3], half_precision=half)


def test_half_precision_falls_back_where_it_overflows() -> None:
    """As ADM's evaluator does: squares above 65,504 are not finite in float16."""
    real, generated = np.arange(0.0, 4000, 400)[:, None], np.array([1000.0, 1600, 8000, 8400, 8800])[:, None]
    assert precision_and_recall(real, generated, half=True) == pytest.approx((0.4, 1.0))


def test_precision_and_recall_in_blocks_are_those_of_all_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(n, 3, generator=draw, dtype=torch.float64) + n / 4000 for n in (2100, 300))

    def share(points: torch.Tensor, centers: torch.Tensor) -> float:
        radii = torch.cdist(centers, centers).topk(4, largest=False).values[:, 3]
        return float((torch.cdist(points, centers) <= radii).any(1).double().mean())

    found = precision_and_recall(real.numpy(), generated.numpy())
    assert found == pytest.approx((share(generated, real), share(real, generated)))


def test_the_kernel_distance_is_unbiased() -> None:
    """Against the estimator written out in sums over pairs, and near 0 for samples of one distribution."""
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((30, 4)), draw.standard_normal((30, 4)) + 1
    kernel = lambda a, b: (a @ b / 4 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(30) for j in range(30)]
    within = np.mean([kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j]) * 2
    across = np.mean([kernel(x[i], y[j]) for i, j in pairs])
    assert kernel_distance(x, y).mean == pytest.approx(within - 2 * across, rel=1e-12)
    same = kernel_distance(draw.standard_normal((400, 4)), draw.standard_normal((300, 4)), subsets=50, subset_size=100)
    assert abs(same.mean) < 0.1 < kernel_distance(x, y).mean
    assert same.std > 0
    with pytest.raises(DataError, match="at least 2 real"):
        kernel_distance(x[:1], y)


@pytest.mark.full  # importing torchmetrics takes longer than all tests of this file
def test_measures_agree_with_torchmetrics_on_the_same_features() -> None:
    """Its networks are replaced by one that returns what it is given."""
    pytest.importorskip("torchmetrics", reason="torchmetrics, of the group test, is not installed")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(torch.nn.Module):
        num_features = 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(len(x), -1)[:, :16]

    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((300, 16)), draw.standard_normal((300, 16)) * 1.5 + 0.2
    distance = FrechetInceptionDistance(Given(), normalize=True, input_img_size=(1, 4, 4)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(Given(), subsets=1, subset_size=300)
    score = InceptionScore(Given(), splits=1)
    for features, real in ((x, True), (y, False)):
        images = torch.from_numpy(features).view(-1, 1, 4, 4)
        distance.update(images, real=real)
        kernel.update(images, real=real)
    score.update(torch.from_numpy(y).view(-1, 1, 4, 4))
    assert float(distance.compute()) == pytest.approx(frechet_distance(gaussian_of(x), gaussian_of(y)), rel=1e-6)
    assert float(kernel.compute()[0]) == pytest.approx(kernel_distance(x, y).mean, rel=1e-4)
    probabilities = torch.from_numpy(y).softmax(1).numpy()
    assert float(score.compute()[0]) == pytest.approx(inception_score(probabilities).mean, rel=1e-5)
