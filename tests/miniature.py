"""Miniature copies of every real dataset's layout, written from the published naming rules and nothing else.

Each writer puts a few images under ``root``, in the folder the set unpacks to, with what archivers and file managers
leave behind, and returns that folder. Nothing here comes from ``autoreid.data``: these are what it must understand.
Every copy is sound: each training identity has two images, each query a match by another camera.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

MESS = ("Thumbs.db", ".DS_Store", "._0002_c1s1_000451_03.jpg", "readme.txt")
MARKET = {
    "bounding_box_train": [
        "0002_c1s1_000451_03.jpg", "0002_c2s1_000451_01.jpg", "0007_c3s3_000001_01.jpg", "0007_c4s3_000101_01.jpg",
    ],
    "query": ["0001_c1s1_000151_00.jpg", "0003_c6s1_000151_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg", "-1_c2s1_000401_03.jpg", "0000_c1s1_000151_01.jpg",
        "0001_c1s1_000176_01.jpg", "0001_c2s1_000151_01.jpg", "0003_c5s1_000176_01.jpg",
    ],
}  # fmt: skip
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c8_f0046302.jpg"],
    "query": ["0005_c2_f0046985.jpg"],
    "bounding_box_test": ["0005_c1_f0051341.jpg", "0005_c2_f0047105.jpg", "0006_c3_f0000001.jpg"],
}
VERI = {
    "image_train": ["0001_c001_00016450_0.jpg", "0001_c020_00016460_0.jpg"],
    "image_query": ["0002_c002_00030600_0.jpg", "0005_c011_00064720_0.jpg"],
    "image_test": [
        "0002_c002_00030600_0.jpg", "0002_c002_00030605_1.jpg", "0002_c013_00030630_0.jpg",
        "0005_c003_00077625_0.jpg", "0005_c011_00064720_0.jpg", "0005_c013_00077650_0.jpg",
    ],
}  # fmt: skip
CUHK03_NP = {
    "detected": {
        "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png"],
        "query": ["0004_c1_3.png", "0004_c2_8.png"],
        "bounding_box_test": ["0004_c1_1.png", "0004_c2_6.png"],
    },
    "labeled": {
        "bounding_box_train": ["0001_c1_1.png", "0001_c1_2.png", "0001_c2_6.png"],
        "query": ["0004_c1_3.png", "0004_c2_8.png"],
        "bounding_box_test": ["0004_c1_1.png", "0004_c2_6.png"],
    },
}
MSMT17 = {  # list: lines; a dataset of its own each
    "list_train.txt": ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0000/0000_001_15_0303noon_0016_0.jpg 0",
                       "0001/0001_000_03_0113afternoon_0001_1.jpg 1", "0001/0001_001_04_0113afternoon_0002_0.jpg 1"],
    "list_val.txt": ["0000/0000_002_09_0303morning_0017_0.jpg 0"],
    "list_query.txt": ["0000/0000_000_01_0114morning_0301_0.jpg 0"],
    "list_gallery.txt": ["0000/0000_001_02_0114noon_0302_2.jpg 0", "0002/0002_000_05_0114noon_0001_0_ex.jpg 2"],
}  # fmt: skip
VEHICLEID_TRAIN = ["0000001 0", "0000002 0", "0000101 7", "0000102 7"]
VEHICLEID_TEST = ["0000201 3", "0000202 3", "0000203 3", "0000301 9", "0000302 9"]
VERI_WILD = {
    "train_list": ["00003/000010", "00003/000011"],
    "query": ["00001/000001"],
    "gallery": ["00001/000002", "00001/000003", "00002/000004"],
}
VERI_WILD_CAMERAS = {
    "00001/000001": 52, "00001/000002": 52, "00001/000003": 174, "00002/000004": 7, "00003/000010": 1, "00003/000011": 2,
}  # fmt: skip
VRIC = {  # folder: (list, lines)
    "train_images": ("vric_train.txt", ["00001.jpg 0 3", "00002.jpg 0 40", "00003.jpg 5 3", "00004.jpg 5 119"]),
    "probe_images": ("vric_probe.txt", ["00001.jpg 2 8", "00002.jpg 3 9"]),
    "gallery_images": ("vric_gallery.txt", ["00001.jpg 2 10", "00002.jpg 3 11"]),
}


def jpeg(colour: tuple[int, int, int] = (90, 40, 20), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 16), colour).save(file, kind)
    return file.getvalue()


JPEG, PNG = jpeg(), jpeg(kind="PNG")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG if path.suffix == ".png" else JPEG)


def mess(folder: Path) -> None:
    """What is left in a folder by Windows, macOS and their archivers; none of it is an image of the set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MESS:
        (folder / name).write_bytes(JPEG)
    image(folder / "__MACOSX" / "._0001_c1s1_000151_00.jpg")


