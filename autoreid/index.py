"""A gallery in use: one file with the embedding, the identity and the path of every picture, and who may be said to match.

The file is safetensors. Tensors: ``features`` N x D (float32, float16, or int8 codes), ``digests`` N x 16 (BLAKE2b of the
pictures' bytes), ``entries`` (UTF-8 JSON: ``identities`` and ``paths``, each of length N). The metadata hold one JSON value
under the key ``autoreid``: format, version, an id, the edition (a number that grows with every change), the weights that
made it (SHA-256, label, where they lay), input size, dims, dtype, the scale of int8, the threshold. The id is another in
every edition: copies of one file may go different ways.

It is rewritten whole under a lock: a crash leaves the edition before, and of two processes that add at once the second
adds to what the first has written. Pictures under the index's own folder are kept by relative paths.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoreid import data
from autoreid.data import JUNK, Sample
from autoreid.data.layout import image_names, number_cameras
from autoreid.errors import UserError, unknown
from autoreid.evaluate import extract_readable
from autoreid.neighbours import (
    FaissGallery,
    FloatGallery,
    Gallery,
    Int8Gallery,
    dequantise,
    faiss_hnsw,
    import_faiss,
    quantise,
    scale_of,
)
from autoreid.network import load_weights
from autoreid.pictures import wait_for_lock
from autoreid.runs import Preempted, asked_to_stop, command, progress, say, whole_file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
ENGINES = ("auto", "exact", "hnsw")
HNSW_FROM = 50_000  # pictures: below, an exact answer takes about a millisecond (docs/gallery.md)
HNSW_QUERIES = 16  # at once: more are answered sooner by products of matrices
GRAPH_DEPTH = 256  # nearest pictures: to find more a graph has to be walked so widely that it gains nothing
CHUNK = 256  # pictures embedded between two looks at the clock
SAVE_EVERY = 60.0  # seconds
ENOUGH = 10  # false matches that a threshold must be measured by


# ---------------------------------------------------------------------------------------- pictures
class Picture(NamedTuple):
    """An image file, who is on it, and which camera took it (0: not known)."""

    path: str  # absolute
    identity: str
    camera: int = 0


NAMED = re.compile(r"(-?\d+)_c(\d+)")  # Market-1501, DukeMTMC, VeRi and all that follow them
IN_FOLDERS = re.compile(r"_c(\d+)")


def pictures_of(folder: str | Path) -> tuple[list[Picture], list[str]]:
    """The pictures of a gallery folder, and lines that must be said of them.

    ``DIR/<identity>/*.jpg``; or pictures of which every name says identity and camera, as ``0002_c1s1_000451_03.jpg``; or
    any pictures, each an identity of its own named by the file. The identity -1 is junk and left out; in folders the
    camera is the number after ``_c``, if all file names have one. Raises UserError: no folder, no pictures.
    """
    at = Path(folder).expanduser().absolute()
    if not at.is_dir():
        raise UserError(f"{folder} is {'a file' if at.exists() else 'not there'}; give a folder of pictures: "
                        "DIR/<identity>/*.jpg, or pictures named as 0002_c1s1_000451_03.jpg")
    folders = sorted(path for path in at.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
    people = {path.name: image_names(str(path)) for path in folders}
    flat, lines = image_names(str(at)), []
    if any(people.values()):
        found = [(name, str(at / name / file), match) for name, files in people.items() for file in files
                 for match in [IN_FOLDERS.search(file)]]
        numbers = number_cameras(match[1] for *_, match in found if match) if all(match for *_, match in found) else {}
        pictures = [Picture(path, name, numbers[match[1]] if numbers and match else 0) for name, path, match in found]
        if flat:
            lines.append(f"not read: {len(flat)} pictures beside the folders of identities, the first is {flat[0]}")
        if empty := [name for name, files in people.items() if not files]:
            lines.append(f"not read: {len(empty)} folders without pictures of their own, the first is {empty[0]}")
    elif flat:
        names = [(file, NAMED.match(file)) for file in flat]
        if all(match for _, match in names):
            pictures = [Picture(str(at / file), match[1], int(match[2])) for file, match in names if match]
        else:
            stems = [Path(file).stem for file in flat]
            alone = len(set(stems)) == len(stems)  # else a.jpg and a.png would be one
            pictures = [Picture(str(at / file), stem if alone else file) for file, stem in zip(flat, stems, strict=True)]
            lines.append(f"{len(flat)} pictures without a folder per identity: each is an identity of its own, named by "
                         "its file")
    else:
        inner = [path.name for path in folders if any(child.is_dir() for child in path.iterdir())]
        hint = f"; its folder '{inner[0]}' holds folders: did you mean {Path(folder) / inner[0]}?" if inner else ""
        raise UserError(f"{folder} holds no pictures (.jpg, .png, .bmp or .webp), nor do its folders{hint}")
    kept = [picture for picture in pictures if picture.identity != str(JUNK)]
    if len(kept) < len(pictures):
        lines.append(f"left out: {len(pictures) - len(kept)} junk pictures (identity -1)")
    if not kept:
        raise UserError(f"{folder} holds junk pictures (identity -1) alone")
    return kept, lines


# ---------------------------------------------------------------------------------------- pictures to embeddings
class Extractor:
    """Trained weights, ready to embed pictures; ``about`` is what an index says of them."""

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        net, header = load_weights(weights)
        self.net, self.device = net.to(device), device
        self.size: tuple[int, int] = net.input_size  # type: ignore[assignment]
        self.scale: float | None = net.scale  # of weights that were trained in int8
        self.about = {"sha256": sha256_of(weights), "label": header.get("name") or header["model"]["label"],
                      "path": str(Path(weights).absolute())}
        self.header = header

    def embed(self, paths: Sequence[str]) -> tuple[Tensor, list[int], list[str]]:
        """Features N x D float32 of the pictures that can be read, their places in ``paths``, the paths left out."""
        try:
            # the place as the identity: which are left?
            samples = [Sample(path, place, 0) for place, path in enumerate(paths)]
            features, kept, unreadable = extract_readable(self.net, samples, self.size, self.device)
        except UserError:
            if any(_opens(path, self.size) for path in paths):
                raise
            return torch.empty(0, self.net.dims), [], list(paths)
        return features, [sample.identity for sample in kept], unreadable


def _opens(path: str, size: tuple[int, int]) -> bool:
    from autoreid.pictures import load_image

    try:
        load_image(path, size)
    except UserError:
        return False
    return True


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def digest_of(path: str) -> bytes | None:
    """16 bytes that stand for a file's bytes; None where it cannot be read."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    except OSError:
        return None


# ---------------------------------------------------------------------------------------- who is said to match
@dataclass(frozen=True)
class Threshold:
    """Two pictures match where their distance is at most ``distance``."""

    distance: float
    asked: float  # the false-match rate that was asked for
    false_match_rate: float  # the share of the impostor pairs that match; at most what was asked
    false_non_match_rate: float  # the share of the genuine pairs that do not
    genuine: int  # pairs of one identity
    impostors: int  # pairs of two
    across_cameras: bool  # only pairs of two cameras
    source: str = ""
    identities: int = 0


def threshold_of(
    features: Any, identities: Sequence[Any], cameras: Sequence[int], rate: float, scale: float | None = None
) -> Threshold:
    """The distance at which the false-match rate is ``rate``, from all pairs of labelled pictures: of two cameras where
    there are two or more, else all. ``features``: N x D, or int8 codes and their ``scale``.

    With n = floor(rate x impostor pairs), it is the largest impostor distance below the (n + 1)-th smallest: at most n
    match, and none that lies as near as one too many. Distances are those of a search: single precision, and of codes
    from whole numbers, so that equal ones stay equal. Raises UserError: as :func:`require_pairs`.
    """
    across, genuine, impostors = require_pairs(identities, cameras, rate)
    x = torch.as_tensor(np.asarray(features)).double()
    number: dict[Any, int] = {}
    who = torch.tensor([number.setdefault(name, len(number)) for name in identities])
    seen = torch.tensor(list(cameras))
    wanted = int(rate * impostors + 1e-9) + 1
    centred = x - x.mean(0) if scale is None else x  # products of codes are exact as they are
    squares = centred.square().sum(1)
    nearest, own = np.empty(0), []
    for start in range(0, len(x), 256):
        rows = slice(start, start + 256)
        lengths = squares[rows, None] + squares[start:]
        squared = torch.addmm(lengths, centred[rows], centred[start:].T, alpha=-2)
        if scale is None:
            squared[squared < 1e-13 * lengths] = 0  # the same picture twice: rounding would order them
        later = torch.arange(start, len(x)) > torch.arange(start, start + len(squared))[:, None]
        if across:
            later &= seen[rows, None] != seen[start:]
        same = who[rows, None] == who[start:]
        own.append(squared[later & same].numpy())
        nearest = np.concatenate([nearest, squared[later & ~same].numpy()])
        if len(nearest) > wanted:
            nearest = np.partition(nearest, wanted - 1)[:wanted]
    distances, own_distances = (((scale or 1) * np.sqrt(np.maximum(part, 0))).astype(np.float32)
                                for part in (nearest, np.concatenate(own)))
    over = distances.max()
    below = distances[distances < over]
    limit = float(below.max() if len(below) else np.nextafter(over, np.float32(-np.inf)))
    return Threshold(
        limit, rate, float((distances <= limit).sum() / impostors), float((own_distances > limit).mean()), genuine,
        impostors, across, identities=len(number),
    )


def require_pairs(identities: Sequence[Any], cameras: Sequence[int], rate: float) -> tuple[bool, int, int]:
    """Are pairs taken across cameras, and how many genuine and impostor pairs there are. Raises UserError: a rate that is
    not between 0 and 1, no genuine pair, fewer than 10 / rate impostor pairs (a rate measured by fewer than ten false
    matches says little)."""
    if not 0 < rate < 1:
        raise UserError(f"a false-match rate of {rate}: allowed is above 0 and below 1, as in 0.001")
    across = len(set(cameras)) > 1
    genuine, impostors = _count_pairs(identities, cameras if across else range(len(identities)))
    if not genuine:
        where = " by two cameras" if across else ""
        raise UserError(
            f"of {len(set(identities))} validation identities none has two pictures{where}: there is no "
            "genuine pair; give more pictures of each"
        )
    if rate * impostors < ENOUGH:
        least = f"{_rounded_up(ENOUGH / impostors):g} or more" if impostors > ENOUGH else "a higher one"
        raise UserError(
            f"a false-match rate of {rate:g} needs at least {ENOUGH / rate:,.0f} impostor pairs and the "
            f"{len(identities):,} validation pictures make {impostors:,}: ask for {least}, or give more identities"
        )
    return across, genuine, impostors


def _rounded_up(rate: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.ceil(rate / unit * (1 - 1e-12)) * unit


def _count_pairs(identities: Sequence[Any], cameras: Sequence[int]) -> tuple[int, int]:
    """(genuine, impostor) pairs of two different cameras."""
    def pairs(counts: Iterable[int]) -> int:
        return sum(n * (n - 1) // 2 for n in counts)

    everybody = pairs([len(identities)]) - pairs(Counter(cameras).values())
    genuine = pairs(Counter(identities).values()) - pairs(Counter(zip(identities, cameras, strict=True)).values())
    return genuine, everybody - genuine


def validation_pictures(name: str, root: str | None, extractor: Extractor) -> tuple[list[Picture], str]:
    """Labelled pictures of people that the network was not trained on, and what to call them.

    ``name``: a dataset, of whose training images those of identities that the weights' training held out are taken, or
    all where the weights were trained on another dataset; or a labelled folder, of which nobody can tell: it must hold
    people that were not trained on. Raises UserError where all were trained on, or none is labelled.
    """
    if name.partition("/")[0].partition("+")[0] not in data.DATASETS:
        if not os.path.isdir(Path(name).expanduser()):
            raise unknown("dataset or folder", name, data.DATASETS)
        pictures, _ = pictures_of(name)
        labelled = [picture for picture in pictures if picture.identity.strip("0")]  # 0000 is nobody
        return labelled, name
    origin = extractor.header.get("origin") or {"trained_on": extractor.header["dataset"]}
    splits = data.load(name, root, parts=("train",))
    ours, theirs = (set(data.split(dataset)) for dataset in (splits.name, origin["trained_on"]))
    samples: Sequence[Sample] = splits.train
    known = bool({*map(_people, ours)} & {*map(_people, theirs)})
    if known:
        held_out = set(extractor.header.get("held_out") or ())
        cure = ("retrain with --set held_out=0.1, which keeps a tenth of the identities out, or give a folder of other "
                "people, DIR/<identity>/*.jpg")
        if not held_out:
            raise UserError(f"--validation {name}: the weights were trained on all its training identities; {cure}"
                            if ours & theirs else f"--validation {name} shows people of {origin['trained_on']}, which the "
                            f"weights were trained on; {cure}")
        if ours != theirs or origin.get("train_fingerprint") != data.fingerprint(splits, ("train",)):
            raise UserError(
                f"--validation {name}: the weights were trained on {origin['trained_on']} as it lay then, and these are "
                f"other lists of images, so who was held out cannot be told; give the same data (--root), or {cure}"
            )
        samples = [sample for sample in splits.train if sample.identity in held_out]
    said = f"{splits.name}, {'held-out ' if known else ''}training identities"
    if origin.get("init") == "file":
        said += f" (the training began with {origin.get('init_file')}, and whom that has seen is not known)"
    return [Picture(s.path, splits.name_of(s.identity), s.camera) for s in samples if not s.frames], said


def _people(name: str) -> str:
    """Whose people a dataset shows: variants share them, as do Market-1501 and MARS, and drawn ones of all sizes."""
    base = name.partition("/")[0]
    drawn = data.DATASETS[base].drawn
    return f"drawn {drawn[0]}" if drawn else {"market+500k": "market", "mars": "market"}.get(base, base)


# ---------------------------------------------------------------------------------------- the index
class Match(NamedTuple):
    """One answer to a query. ``match`` is None where the index has no threshold."""

    rank: int
    identity: str
    path: str
    distance: float
    cosine: float
    match: bool | None


@dataclass
class Change:
    """What an adding did."""

    added: int = 0
    replaced: int = 0  # the picture at that path has changed
    present: int = 0
    clipped: int = 0  # values of new pictures beyond the range of an int8 index, of ``values``
    values: int = 0
    unreadable: list[str] = field(default_factory=list)


class Index:
    """A gallery file. What is read is one edition; a change reads the newest, writes the next, and holds that."""

    def __init__(self, path: str | Path, header: dict[str, Any], weights: str | Path | None = None, device: str = "cpu"):
        self.path, self.header = Path(path), header
        self.features = torch.empty(0, header["dims"], dtype=DTYPES[header["dtype"]])  # as they are stored
        self.digests = torch.empty(0, 16, dtype=torch.uint8)
        self.identities: list[str] = []
        self._paths: list[str] = []  # as they are stored
        self._weights, self._device = weights, device
        self._extractor: Extractor | None = None
        self._gallery: Gallery | None = None
        self._graph: FaissGallery | None = None
        self._anew = False  # the file that is there, if any, is not read but replaced

    # ------------------------------------------------------------------------------------ files
    @classmethod
    def open(cls, path: str | Path, weights: str | Path | None = None, device: str = "cpu") -> Index:
        """The index in a file. ``weights``: those that made it, where they no longer lie where they lay. Raises UserError:
        no file, no index, a newer format, other weights."""
        index = cls(path, {"dims": 0, "dtype": "float32"}, weights, device)
        index._read()
        if weights is not None:
            index._own_weights()
        return index

    @classmethod
    def create(
        cls, path: str | Path, weights: str | Path, dtype: str = "float32", device: str = "cpu", overwrite: bool = False
    ) -> Index:
        """An empty index by these weights; the file is written by the first :meth:`add`. Raises UserError: a file is there
        already (without ``overwrite``), or is the weights' own; an unknown dtype; no weights."""
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if Path(path).exists() and not overwrite:
            raise UserError(f"{path} is there already: --add adds to it, --overwrite makes it anew")
        extractor = Extractor(weights, device)
        if Path(path).exists() and os.path.samefile(path, weights):
            raise UserError(f"{path} is the file of the weights: give another name for the index")
        index = cls(path, {
            "format": "autoreid-index", "version": 1, "id": uuid.uuid4().hex, "edition": 0, "weights": extractor.about,
            "input": list(extractor.size), "dims": extractor.net.dims, "dtype": dtype, "scale": None, "threshold": None,
        }, weights, device)
        index._extractor, index._anew = extractor, overwrite
        return index

    def _read(self) -> None:
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder: give the file that `autoreid index` wrote")
        if not self.path.is_file():
            raise UserError(f"no index at {self.path}: `autoreid index DIR --weights W --out {self.path}` makes one")
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("autoreid", "{}"))
                if header.get("format") != "autoreid-index":
                    raise UserError(f"{self.path} is no index: `autoreid index DIR --weights W --out INDEX` writes one")
                if header["version"] != 1:
                    raise UserError(f"{self.path} was written by a newer autoreid (version {header['version']}); update it")
                tensors = {name: file.get_tensor(name) for name in ("features", "digests", "entries")}
        except SafetensorError as fault:
            raise UserError(f"{self.path} is damaged or no index ({fault}): `autoreid index DIR --weights W --out INDEX` "
                            "makes one") from None
        entries = json.loads(tensors["entries"].numpy().tobytes())
        self.header, self.features, self.digests = header, tensors["features"], tensors["digests"]
        self.identities, self._paths = entries["identities"], entries["paths"]
        self._gallery = self._graph = None

    @contextmanager
    def _newest(self) -> Iterator[None]:
        """Within the block no other process changes the file, and this holds the newest edition; it is written at the end
        as the next, unless an error ends the block."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.parent / f".{self.path.name}.lock", "a") as lock:
            wait_for_lock(lock)  # until the block ends, or the process
            before = self.header
            if self.path.exists() and not self._anew:
                self._read()
                if self.header["weights"]["sha256"] != before["weights"]["sha256"]:
                    raise self._others(before["weights"]["path"], before["weights"]["sha256"])
            yield
            self._write()

    def _write(self) -> None:
        for left in self._beside(re.escape(f".{self.path.name}.") + "[a-z0-9_]{8}"):  # of one killed as it wrote
            left.unlink(missing_ok=True)
        header = {**self.header, "id": uuid.uuid4().hex, "edition": self.header["edition"] + 1, "command": command()}
        entries = json.dumps({"identities": self.identities, "paths": self._paths}).encode()
        tensors = {"features": self.features.contiguous(), "digests": self.digests.contiguous(),
                   "entries": torch.frombuffer(bytearray(entries), dtype=torch.uint8)}
        with whole_file(self.path) as temporary:
            save_file(tensors, temporary, metadata={"autoreid": json.dumps(header)})
        self.header, self._anew = header, False
        self._gallery = self._graph = None
        for old in self._graphs():
            old.unlink(missing_ok=True)

    def extractor(self) -> Extractor:
        """The network that made the index. Raises UserError: it is not where it was, or these are other weights."""
        if self._extractor is None:
            self._extractor = Extractor(self._own_weights(), self._device)
        return self._extractor

    def _own_weights(self) -> str | Path:
        weights = self._weights or self.header["weights"]["path"]
        if not Path(weights).is_file():
            moved = "" if self._weights else f", where {self.path} says they were: give --weights FILE"
            raise UserError(f"no weights at {weights}{moved}")
        if (found := sha256_of(weights)) != self.header["weights"]["sha256"]:
            raise self._others(weights, found)
        return weights

    def _others(self, weights: str | Path, found: str) -> UserError:
        about = self.header["weights"]
        return UserError(
            f"{self.path} was made by {about['label']} (SHA-256 {about['sha256'][:12]}...) and {weights} are other weights "
            f"({found[:12]}...), whose embeddings mean something else: give --weights of the former, or make the index "
            f"anew: autoreid index DIR --weights {shlex.quote(str(weights))} --out {shlex.quote(str(self.path))} "
            "--overwrite"
        )

    # ------------------------------------------------------------------------------------ what is in it
    def __len__(self) -> int:
        return len(self.identities)

    @property
    def paths(self) -> list[str]:
        """Of the pictures, absolute."""
        own = self._own_folder()
        return [os.path.join(own, path) for path in self._paths]

    @property
    def threshold(self) -> Threshold | None:
        return Threshold(**self.header["threshold"]) if self.header["threshold"] else None

    def summary(self) -> dict[str, Any]:
        """Figures about the index: what it holds, by which weights, its threshold."""
        keys = ("edition", "weights", "input", "dims", "dtype", "scale", "threshold")
        return {"index": str(self.path), "pictures": len(self), "identities": len(set(self.identities)),
                **{key: self.header[key] for key in keys}, "bytes": self.path.stat().st_size if self.path.exists() else 0}

    def _own_folder(self) -> Path:
        return Path(os.path.abspath(self.path)).parent  # without "..", as the paths of pictures

    def _stored_path(self, path: str) -> str:
        own = self._own_folder()
        absolute = Path(os.path.abspath(path))
        return absolute.relative_to(own).as_posix() if absolute.is_relative_to(own) else str(absolute)

    def stored(self, features: Tensor) -> Tensor:
        """Float features as they are stored: rounded to float16, or codes."""
        if self.header["dtype"] == "int8":
            return quantise(features, self.header["scale"])
        return features.to(DTYPES[self.header["dtype"]])

    def floats(self, stored: Tensor) -> Tensor:
        """What is stored, as float32."""
        return dequantise(stored, self.header["scale"]) if stored.dtype is torch.int8 else stored.float()

    # ------------------------------------------------------------------------------------ changing it
    def add(self, pictures: str | Path | Sequence[Picture]) -> Change:
        """Embed the pictures of a folder (see :func:`pictures_of`) or these, and add them.

        One that is there already (same path, bytes and identity) is not embedded again; one whose file has changed takes
        its own place. Unreadable ones are left out and named. Long work is written every minute, and when SIGTERM comes
        (then :class:`runs.Preempted` is raised): the same call then goes on from there.
        """
        if isinstance(pictures, (str, Path)):
            pictures, lines = pictures_of(pictures)
            for line in lines:
                say(line)
        extractor, change = self.extractor(), Change()
        present = self._present()
        fresh: list[tuple[Picture, bytes]] = []
        for picture in pictures:
            digest = digest_of(picture.path)
            if digest is None:
                change.unreadable.append(picture.path)
            elif (self._stored_path(picture.path), digest, picture.identity) in present:
                change.present += 1
            else:
                fresh.append((picture, digest))
        waiting: list[tuple[Picture, bytes]] = []
        embedded: list[Tensor] = []
        numbers = progress(range(len(fresh)), len(fresh), "pictures")
        last = time.monotonic()
        try:
            while places := list(islice(numbers, CHUNK)):
                features, kept, unreadable = extractor.embed([fresh[i][0].path for i in places])
                change.unreadable += unreadable
                waiting += [fresh[places[k]] for k in kept]
                embedded.append(features)
                if asked_to_stop():
                    raise Preempted
                if time.monotonic() - last > SAVE_EVERY:
                    self._put(waiting, torch.cat(embedded), change)
                    waiting, embedded, last = [], [], time.monotonic()
        except Preempted:
            if waiting:
                self._put(waiting, torch.cat(embedded), change)
            raise
        if waiting:
            self._put(waiting, torch.cat(embedded), change)
        return change

    def _present(self) -> set[tuple[str, bytes, str]]:
        digests = [row.tobytes() for row in self.digests.numpy()]
        return set(zip(self._paths, digests, self.identities, strict=True))

    def _put(self, entries: Sequence[tuple[Picture, bytes]], features: Tensor, change: Change) -> None:
        """Write embedded pictures. A path that is there already is replaced (by another process meanwhile, too)."""
        with self._newest():
            if self.header["dtype"] == "int8" and self.header["scale"] is None:
                self.header["scale"] = self.extractor().scale or scale_of(features)
            place = {path: i for i, path in enumerate(self._paths)}
            stored, keys = self.stored(features), [self._stored_path(picture.path) for picture, _ in entries]
            new = {key: i for i, key in enumerate(keys) if key not in place}  # of one path twice the last
            there_already = self._present()  # by another process
            old = {place[key]: i for i, key in enumerate(keys) if key in place
                   and (key, entries[i][1], entries[i][0].identity) not in there_already}
            digests = torch.tensor([list(digest) for _, digest in entries], dtype=torch.uint8)
            change.present += sum(key in place and place[key] not in old for key in keys)
            if old:
                there, own = list(old), list(old.values())
                self.features, self.digests = self.features.clone(), self.digests.clone()
                self.features[there], self.digests[there] = stored[own], digests[own]
                for i, j in old.items():
                    self.identities[i] = entries[j][0].identity
            chosen = list(new.values())
            self.features = torch.cat([self.features, stored[chosen]])
            self.digests = torch.cat([self.digests, digests[chosen]])
            self.identities += [entries[i][0].identity for i in chosen]
            self._paths += list(new)
            change.added, change.replaced = change.added + len(new), change.replaced + len(old)
            if self.header["scale"] is not None:
                change.values += features.numel()
                change.clipped += int((features.abs() > 127.5 * self.header["scale"]).sum())

    def remove(self, identities: Iterable[str]) -> int:
        """Take all pictures of these identities out; how many these were. Raises UserError, and removes none, where one of
        them is not in the index."""
        gone = set(identities)
        with self._newest():
            known = set(self.identities)
            for name in sorted(gone - known):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise UserError(f"no identity '{name}' among the {len(known):,} of {self.path}{hint}")
            keep = [i for i, name in enumerate(self.identities) if name not in gone]
            removed = len(self.identities) - len(keep)
            self.features, self.digests = self.features[keep], self.digests[keep]
            self.identities, self._paths = ([values[i] for i in keep] for values in (self.identities, self._paths))
        return removed

    def validation(self, name: str, root: str | None = None, rate: float = 1e-3) -> tuple[list[Picture], str]:
        """What :meth:`calibrate` would take, and what to call it: to be asked before long work. Raises UserError as
        :func:`validation_pictures` and :func:`require_pairs`."""
        pictures, source = validation_pictures(name, root, self.extractor())
        if not pictures:
            raise UserError(f"--validation {name}: there are no labelled pictures")
        require_pairs([picture.identity for picture in pictures], [picture.camera for picture in pictures], rate)
        return pictures, source

    def calibrate(self, name: str, root: str | None = None, rate: float = 1e-3) -> Threshold:
        """Measure and keep the threshold by which pictures match: see :func:`validation_pictures` and
        :func:`threshold_of`. In the form that the index stores."""
        extractor = self.extractor()
        pictures, source = self.validation(name, root, rate)
        features, kept, unreadable = extractor.embed([picture.path for picture in pictures])
        for path in unreadable:
            say(f"left out, as it cannot be read: {path}")
        chosen = [pictures[i] for i in kept]
        if self.header["dtype"] == "int8" and self.header["scale"] is None:
            raise UserError(f"{self.path} is empty and its int8 scale not known: add pictures first")
        stored = self.stored(features)
        found = threshold_of(stored if stored.dtype is torch.int8 else stored.float(), [p.identity for p in chosen],
                             [p.camera for p in chosen], rate, self.header["scale"])
        threshold = Threshold(**{**asdict(found), "source": source})
        with self._newest():
            self.header["threshold"] = asdict(threshold)
        return threshold

    # ------------------------------------------------------------------------------------ asking it
    def search(
        self, query: Sequence[str | Path] | Tensor, top: int = 10, by: str = "image", engine: str = "auto"
    ) -> list[list[Match]]:
        """The ``top`` nearest pictures of each query, or with ``by`` "identity" the nearest picture of each of the nearest
        identities. A query is a picture's path, or a row of features N x D.

        ``engine``: "exact"; "hnsw", a graph by faiss (approximate) that is made on first use and kept beside the index; or
        "auto": the graph where there is one of this edition, the gallery is large, and queries and answers are few.
        """
        if by not in ("image", "identity"):
            raise unknown("by", by, ("image", "identity"))
        if top < 1:
            raise UserError(f"top={top}: allowed is 1 or more")
        if not len(self):
            raise UserError(f"{self.path} holds no pictures: add some with `autoreid index DIR --out {self.path} --add`")
        features = query.float() if isinstance(query, Tensor) else self._embedded(query)
        if features.shape[1] != self.header["dims"]:
            raise UserError(f"the query has {features.shape[1]} dims, {self.path} has {self.header['dims']}")
        gallery, depth = self._engine(engine, len(features), top), min(top, len(self))
        while True:
            found = gallery.search(features, depth)
            if (found.indices < 0).any():  # a graph that was searched to its end
                gallery = self._exact()
                continue
            lists = [self._first(row, top, by) for row in found.indices]
            if depth == len(self) or by == "image" or all(len(chosen) >= top for chosen in lists):
                break
            depth = min(4 * depth, len(self))
            if depth > GRAPH_DEPTH:
                gallery = self._exact()
        asked = self.floats(self.stored(features)) if self.header["dtype"] == "int8" else features
        return [self._matches(asked[i], found.indices[i][chosen], found.distances[i][chosen])
                for i, chosen in enumerate(lists)]

    def _embedded(self, paths: Sequence[str | Path]) -> Tensor:
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"no picture at {path}")
        features, _, unreadable = self.extractor().embed([str(path) for path in paths])
        if unreadable:
            raise UserError(f"{unreadable[0]} cannot be read as a picture: give a .jpg, .png, .bmp or .webp file")
        return features

    def _first(self, indices: np.ndarray, top: int, by: str) -> list[int]:
        """Places of a row of the nearest: the first ``top``, of each identity the nearest only where identities are asked
        for."""
        if by == "image":
            return list(range(min(top, len(indices))))
        first: dict[str, int] = {}
        for place, i in enumerate(indices.tolist()):
            first.setdefault(self.identities[i], place)
        return list(first.values())[:top]

    def _matches(self, query: Tensor, indices: np.ndarray, distances: np.ndarray) -> list[Match]:
        vectors = self.floats(self.features[torch.from_numpy(indices)]).double()
        lengths = vectors.norm(dim=1) * query.double().norm()
        cosines = torch.where(lengths > 0, vectors @ query.double() / lengths.clamp(min=1e-300), 0).tolist()
        limit, own = self.threshold, self._own_folder()
        return [
            Match(rank, self.identities[i], str(own / self._paths[i]), float(distance), cosine,
                  None if limit is None else bool(distance <= limit.distance))
            for rank, (i, distance, cosine) in enumerate(zip(indices.tolist(), distances, cosines, strict=True), start=1)
        ]

    # ------------------------------------------------------------------------------------ by which means
    def chosen_engine(self, engine: str, queries: int, top: int = 1) -> str:
        """What "auto" stands for. Raises UserError: an unknown engine, a graph of an int8 index."""
        if engine not in ENGINES:
            raise unknown("engine", engine, ENGINES)
        if engine == "hnsw" and self.header["dtype"] == "int8":
            raise UserError(f"{self.path} is stored in int8, which is searched exactly: --engine exact; a graph needs an "
                            "index of --dtype float32 or float16")
        if engine != "auto":
            return engine
        few_of_many = len(self) >= HNSW_FROM and queries <= HNSW_QUERIES and top <= GRAPH_DEPTH
        if not few_of_many or self.header["dtype"] == "int8":
            return "exact"
        return "hnsw" if self._graph is not None or self._graph_path().exists() else "exact"

    def _engine(self, engine: str, queries: int, top: int) -> Gallery:
        return self._hnsw() if self.chosen_engine(engine, queries, top) == "hnsw" else self._exact()

    def _exact(self) -> Gallery:
        if self._gallery is None:
            codes = self.header["dtype"] == "int8"
            self._gallery = Int8Gallery(self.features, self.header["scale"]) if codes else FloatGallery(self.features)
        return self._gallery

    def _graph_path(self) -> Path:
        """The graph of this very edition: the id tells it from one that a copy of the file came to."""
        return self.path.with_name(f"{self.path.name}.{self.header['id'][:8]}-{self.header['edition']}.hnsw")

    def _graphs(self) -> list[Path]:
        return self._beside(re.escape(f"{self.path.name}.") + r"[0-9a-f]{8}-\d+\.hnsw")

    def _beside(self, name: str) -> list[Path]:
        return [path for path in self.path.parent.iterdir() if re.fullmatch(name, path.name)]

    def _hnsw(self) -> FaissGallery:
        if self._graph is None:
            faiss, path = import_faiss(), self._graph_path()
            if path.exists():
                with suppress(RuntimeError):  # damaged: made again
                    self._graph = FaissGallery(faiss.read_index(str(path)))
            if self._graph is None:
                say(f"making the graph of {len(self):,} pictures: {path}")
                self._graph = faiss_hnsw(self.features)
                for old in self._graphs():
                    old.unlink(missing_ok=True)
                with whole_file(path) as temporary:
                    faiss.write_index(self._graph.index, str(temporary))
        return self._graph
