"""audit: what does an upload still tell an attacker who knows everything but the input?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.audit.data import AuditData
from prifu_plugin.audit.disjoint import split_off
from prifu_plugin.audit.facts import facts_of
from prifu_plugin.audit.inference import MANY, Prepared, prepare
from prifu_plugin.audit.judge import Evidence, judge
from prifu_plugin.audit.preparation import WIDE, channel_dims, is_spatial
from prifu_plugin.audit.reconstruction import Reconstruction
from prifu_plugin.audit.request import References, Request, requested
from prifu_plugin.audit.result import AuditReport
from prifu_plugin.audit.sending import Sent, arrived, rebuilt, send
from prifu_plugin.audit.statistics import Interval, mean_interval
from prifu_plugin.channel import Channel
from prifu_plugin.device import device_of, seeded


def audit(
    edge: nn.Module,
    train: AuditData,
    test: AuditData,
    *,
    task: str,
    attributes: Sequence[str],
    cloud: nn.Module | None = None,
    channel: Channel | None = None,
    references: References | None = None,
    suite: str = "standard",
    seeds: int = 2,
    queries: int = 16,
    reconstruct: bool | Sequence[str] = True,
    name: str = "edge",
    seed: int = 0,
) -> AuditReport:
    """Attack uploads with a suite, and report the strongest beside floors and ceilings.

    Networks of the attacker train where the edge is, all else is computed on the CPU.
    The attacker has the edge, its masks, codec and noise, and labelled training data, and trains
    on the defended uploads (Algorithm 1 of the paper). Every statement is empirical: a stronger
    attacker may read more.

    Args:
        edge: images -> uploads, in eval mode; from `prifu_plugin.split`.
        train: what attackers are trained and chosen on (a quarter is for choosing).
        test: what they are judged on; shares no image with train.
        task: name of the label the model serves.
        attributes: names of private labels.
        cloud: what arrives -> the task's logits: gives the utility and the task-only floor.
        channel: what uploads pass through.
        references: other edges to compare with, or what `audit` said of them on the same data:
            "plain" (the undefended model: leaks are measured against it) and "untrained". The
            images themselves are attacked too, unless one of the reports tells what came of it;
            any report on the same data may be given as "input" for that.
        suite: "standard"; "full" adds nearest neighbours and trees on every preparation, raw and
            ranked values of maps, and a decoder on the mean of repeated queries; "quick" is a look.
        seeds: of the attacks: the first chooses the strongest attacker, each of the others trains
            it anew, and their mean is reported.
        queries: how often an attacker may ask a noisy or rounding edge about the same image, a
            little varied, to average the answers; 1 for an attacker who sees what one person
            uploads once.
        reconstruct: also reconstruct images, which must be in [0, 1]; True trains a decoder on each
            loss, names choose among "squared error", "absolute error", "structure".
        name: of what is audited, for the report.
        seed: of splits and bootstraps, and the first of the attacks.

    Returns:
        The report.

    Raises:
        ConfigError: for labels or images that do not fit.
        OrderError: if the edge is in train mode.
        ImportError: if a package of the suite is missing; the message names it.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> x, s = torch.rand(600, 1, 8, 8, generator=g), torch.arange(600) % 2
        >>> x[s == 1] += 0.2
        >>> data = AuditData(x, {"task": (x.mean((1, 2, 3)) * 9).long() % 2, "bright": s})
        >>> parts = data.at(torch.arange(400)), data.at(torch.arange(400, 600))
        >>> found = audit(nn.Flatten().eval(), *parts, task="task", attributes=["bright"],
        ...               suite="quick", seeds=1, reconstruct=False)
        >>> found.attributes[0].accuracy.value > 0.95
        True
    """
    return _attacked(
        requested(
            edge=edge,
            train=train,
            test=test,
            task=task,
            attributes=attributes,
            cloud=cloud,
            channel=channel,
            references=references,
            suite=suite,
            seeds=seeds,
            queries=queries,
            reconstruct=reconstruct,
            name=name,
            seed=seed,
        )
    )


def _attacked(asked: Request) -> AuditReport:
    parts = (*split_off(asked.train, 0.25, asked.seed, asked.labels), asked.test)
    device = device_of(asked.edge)
    with torch.inference_mode(False):
        with seeded(asked.seed, device):  # of noise that edges draw
            sent = send(
                asked.edge,
                asked.channel,
                asked.cloud,
                parts,
                task=asked.task,
                queries=asked.queries,
                name=asked.name,
            )
            facts = facts_of(
                sent.uploads[0], asked.edge, asked.channel, asked.test.images, sent.stochastic
            )
            evidence = _evidence(asked, sent, device, constant=facts.constant == facts.values)
        bar = tqdm(asked.attributes, desc=f"attacking {asked.name}", leave=False, disable=None)
        rows = tuple(judge(label, evidence) for label in bar)
        images = None
        if asked.losses:
            with seeded(asked.seed, device):
                images = rebuilt(
                    asked.edge, asked.channel, sent, asked.suite, asked.seed, asked.losses
                )
    return AuditReport(
        name=asked.name,
        task=asked.task,
        utility=_utility(asked, sent.answers[2]),
        attributes=rows,
        upload=facts,
        reconstruction=images,
        sizes=(len(parts[0]), len(parts[1]), len(parts[2])),
        settings={**asked.settings(), **_counted(parts)},
        not_tested=_not_tested(asked, images, sent.uploads[0]),
    )


def _evidence(asked: Request, sent: Sent, device: torch.device, *, constant: bool) -> Evidence:
    """Prepare all that is attacked: uploads, their means, those of other edges, and the images."""
    uploads, repeated, others = _prepared(sent, asked, device)
    return Evidence(
        parts=sent.parts,
        answers=sent.answers,
        sent=uploads,
        repeated=repeated,
        others=others,
        reports=asked.reports,
        task=asked.task,
        constant=constant,
        seeds=asked.seeds,
        seed=asked.seed,
    )


def _prepared(
    sent: Sent, asked: Request, device: torch.device
) -> tuple[Prepared, Prepared | None, dict[str, Prepared]]:
    def ready(uploads: Iterable[Tensor], tail: nn.Module | None = None) -> Prepared:
        fitting, choosing, test = uploads
        return prepare(fitting, choosing, test, asked.suite, tail, device)

    others = {}
    for label, other in asked.references.items():
        if isinstance(other, nn.Module):
            there = (arrived(other, None, part.images, label) for part in sent.parts)
            others[label] = ready(there)
    told = (row for report in asked.reports.values() for row in report.attributes)
    known = {row.name for row in told if "input" in row.ceilings}
    if not known.issuperset(asked.attributes):
        images = (part.images.float() for part in sent.parts)
        others["input"] = ready(images)
    repeated = None if sent.means is None else ready(sent.means, asked.cloud)
    return ready(sent.uploads, asked.cloud), repeated, others


def _utility(asked: Request, answers: Tensor) -> Interval | None:
    if asked.cloud is None:
        return None
    right = (answers == asked.test.labels[asked.task]).double()
    return mean_interval(right, asked.seed, groups=asked.test.groups)


def _counted(parts: Sequence[AuditData]) -> dict[str, int]:
    """Say how many groups, which are persons mostly, test images are of."""
    groups = parts[-1].groups
    return {} if groups is None else {"test groups": len(groups.unique())}


def _not_tested(asked: Request, rebuilt: Reconstruction | None, z: Tensor) -> tuple[str, ...]:
    found = ["generative priors (GAN, diffusion)", "membership of the training set", "timing"]
    found.append("codes in exact values (a zero that moves about, the parity of the last digit)")
    if asked.test.groups is None:
        found.append("whether train and test show the same persons (no groups were given)")
    if asked.queries == 1:
        found.append("averages over repeated queries of the same image")
    if rebuilt is None:
        found.append("reconstruction")
    else:
        best = max(one.psnr for one in rebuilt.decoders.values())
        if best < rebuilt.mean_image.psnr + 0.1:
            found.append("images from decoders (they ended at the floor: no evidence)")
    if rebuilt is not None and rebuilt.search is None:
        found.append("search for images against the edge")
    elif (
        rebuilt is not None
        and rebuilt.search is not None
        and rebuilt.search.psnr < rebuilt.floor_of_search.psnr + 0.1
    ):
        found.append("search for images against the edge (it ended at the floor: no evidence)")
    if rebuilt is not None and asked.queries > 1 and asked.suite != "full":
        found.append("reconstruction from repeated queries")
    if len(channel_dims(z)) > 1 and is_spatial(z) and asked.suite != "quick":
        taken = "first" if channel_dims(z)[0] == 1 else "last"
        found.append(
            f"networks on maps {tuple(z.shape[1:])} with channels elsewhere than in the {taken} "
            "dimension, where they were taken to be"
        )
    if z[0].numel() > WIDE and z.ndim > 2:
        found.append(
            f"single values of such wide uploads ({z[0].numel()} numbers): vector attackers see "
            "their strongest components and their moments"
        )
    if z[0].numel() > MANY:
        left = "logistic regression" if asked.suite == "full" else "trees and logistic regression"
        found.append(f"{left} on more than {MANY} values")
    if asked.suite == "quick":
        found.append("the standard suite: this was a quick look")
    return tuple(found)
