"""Which runs the comparison, the ablation, the backbones and the sweeps consist of."""

from lab.datasets import NAMED
from lab.runs import Run, run_of
from lab.scale import Scale


def comparison(scale: Scale, cut: str, data: str = "") -> list[Run]:
    """Every method by its settings, first seed first: a few each, and more forms of the filter."""
    data = data or scale["data"]
    named = NAMED[data.split(":")[0]]
    methods: list[tuple[str, dict]] = [("plain", {}), ("PriFU", {})]
    methods += [("PriFU", {"cut_filter": True, "noise": noise}) for noise in (0.1, 0.3)]
    methods += [("PriFU", {"form": "preserved"})]
    methods += [("PriFU", {"form": "preserved", "cut_filter": True, "noise": 0.3})]
    methods += [("PriFU", {"bits": 4}), ("plain", {"bits": 4})]
    methods += [("plain", {"projection": True})] if cut == "pooled" else []
    for name in ("CI", "MaxEnt-ARL", "PAN", "DISCO"):
        methods += [(name, {"named": named, "strength": strength}) for strength in (0.3, 1.0)]
    nats = (0.001, 0.003, 0.01) if cut == "pooled" else (0.00003, 0.0001)  # summed over positions
    methods += [("CFB", {"named": named, "strength": s}) for s in nats]
    methods += [("RAN", {"strength": s}) for s in (0.3, 1.0)]
    methods += [("NoPeek-Infer", {"strength": s}) for s in (0.3, 1.0)]
    methods += [("VIB", {"strength": s}) for s in nats]
    methods += [("noise", {"noise": s}) for s in (1.0, 3.0)]
    methods += [("bottleneck", {"width": width, "bits": 4}) for width in (2, 8)]
    methods += [("Shredder", {"strength": s}) for s in (0.03, 0.3)]
    methods += [("slimming", {"strength": 1e-4, "remove": 0.5}), ("untrained", {})]
    methods += [("plain", {"keep": 0.25, "order": order}) for order in ("avgri", "random")]
    methods += [("plain", {"directions": 2})] if cut == "pooled" else []
    if cut == "pooled":  # noise first, then only what the head sees of it
        filtered = {"cut_filter": True, "projection": True}
        methods += [("PriFU", {**filtered, "noise": noise}) for noise in (0.1, 0.3)]
        methods += [("noise", {"noise": noise, "projection": True}) for noise in (1.0, 3.0)]
    methods += [("PriFU", {"cut_filter": True, **form}) for form in _beyond(cut)]
    if scale.name == "smoke":  # one setting a method shows that it runs
        methods = list(dict(reversed(methods)).items())
    return [
        run_of(scale, name, seed, data=data, cut=cut, **settings)
        for seed in scale["seeds"]
        for name, settings in methods
    ]


def _beyond(cut: str) -> list[dict]:
    """Filters on the upload that act on space too, or on directions that are learned with them."""
    if cut == "pooled":
        return [{"rotated": True, "noise": noise} for noise in (0.1, 0.3)]
    forms: list[dict] = [{"noise": 1.0}]
    forms += [{"rotated": True, "noise": noise} for noise in (0.3, 0.5, 1.0)]
    forms += [{"over": "positions", "noise": noise} for noise in (0.1, 0.3)]
    return [{**form, "ramped": True} for form in forms]  # from the start, noise 1 drowns the task


def ablation(scale: Scale) -> list[Run]:
    """Return the four cells of Table 2: with and without decay, with and without filter."""
    cells = [("plain", {}), ("PriFU", {"alpha": 0.0}), ("PriFU", {"dose": 0.0}), ("PriFU", {})]
    return [run_of(scale, m, seed, **s) for seed in scale["seeds"] for m, s in cells]


def backbones(scale: Scale) -> list[Run]:
    """Return plain and filtered runs of every backbone (Table 3)."""
    return [
        run_of(scale, method, seed, network=network)
        for seed in scale["seeds"]
        for network in scale["networks"]["backbones"]
        for method in ("plain", "PriFU")
    ]


