"""The plan of tools/real.py: which runs there are, what each changes in params.yaml, what it costs.

The runs are listed by importance. Seven protocols, each in five folds by patient; a fold's own
images are the test split, and "across" are all films of the hospital that is held out:

    protocol        images                held out     epochs (full)   trained on
    both            CT slices and films   -            3 (30)          1,088
    shenzhen        films                 Montgomery   6 (24)          340
    montgomery      films                 Shenzhen     15 (60)         83
    films           films                 -            6 (12)          422
    ct              CT slices             -            3 (12)          666
    ct_shenzhen     CT slices and films   Montgomery   3 (12)          1,006
    ct_montgomery   CT slices and films   Shenzhen     3 (12)          749

What pretraining is worth and few tuberculosis images stay short also in the full plan. Fold k of a
protocol is trained with seed k, so that five folds are five training runs; only `both`
is repeated with five seeds. Lung masks of films come from a U-Net that is trained once for each
hospital held out, on 80 % of the other one's films.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product

FOLDS = 5
SIDE, FROZEN_SIDE = 128, 224  # px, of fine-tuned networks and of frozen features
# Images per second of one thread, with another one beside it; seconds to start a stage.
TRAINED, SEEN, FROZEN, START = 27, 75, 40, 10
SMALL = 400, 900  # the same, of the small networks: trained, seen
IMAGES = {"both": 1814, "xrays": 704, "ct": 1110}
NET = "efficientnet_b0"  # the block of params.yaml, whatever EfficientNet the checkpoint is
FINETUNED, FEATURES, PIXELS = "finetuned", "frozen", "baselines"


@dataclass(frozen=True)
class Protocol:
    """Collections (a key of IMAGES), sites held out, epochs, images in training and held out.

    ``full``: epochs of the full plan.
    """

    collections: str
    external: tuple[str, ...]
    epochs: int
    full: int
    trained: int
    held_out: int = 0

    @property
    def fold(self) -> int:
        """Images of a fold."""
        return self.trained // (FOLDS - 2)


PROTOCOLS = {
    "both": Protocol("both", (), 3, 30, 1088),
    "shenzhen": Protocol("xrays", ("Montgomery",), 6, 24, 340, 138),
    "montgomery": Protocol("xrays", ("Shenzhen",), 15, 60, 83, 566),
    "films": Protocol("xrays", (), 6, 12, 422),
    "ct": Protocol("ct", (), 3, 12, 666),
    "ct_shenzhen": Protocol("both", ("Montgomery",), 3, 12, 1006, 138),
    "ct_montgomery": Protocol("both", ("Shenzhen",), 3, 12, 749, 566),
}
HOSPITALS = ("shenzhen", "montgomery")
NAMES = {"both": ["ct_volumes", "xrays"], "xrays": ["xrays"], "ct": ["ct_volumes"]}

LUNGS = {"visible": "lungs"}
CROPPED = LUNGS | {"crop": True, "grey": "stretch"}
# What is visible, in the order of the tables.
VIEWS = {
    "everything": {},
    "lungs": LUNGS,
    "lungs_crop": CROPPED,
    "no_lungs": {"visible": "no_lungs"},
    "border": {"visible": "border"},
    "mask": {"visible": "mask"},
    "lungs_true": LUNGS | {"masks": "true"},
    "lungs_box": LUNGS | {"masks": "box"},
    "lungs_shuffled": LUNGS | {"masks": "shuffled"},
    "dilate_0": LUNGS | {"dilate": 0.0},
    "dilate_4": LUNGS | {"dilate": 0.04},
    "dilate_8": LUNGS | {"dilate": 0.08},
    "stretch": {"grey": "stretch"},
    "equalize": {"grey": "equalize"},
}
MAIN = ("everything", "lungs_crop", "lungs", "border", "no_lungs", "mask")
BOTH_WAYS = (*MAIN, "lungs_true", "lungs_box", "equalize")
ON_CT = ("everything", "lungs_crop", "lungs", "mask")
UNMASKED = ("everything", "border", "stretch", "equalize")
# What may help, as changes of the block of the fine-tuned network; FIRST are for both hospitals.
VARIANTS = {
    "head by modality": {"head": "by_modality"},
    "balance: none": {"balance": "none"},
    "balance: class": {"balance": "class"},
    "adversary: modality": {"adversary": "modality"},
    "balance: logit_adjusted": {"balance": "logit_adjusted"},
    "no augmentation": {"augment": None},
    "batch norms of the checkpoint": {"batch_norm": "pretrained"},
}
FIRST = [*VARIANTS][:4]
BRIEF = {"epochs": 3}
STARVED = (22, 4, 1)  # tuberculosis images left to training: 2.4 %, 0.5 % and 0.1 %
BALANCES = ("none", "class", "class_modality", "logit_adjusted")
# The part `synthetic`: films of 64 px; numbers of tuberculosis films in training by importance, of
# which 171 are all; normal films; and by what the former are filled up to the latter.
TINY = 64
FILMS, NORMAL = (25, 171, 100, 10, 50), 167
FILLED = ("duplicates", "augmented", "mixup", "diffusion")
SEEDS = 5
CLASSIFIER = {"epochs": 5, "epoch_steps": 20, "batch_size": 16, "warmup_steps": 10}
CLASSIFIER |= {"image_size": TINY, "balance": "none", "save_every": 200}
GENERATOR = {"image_size": TINY, "patch": 2, "channels": [32, 64, 64], "blocks": 1, "lr": 1.0e-3}
GENERATOR |= {"epochs": 8, "epoch_steps": 200, "batch_size": 8, "warmup_steps": 100, "ema": 0.99}
GENERATOR |= {"guidance": 1.5, "sampling_steps": 25, "sampling_batch": 32, "save_every": 200}


@dataclass(frozen=True)
class Run:
    """Stages that are executed in a folder of their own.

    ``stages`` are scripts with their arguments; ``params`` changes of params.yaml by dotted key;
    ``links`` {path: name of the run that made it}; ``cost`` the expected seconds. ``part`` and
    ``labels``, for the report, are empty if the run only prepares others. ``raw``: it reads the
    collections. ``thin``: how many tuberculosis images are left to training.
    """

    name: str
    stages: tuple[tuple[str, ...], ...]
    params: dict
    links: dict[str, str]
    cost: float
    part: str = ""
    labels: dict = field(default_factory=dict)
    raw: bool = False
    thin: int | None = None


def plan(checkpoint: str, full: bool = False) -> list[Run]:
    """Return all runs, each after those that it needs."""
    whole = Plan(checkpoint, full)
    runs: dict[str, Run] = {}
    for run in [*whole.runs(), *(whole.more() if full else ())]:
        runs.setdefault(run.name, run)
    return list(runs.values())


@dataclass(frozen=True)
class Plan:
    """Makes the runs for a checkpoint. A method yields a run after those that it needs.

    ``full``: trainings take as long as they should, not as long as two cores allow in three hours.
    """

    checkpoint: str
    full: bool = False

    def runs(self) -> Iterator[Run]:
        hospitals = HOSPITALS
        yield from self.baselines("folds", "both")
        yield from self.frozen("folds", "both", "everything")
        yield from self.several("folds", "both", seeds=(0,))
        for view in MAIN:
            for protocol in hospitals:
                yield from self.frozen("hospitals", protocol, view)
        for protocol in hospitals:
            yield from self.baselines("hospitals", protocol)
            for view in MAIN[:2]:
                yield from self.several("hospitals", protocol, view)
        for view in ON_CT:
            yield from self.frozen("ct", "ct", view)
        for view in ON_CT[:2]:
            yield from self.several("ct", "ct", view)
        yield from self.several("folds", "both", seeds=(1, 2))
        for protocol, view in [*product(hospitals[:1], MAIN[2:]), (hospitals[1], "border")]:
            yield from self.several("hospitals", protocol, view)
        for keep in STARVED:
            yield from self.starved(keep)
        for view in VIEWS:
            for protocol in hospitals if view in BOTH_WAYS else hospitals[:1]:
                yield from self.frozen("objections", protocol, view)
        if self.full:  # beside those from random weights
            yield from self.several(
                "folds", "both", variant="3 epochs", change=BRIEF, seeds=range(5)
            )
        yield from self.scratch()
        yield from self.several("folds", "both", seeds=(3, 4))
        yield from self.several("helps", "shenzhen", "equalize")
        yield from self.vary("ct_shenzhen", ["", *FIRST, "no augmentation"], range(3))
        yield from self.against_site(range(2))

    def more(self) -> Iterator[Run]:
        """Yield what three hours on two cores do not hold."""
        for protocol, view in product(HOSPITALS, MAIN):
            yield from self.several("hospitals", protocol, view)
        for view in ON_CT:
            yield from self.several("ct", "ct", view)
        yield from self.vary("ct_shenzhen", ["", *VARIANTS])
        yield from self.vary("ct_montgomery", ["", *FIRST])
        yield from self.against_site()
        yield from self.synthetic()

    # --- What others need ----------------------------------------------------------------

    def data(self, collections: str) -> Iterator[Run]:
        """Index, slices, manifest and packed images; slices are cut once."""
        stages, links = ["index_collections", "extract_slices", "build_manifest"], {}
        if collections == "ct":
            yield from self.data("both")
            stages.remove("extract_slices")
            links = {"data/slices": "data/both"}
        yield Run(
            f"data/{collections}",
            tuple((f"stages/{name}.py",) for name in stages),
            shared(collections),
            links,
            START + IMAGES[collections] / 50,
            raw=True,
        )

    def split(self, protocol: str, fold: int | None, keep: int | None = None) -> Iterator[Run]:
        """A fold, or without one 80, 10 and 10 % of the images that are not held out."""
        own = PROTOCOLS[protocol]
        yield from self.data(own.collections)
        changes = {"external": list(own.external), "seed": 42}
        changes |= {} if fold is None else {"folds": FOLDS, "fold": fold}
        params = shared(own.collections) | {f"split.{key}": x for key, x in changes.items()}
        name, links = split_name(protocol, fold, keep), packed(own.collections)
        yield Run(name, (("stages/split.py",),), params, links, 4, thin=keep)

    def masks(self, protocol: str) -> Iterator[Run]:
        """Lung masks, the same for all folds: by a U-Net; on CT slices by thresholds."""
        yield from self.split(protocol, None)
        own = PROTOCOLS[protocol]
        films = 0.9 * own.trained if own.collections == "xrays" else 0
        cost = START + films + IMAGES[own.collections] / 30
        links = packed(own.collections) | {"data/split.csv": split_name(protocol, None)}
        stages = (("stages/segment_lungs.py",),)
        yield Run(f"masks/{protocol}", stages, shared(own.collections), links, cost)

    def features(self, protocol: str, view: str) -> Iterator[Run]:
        """Frozen features, the same for all folds, and all protocols where no mask matters."""
        own, name = PROTOCOLS[protocol], feature_name(protocol, view)
        yield from self.split(protocol, 0)
        links = packed(own.collections) | {"data/split.csv": split_name(protocol, 0)}
        if view not in UNMASKED:
            yield from self.masks(protocol)
            links["data/masks"] = f"masks/{protocol}"
        block = f"study.extract_features.{NET}"
        changes = {"checkpoint": self.checkpoint, "image_size": FROZEN_SIDE, "batch_size": 64}
        params = shared(own.collections) | {f"{block}.{key}": x for key, x in changes.items()}
        params |= {f"{block}.view.{key}": x for key, x in VIEWS[view].items()}
        cost = START + IMAGES[own.collections] / FROZEN
        yield Run(name, (("stages/extract_features.py", NET),), params, links, cost)

    # --- Systems -------------------------------------------------------------------------

    def baselines(self, part: str, protocol: str) -> Iterator[Run]:
        """Blind baselines and a linear model on pixels."""
        for fold in range(FOLDS):
            yield from self.split(protocol, fold)
            own = PROTOCOLS[protocol]
            links = packed(own.collections) | {"data/split.csv": split_name(protocol, fold)}
            cost = 8 + own.trained / 100
            stages, labels = (("stages/baselines.py",),), label(protocol, PIXELS, fold=fold)
            yield made(part, labels, stages, shared(own.collections), links, cost)

    def frozen(self, part: str, protocol: str, view: str) -> Iterator[Run]:
        """Logistic regression on frozen features; on both collections also few shots."""
        yield from self.features(protocol, view)
        own, source = PROTOCOLS[protocol], feature_name(protocol, view)
        stages = (("stages/probe_features.py", NET),)
        stages += (("stages/few_shots.py", NET),) if protocol == "both" else ()
        for fold in range(FOLDS):
            yield from self.split(protocol, fold)
            links = packed(own.collections) | {"data/split.csv": split_name(protocol, fold)}
            links |= {"data/features": source}
            labels, cost = label(protocol, FEATURES, view, fold=fold), 5 + own.trained / 100
            cost += 12 * (protocol == "both")
            yield made(part, labels, stages, shared(own.collections), links, cost)

    def several(
        self,
        part: str,
        protocol: str,
        view: str = "everything",
        variant: str = "",
        change: dict | None = None,
        folds: Iterable[int] = range(FOLDS),
        seeds: Iterable[int] = (0,),
    ) -> Iterator[Run]:
        """Fine-tune in each fold with each seed; `change` are settings of the network."""
        for seed in seeds:
            for fold in folds:
                yield from self.finetune(part, protocol, fold, seed, view, variant, change or {})

    def finetune(
        self,
        part: str,
        protocol: str,
        fold: int,
        seed: int,
        view: str,
        variant: str,
        change: dict,
        keep: int | None = None,
    ) -> Iterator[Run]:
        own = PROTOCOLS[protocol]
        yield from self.split(protocol, fold, keep)
        links = packed(own.collections) | {"data/split.csv": split_name(protocol, fold, keep)}
        if view not in UNMASKED:
            yield from self.masks(protocol)
            links["data/masks"] = f"masks/{protocol}"
        changes = {"checkpoint": self.checkpoint, "image_size": SIDE}
        epochs = own.full if self.full else own.epochs
        changes |= {"epochs": epochs, "warmup_steps": 10, "save_every": 50} | change
        changes |= {f"view.{key}": x for key, x in VIEWS[view].items()}
        block = f"study.finetune_cnn.{NET}"
        params = shared(own.collections) | {f"{block}.{key}": x for key, x in changes.items()}
        params["seed"] = FOLDS * seed + fold
        labels = label(protocol, FINETUNED, view, variant, fold, seed)
        labels |= {} if keep is None else {"keep": keep}
        stages = (("stages/finetune_cnn.py", NET),)
        yield made(part, labels, stages, params, links, training_cost(own, changes["epochs"]))

    def vary(
        self, protocol: str, variants: Iterable[str], folds: Iterable[int] = range(FOLDS)
    ) -> Iterator[Run]:
        """Fine-tune with each of some VARIANTS; "" is without a change."""
        for variant in variants:
            change = VARIANTS.get(variant)
            yield from self.several("helps", protocol, "everything", variant, change, folds)

    def against_site(self, folds: Iterable[int] = range(FOLDS)) -> Iterator[Run]:
        """Fine-tune on the films of both hospitals, without and with an adversary by site."""
        for variant in ("", "adversary: site"):
            change = {"adversary": "site"} if variant else None
            yield from self.several("helps", "films", "everything", variant, change, folds)

    def starved(self, keep: int) -> Iterator[Run]:
        """Train with few tuberculosis images, by each way to balance the classes."""
        for balance in BALANCES:
            change = {"balance": balance, **BRIEF}
            yield from self.finetune("starved", "both", 0, 0, "everything", balance, change, keep)

    def synthetic(self) -> Iterator[Run]:
        """Train on few tuberculosis films of Shenzhen, alone and filled up in several ways.

        All make equally many steps; filled up, they see equally many tuberculosis films. Images are
        drawn as they occur, so that sampling does not fill up what nothing else does.
        """
        shared_params = shared("xrays") | {"study.image_sizes": [TINY]}
        source = "data/xrays-64"
        stages = tuple((f"stages/{x}.py",) for x in ("index_collections", "extract_slices"))
        stages += (("stages/build_manifest.py",),)
        yield Run(source, stages, shared_params, {}, 20, raw=True)
        given = {"data/manifest.csv": source, "data/images": source}
        for films in FILMS:
            changes = {"external": ["Montgomery"], "seed": 42, "folds": FOLDS, "fold": 0}
            params = shared_params | {f"split.{key}": x for key, x in changes.items()}
            name = f"split/synthetic/{films}"
            yield Run(name, (("stages/split.py",),), params, given, 4, thin=films)
            links = given | {"data/split.csv": name}
            filled = {"none": links}
            for method in FILLED if films < NORMAL else ():
                source, audit = (f"{x}/{method}/{films}" for x in ("synthetic", "audit"))
                # A quarter more for those that are dropped as copies of training images.
                count = (NORMAL - films) * (5 if method == "diffusion" else 4) // 4
                changes = GENERATOR | {"method": method, "per_class": count}
                own = shared_params | {f"study.synthesize.{key}": x for key, x in changes.items()}
                cost = 420 if method == "diffusion" else START
                yield Run(source, (("stages/synthesize.py",),), own, links, cost)
                with_images = links | {"data/synthetic": source}
                changes = {"checkpoint": self.checkpoint, "image_size": TINY, "batch_size": 64}
                own = {f"study.audit_synthetic.{key}": x for key, x in changes.items()}
                stages = (("stages/audit_synthetic.py",),)
                yield Run(audit, stages, shared_params | own, with_images, 2 * START)
                filled[method] = with_images | {"data/synthetic_audit.csv": audit}
            for seed, (method, own) in product(range(SEEDS), filled.items()):
                missing = 0 if method == "none" else NORMAL - films
                yield self.learn_filled(method, films, missing, seed, shared_params, own)

    def learn_filled(
        self, method: str, films: int, missing: int, seed: int, params: dict, links: dict[str, str]
    ) -> Run:
        changes = CLASSIFIER | {"checkpoint": self.checkpoint, "synthetic.per_class": missing}
        changes = {f"study.finetune_cnn.{NET}.{key}": x for key, x in changes.items()}
        labels = label("shenzhen", FINETUNED, variant=f"filled by {method}", seed=seed)
        stages = (("stages/finetune_cnn.py", NET),)
        own = params | changes | {"seed": seed}
        return made("synthetic", labels | {"films": films}, stages, own, links, 40)

    def scratch(self) -> Iterator[Run]:
        """Train from random weights: what pretraining is worth."""
        random = {"weights": "random", "lr": 1.0e-3, **BRIEF}
        yield from self.several("scratch", "both", variant="random weights", change=random)
        command = ("data/make_checkpoints.py", "--into", "checkpoints", "--side", str(SIDE))
        yield Run("checkpoints", ((*command, "--patch", "16"),), {}, {}, START)
        systems = {
            "resnet": ("stages/finetune_cnn.py resnet50", "finetune_cnn.resnet50", "resnet50"),
            "siglip": ("stages/finetune_siglip.py", "finetune_siglip", "siglip"),
        }
        own, changes = PROTOCOLS["both"], {"image_size": SIDE, "weights": "random"}
        changes |= {"epochs": 10, "lr": 3.0e-3, "warmup_steps": 30, "save_every": 50}
        for system, (command, block, name) in systems.items():
            changes["checkpoint"] = f"checkpoints/{name}"
            params = shared("both") | {f"study.{block}.{key}": x for key, x in changes.items()}
            for fold in range(FOLDS):
                links = packed("both") | {"data/split.csv": split_name("both", fold)}
                links |= {"checkpoints": "checkpoints"}
                labels, own_params = label("both", system, fold=fold), params | {"seed": fold}
                stages, cost = (tuple(command.split()),), training_cost(own, 10, *SMALL)
                yield made("scratch", labels, stages, own_params, links, cost)


def made(
    part: str, labels: dict, stages: tuple, params: dict, links: dict[str, str], cost: float
) -> Run:
    """Return a run whose folder and labels tell what it is."""
    words = [str(value).replace(": ", "-").replace(" ", "-") for value in labels.values()]
    name = "/".join(["runs", *filter(None, words)])
    return Run(name, stages, params, links, cost, part, {"part": part, **labels})


def label(
    protocol: str,
    system: str,
    view: str = "everything",
    variant: str = "",
    fold: int = 0,
    seed: int = 0,
) -> dict:
    """Return what the report knows a run by."""
    labels = {"protocol": protocol, "system": system, "view": view, "variant": variant}
    return labels | {"fold": fold, "seed": seed}


def shared(collections: str) -> dict:
    """Return the parameters of all runs on some collections."""
    return {
        "profile": "study",
        "collections": NAMES[collections],
        "study.expected_counts": None,
        "study.image_sizes": [SIDE, FROZEN_SIDE],
    }


def packed(collections: str) -> dict[str, str]:
    """Return the links to manifest and packed images."""
    source = f"data/{collections}"
    return {"data/manifest.csv": source, "data/images": source}


def split_name(protocol: str, fold: int | None, keep: int | None = None) -> str:
    name = "whole" if fold is None else fold
    return f"split/{protocol}/{name}" + ("" if keep is None else f"-{keep}")


def feature_name(protocol: str, view: str) -> str:
    """Return where features are: views without a mask are the same in all protocols."""
    place = PROTOCOLS[protocol].collections if view in UNMASKED else protocol
    return f"features/{place}/{view}"


def training_cost(
    protocol: Protocol, epochs: int, trained: float = TRAINED, answered: float = SEEN
) -> float:
    """Return the expected seconds of a training: its steps, validation, and the answers."""
    seen = protocol.trained + protocol.fold * epochs  # batch norms, validation
    seen += 2 * (2 * protocol.fold + protocol.held_out) + protocol.fold  # answers, features
    return START + protocol.trained * epochs / trained + seen / answered
