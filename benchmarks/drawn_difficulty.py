"""How hard the drawn data is, and for whom: floors, a plain and a part-aware net, and the background alone.

What it must show on the people: colour histograms fail; a 60 k-parameter net lands mid-range after some 600 steps; its
part-aware twin, equal in parameters and trunk, does better by more than the spread over seeds (compared in pairs: one
seed is one sampling stream for both); and nothing is learnt from the background alone.

    python benchmarks/drawn_difficulty.py --json results/benchmarks/drawn_difficulty.json

Evaluation is Market-1501's: -1 is left out, the query's own camera's pictures of the same identity do not count, and AP
is the step AP. "Chance" is the mAP of random features under the same protocol. One torch thread per run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from autoreid.data import drawn
from autoreid.data.drawn_layout import FOLDERS, read_masks

INPUT = {"people": (64, 32), "vehicles": (64, 64)}


# --- data -------------------------------------------------------------------------------------------------------------

def read_split(folder: Path, kind: str, split: str, view: str = "whole") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (N x h x w x 3 uint8 at net size), identities and cameras, without -1. `view`: whole; no_silhouette =
    the subject's own pixels replaced by noise around mid grey; no_box = its bounding box grown by a tenth replaced."""
    files, masks = read_masks(folder, split)
    height, width = INPUT[kind]
    pictures, identities, cameras = [], [], []
    for file, mask in zip(files, masks):
        identity = int(file.split("_")[0])
        if identity < 0:
            continue
        image = Image.open(folder / FOLDERS[kind][split] / file)
        if view != "whole":
            image = Image.fromarray(_hide(np.asarray(image).copy(), mask, view, len(pictures)))
        pictures.append(np.asarray(image.resize((width, height), Image.Resampling.BOX)))
        identities.append(identity)
        cameras.append(int(file.split("_c")[1][: 1 if kind == "people" else 3]))
    return np.stack(pictures), np.array(identities), np.array(cameras)


def _hide(image: np.ndarray, mask: np.ndarray, view: str, number: int) -> np.ndarray:
    """Replace the subject by noise. The silhouette is grown by 3 pixels: resizing and JPEG smear its colours."""
    rng = np.random.default_rng([3, number])
    rows, columns = np.nonzero(mask)
    hidden = np.zeros_like(mask)
    if view == "no_box" and len(rows):
        grow_y, grow_x = 4 + len(mask) // 20, 4 + mask.shape[1] // 20
        top, left = max(0, rows.min() - grow_y), max(0, columns.min() - grow_x)
        hidden[top:rows.max() + grow_y, left:columns.max() + grow_x] = True
    elif len(rows):
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                hidden[np.clip(rows + dy, 0, mask.shape[0] - 1), np.clip(columns + dx, 0, mask.shape[1] - 1)] = True
    image[hidden] = np.clip(rng.normal(118, 25, (int(hidden.sum()), 3)), 0, 255)
    return image


# --- evaluation -------------------------------------------------------------------------------------------------------

def evaluate(query: np.ndarray, gallery: np.ndarray, q_ids: np.ndarray, g_ids: np.ndarray, q_cams: np.ndarray,
             g_cams: np.ndarray) -> tuple[float, float]:
    """mAP and rank-1 by cosine, features N x D."""
    query, gallery = (f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-9) for f in (query, gallery))
    scores = query @ gallery.T
    precision, first = [], []
    for row, identity, camera in zip(scores, q_ids, q_cams):
        keep = ~((g_ids == identity) & (g_cams == camera))
        order = np.argsort(-row[keep], kind="stable")
        hits = (g_ids[keep] == identity)[order]
        if hits.any():
            places = np.flatnonzero(hits)
            precision.append(float(np.mean(np.arange(1, len(places) + 1) / (places + 1))))
            first.append(bool(hits[0]))
    return float(np.mean(precision)), float(np.mean(first))