def alphas(scale: Scale) -> list[Run]:
    """Return runs over thresholds (Fig. 8, left)."""
    given = scale["filter"]["alpha"]
    return [
        run_of(scale, "PriFU", seed, **({} if alpha == given else {"alpha": alpha}))
        for seed in scale["seeds"]
        for alpha in scale["sweep"]["alphas"]
    ]


def doses(scale: Scale) -> list[Run]:
    """Return runs over decays (Fig. 8, right)."""
    given = scale["filter"]["dose"]
    return [
        run_of(scale, "PriFU", seed, **({} if dose == given else {"dose": dose}))
        for seed in scale["seeds"]
        for dose in scale["sweep"]["doses"]
    ]


def removals(scale: Scale) -> list[Run]:
    """Return the plain model with fewer and fewer channels uploaded (Fig. 3)."""
    return [run_of(scale, "plain", seed) for seed in scale["seeds"]] + [
        run_of(scale, "plain", seed, keep=keep, order=order)
        for seed in scale["seeds"]
        for keep in (0.1, 0.25, 0.5)
        for order in ("avgri", "random")
    ]


def correlated(scale: Scale) -> list[Run]:
    """Return runs on faces whose private attribute follows the task (Table 6)."""
    found = []
    for seed in scale["seeds"]:
        for other, correlation in scale["correlated"]["pairs"]:
            data = f"faces:{other}:{correlation}" if scale.name != "paper" else f"celeba:{other}:0"
            found += [
                run_of(scale, "plain", seed, data=data),
                run_of(scale, "CI", seed, data=data, named=other, strength=0.3),
                run_of(scale, "MaxEnt-ARL", seed, data=data, named=other, strength=0.3),
                run_of(scale, "PriFU", seed, data=data),
            ]
    return found


def finetuning(scale: Scale) -> list[Run]:
    """Return what fine-tunes pretrained networks: forms of the filter, and controls."""
    kept = {"form": "preserved"}
    still, moved = {**kept, "affine": "frozen"}, {**kept, "affine": "absorbed"}
    upload = {"cut_filter": True, "noise": 0.3}
    main = [
        ("plain", {}),
        ("PriFU", {}),
        # W's steps are larger than those of other weights by 1/init squared.
        *[("PriFU", {**kept, **init}) for init in ({}, {"init": 0.3}, {"init": 0.5})],
        ("PriFU", {**moved, "init": 0.3}),
        ("PriFU", {**kept, "recalibrated": True}),
        ("PriFU", {**kept, "init": 0.5, "cut_filter": True, "noise": 1.5}),
        # Gentle steps of W, and a factor or noise that changes over the first half of training.
        ("PriFU", {**kept, "init": 0.3, "gain_to": 1.0}),
        ("PriFU", {**kept, "init": 0.5, **upload, "ramped": True}),
        # Gentle steps with a warm-up before filtering, a scale that stays, and twice the dose.
        ("PriFU", {**kept, "init": 0.3, "alpha_from": 0.0}),
        ("PriFU", {**still, "init": 0.3}),
        ("PriFU", {**kept, "init": 0.5, "dose": 2 * scale["filter"]["dose"]}),
    ]
    more = [
        ("PriFU", {**kept, "init": 1.0}),
        *[("PriFU", form) for form in (still, moved)],
        *[("PriFU", {**form, "gain_to": 1.0}) for form in (kept, moved)],
        ("PriFU", {**moved, "alpha_from": 0.0}),
        ("PriFU", {**kept, "dose": 2 * scale["filter"]["dose"]}),
        *[("PriFU", {**form, **upload}) for form in ({}, kept, moved)],
        ("PriFU", {**kept, **upload, "ramped": True}),
        ("noise", {"noise": 3.0}),
    ]
    if scale.name == "smoke":  # each setting once shows that it runs
        main, more = [*main[:3], main[6], main[9]], [*more[4:7], more[-1]]
    small = scale["networks"]["pretrained"][0]
    return [
        run_of(scale, name, seed, network=network, **settings)
        for seed in scale["seeds"]
        for network in scale["networks"]["pretrained"]
        for name, settings in [*main, *(more if network == small else ())]
    ]
