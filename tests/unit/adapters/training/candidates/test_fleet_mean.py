"""Regressions over the groups of a fleet against ones that are fitted again without a group."""

# G groups · N rows · J features · C outputs
import torch

from adapters.training.candidates.fleet_mean import ClusterModel, CommonModel, GroupRows, fit_clusters, fit_mean
from adapters.training.candidates.scores import Scores
from adapters.training.settings import Loss

SCORES = Scores(Loss.CROSS_ENTROPY)


def make_rows(groups: int, kinds: int) -> GroupRows:
    """Return groups of 12 rows whose classes are renamed in as many ways as there are kinds."""
    generator = torch.Generator().manual_seed(3)
    phi_GNJ = torch.randn(groups, 12, 6, generator=generator, dtype=torch.float64)
    truth_JC = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    classes_GN = (phi_GNJ @ truth_JC).argmax(-1)
    renamed = torch.stack([torch.randperm(4, generator=generator) for _ in range(kinds)])
    classes_GN = renamed[torch.arange(groups) % kinds].gather(1, classes_GN)
    weights_GN = torch.rand(groups, 12, generator=generator, dtype=torch.float64) + 0.5
    base_GNC = torch.randn(groups, 12, 4, generator=generator, dtype=torch.float64)
    return GroupRows(torch.arange(groups), phi_GNJ, base_GNC, SCORES.wide(classes_GN, 4), weights_GN)


def test_mean_without_a_group() -> None:
    rows = make_rows(8, 1)
    mean = fit_mean(lambda: [rows], SCORES, 8)
    change_GNC, theta_GJC = mean.changes(rows, SCORES), mean.thetas(rows, SCORES)
    residuals_GNC = SCORES.residuals(rows.base_GNC, rows.y_GNC)
    for group in range(8):
        others = [other for other in range(8) if other != group]
        phi_NJ, weights_N1 = rows.features_GNJ[others].flatten(0, 1), rows.weights_GN[others].flatten()[:, None]
        gram_JJ = phi_NJ.T @ (weights_N1 * phi_NJ) + mean.ridge * torch.eye(6, dtype=torch.float64)
        theta_JC = torch.linalg.solve(gram_JJ, phi_NJ.T @ (weights_N1 * residuals_GNC[others].flatten(0, 1)))
        assert (theta_GJC[group] - mean.step * theta_JC).abs().max() < 1e-9
        assert (change_GNC[group] - mean.step * rows.features_GNJ[group] @ theta_JC).abs().max() < 1e-9


def test_clusters_of_others() -> None:
    rows = make_rows(60, 3)
    mean = fit_mean(lambda: [rows], SCORES, 60)
    clusters = fit_clusters(lambda: [rows], SCORES, 60, mean, seed=0)
    assert clusters
    for cluster in clusters:
        for part, model in enumerate(cluster.models):
            # No group helps to form the clusters that it may take.
            assert not model.is_member[cluster.part_of == part].any()
    models: list[CommonModel | ClusterModel] = [mean, *clusters]
    losses = [SCORES.losses(rows.base_GNC + model.changes(rows, SCORES), rows.y_GNC).mean(1) for model in models]
    # The best cluster of a group fits its rows much better than the mean of all does.
    assert torch.stack(losses[1:]).amin(0).mean() < 0.8 * losses[0].mean()


def test_few_groups_have_no_clusters() -> None:
    rows = make_rows(8, 2)
    mean = fit_mean(lambda: [rows], SCORES, 8)
    assert fit_clusters(lambda: [rows], SCORES, 8, mean, seed=0) == []
