"""Reconstruction of the input from the upload: trained decoders, and search against the edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prifu_plugin.audit.decoders import decoded
from prifu_plugin.audit.search import searched
from prifu_plugin.audit.similarity import LOSSES, Similarity, similarity
from prifu_plugin.device import CPU


@dataclass(frozen=True)
class Reconstruction:
    """The best of the decoders by each measure, with floors.

    Attributes:
        decoders: by loss, and on what if not on single uploads.
        search: optimization against the edge, on a few images; None if not run.
        mean_image: the floor of who uploads nothing.
        task_mean: the floor of who knows the task's answer alone.
        linkage: share of test images found as nearest to their own reconstruction among all.
        chance: of that.
        images: some true images and their reconstructions, (2, n, C, H, W).
        retrieval: k -> share of test images among the k nearest to their own reconstruction.
        search_floor: what the mean image has on the images of the search.
    """

    decoders: dict[str, Similarity]
    search: Similarity | None
    mean_image: Similarity
    task_mean: Similarity
    linkage: float
    chance: float
    images: Tensor = field(repr=False, compare=False)
    retrieval: dict[int, float] = field(default_factory=dict)
    search_floor: Similarity | None = None

    @property
    def floor_of_search(self) -> Similarity:
        """The mean image on the images of the search; on all, in reports of before it was kept."""
        return self.search_floor or self.mean_image

    @property
    def best(self) -> Similarity:
        """Best PSNR and best SSIM over all attackers.

        The search sees few images: what counts of it is its gain over the mean image of those.
        """
        found = list(self.decoders.values())
        if self.search:
            mean, floor = self.mean_image, self.floor_of_search
            gain = self.search.psnr - floor.psnr, self.search.ssim - floor.ssim
            found.append(Similarity(mean.psnr + gain[0], mean.ssim + gain[1]))
        return Similarity(max(s.psnr for s in found), max(s.ssim for s in found))


def reconstruct(
    train: tuple[Tensor, Tensor],
    choose: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    answers: tuple[Tensor, Tensor],
    *,
    edge: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    steps: int = 400,
    losses: Sequence[str] = tuple(LOSSES),
    repeated: Sequence[Tensor] | None = None,
    device: torch.device = CPU,
) -> Reconstruction:
    """Attack with decoders trained on defended uploads, and by search against the edge.

    Args:
        train: uploads (N, ...) and images (N, C, H, W) in [0, 1], to train decoders on.
        choose: the same, on which the decoder is chosen that shows, links and retrieves.
        test: the same, to judge on.
        answers: the task's answers, of both, for the floor.
        edge: differentiable, images -> uploads, for the search; None leaves it out.
        seed: of the decoders.
        steps: of each decoder's training.
        losses: which decoders to train, by names in `LOSSES`; a linear one is fitted too.
        repeated: means of the uploads of repeated queries, for `train`, `choose` and `test`; the
            first loss also trains a decoder on them.
        device: where decoders train.
    """
    images, (z_test, images_test) = train[1], test
    mean = images.mean(0, keepdim=True)
    found, best = decoded(
        train,
        choose,
        test,
        losses=losses,
        repeated=repeated,
        seed=seed,
        steps=steps,
        device=device,
    )
    search = search_floor = None
    if edge is not None:
        some = torch.randperm(len(z_test), generator=torch.Generator().manual_seed(seed))[:16]
        few = choose[0][:8], choose[1][:8]
        made = searched(edge, train[0], few, z_test[some], mean, seed)
        search = similarity(made, images_test[some])
        search_floor = similarity(mean.expand_as(made), images_test[some])
    retrieved = _retrieval(best, images_test)
    return Reconstruction(
        found,
        search,
        similarity(mean.expand_as(images_test), images_test),
        similarity(_task_means(images, *answers), images_test),
        retrieved[1],
        1 / len(images_test),
        torch.stack([images_test[:8], best[:8].clamp(0, 1)]),
        retrieved,
        search_floor,
    )


def _task_means(images: Tensor, answers: Tensor, asked: Tensor) -> Tensor:
    means = images.mean(0).repeat(int(max(answers.max(), asked.max())) + 1, 1, 1, 1)
    for answer in answers.unique().tolist():
        means[answer] = images[answers == answer].mean(0)
    return means[asked]


def _retrieval(found: Tensor, images: Tensor) -> dict[int, float]:
    """Return how often the true image is among the 1, 5, 10 nearest to its reconstruction."""
    a, b = found.flatten(1), images.flatten(1)
    distance = torch.cat([torch.cdist(part, b) for part in a.split(250)])
    nearer = (distance < distance.diagonal()[:, None]).sum(1)
    return {k: float((nearer < k).double().mean()) for k in (1, 5, 10) if k <= len(b)}
