"""Reconstruction of the input from the upload: trained decoders, and search against the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.audit.least_squares import least_squares, with_one
from prifu_plugin.audit.preparation import WIDE, per_pixel, standardize, whiten
from prifu_plugin.device import CPU, seeded


@dataclass(frozen=True)
class Similarity:
    """How close images are to the true ones, means over images.

    Attributes:
        psnr: of each image, in dB, for values in [0, 1] (peak 1).
        ssim: 11 x 11 Gaussian window of deviation 1.5, peak 1.
    """

    psnr: float
    ssim: float


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


def similarity(found: Tensor, images: Tensor) -> Similarity:
    """Compare reconstructions with images, (N, C, H, W) in [0, 1].

    Raises:
        ImportError: if torchmetrics is missing.

    Example:
        >>> x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> similarity((x + 0.1).clamp(0, 1), x).psnr > 19
        True
    """
    found = found.clamp(0, 1)
    window = min(11, images.shape[-1] // 2 * 2 - 1, images.shape[-2] // 2 * 2 - 1)
    ssim = _ssim()(found, images, data_range=1.0, sigma=1.5 * window / 11, kernel_size=window)
    return Similarity(_psnr(found, images), float(ssim))


def _psnr(found: Tensor, images: Tensor) -> float:
    error = (found.clamp(0, 1) - images).square().flatten(1).mean(1).clamp_min(1e-10)
    return float(-10 * error.log10().mean())


def _dissimilarity(found: Tensor, images: Tensor) -> Tensor:
    window = min(7, images.shape[-1] // 2 * 2 - 1, images.shape[-2] // 2 * 2 - 1)
    ssim = _ssim()(found, images, data_range=1.0, sigma=1.0, kernel_size=window)
    loss: Tensor = 1 - ssim + F.l1_loss(found, images)
    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared error": F.mse_loss,
    "absolute error": F.l1_loss,
    "structure": _dissimilarity,
}


def _ssim() -> Any:
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("SSIM needs torchmetrics: pip install 'prifu_plugin[audit]'") from error
    return structural_similarity_index_measure


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
    z, images = train
    z_test, images_test = test
    mean = images.mean(0, keepdim=True)
    found: dict[str, Similarity] = {}
    best, highest = images_test, -math.inf
    attacks = [(name, name, (z, choose[0], z_test)) for name in losses]
    if z[0].numel() <= WIDE and z[0].numel() * images[0].numel() <= MOST_WEIGHTS:
        attacks = [(LINEAR, LINEAR, (z, choose[0], z_test)), *attacks]
    if repeated is not None:
        means = (repeated[0], repeated[1], repeated[2])
        attacks.append((f"{losses[0]}, mean of repeated queries", losses[0], means))
    for label, name, (seen, seen_choosing, seen_test) in tqdm(
        attacks, desc="decoders", leave=False, disable=None
    ):
        parts = (seen, images), (seen_choosing, choose[1])
        if name == LINEAR:
            decode = _linear_decoder(*parts)
        else:
            decode = _decoder_of(*parts, LOSSES[name], seed, steps, device)
        decoded = decode(seen_test)
        found[label] = similarity(decoded, images_test)
        known = _psnr(decode(seen_choosing), choose[1])
        if known > highest:
            best, highest = decoded, known
    search = search_floor = None
    if edge is not None:
        some = torch.randperm(len(z_test), generator=torch.Generator().manual_seed(seed))[:16]
        tolerance = _tolerance(edge, z, (choose[0][:8], choose[1][:8]), mean, seed)
        searched = _search(edge, z, z_test[some], mean, seed, tolerance)
        search = similarity(searched, images_test[some])
        search_floor = similarity(mean.expand_as(searched), images_test[some])
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


LINEAR = "least squares"
"""The decoder that needs no training, and few images."""
MOST_WEIGHTS = 30_000_000
"""Of that decoder: what is linear in larger uploads is left to convolutions."""


def _linear_decoder(
    train: tuple[Tensor, Tensor], choose: tuple[Tensor, Tensor]
) -> Callable[[Tensor], Tensor]:
    """Fit a linear map from whitened uploads to images, with the best of five penalties."""
    (z, images), shape = train, train[1].shape[1:]
    prepare = _vectors(z)
    fits = least_squares(prepare(z), images.flatten(1).double())
    known = with_one(prepare(choose[0]))
    wanted = choose[1].flatten(1).double()
    best = min(fits, key=lambda weight: float((known @ weight - wanted).square().mean()))
    return lambda asked: (with_one(prepare(asked)) @ best).float().unflatten(1, shape)


def _decoder_of(
    train: tuple[Tensor, Tensor],
    choose: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
    steps: int,
    device: torch.device,
) -> Callable[[Tensor], Tensor]:
    """Train a decoder from whitened vectors or standardized maps to images.

    Of its training, the moment counts at which it was best on images to choose by.
    """
    z, images = train
    prepare = _per_channel(z) if z.ndim == 4 and z.shape[-1] > 1 else _vectors(z)
    x = prepare(z)
    if not x[0].numel():  # constant uploads: the mean image is all there is to know
        return lambda asked: images.mean(0).expand(len(asked), -1, -1, -1)
    with seeded(seed, device), torch.enable_grad():
        net = decoder(x.shape[1:], tuple(images.shape[1:])).to(device)
        size = min(64, len(x))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        best: tuple[float, dict[str, Tensor]] = (-math.inf, {})
        for step in range(1, steps + 1):
            net.train()
            batch = torch.randperm(len(x))[:size]
            optimizer.zero_grad()
            loss(net(x[batch].to(device)), images[batch].to(device)).backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // LOOKS) == 0 or step == steps:
                value = _psnr(_decoded(net, prepare(choose[0]), device), choose[1])
                if value > best[0]:
                    best = value, {key: value.clone() for key, value in net.state_dict().items()}
        net.load_state_dict(best[1] or net.state_dict())
    return lambda asked: _decoded(net, prepare(asked), device)


LOOKS = 10
"""How often the training of a decoder is judged: with few images it soon learns them by heart."""


def _decoded(net: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    net.eval()
    with torch.no_grad():
        return torch.cat([net(part.to(device)).cpu() for part in x.split(250)])


def decoder(shape: torch.Size, image: tuple[int, ...]) -> nn.Module:
    """Build a decoder that doubles a map, the given one or an eighth of the image, to its size.

    Args:
        shape: of one upload, (C,) or (C, H, W); (C, T, 1) are tokens.
        image: of one image, (C, H, W); what is decoded is in [0, 1].
    """
    channels, height, width = image
    start = shape[1:] if len(shape) == 3 else (-(-height // 8), -(-width // 8))
    width_in = shape[0] if len(shape) == 3 else 64
    layers: list[nn.Module] = []
    if len(shape) == 3 and shape[1] > shape[2] == 1:  # tokens, whose places it has to learn
        start, width_in = (-(-height // 8), -(-width // 8)), 64
        layers += [nn.Conv2d(shape[0], 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(2)]
        layers += [nn.Linear(shape[1], math.prod(start)), nn.Unflatten(2, start)]
    if len(shape) == 1:
        layers += [nn.Linear(shape[0], 64 * math.prod(start)), nn.Unflatten(1, (64, *start))]
    layers += [nn.Conv2d(width_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    size, inner = start[0], 64
    while size < height:
        outer = max(16, inner // 2)
        # Each position makes four: cheaper than a convolution at the larger size.
        layers += [nn.Conv2d(inner, 4 * outer, 3, padding=1), nn.PixelShuffle(2)]
        layers += [nn.BatchNorm2d(outer), nn.ReLU()]
        size, inner = 2 * size, outer
    layers += [nn.Upsample((height, width), mode="bilinear")]
    layers += [nn.Conv2d(inner, channels, 3, padding=1), nn.Sigmoid()]
    return nn.Sequential(*layers)


def _vectors(z: Tensor) -> Callable[[Tensor], Tensor]:
    fitted = whiten(z.flatten(1)) if z[0].numel() <= WIDE else standardize(z.flatten(1))
    return lambda x: fitted(x.flatten(1))


def _per_channel(z: Tensor) -> Callable[[Tensor], Tensor]:
    # Constant channels go: the rounding left in them, divided by almost nothing, drowns the rest.
    return per_pixel(standardize(z.movedim(1, -1).flatten(0, -2)))


def _tolerance(
    edge: Callable[[Tensor], Tensor],
    z: Tensor,
    known: tuple[Tensor, Tensor],
    mean: Tensor,
    seed: int,
) -> float:
    """Choose on images the attacker has which directions count: below are rounding and noise."""
    found = {
        tolerance: similarity(_search(edge, z, known[0], mean, seed, tolerance), known[1]).psnr
        for tolerance in (1e-3, 1e-2, 1e-1)
    }
    return max(found, key=lambda tolerance: found[tolerance])


def _search(
    edge: Callable[[Tensor], Tensor],
    z: Tensor,
    target: Tensor,
    mean: Tensor,
    seed: int,
    tolerance: float,
) -> Tensor:
    """Find images whose whitened uploads are near, and that have little total variation."""
    # Directions that images hardly reach would drown the others in their gradients.
    flat = z.flatten(1)
    direct = whiten(flat, tolerance=tolerance) if flat.shape[1] <= WIDE else standardize(flat)

    def fitted(x: Tensor) -> Tensor:
        return direct(x.flatten(1))

    goal = fitted(target)
    if not goal.numel():
        return mean.expand(len(target), -1, -1, -1)
    generator = torch.Generator().manual_seed(seed)
    start = mean.expand(len(target), -1, -1, -1)
    start = start + 0.05 * torch.randn(start.shape, generator=generator)
    raw = torch.logit(start.clamp(0.02, 0.98)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    with torch.enable_grad():
        for _ in range(200):
            optimizer.zero_grad()
            images = raw.sigmoid()
            distance = (fitted(edge(images)) - goal).square().mean()
            rough = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
            # Not backward(), which would leave gradients on the edge's parameters.
            (raw.grad,) = torch.autograd.grad(distance + 0.05 * rough, raw)
            optimizer.step()
    return raw.detach().sigmoid()


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
