"""Classifiers an attacker trains on prepared uploads, each tuned on validation data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.audit.least_squares import least_squares, with_one
from prifu_plugin.audit.statistics import area
from prifu_plugin.audit.tail import repurposed
from prifu_plugin.device import CPU, seeded

Classifier = Callable[[Tensor], Tensor]
"""Prepared uploads -> logarithms of class probabilities, (N, K)."""


RARE = 0.8
"""Share of one class above which attackers are chosen by AUC: always naming it is no attack."""


@dataclass(frozen=True)
class Fitted:
    """A trained attacker.

    Attributes:
        classify: prepared uploads -> log-probabilities.
        converged: False if validation accuracy was still rising when training ended.
    """

    classify: Classifier
    converged: bool = True


@dataclass(frozen=True)
class Sample:
    """Prepared uploads and private labels, of training and of validation data; networks' device."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    classes: int
    device: torch.device = CPU

    def score(self, classify: Classifier) -> float:
        """Return the accuracy on validation data, or the AUC where one class is most of them."""
        return self.judged(classify)[0]

    def judged(self, classify: Classifier) -> tuple[float, float]:
        """Return `score`, and the accuracy in any case."""
        scores = classify(self.x_validation)
        accuracy = float((scores.argmax(1) == self.y_validation).double().mean())
        if self.y_validation.bincount().max() > RARE * len(self.y_validation):
            return area(scores, self.y_validation), accuracy
        return accuracy, accuracy


def ridge(sample: Sample, seed: int) -> Fitted:
    """Fit least squares to one-hot labels, with the best of five penalties."""
    target = F.one_hot(sample.y, sample.classes).double()
    fits = [_linear(weight) for weight in least_squares(sample.x, target)]
    return Fitted(max(fits, key=sample.score))


def logistic(sample: Sample, seed: int) -> Fitted:
    """Fit multinomial logistic regression by L-BFGS, with the best of three penalties."""
    x = with_one(sample.x)
    fits = []
    for penalty in (1e-4, 1e-3, 1e-2):
        weight = torch.zeros(x.shape[1], sample.classes, dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss(weight: Tensor = weight, penalty: float = penalty) -> Tensor:
            weight.grad = None
            with torch.enable_grad():
                value = F.cross_entropy(x @ weight, sample.y) + penalty * weight[1:].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        fits.append(_linear(weight.detach(), temperature=1.0))
    return Fitted(max(fits, key=sample.score))


def neighbours(sample: Sample, seed: int) -> Fitted:
    """Vote among the nearest training samples, with the best of three numbers of them."""

    def voting(count: int) -> Classifier:
        def classify(x: Tensor) -> Tensor:
            votes = []
            for part in x.split(512):
                near = torch.cdist(part, sample.x).topk(count, largest=False).indices
                votes.append(F.one_hot(sample.y[near], sample.classes).double().mean(1))
            return ((torch.cat(votes) + 1e-3) / (1 + sample.classes * 1e-3)).log()

        return classify

    counts = [k for k in (1, 5, 15) if k <= len(sample.x)]
    return Fitted(max((voting(count) for count in counts), key=sample.score))


def mlp(sample: Sample, seed: int) -> Fitted:
    """Train a perceptron of two hidden layers with batch normalization of its input."""
    width = sample.x.shape[1]

    def make() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm1d(width, affine=False),
            *(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)),
            nn.Linear(128, sample.classes),
        )

    return _train(make, sample, seed, epochs=40)


def convnet(sample: Sample, seed: int) -> Fitted:
    """Train a small convolutional network with batch normalization of its input."""
    channels, size = sample.x.shape[1], min(sample.x.shape[2:])

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def make() -> nn.Module:
        # Large maps are halved early, so that each costs about the same.
        strides = [2 if size > limit else 1 for limit in (15, 31, 63)]
        return nn.Sequential(
            nn.BatchNorm2d(channels, affine=False),
            *block(channels, 48, strides[0]),
            *block(48, 64, strides[1]),
            *block(64, 96, strides[2]),
            *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.2)),
            nn.Linear(9 * 96, sample.classes),
        )

    return _train(make, sample, seed, epochs=15)


