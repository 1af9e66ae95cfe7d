"""From the shape of an input to others that a model might take instead."""

from __future__ import annotations

from collections.abc import Callable

Change = Callable[[tuple[int, ...]], tuple[int, ...]]
"""From one shape to another."""


def odd(more: tuple[int, int]) -> Change:
    """Return how images are skewed, with so much more in height and width."""

    def change(shape: tuple[int, ...]) -> tuple[int, ...]:
        begin = skewed(shape)
        if len(shape) != 4:
            return begin if len(shape) < 4 else (*shape[:2], *(size + 1 for size in begin[2:]))
        return *begin[:2], begin[2] + more[0], begin[3] + more[1]

    return change


def near(size: int) -> list[int]:
    """Return sizes that a dimension might have instead: smaller, larger, multiples."""
    return [other for other in (size - 1, size // 2, size + 1, size + 32, 2 * size) if other > 0]


def far_tokens(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make indices of tokens (N, L) more than twice as many."""
    return (shape[0], 2 * shape[1] + 3) if len(shape) == 2 else shape


def more_tokens(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make tokens (N, L) a few more."""
    return (shape[0], shape[1] + 3) if len(shape) == 2 else shape


def fewer_tokens(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make tokens fewer, where there are as many as a model takes: (N, L), (N, L, C)."""
    return (shape[0], max(1, shape[1] - 3), *shape[2:]) if len(shape) in (2, 3) else shape


def all_of_image(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Change all that is no batch: frames may be where images have their channels."""
    return (shape[0], shape[1] + 1, *odd((5, -5))(shape)[2:]) if len(shape) == 4 else shape


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make images (N, H, W, C) larger."""
    if len(shape) != 4:
        return shape
    return shape[0], shape[1] + 37, shape[2] + 27, shape[3]


def clips(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make clips (N, frames, C, H, W) longer, with larger images."""
    if len(shape) != 5:
        return shape
    return shape[0], shape[1] + 1, shape[2], *(size + 32 for size in shape[3:])


def far(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make sequences (N, L, C) more than twice as long: every fourth of them is one more, too."""
    return (shape[0], 2 * shape[1] + 3, shape[2]) if len(shape) == 3 else shape


def far_signals(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Do the same to signals (N, C, L)."""
    return (*shape[:2], 2 * shape[2] + 3) if len(shape) == 3 else shape


def between_signals(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make signals (N, C, L) somewhat longer."""
    return (*shape[:2], shape[2] + 7) if len(shape) == 3 else shape


def between(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make images and sequences somewhat larger, by what is no multiple of much."""
    if len(shape) == 3:
        return shape[0], shape[1] + 7, shape[2]
    return (*shape[:2], shape[2] + 21, shape[3] + 11) if len(shape) == 4 else shape


def skewed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make images larger one way and smaller, or larger, the other way."""
    if len(shape) != 4:
        return grown(shape)
    n, c, height, width = shape
    return n, c, height + 32, width - 32 if width > 63 else width + 64


def grown(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make whatever may be a length longer: all but batch and channels, or tokens (N, L, C)."""
    if len(shape) == 2:
        return shape
    if len(shape) == 3:
        return shape[0], shape[1] + 3, shape[2]
    return *shape[:2], *(size + 32 for size in shape[2:])


def framed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make the images of clips (N, frames, C, H, W) larger, whose third size is no length."""
    if len(shape) != 5:
        return shape
    return *shape[:3], *(size + 32 for size in shape[3:])


def by_patches(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make images larger by patches of 14."""
    if len(shape) != 4:
        return shape
    return *shape[:2], shape[2] + 28, shape[3] + 56


def shrunk(by: int) -> Change:
    """Return how all but batch and channels is divided, by sequences (N, L, C) their length."""

    def change(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 2:
            return shape
        lengths = shape[1:2] if len(shape) == 3 else shape[2:]
        less = tuple(max(1, size // by) for size in lengths)
        return (shape[0], *less, shape[2]) if len(shape) == 3 else (*shape[:2], *less)

    return change


def longer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Double the last size of images."""
    return (*shape[:-1], 2 * shape[-1]) if len(shape) == 4 else shape


def doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Double images and signals."""
    if len(shape) == 3:
        return *shape[:2], 2 * shape[2]
    return *shape[:2], *(2 * size for size in shape[2:])
