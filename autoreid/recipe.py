"""The recipe: how a network is trained, as one value with a key; and the papers' own recipes by name.

A searched and a hand-designed network can only be compared when both were trained alike, so the key of the recipe stands
in every result. Each paper's own recipe is here to reproduce that paper; its comment says what the paper leaves open and
what was chosen. No torch is imported: a recipe is a value.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from autoreid.errors import UserError, unknown
from autoreid.options import changed, read_json, require, require_ranges
from autoreid.runs import key_of

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "step", "exponential")
TRIPLETS = ("batch-hard", "batch-soft")
VIEWS = (1, 2, 10)


def require_views(views: int) -> None:
    require(views in VIEWS, "views", views, "1 (the picture), 2 (its mirror image too) or 10 (five crops, mirrored)")


def _later(default: Any) -> Any:
    """A field that older recipes do not have: it enters the key only where it differs from its default, so that a
    result keeps its key when a new possibility comes that it does not use."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the field's usual ones (Luo et al. 2019, "Bag of Tricks").

    ``identities`` x ``images`` make a batch. The learning rate rises linearly from ``lr`` / 10 over
    ``warmup_epochs``, then falls by ``schedule``: "cosine" to ``lr_min``, "step" by ``gamma`` at each milestone,
    "exponential" from the first milestone to ``gamma`` times itself at the end (``momentum_late``, where not 0, is the
    momentum or beta 1 from that milestone on). ``pad`` (pixels), ``enlarge`` (a factor) and ``flip``, ``erase``
    (probabilities) are the augmentation; ``clip`` 0 means no clipping.

    ``triplet`` "batch-hard" or "batch-soft" with the hinge at ``margin``, or with ``soft_margin`` the softplus.
    ``literal_smoothing`` takes SAFR's printed formula with 1 / identities for label_smoothing. The center loss has its
    own SGD at ``center_lr``. Every branch of a network has all these losses, added up (deep supervision).

    After ``epochs``, SWAG: ``swag_cycles`` cosine cycles of ``swag_epochs``, each cycle's peak ``swag_decay`` times
    the one before, weights averaged at the cycles' ends. ``views`` is the evaluation's: see ``evaluate.extract``.
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

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("triplet", TRIPLETS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"0 to {self.epochs}")
        require(len(self.input) == 2 and min(self.input) >= 16, "input", "x".join(map(str, self.input)),
                "HxW with both sides at least 16, as in 128x64")
        require(self.identities >= 2 and self.images >= 2, "identities, images", (self.identities, self.images),
                "2 or more each: a triplet needs a positive and a negative")
        require_ranges(
            self, lr=(1e-12, 1e40, "above 0"), lr_min=(0, self.lr, "from 0 to lr"), gamma=(0, 1, "from 0 to 1"),
            momentum=(0, 0.9999, "from 0 to below 1"), weight_decay=(0, 1e6, "0 or more"),
            ce_weight=(0, 1e6, "0 or more"), triplet_weight=(0, 1e6, "0 or more"), margin=(0, 1e6, "0 or more"),
            label_smoothing=(0, 0.9999, "from 0 to below 1"), drop_path=(0, 0.9999, "from 0 to below 1"),
            flip=(0, 1, "from 0 to 1"), erase=(0, 1, "from 0 to 1"), pad=(0, 4096, "0 or more pixels"),
            clip=(0, 1e12, "0 (no clipping) or more"), center_weight=(0, 1e6, "0 or more"),
            center_lr=(1e-12, 1e6, "above 0"), momentum_late=(0, 0.9999, "from 0 (unchanged) to below 1"),
            enlarge=(1, 4, "from 1 to 4"), swag_cycles=(0, 1e6, "0 (no SWAG) or more"),
            swag_epochs=(1, 1e6, "1 or more"), swag_decay=(1e-6, 1, "above 0, at most 1"),
        )
        require(self.ce_weight > 0 or self.triplet_weight > 0, "ce_weight, triplet_weight",
                (self.ce_weight, self.triplet_weight), "at least one above 0")
        require_views(self.views)
        require(self.schedule == "cosine" or bool(self.milestones), "milestones", self.milestones,
                f"at least one with the schedule {self.schedule}")

    def key(self) -> str:
        """Twelve hexadecimal digits; equal keys mean networks trained alike."""
        values = asdict(self)
        for f in fields(self):
            if f.metadata.get("later") and values[f.name] == f.default:
                del values[f.name]
        return key_of(values)

    @property
    def all_epochs(self) -> int:
        """With those of SWAG."""
        return self.epochs + self.swag_cycles * self.swag_epochs

    def learning_rate(self, epoch: int) -> float:
        """The rate of ``epoch`` (from 0): a function of the epoch, so that a resumed run needs no schedule state."""
        if epoch >= self.epochs:
            cycle, step = divmod(epoch - self.epochs, self.swag_epochs)
            return self._cosine(max(self.lr * self.swag_decay**cycle, self.lr_min), step, self.swag_epochs)
        if epoch < self.warmup_epochs:
            return self.lr * (0.1 + 0.9 * epoch / self.warmup_epochs)
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "exponential":
            first = self.milestones[0]
            return self.lr * self.gamma ** max(0.0, (epoch - first) / max(self.epochs - first, 1))
        return self._cosine(self.lr, epoch - self.warmup_epochs, self.epochs - self.warmup_epochs)

    def _cosine(self, peak: float, step: int, steps: int) -> float:
        """From the peak at step 0 to ``lr_min`` at the last of the steps."""
        return self.lr_min + (peak - self.lr_min) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2

    def momentum_of(self, epoch: int) -> float:
        late = self.momentum_late > 0 and bool(self.milestones) and epoch >= self.milestones[0]
        return self.momentum_late if late else self.momentum


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


def find_recipe(name: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A recipe by name or from a JSON file of its fields, with ``changes`` applied."""
    if name.endswith(".json"):
        given = read_json(name, "recipe")
        if not isinstance(given, dict):
            raise UserError(f"{name}: a recipe is a JSON object of fields, got {type(given).__name__}")
        try:
            recipe = changed(Recipe(), given, "recipe")
        except UserError as fault:
            raise UserError(f"{name}: {fault}") from None
    elif name in RECIPES:
        recipe = RECIPES[name]
    else:
        raise unknown("recipe", name, [*RECIPES, "PATH/recipe.json"])
    shorter = changed(recipe, changes or {}, "recipe", ("warmup_epochs", "milestones"))
    if recipe.swag_cycles and "swag_epochs" not in (changes or {}):  # SWAG's cycles keep their share of the epochs too
        return replace(shorter, swag_epochs=max(1, recipe.swag_epochs * shorter.epochs // recipe.epochs))
    return shorter