def text(path: Path, lines: list[str], end: str = "\r\n") -> None:
    """A list as Windows writes it: CRLF, and an empty line at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end + end).encode())


def folders(folder: Path, files: dict[str, list[str]], parts: list[str] | None = None) -> Path:
    """A set whose file names say everything; ``parts`` limits which of its folders are there."""
    for directory, names in files.items():
        if parts is None or directory in parts:
            for name in names:
                image(folder / directory / name)
            mess(folder / directory)
    return folder


def market(root: Path) -> Path:
    return folders(root / "Market-1501-v15.09.15", MARKET)


def market_500k(root: Path, images: str = "images") -> Path:
    folder = market(root)
    for name in ("00000001.jpg", "0000_c3s1_000001_00.jpg"):
        image(folder / images / name)
    mess(folder / images)
    return folder


def duke(root: Path) -> Path:
    return folders(root / "DukeMTMC-reID", DUKE)


def veri(root: Path) -> Path:
    """With the authors' lists of names and of good and junk rows; the query image itself lies in the gallery as junk."""
    folder = folders(root / "VeRi", VERI)
    text(folder / "name_query.txt", VERI["image_query"])
    text(folder / "name_test.txt", VERI["image_test"])
    (folder / "gt_index.txt").write_text("3 \n4 6 \n")
    (folder / "jk_index.txt").write_text("1 2 \n5 \n")
    return folder


def cuhk03_np(root: Path) -> Path:
    for flavour, files in CUHK03_NP.items():
        folders(root / "cuhk03-np" / flavour, files)
    return root / "cuhk03-np"


def raw_pixels(pair: int, person: int, number: int) -> np.ndarray:
    """An image that is no other's, neither turned nor mirrored: 6 high, 4 wide."""
    pixels = np.zeros((6, 4, 3), np.uint8)
    pixels[..., 0] = np.arange(6)[:, None] * 10
    pixels[..., 1] = np.arange(4)[None] * 10
    pixels[..., 2] = pair * 40 + person * 10 + number
    return pixels


def raw_images(flavour: str) -> list[tuple[int, int, int]]:
    """(pair, person, number) of each image: 1 to 5 by the first camera, 6 to 10 by the second; a few are missing."""
    numbers = (1, 5, 6) if flavour == "detected" else (1, 5, 6, 7)
    return [(pair, person, n) for pair, people in ((1, 2), (2, 1)) for person in range(1, people + 1) for n in numbers]


