"""A quick attribute-inference attack (Algorithm 1 of the paper) and its floors.

The attacker has the extractor, labelled training data and the uploaded features; it knows the
defence and trains on defended features. Pre-processing is part of the attack: a filter scales
information down, and whitening scales it up again. This is a first look, not an audit: a weak
result of a quick attacker proves nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Part = tuple[Tensor, Tensor]
"""Features (N, D) and private labels (N,), integers."""


@dataclass(frozen=True)
class AttackResult:
    """The attacker that was best on validation data, and what it reaches on test data.

    Attributes:
        accuracy: of that attacker on test data.
        winner: its pre-processing and classifier.
        majority: accuracy of the most frequent training label on test data, the lowest floor.
    """

    accuracy: float
    winner: str
    majority: float


def quick_attack(train: Part, validation: Part, test: Part, *, seed: int = 0) -> AttackResult:
    """Attack with {standardized, PCA-whitened} x {logistic regression, MLP}.

    Args:
        train: what the attackers are fitted on.
        validation: what chooses among them.
        test: what the choice is judged on; disjoint from both.
        seed: of the MLPs.

    Returns:
        The chosen attacker's result.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> import torch
        >>> s = torch.arange(120) % 2
        >>> z = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)) + 9 * s[:, None]
        >>> quick_attack((z[:60], s[:60]), (z[60:90], s[60:90]), (z[90:], s[90:])).accuracy
        1.0
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_selection import VarianceThreshold
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "The attack needs scikit-learn: pip install 'prifu_plugin[audit]'"
        ) from error
    (x, y), (x_val, y_val), (x_test, y_test) = (
        (z.double().flatten(1).numpy(), s.numpy()) for z, s in (train, validation, test)
    )
    # More components than the spread of the data supports are rounding errors.
    rank = max(1, int(np.linalg.matrix_rank(x - x.mean(0), rtol=1e-7)))
    preparations: dict[str, list[Any]] = {
        "standardized": [VarianceThreshold(), StandardScaler()],
        "whitened": [VarianceThreshold(), PCA(min(rank, len(x) - 1), whiten=True)],
    }
    classifiers: dict[str, Any] = {
        "logistic regression": lambda: LogisticRegression(C=0.1, max_iter=300),
        "MLP": lambda: MLPClassifier((128,), alpha=1e-2, max_iter=60, random_state=seed),
    }
    best = (-1.0, 0.0, "")
    for preparation, steps in preparations.items():
        for name, classifier in classifiers.items():
            attacker = make_pipeline(*steps, classifier())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                attacker.fit(x, y)
            score = float(attacker.score(x_val, y_val))
            if score > best[0]:
                best = (score, float(attacker.score(x_test, y_test)), f"{preparation} {name}")
    majority = float((y_test == np.bincount(y).argmax()).mean())
    return AttackResult(best[1], best[2], majority)


def task_floor(train: Part, test: Part) -> float:
    """Return what the task's own prediction gives away: the most frequent label for each class.

    Args:
        train: predicted task class (N,) and private label (N,).
        test: the same of test data.

    Returns:
        Accuracy on test data; an attack is worth something only above it.

    Example:
        >>> import torch
        >>> odd, digit = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 3, 5])
        >>> task_floor((odd, digit), (odd, digit))
        0.75
    """
    predicted, private = train[0].numpy(), train[1].numpy()
    fallback = np.bincount(private).argmax()
    guess = {c: np.bincount(private[predicted == c]).argmax() for c in np.unique(predicted)}
    guesses = np.array([guess.get(c, fallback) for c in test[0].numpy()])
    return float((guesses == test[1].numpy()).mean())
