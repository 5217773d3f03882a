"""The recipe: how a network is trained, as one value with a key; and the papers' own recipes by name.

A searched and a hand-designed network can only be compared when both were trained alike, so the key of the recipe stands
in every result. Each paper's own recipe is here to reproduce that paper; its comment says what the paper leaves open and
what was chosen. No torch is imported: a recipe is a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from autoreid.errors import UserError, unknown
from autoreid.options import changed, faults_of, parse, range_checks, read_json, require
from autoreid.runs import key_of, write_json

FORMAT, VERSION = "autoreid-recipe", 1
WORDS = {  # the words that a field takes
    "optimizer": ("adam", "adamw", "sgd"),
    "schedule": ("cosine", "step", "exponential", "cyclic"),
    "triplet": ("batch-hard", "batch-soft"),
    "auto_augment": ("none", "autoaugment", "randaugment"),
    "amp": ("none", "bf16", "fp16"),
}
MOST_OPERATIONS = 8  # of RandAugment on one picture
VIEWS = (1, 2, 10)
VIEWS_ALLOWED = "1 (the picture), 2 (its mirror image too) or 10 (five crops, mirrored)"


def require_views(views: int) -> None:
    require(views in VIEWS, "views", views, VIEWS_ALLOWED)


def _later(default: Any) -> Any:
    """A field that older recipes do not have: it enters the key only where it differs from its default, so that a
    result keeps its key when a new possibility comes that it does not use."""
    return field(default=default, metadata={"later": True})


def _speed(default: Any) -> Any:
    """A field that says how fast, not how, a network is trained: it never enters the key."""
    return field(default=default, metadata={"speed": True})


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the field's usual ones (Luo et al. 2019, "Bag of Tricks").

    ``identities`` x ``images`` make a batch, and the gradients of ``accumulate`` batches a step. The learning rate rises
    linearly from ``lr`` / 10 over ``warmup_epochs``, then goes by ``schedule``: "cosine" to ``lr_min``, "step" by
    ``gamma`` at each milestone, "exponential" from the first milestone to ``gamma`` times itself at the end
    (``momentum_late``, where not 0, is the momentum or beta 1 from that milestone on), "cyclic" up and down between
    ``lr_min`` and ``lr`` with the period ``cycle_epochs`` (Smith 2017, "triangular"), from ``lr`` on where a warm-up
    has led there, else from ``lr_min`` on. ``clip`` 0 means no clipping.

    The augmentation is ``autoreid.augment``'s: ``pad`` (pixels), ``enlarge`` (a factor), ``flip``, ``erase`` and ``patch``
    (probabilities), ``jitter`` (a strength), ``auto_augment`` by AutoAugment's ImageNet policy or by RandAugment with
    ``rand_n`` operations of magnitude ``rand_m``. ``drop_path`` leaves out paths of the network, ``classifier_dropout``
    features that the classifier reads; a head's own option ``dropout`` is part of the model.

    ``triplet`` "batch-hard" or "batch-soft" with the hinge at ``margin``, or with ``soft_margin`` the softplus.
    ``literal_smoothing`` takes SAFR's printed formula with 1 / identities for label_smoothing. The center loss has its
    own SGD at ``center_lr``. Every branch of a network has all these losses, added up (deep supervision).

    After ``epochs``, SWAG: ``swag_cycles`` cosine cycles of ``swag_epochs``, each cycle's peak ``swag_decay`` times
    the one before, weights averaged at the cycles' ends. Or SWA: the weights of the last ``swa_epochs`` of ``epochs`` are
    averaged, at the constant rate ``swa_lr`` (0: the schedule's own). Or an average with the decay ``ema``.

    With several processes the losses are those of the whole batch (``gather``), or each process's own images'; batch norms
    are synchronised with ``sync_bn``. ``amp`` is the type of mixed precision. The share ``held_out`` of the identities
    does not train but is evaluated, every ``eval_every`` epochs (0: at the end only). ``views`` is the evaluation's: see
    ``evaluate.extract``.

    ``channels_last`` (the order of pictures in memory) and ``compile`` (``torch.compile``) are for speed alone.
    """

    input: tuple[int, int] = (256, 128)
    optimizer: str = "adam"
    lr: float = 3.5e-4
    lr_min: float = 7e-7
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 60
    warmup_epochs: int = 10
    schedule: str = "cosine"
    milestones: tuple[int, ...] = (40, 50)
    gamma: float = 0.1
    identities: int = 16
    images: int = 4
    ce_weight: float = 1.0
    triplet_weight: float = 1.0
    margin: float = 0.3
    label_smoothing: float = 0.1
    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    drop_path: float = 0.0
    clip: float = 0.0
    triplet: str = _later("batch-hard")
    soft_margin: bool = _later(False)
    literal_smoothing: bool = _later(False)
    center_weight: float = _later(0.0)
    center_lr: float = _later(0.5)
    momentum_late: float = _later(0.0)
    enlarge: float = _later(1.0)
    swag_cycles: int = _later(0)
    swag_epochs: int = _later(35)
    swag_decay: float = _later(0.7)
    views: int = _later(1)
    cycle_epochs: int = _later(10)
    classifier_dropout: float = _later(0.0)
    jitter: float = _later(0.0)
    auto_augment: str = _later("none")
    rand_n: int = _later(2)
    rand_m: int = _later(9)
    patch: float = _later(0.0)
    ema: float = _later(0.0)
    swa_epochs: int = _later(0)
    swa_lr: float = _later(0.0)
    amp: str = _later("none")
    accumulate: int = _later(1)
    sync_bn: bool = _later(False)
    gather: bool = _later(True)
    held_out: float = _later(0.0)
    eval_every: int = _later(0)
    channels_last: bool = _speed(False)
    compile: bool = _speed(False)

    def __post_init__(self) -> None:
        faults = [str(unknown(name, getattr(self, name), words)) for name, words in WORDS.items()
                  if getattr(self, name) not in words]
        averaged = [f"{name}={getattr(self, name)}" for name in ("ema", "swa_epochs", "swag_cycles") if getattr(self, name)]
        faults += faults_of([
            (len(self.input) == 2 and min(self.input) >= 16 and max(self.input) <= 4096, "input",
             "x".join(map(str, self.input)), "HxW with both sides from 16 to 4096, as in 128x64"),
            (self.identities >= 2 and self.images >= 2, "identities, images", (self.identities, self.images),
             "2 or more each: a triplet needs a positive and a negative"),
            (self.ce_weight > 0 or self.triplet_weight > 0, "ce_weight, triplet_weight",
             (self.ce_weight, self.triplet_weight), "at least one above 0"),
            (self.schedule not in ("step", "exponential") or bool(self.milestones), "milestones", self.milestones,
             f"at least one with the schedule {self.schedule}"),
            (list(self.milestones) == sorted(self.milestones) and min(self.milestones, default=0) >= 0, "milestones",
             self.milestones, "ascending epochs, from 0"),
            (self.eval_every == 0 or self.held_out > 0, "eval_every", self.eval_every,
             "0 with held_out=0: only identities that are held out can be evaluated; set held_out too, as in held_out=0.2"),
            *range_checks(
                self, epochs=(1, 1e9, "1 or more"), warmup_epochs=(0, self.epochs, f"0 to {self.epochs}"),
                lr=(1e-12, 1e40, "above 0"), lr_min=(0, self.lr, "from 0 to lr"), gamma=(0, 1, "from 0 to 1"),
                momentum=(0, 0.9999, "from 0 to below 1"), weight_decay=(0, 1e6, "0 or more"),
                ce_weight=(0, 1e6, "0 or more"), triplet_weight=(0, 1e6, "0 or more"), margin=(0, 1e6, "0 or more"),
                label_smoothing=(0, 0.9999, "from 0 to below 1"), drop_path=(0, 0.9999, "from 0 to below 1"),
                flip=(0, 1, "from 0 to 1"), erase=(0, 1, "from 0 to 1"), pad=(0, 4096, "0 to 4096 pixels"),
                clip=(0, 1e12, "0 (no clipping) or more"), center_weight=(0, 1e6, "0 or more"),
                center_lr=(1e-12, 1e6, "above 0"), momentum_late=(0, 0.9999, "from 0 (unchanged) to below 1"),
                enlarge=(1, 4, "from 1 to 4"), swag_cycles=(0, 1e6, "0 (no SWAG) or more"),
                swag_epochs=(1, 1e6, "1 or more"), swag_decay=(1e-6, 1, "above 0, at most 1"),
                cycle_epochs=(2, self.epochs if self.schedule == "cyclic" else 1e9, f"2 to {self.epochs}, the epochs"),
                classifier_dropout=(0, 0.9999, "from 0 to below 1"), jitter=(0, 1, "from 0 to 1"),
                rand_n=(1, MOST_OPERATIONS, f"1 to {MOST_OPERATIONS} operations"), rand_m=(0, 30, "0 to 30"),
                patch=(0, 1, "from 0 to 1"), ema=(0, 0.999999, "from 0 (none) to below 1"),
                swa_epochs=(0, self.epochs, f"0 (none) to {self.epochs}"), swa_lr=(0, 1e40, "0 (the schedule's) or more"),
                accumulate=(1, 1e6, "1 or more batches"), held_out=(0, 0.9999, "from 0 (none) to below 1"),
                eval_every=(0, 1e9, "0 (at the end only) or more"),
            ),
            (self.views in VIEWS, "views", self.views, VIEWS_ALLOWED),
        ])
        if len(averaged) > 1:
            faults.append(f"{', '.join(averaged)}: allowed is one average of the weights; set the other to 0")
        if faults:
            raise UserError("; ".join(faults))

    def question(self) -> dict[str, Any]:
        """All fields but those that are for speed alone."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("speed")}

    def key(self) -> str:
        """Twelve hexadecimal digits; equal keys mean networks trained alike (by one process, or with synchronised batch
        norms: a result says in ``batch_parts`` where a batch was shared out)."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            value = float(value) if isinstance(f.default, float) else value  # 1 and 1.0 are one rate
            idle = f.name in OF_OTHERS and not OF_OTHERS[f.name](self)
            if not f.metadata.get("speed") and not (f.metadata.get("later") and (value == f.default or idle)):
                values[f.name] = value
        return key_of(values)

    def to_file(self, path: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write recipe.json, whole or not at all: what :func:`find_recipe` reads. ``provenance`` says where it is from."""
        write_json(path, {"format": FORMAT, "version": VERSION, **asdict(self), "provenance": provenance or {}})

    @property
    def all_epochs(self) -> int:
        """With those of SWAG."""
        return self.epochs + self.swag_cycles * self.swag_epochs

    def learning_rate(self, epoch: int) -> float:
        """The rate of ``epoch`` (from 0): a function of the epoch, so that a resumed run needs no schedule state."""
        if epoch >= self.epochs:
            cycle, step = divmod(epoch - self.epochs, self.swag_epochs)
            return self._cosine(max(self.lr * self.swag_decay**cycle, self.lr_min), step, self.swag_epochs)
        if self.swa_lr > 0 and epoch >= self.epochs - self.swa_epochs:
            return self.swa_lr
        if epoch < self.warmup_epochs:
            return self.lr * (0.1 + 0.9 * epoch / self.warmup_epochs)
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "exponential":
            first = self.milestones[0]
            return self.lr * self.gamma ** max(0.0, (epoch - first) / max(self.epochs - first, 1))
        if self.schedule == "cyclic":
            cycles = (epoch - self.warmup_epochs) / self.cycle_epochs + (0.5 if self.warmup_epochs else 0.0)
            return self.lr_min + (self.lr - self.lr_min) * (1 - abs(2 * (cycles % 1) - 1))
        return self._cosine(self.lr, epoch - self.warmup_epochs, self.epochs - self.warmup_epochs)

    def _cosine(self, peak: float, step: int, steps: int) -> float:
        """From the peak at step 0 to ``lr_min`` at the last of the steps."""
        return self.lr_min + (peak - self.lr_min) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2

    def momentum_of(self, epoch: int) -> float:
        late = self.momentum_late > 0 and bool(self.milestones) and epoch >= self.milestones[0]
        return self.momentum_late if late else self.momentum


# Settings of what may not be in use, and whether it is: idle ones do not enter the key.
OF_OTHERS: dict[str, Callable[[Recipe], bool]] = {
    "eval_every": lambda r: False,  # who watches changes nothing
    "cycle_epochs": lambda r: r.schedule == "cyclic",
    "rand_n": lambda r: r.auto_augment == "randaugment",
    "rand_m": lambda r: r.auto_augment == "randaugment",
    "swa_lr": lambda r: r.swa_epochs > 0,
}

# ---------------------------------------------------------------------------------------- recipes by name
_ROBUST = Recipe(
    input=(160, 64), optimizer="sgd", lr=3e-2, momentum=0.9, weight_decay=5e-4, epochs=350, warmup_epochs=9,
    schedule="step", milestones=(150, 225), identities=8, triplet="batch-soft", soft_margin=True, pad=0,
)
_SAFR = Recipe(
    input=(350, 350), optimizer="adamw", lr=1e-4, weight_decay=5e-4, epochs=36, warmup_epochs=10, schedule="step",
    milestones=(20, 30), gamma=0.6, identities=18, center_weight=5e-4, pad=0,
)
RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    # For the drawn data on two CPU cores.
    "drawn": Recipe(
        input=(64, 32), optimizer="adamw", lr=3.5e-3, lr_min=1e-5, weight_decay=0.01, epochs=12, warmup_epochs=2,
        pad=4, erase=0.25,
    ),
    # Auto-ReID (ICCV 2019), section 4.1: from scratch; its learning rate taken literally, ten times the usual one.
    "autoreid": Recipe(
        input=(384, 128), lr=3.5e-3, epochs=240, warmup_epochs=0, schedule="step", milestones=(80, 150), identities=8,
        ce_weight=0.5, triplet_weight=0.5, label_smoothing=0.0, erase=0.0,
    ),
    # SAFR (Suprem et al. 2020), sections 4.2 and 5.1: batch 18 x 4, 350 x 350 (--input 224x224 for safr-micro), warm-up
    # over 10 epochs, center loss x 0.0005. Optimiser, rate, decay, epochs and margin are not in the paper: those of the
    # authors' predecessor (AdamW, 1e-4, x 0.6 every 10 epochs, here from epoch 20 on: the warm-up must reach the rate).
    # The paper's smoothing is 1/N in a formula that is no distribution (safr-literal); by the standard one 1/N would be
    # next to none, so 0.1, the predecessor's. The baseline has no center loss; its "softmax" is smoothed alike.
    "safr": _SAFR,
    "safr-baseline": replace(_SAFR, center_weight=0.0),
    "safr-literal": replace(_SAFR, literal_smoothing=True),
    # Robust-ReID (Lawen et al. 2019), section 4: Eq. 1's rates (t counts from 1: epoch 0 has a tenth), 8 x 4, 160 x 64.
    # Momentum and decay are not in the paper: 0.9 and HA-CNN's 5e-4. The recipe of every column of its Table 2 has the
    # column's name: a without a triplet, d with the hinge, g and full with SWAG.
    "robust-reid": _ROBUST,
    "robust-reid-swag": replace(_ROBUST, swag_cycles=15),
    "robust-reid-a": replace(_ROBUST, triplet_weight=0.0),
    **{f"robust-reid-{column}": _ROBUST for column in "bcefh"},
    "robust-reid-d": replace(_ROBUST, soft_margin=False),
    "robust-reid-g": replace(_ROBUST, swag_cycles=15),
    "robust-reid-full": replace(_ROBUST, swag_cycles=15),
    # DaRe (CVPR 2018), section 4: no classifier, soft margin, 288 x 144 cropped to 256 x 128, ten views. 60,000 steps of
    # 18 x 4 are 333 epochs of Market-1501; from the half on the rate falls to a thousandth and beta 1 is 0.5. Random
    # erasing is optional: --set erase=0.5.
    "dare": Recipe(
        optimizer="adam", lr=3e-4, lr_min=0.0, weight_decay=1e-4, epochs=333, warmup_epochs=0, schedule="exponential",
        milestones=(167,), gamma=1e-3, momentum_late=0.5, identities=18, ce_weight=0.0, soft_margin=True, pad=0,
        enlarge=1.125, erase=0.0, views=10,
    ),
}
RECIPES["demo"] = replace(RECIPES["drawn"], epochs=10)


def step_of_pruning(recipe: Recipe) -> Recipe:
    """A fifth of the epochs, rounded up, with the same shape of the schedule (McDermott 2024, section 3: "each retraining
    uses 20% of the epochs used during normal training")."""
    return _with(recipe, {"epochs": -(-recipe.epochs // 5)})


def find_recipe(name: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A recipe by name or from a JSON file, with ``changes`` applied (text as in ``--set``, or values)."""
    if name.endswith(".json"):
        recipe = _from_file(name)
    elif name in RECIPES:
        recipe = RECIPES[name]
    else:
        raise unknown("recipe", name, [*RECIPES, "PATH/recipe.json"])
    return _with(recipe, changes or {})


def _with(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with fields changed; what is counted in epochs keeps its share of them where it is not given."""
    wanted = dict(changes)
    if "epochs" in wanted:
        epochs = parse("epochs", wanted["epochs"], recipe.epochs)
        for follows, lowest, used in (
            ("swag_epochs", 1, recipe.swag_cycles), ("swa_epochs", 1, recipe.swa_epochs),
            ("cycle_epochs", 2, "cyclic" in (recipe.schedule, wanted.get("schedule"))),
        ):
            if used:
                wanted.setdefault(follows, max(lowest, getattr(recipe, follows) * epochs // recipe.epochs))
    return changed(recipe, wanted, "recipe", ("warmup_epochs", "milestones"))


def _from_file(path: str) -> Recipe:
    """``{"format": "autoreid-recipe", "version": 1, <fields>, "provenance": {}}``; all but the fields may be left out."""
    given = read_json(path, "recipe")
    if not isinstance(given, dict):
        raise UserError(f"{path}: a recipe is a JSON object of fields, got {type(given).__name__}")
    values = dict(given)
    form, version = values.pop("format", FORMAT), values.pop("version", VERSION)
    provenance = values.pop("provenance", {})
    try:
        require(form == FORMAT, "format", form, f"{FORMAT}; give the recipe.json that `autoreid tune` wrote, or your own")
        require(type(version) is int and version <= VERSION, "version", json.dumps(version),
                f"the number {VERSION}; where a newer autoreid wrote this file, update autoreid")
        require(isinstance(provenance, dict), "provenance", provenance, "an object")
        defaults = asdict(Recipe())
        words = [name for name, value in values.items() if isinstance(value, str) and name in defaults
                 and not isinstance(defaults[name], (str, tuple))]
        if words:  # of a --set a number is text; in a file it is a mistake
            raise UserError("; ".join(f'{name}="{values[name]}": write it without quotes' for name in words))
        return _with(Recipe(), values)
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None