def cuhk03_raw(root: Path, release: str = "cuhk03_release/", config: str = "", folder: str = "cuhk03") -> Path:
    """cuhk-03.mat as MATLAB writes it (cells of references, axes reversed) and the new protocol's two files."""
    import h5py
    from scipy.io import savemat

    folder = root / folder
    (folder / release).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / release / "cuhk-03.mat", "w") as file:

        def stored(array):
            name = f"#refs#/{len(file.get('#refs#', ())):x}"
            file.create_dataset(name, data=array)
            return file[name].ref

        def cell(references):
            array = np.empty(np.shape(references), h5py.ref_dtype)
            for place in np.ndindex(array.shape):
                item = references
                for i in place:
                    item = item[i]
                array[place] = item
            return array.T

        for flavour in ("detected", "labeled"):
            there = set(raw_images(flavour))
            pairs = []
            for pair, people in ((1, 2), (2, 1), (3, 0), (4, 0), (5, 0)):
                rows = [
                    [
                        stored(raw_pixels(pair, p, n).T if (pair, p, n) in there else np.zeros(2, np.uint64))
                        for n in range(1, 11)
                    ]
                    for p in range(1, people + 1)
                ]
                pairs.append(stored(cell(rows) if rows else np.empty((10, 0), h5py.ref_dtype)))
            file.create_dataset(flavour, data=cell([[reference] for reference in pairs]))
        sets = [stored(np.array([[1, 1 + i % 2]], float).T) for i in range(20)]  # the two people of pair 1 in turn
        file.create_dataset("testsets", data=cell([[reference] for reference in sets]))
    for flavour in ("detected", "labeled"):
        images = raw_images(flavour)
        names = np.empty((len(images), 1), object)
        names[:, 0] = [f"{pair}_{person:03d}_{1 if n < 6 else 2}_{n:02d}.png" for pair, person, n in images]
        labels = [{(1, 1): 3, (1, 2): 1, (2, 1): 2}[pair, person] for pair, person, _ in images]  # not in their order
        rows = {label: [i for i, found in enumerate(labels, start=1) if found == label] for label in (1, 2, 3)}
        savemat(folder / config / f"cuhk03_new_protocol_config_{flavour}.mat", {
            "train_idx": np.array([rows[1] + rows[2]], np.uint16).T, "query_idx": np.array([rows[3][:1]], np.uint16).T,
            "gallery_idx": np.array([rows[3][1:]], np.uint16).T, "labels": np.array([labels], np.uint16).T,
            "filelist": names, "camId": np.array([[1 if n < 6 else 2 for _, _, n in images]], np.uint8).T,
        })  # fmt: skip
    return folder


def msmt17(root: Path, edition: str = "V1", folder: str | None = None, lists: str = ".", end: str = "\r\n") -> Path:
    """V1 or V2, the four lists in the folder or (``lists`` "..") above it."""
    place = root / (folder or f"MSMT17_{edition}")
    train, test = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}[edition]
    for name, lines in MSMT17.items():
        text(place / lists / name, lines, end)
        images = train if name in ("list_train.txt", "list_val.txt") else test
        for line in lines:
            image(place / images / line.split(" ")[0])
        mess(place / images)
    return place


def vehicleid(root: Path, folder: str = "VehicleID_V1.0") -> Path:
    folder = root / folder
    text(folder / "train_test_split" / "train_list.txt", VEHICLEID_TRAIN)
    for size in (800, 1600, 2400, 3200, 6000, 13164):
        text(folder / "train_test_split" / f"test_list_{size}.txt", VEHICLEID_TEST)
    for line in VEHICLEID_TRAIN + VEHICLEID_TEST:
        image(folder / "image" / f"{line.split(' ')[0]}.jpg")
    mess(folder / "image")
    return folder


def veri_wild(root: Path, folder: str = "VERI-Wild", ending: str = "") -> Path:
    folder = root / folder
    split = folder / "train_test_split"
    lists = {"train_list.txt": VERI_WILD["train_list"]}
    for size in (3000, 5000, 10000):
        lists |= {f"test_{size}_query.txt": VERI_WILD["query"], f"test_{size}.txt": VERI_WILD["gallery"]}
    for name, lines in lists.items():
        text(split / name, [line + ending for line in lines])
    rows = [f"{name};{camera};2018-03-06 12:10:00;宝马;SUV;白" for name, camera in VERI_WILD_CAMERAS.items()]
    (split / "vehicle_info.txt").write_bytes(
        "\r\n".join(["id/image;Camera ID;Time;Model;Type;Color", *rows, ""]).encode("gb2312")
    )
    for name in VERI_WILD_CAMERAS:
        image(folder / "images" / f"{name}.jpg")
    mess(folder / "images")
    return folder