def histogram(pictures: np.ndarray, stripes: int = 1, grey_world: bool = False) -> np.ndarray:
    """8 x 8 x 8 RGB histograms per horizontal stripe, square-rooted; N x (512 stripes)."""
    x = pictures.astype(np.float32)
    if grey_world:
        x = np.clip(x * (128 / np.maximum(x.mean((1, 2), keepdims=True), 1)), 0, 255)
    bins = (x // 32).astype(np.int64) @ np.array([64, 8, 1])
    features = []
    for stripe in np.array_split(bins, stripes, axis=1):
        flat = stripe.reshape(len(x), -1) + 512 * np.arange(len(x))[:, None]
        features.append(np.bincount(flat.ravel(), minlength=512 * len(x)).reshape(len(x), 512))
    return np.sqrt(np.concatenate(features, 1)).astype(np.float32)


def floors(folder: Path, kind: str) -> list[dict]:
    """What needs no learning."""
    (q, q_ids, q_cams), (g, g_ids, g_cams) = (read_split(folder, kind, s) for s in ("query", "gallery"))
    rng = np.random.default_rng(0)
    random = [evaluate(rng.normal(size=(len(q), 64)), rng.normal(size=(len(g), 64)), q_ids, g_ids, q_cams, g_cams)
              for _ in range(10)]
    rows = [{"data": kind, "name": "chance (random features, 10 draws)", "mAP": float(np.mean([m for m, _ in random])),
             "rank1": float(np.mean([r for _, r in random]))}]

    def border(x: np.ndarray) -> np.ndarray:
        edge = np.concatenate([x[:, :, :3], x[:, :, -3:]], 2).reshape(len(x), -1).astype(np.float32)
        return edge - edge.mean(1, keepdims=True)

    def pixels(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1).astype(np.float32)
        return flat - flat.mean(1, keepdims=True)

    for name, describe in (("RGB histogram", histogram), ("6-stripe histogram", partial(histogram, stripes=6)),
                           ("6-stripe grey-world histogram", partial(histogram, stripes=6, grey_world=True)),
                           ("raw pixels", pixels), ("border pixels", border)):
        score, first = evaluate(describe(q), describe(g), q_ids, g_ids, q_cams, g_cams)
        kept = evaluate(describe(q), describe(g), q_ids, g_ids, np.full_like(q_cams, -1), g_cams)
        rows.append({"data": kind, "name": name, "mAP": score, "rank1": first, "rank1_if_own_camera_counted": kept[1]})
    return rows


# --- nets and training ------------------------------------------------------------------------------------------------

class Net(nn.Module):
    """Eight 3x3 convolutions (stride 4 in all), pooled in `stripes` stripes, each with its share of 128 dimensions:
    1 stripe (plain) and 4 stripes (part-aware) have the same number of parameters."""

    def __init__(self, classes: int, stripes: int) -> None:
        super().__init__()
        widths, strides = (16, 16, 24, 32, 32, 32, 40, 40), (2, 1, 2, 1, 1, 1, 1, 1)
        layers: list[nn.Module] = []
        for before, after, stride in zip((3, *widths), widths, strides):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.stripes = stripes
        self.embed = nn.ModuleList(nn.Linear(widths[-1], 128 // stripes, bias=False) for _ in range(stripes))
        self.neck = nn.BatchNorm1d(128)
        self.classifier = nn.Linear(128, classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W -> B x 128, before the neck."""
        pooled = F.adaptive_avg_pool2d(self.trunk(images), (self.stripes, 1)).squeeze(-1)
        return torch.cat([layer(pooled[:, :, k]) for k, layer in enumerate(self.embed)], 1)


def augment(batch: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Pad-crop by 4, flip, channel gain and offset of 20 %, erasing 25 %; N x H x W x 3 uint8 -> N x 3 x H x W."""
    height, width = batch.shape[1:3]
    padded = np.pad(batch, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    out = np.empty(batch.shape, np.float32)
    for k in range(len(batch)):
        top, left = rng.integers(0, 9, 2)
        view = padded[k, top:top + height, left:left + width]
        out[k] = view[:, ::-1] if rng.random() < 0.5 else view
    out = (out / 255 - 0.45) * 4
    out = out * rng.uniform(0.8, 1.2, (len(batch), 1, 1, 3)) + rng.uniform(-0.4, 0.4, (len(batch), 1, 1, 3))
    for k in np.flatnonzero(rng.random(len(batch)) < 0.25):
        high, wide = (int(n * rng.uniform(0.15, 0.45)) for n in (height, width))
        top, left = rng.integers(0, height - high), rng.integers(0, width - wide)
        out[k, top:top + high, left:left + wide] = rng.normal(size=(high, wide, 3))
    return torch.from_numpy(out.astype(np.float32)).permute(0, 3, 1, 2)      # stays channels-last in memory


def triplet(features: torch.Tensor, labels: torch.Tensor, margin: float = 0.3) -> torch.Tensor:
    """Batch-hard triplet loss on normalised features (Hermans et al. 2017)."""
    unit = F.normalize(features)
    distance = (2 - 2 * unit @ unit.T).clamp_min(1e-6).sqrt()
    same = labels[:, None] == labels[None, :]
    return F.relu(distance.masked_fill(~same, -1).amax(1) - distance.masked_fill(same, 9).amin(1) + margin).mean()


def train(folder: Path, kind: str, stripes: int, seed: int, steps: int, view: str = "whole",
          test_views: tuple[str, ...] = ("whole",)) -> list[dict]:
    """Train one net and test it on each view: batches of 16 x 4, AdamW 3.5e-3, one-cycle, smoothed CE + triplet."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    started, cpu = time.perf_counter(), time.process_time()
    pictures, identities, _ = read_split(folder, kind, "train", view)
    names, labels = np.unique(identities, return_inverse=True)
    members = [np.flatnonzero(labels == k) for k in range(len(names))]
    net = Net(len(names), stripes).to(memory_format=torch.channels_last)     # a third faster on CPU
    optimiser = torch.optim.AdamW(net.parameters(), lr=3.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3.5e-3, total_steps=steps)
    rng = np.random.default_rng([seed, 77])
    for _ in range(steps):
        chosen = np.concatenate([rng.choice(members[k], 4, replace=len(members[k]) < 4)
                                 for k in rng.choice(len(names), 16, replace=False)])
        target = torch.from_numpy(labels[chosen])
        features = net(augment(pictures[chosen], rng))
        loss = F.cross_entropy(net.classifier(net.neck(features)), target, label_smoothing=0.1)
        loss = loss + triplet(features, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()
    result = {"data": kind, "name": f"{'plain' if stripes == 1 else f'part ({stripes} stripes)'}", "seed": seed,
              "steps": steps, "trained_on": view,
              "params": sum(p.numel() for name, p in net.named_parameters() if not name.startswith("classifier"))}
    rows = []
    for test_view in test_views:
        (q, q_ids, q_cams), (g, g_ids, g_cams) = (read_split(folder, kind, s, test_view) for s in ("query", "gallery"))
        score, first = evaluate(_describe(net, q), _describe(net, g), q_ids, g_ids, q_cams, g_cams)
        rows.append({**result, "tested_on": test_view, "mAP": score, "rank1": first})
    seconds = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return [{**row, **seconds} for row in rows]


@torch.no_grad()
def _describe(net: Net, pictures: np.ndarray) -> np.ndarray:
    features = []
    for start in range(0, len(pictures), 256):
        x = torch.from_numpy(pictures[start:start + 256].astype(np.float32)).permute(0, 3, 1, 2)
        x = (x / 255 - 0.45) * 4
        features.append(sum(F.normalize(net.neck(net(v))) for v in (x, x.flip(3))))
    return torch.cat(features).numpy()


# --- the table --------------------------------------------------------------------------------------------------------

def summarise(rows: list[dict]) -> list[dict]:
    """Mean and spread (sample standard deviation) over seeds, and the paired gain of the part-aware net."""
    whole = [row for row in rows if row.get("trained_on") == row.get("tested_on") == "whole"]
    out = []
    for kind in dict.fromkeys(row["data"] for row in whole):
        by_net = {name: {row["seed"]: row["mAP"] for row in whole if row["data"] == kind and row["name"] == name}
                  for name in dict.fromkeys(row["name"] for row in whole if row["data"] == kind)}
        for name, scores in by_net.items():
            out.append({"data": kind, "name": f"{name}, mean of {len(scores)} seeds",
                        "mAP": float(np.mean(list(scores.values()))), "sd": _spread(list(scores.values()))})
        if len(by_net) == 2:
            plain, part = by_net.values()
            gains = [part[seed] - plain[seed] for seed in plain if seed in part]
            out.append({"data": kind, "name": "part minus plain, paired by seed", "mAP": float(np.mean(gains)),
                        "sd": _spread(gains), "gains": gains})
    return out


def _spread(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def show(rows: list[dict]) -> None:
    print(f"{'data':9} {'what':66} {'mAP %':>7} {'sd':>5} {'rank-1 %':>8}  {'CPU s':>6}")
    for row in rows:
        name = row["name"]
        if "seed" in row:
            name += f", seed {row['seed']}, {row['steps']} steps"
            if (row["trained_on"], row["tested_on"]) != ("whole", "whole"):
                name += f", {row['trained_on']} -> {row['tested_on']}"
        spread = f"{100 * row['sd']:5.1f}" if row.get("sd") is not None else ""
        first = f"{100 * row['rank1']:8.1f}" if "rank1" in row else ""
        cost = row.get("cpu_seconds", "")
        print(f"{row['data']:9} {name:66} {100 * row['mAP']:7.1f} {spread:>5} {first:>8}  {cost:>6}")


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kinds", default="people,vehicles", help="which data")
    parser.add_argument("--size", default="small")
    parser.add_argument("--data-seed", type=int, default=drawn.SEED)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds per net")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--background", default="people", help="data for which the background alone is tried")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--root", default=None, help="where the data lies (default: the cache)")
    parser.add_argument("--json", metavar="FILE", default=None)
    chosen = parser.parse_args()
    rows: list[dict] = []
    tasks = []
    for kind in chosen.kinds.split(","):
        folder = drawn.ensure(kind, chosen.size, chosen.root, chosen.data_seed)
        rows += floors(folder, kind)
        for seed in range(chosen.seeds):
            views = ("whole", "no_silhouette", "no_box") if seed == 0 and kind in chosen.background else ("whole",)
            tasks += [(folder, kind, stripes, seed, chosen.steps, "whole", views) for stripes in (1, 4)]
        if kind in chosen.background:
            tasks += [(folder, kind, stripes, 0, chosen.steps, view, (view,)) for stripes in (1, 4)
                      for view in ("no_silhouette", "no_box")]
    with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(train, *task) for task in tasks]:
            for row in done.result():
                rows.append(row)
                print(f"{row['data']} {row['name']} seed {row['seed']} {row['trained_on']} -> {row['tested_on']}: mAP "
                      f"{100 * row['mAP']:.1f} ({row['cpu_seconds']} CPU s)", file=sys.stderr, flush=True)
    rows += summarise(rows)
    show(rows)
    if chosen.json:
        record = {"command": shlex.join(["python", "benchmarks/drawn_difficulty.py", *_without_root(sys.argv[1:])]),
                  "machine": machine(),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                               "pillow": PIL.__version__, "drawn": drawn.VERSION},
                  "data_seed": chosen.data_seed, "rows": rows}
        Path(chosen.json).parent.mkdir(parents=True, exist_ok=True)
        Path(chosen.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _without_root(arguments: list[str]) -> list[str]:
    """The command as recorded names no folder of this machine."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--root" and not argument.startswith("--root="):
            kept.append(argument)
        skip = argument == "--root"
    return kept


if __name__ == "__main__":
    sys.exit(main())