def tail_of(cloud: nn.Module) -> Callable[[Sample, int], Fitted]:
    """Return an attacker that begins as the layers of the task behind the cut."""

    def tail(sample: Sample, seed: int) -> Fitted:
        def make() -> nn.Module:
            net = repurposed(cloud, sample.x, sample.classes)
            assert net is not None
            return net

        return _train(make, sample, seed, epochs=15)

    return tail


def boosting(sample: Sample, seed: int) -> Fitted:
    """Fit sixty gradient-boosted trees (scikit-learn) on the features that tell most.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise ImportError(
            "The standard suite needs scikit-learn: pip install 'prifu_plugin[audit]'"
        ) from error
    if len(sample.y.unique()) < 2:  # in a part of the data: there is nothing to split by
        known = F.one_hot(sample.y[:1], sample.classes).double().clamp_min(1e-6).log()
        return Fitted(lambda x: known.expand(len(x), -1))
    trees = HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=15, early_stopping=False, random_state=seed
    )
    chosen = _telling(sample.x, sample.y, 64)
    trees.fit(sample.x[:, chosen].numpy(), sample.y.numpy())
    columns = torch.as_tensor(trees.classes_)

    def classify(x: Tensor) -> Tensor:
        found = torch.full((len(x), sample.classes), 1e-6, dtype=torch.float64)
        found[:, columns] = torch.from_numpy(trees.predict_proba(x[:, chosen].numpy()))
        return found.clamp_min(1e-6).log()

    return Fitted(classify)


def _telling(x: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the features whose means differ most between the classes (the F statistic)."""
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])
    sizes = torch.stack([(y == c).sum() for c in y.unique()]).to(x)[:, None]
    between = (sizes * (means - x.mean(0)).square()).sum(0)
    within = (x - x.mean(0)).square().sum(0) - between
    order = (between / within.clamp_min(1e-12)).argsort(descending=True)
    return order[:count]


def _linear(weight: Tensor, temperature: float = 5.0) -> Classifier:
    # Least squares gives no probabilities: a fixed temperature makes usable ones.
    return lambda x: F.log_softmax(with_one(x) @ weight * temperature, 1)


def _train(make: Callable[[], nn.Module], sample: Sample, seed: int, epochs: int) -> Fitted:
    """Train with AdamW on a one-cycle schedule and keep the epoch best on validation data."""
    with seeded(seed, sample.device), torch.enable_grad():
        net = make().to(sample.device, torch.float32)  # whatever the default dtype
        size = min(64, max(8, len(sample.x) // 8))
        steps = epochs * max(1, len(sample.x) // size)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        scores: list[float] = []
        best: dict[str, Tensor] = {}
        for _ in range(epochs):
            net.train()
            order = torch.randperm(len(sample.x))
            for batch in order[: len(order) // size * size].split(size):
                optimizer.zero_grad()
                x, y = sample.x[batch].to(sample.device), sample.y[batch].to(sample.device)
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                schedule.step()
            scores.append(sample.score(_network(net, sample.device)))
            if scores[-1] >= max(scores):
                best = {key: value.clone() for key, value in net.state_dict().items()}
        net.load_state_dict(best)
    late = max(scores[-(epochs // 5) :]) - max(scores[: -(epochs // 5)])
    return Fitted(_network(net, sample.device), converged=late < 0.02)


def _network(net: nn.Module, device: torch.device) -> Classifier:
    def classify(x: Tensor) -> Tensor:
        net.eval()
        with torch.no_grad():
            logits = [net(part.to(device)).cpu() for part in x.split(1024)]
            return F.log_softmax(torch.cat(logits).double(), 1)

    return classify