def vric(root: Path, folder: str = "VRIC") -> Path:
    folder = root / folder
    for images, (listed, lines) in VRIC.items():
        text(folder / listed, lines)
        for line in lines:
            image(folder / images / line.split(" ")[0])
        mess(folder / images)
    return folder


def mars(root: Path, folder: str = "MARS") -> Path:
    """Tracklets of two and three frames; 00-1 is junk, 0000 a distractor."""
    from scipy.io import savemat

    folder = root / folder
    tracks = {
        "train": [("0001", 1, 1, 2), ("0001", 2, 1, 3)],
        "test": [("00-1", 1, 1, 2), ("0000", 3, 1, 2), ("0002", 1, 1, 2), ("0002", 5, 2, 3), ("0004", 6, 1, 2),
                 ("0004", 2, 1, 2)],
    }  # fmt: skip
    for side, listed in tracks.items():
        names, rows = [], []
        for person, camera, track, frames in listed:
            first = len(names) + 1
            names += [f"{person}C{camera}T{track:04d}F{frame:03d}.jpg" for frame in range(1, frames + 1)]
            rows.append([first, len(names), int(person.lstrip("0") or "0"), camera])
        text(folder / "info" / f"{side}_name.txt", names)
        savemat(folder / "info" / f"tracks_{side}_info.mat", {f"track_{side}_info": np.array(rows, np.int32)})
        for name in names:
            image(folder / f"bbox_{side}" / name[:4] / name)
        mess(folder / f"bbox_{side}")
    savemat(folder / "info" / "query_IDX.mat", {"query_IDX": np.array([[3, 5]], np.uint16)})
    return folder


def own_folder(root: Path, cameras: bool = True) -> Path:
    """Four people, each three times by two cameras, and junk."""
    for name in ("anna", "bert", "carl", "dora"):
        for shot, camera in enumerate((1, 1, 2)):
            image(root / name / (f"{name}_c{camera}_{shot}.jpg" if cameras else f"{name}-{shot}.jpg"))
        mess(root / name)
    image(root / "-1" / ("bad_c1_0.jpg" if cameras else "bad.jpg"))
    mess(root)
    return root


def own_csv(root: Path, delimiter: str = ",", name: str = "list.csv", cameras: bool = True) -> Path:
    rows = [
        ("a/1.jpg", "anna", "north", "train"), ("a\\2.jpg", "anna", "south", "train"), ("b/1.jpg", "0", "north", "query"),
        ("b/2.jpg", "0", "south", "gallery"), ("b/3.jpg", "-1", "south", "gallery"),
    ]  # fmt: skip
    columns = ["path", "identity", "camera", "split"]
    lines = [delimiter.join(columns), *(delimiter.join(row) for row in rows)]
    if not cameras:
        lines = [delimiter.join(row[:2] + row[3:]) for row in [tuple(columns), *rows]]
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(("\r\n".join(lines) + "\r\n").encode("utf-8-sig"))
    for path, *_ in rows:
        image(root / path.replace("\\", "/"))
    return root / name


WRITERS = {
    "market": market,
    "market+500k": market_500k,
    "duke": duke,
    "veri": veri,
    "cuhk03/detected": cuhk03_np,
    "cuhk03/labeled": cuhk03_np,
    "cuhk03/detected-classic-0": cuhk03_raw,
    "msmt17": msmt17,
    "msmt17/train+val": msmt17,
    "vehicleid/test-800": vehicleid,
    "veri-wild/test-3000": veri_wild,
    "vric": vric,
    "mars": mars,
    "folder": own_folder,
    "csv": own_csv,
}
