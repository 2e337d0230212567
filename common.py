"""What the scripts share: command line, data, files, scores, training and figures, glyphs.

It knows nothing of models. In this order: the command line, a run, data sets, pictures, rows,
files, scores, training, figures, glyphs.
"""
import argparse
import contextlib
import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Letters: N images, C×H×W image, K classes.  y integer labels (N,), q probabilities (N,K).
FORMAT = 3                              # of the .pt files; a newer one is refused
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
               "emnist-letters": "EMNIST", "emnist-balanced": "EMNIST", "usps": "USPS",
               "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


# ---- the command line -----------------------------------------------------------------------

class Mistake(Exception):
    """A user's mistake, told in one line that names the remedy."""


def require(ok, message):
    if not ok:
        raise Mistake(message)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands; a default only where there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            words = " ".join(str(value) for value in action.default)
            return f"{action.help} (default: {words})"
        return super()._get_help_string(action)


def flags(script: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share."""
    parser = argparse.ArgumentParser(script, description=doc, formatter_class=Help)

    def refuse(message):
        parser.exit(2, f"{script}: {message}; see {script} --help\n")

    parser.error = refuse
    parser.set_defaults(script=script, writes=True)
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--dataset", metavar="NAME|FOLDER|FILE.npz",
        help="glyphs (embedded), a folder of images, an .npz file, or one of "
        + " ".join(TORCHVISION)
        + "; if not given, the one that vae.pt was made from, else glyphs")
    add("--data-dir", metavar="FOLDER",
        help="where named data sets are kept; if not given, as for vae.pt, else data")
    add("--image-size", type=number(int, 16, 64), default=32, metavar="PIXELS",
        help="side to which the images of a folder are scaled")
    add("-o", "--out", type=Path, metavar="FOLDER",
        help="working directory; if not given, runs/<name of the data set>")
    add("--seed", type=number(int, 0, 2**32), default=0, help="seed of every random choice")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where to compute; auto is cuda if there is one, else cpu")
    add("--threads", type=number(int, 1),
        help="processor threads; if not given, all of them, or one per process of compare.py")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16, or never; if not given, where the hardware is fast at it")
    add("--quiet", action="store_true", help="print results only, no progress")
    return parser


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float within [low, high]."""
    def parse(text):
        value = kind(text)              # argparse turns a ValueError into a line
        if low <= value <= high and value != math.inf:          # NaN fails the first test
            return value
        raise argparse.ArgumentTypeError(f"{text} is not within [{low}, {high}]")

    parse.__name__ = kind.__name__
    return parse


def run_script(command, args) -> int:
    """command(run, args) -> 0; a mistake in one line -> 2; an interruption -> 130."""
    run = None
    try:
        run = start(args)
        command(run, args)
        return 0
    except (KeyboardInterrupt, BrokenPipeError):        # or the reader of a pipe has gone
        message = "interrupted; what was finished is kept"
        code = 130
    except (Mistake, FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        message = explain(error, args.out)
        code = 2
        if message is None:
            raise
    finally:
        if run:
            run.release()
    print(f"{args.script}: {' '.join(message.split())}", file=sys.stderr)
    return code


def explain(error, out) -> str | None:
    """What a user can do about an error; None where the fault is the program's own."""
    text = str(error)
    if isinstance(error, (Mistake, FloatingPointError)):
        return text
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or text}; mend that"
    if "no kernel image" in text:       # a GPU too old or too new for this torch
        return "this torch has no code for this GPU; use --device cpu"
    # Out of memory has many names; an illegal access is a fault of the program.
    if "memory" in repr(error).lower() and "illegal memory" not in text:
        return "out of memory; use fewer or smaller images, or --device cpu"
    return None


# ---- a run: its folder, device and arithmetic -----------------------------------------------

def torchrun_rank():
    """This process and how many there are: 0 and 1, unless torchrun or its like started it."""
    try:
        rank = int(os.environ["RANK"])
        ranks = int(os.environ["WORLD_SIZE"])
        os.environ["MASTER_ADDR"]       # batch systems set the other two without it
    except (KeyError, ValueError):
        return 0, 1
    return rank, ranks


RANK, RANKS = torchrun_rank()


@dataclass
class Run:
    """One run of one script: where it works, how it computes, what it was asked for."""
    script: str
    out: Path
    device: torch.device
    amp: bool                           # bfloat16 where autocast allows it
    seed: int
    quiet: bool
    dataset: str | None                 # as given; after load_dataset, as used
    data_dir: str | None
    image_size: int
    settings: dict                      # every flag that can change a result
    cores: int                          # threads that torch would take by itself
    locks: list = field(default_factory=list)

    def release(self):
        """Let other runs into the folder."""
        for file in self.locks:
            file.close()


def start(args) -> Run:
    """Make the working directory, settle threads, device and arithmetic."""
    out = args.out = args.out or Path("runs", Path(args.dataset or "glyphs").stem)
    require(out.is_dir() or not out.exists(), f"{out} is a file; --out takes a folder")
    require(RANKS == 1 or args.script not in ("latent.py", "hybrids.py"),
            "start without torchrun")
    out.mkdir(parents=True, exist_ok=True)
    cores = torch.get_num_threads()     # or OMP_NUM_THREADS, which torchrun sets to 1
    torch.set_num_threads(args.threads or cores)
    keep_freed_memory()
    device = choose_device(args.device)
    amp = bfloat16_is_fast(device) if args.amp is None else args.amp
    locks = lock_folder(out) if args.writes else []
    return Run(args.script, out, device, amp, args.seed, args.quiet, args.dataset,
               args.data_dir, args.image_size, settings(args), cores, locks)


def settings(args) -> dict:
    """The flags that can change a result, for the files."""
    others = ("out script writes resume quiet export image point predict jobs gather").split()
    return {key: value for key, value in sorted(vars(args).items()) if key not in others}


def lock_folder(out: Path) -> list:
    """One run at a time works in a folder; torchrun's ranks are one run -> files to close."""
    shared = (out / ".lock").open("w")
    own = (out / f".lock-{RANK}").open("w")
    try:
        import fcntl
        alone = fcntl.LOCK_EX if RANKS == 1 else fcntl.LOCK_SH
        fcntl.flock(shared, fcntl.LOCK_NB | alone)
        fcntl.flock(own, fcntl.LOCK_NB | fcntl.LOCK_EX)
    except BlockingIOError:
        raise Mistake(f"another run works in {out}; wait, or give another --out") from None
    except (ImportError, OSError):      # Windows and some network drives have no such lock
        pass
    return [shared, own]


def keep_freed_memory():
    """Ask glibc to keep what is freed for the next step: fewer page faults, a tenth faster."""
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**29)           # for processes to come
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**25)
    if os.name != "posix":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)       # other C libraries lack it
    if mallopt:
        mallopt(-1, 2**29)              # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)              # M_MMAP_THRESHOLD


def choose_device(name: str) -> torch.device:
    """The device that --device names; on a machine of several cards the rank's own."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    require(there[name], f"--device {name}: there is none here; use --device cpu")
    if name != "cuda":
        return torch.device(name)
    card = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    return torch.device("cuda", card)


def bfloat16_is_fast(device) -> bool:
    """Does the hardware multiply in bfloat16? A torch that cannot tell says no."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return torch.cpu._is_avx512_bf16_supported()
    return False


def require_memory(size, what):
    """Refuse what takes more bytes than the machine has, before the system kills somebody."""
    if os.name != "posix":
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(size < there, f"{what} needs {size / 2**30:.1f} GiB of memory, and this machine "
            f"has {there / 2**30:.1f}; use fewer or smaller images")


# ---- data sets ------------------------------------------------------------------------------

@dataclass
class Dataset:
    """Images uint8 (N,C,H,W), labels int64 (N,) in 0..K-1, and the same for test."""
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    name: str
    validation: torch.Tensor | None = None      # rows that the set itself puts aside
    source: dict = field(default_factory=dict)  # spec, data_dir, image_size: to load it again

    def tensors(self):
        return self.images, self.labels, self.test_images, self.test_labels

    def facts(self) -> dict:
        """What a file says of its data set: enough to load it again, and to know it again."""
        marks = [fingerprint(part.cpu().numpy().tobytes()) for part in self.tensors()]
        border = self.images[:, :, [0, -1]].float().mean((1, 2, 3))     # top and bottom rows
        return {"name": self.name, **self.source, "shape": list(self.images.shape[1:]),
                "classes": self.classes, "images": len(self.images),
                "light": (border > 127).float().mean().item(),
                "test_images": len(self.test_images),
                "fingerprint": fingerprint("".join(marks).encode())}


def load_dataset(run: Run, upstream=None) -> Dataset:
    """The data set that --dataset names, or the one that the `upstream` file was made from."""
    known = upstream["dataset"] if upstream else {}
    if run.dataset in (None, known.get("spec")):        # scaled as it was for vae.pt
        run.image_size = known.get("image_size", run.image_size)
    run.dataset = run.dataset or known.get("spec", "glyphs")
    run.data_dir = run.data_dir or known.get("data_dir", "data")
    run.settings.update(dataset=run.dataset, data_dir=run.data_dir, image_size=run.image_size)

    data = open_dataset(run.dataset, run.data_dir, run.image_size, run.out)
    check(data, run.image_size)
    data.source = {"spec": run.dataset, "data_dir": run.data_dir, "image_size": run.image_size}
    if known:
        require(data.facts()["fingerprint"] == known["fingerprint"],
                f"{run.out}/vae.pt was made from other images than {run.dataset}; "
                f"make it with: {command_for(run, 'vae.pt')}")
    data.images = data.images.to(run.device)
    data.labels = data.labels.to(run.device)
    data.test_images = data.test_images.to(run.device)
    data.test_labels = data.test_labels.to(run.device)
    return data


def open_dataset(spec: str, data_dir: str, side: int, cache: Path) -> Dataset:
    """Read the data set `spec`; the pictures of a folder are scaled to `side`, once."""
    if spec == "glyphs":
        return glyphs()
    if spec.endswith(".npz"):
        return npz_dataset(Path(spec))
    if spec in TORCHVISION:
        return torchvision_dataset(spec, data_dir)
    if Path(spec).is_dir():
        return folder_dataset(Path(spec), side, cache)
    near = difflib.get_close_matches(spec, ["glyphs", *TORCHVISION], 1)
    hint = f"did you mean {near[0]}?" if near else "names: glyphs " + " ".join(TORCHVISION)
    raise Mistake(f"no data set or folder {spec!r}; {hint}")


def check(data: Dataset, side: int):
    """The one door that every data set passes: labels become 0..K-1, sides at most 64."""
    x, y, x_test, y_test = data.tensors()

    def expect(ok, message):
        require(ok, f"{data.name}: {message}")

    expect(len(x) == len(y) and len(x_test) == len(y_test),
           "images and labels differ in number")
    expect(len(y) and len(y_test), "no images for training, or none for test")
    expect(x.shape[1:] == x_test.shape[1:], "training and test images differ in shape")
    values = y.unique()
    unknown = sorted(set(y_test.tolist()) - set(values.tolist()))
    expect(not unknown, f"labels {unknown[:5]} are in test but not in training")
    expect(len(values) > 1, "only one class; percentages need two or more")
    names = data.classes or values.tolist()
    if len(names) > len(values) and set(values.tolist()) <= set(range(len(names))):
        names = [names[value] for value in values.tolist()]     # some classes have no image
    expect(len(names) == len(values), f"{len(names)} names for {len(values)} classes")

    data.classes = [str(name) for name in names]
    data.labels = torch.searchsorted(values, y)
    data.test_labels = torch.searchsorted(values, y_test)
    if max(x.shape[2:]) > 64 or min(x.shape[2:]) < 16:
        data.images = resize(x, (side, side))
        data.test_images = resize(x_test, (side, side))


def torchvision_datasets():
    """The module torchvision.datasets."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise Mistake(f"torchvision cannot be imported ({error}); it must be of torch's "
                      "build: pip install --upgrade --force-reinstall torch torchvision"
                      ) from None
    return datasets


def torchvision_dataset(name: str, root: str) -> Dataset:
    """One of torchvision.datasets, downloaded only if it is not on disk."""
    train = torchvision_part(name, root, train=True)
    test = torchvision_part(name, root, train=False)
    tensors = []
    for part in (train, test):
        x = as_images(np.asarray(part.data))
        if name.startswith("emnist"):   # its images are stored lying down
            x = x.transpose(2, 3).contiguous()
        y = part.labels if name == "stl10" else part.targets
        tensors += [x, torch.as_tensor(y).long()]
    classes = [label.split(" - ")[0] for label in getattr(test, "classes", [])]
    return Dataset(*tensors, classes or None, name)


def torchvision_part(name: str, root: str, train: bool):
    """The training or the test part of a data set of torchvision."""
    kind = getattr(torchvision_datasets(), TORCHVISION[name])
    keywords = {"train": train}
    if name == "stl10":
        keywords = {"split": "train" if train else "test"}
    if name.startswith("emnist"):
        keywords["split"] = name.removeprefix("emnist-")
    try:
        return kind(root, **keywords, download=False)
    except Exception:                   # each kind has its own way to say that it is not there
        print(f"{name} is not in {root}: downloading it", file=sys.stderr)
    try:
        return kind(root, **keywords, download=True)
    except Exception as error:          # each mirror has its own ways to fail
        raise Mistake(f"{name} is not in {root}, and downloading failed ({error}); put its "
                      f"files into {root}, as torchvision.datasets.{kind.__name__} does, "
                      "or use --dataset glyphs meanwhile") from None


def npz_dataset(path: Path) -> Dataset:
    """x_train y_train x_test y_test [classes]; images (N,H,W), (N,H,W,C) or (N,C,H,W)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            size = sum(part.file_size for part in file.zip.infolist())
            require_memory(2 * size, path)
            x = as_images(file["x_train"])
            x_test = as_images(file["x_test"])
            y = as_labels(file["y_train"])
            y_test = as_labels(file["y_test"])
            classes = file["classes"].tolist() if "classes" in file.files else None
    except Exception as error:          # zip, zlib and numpy have many
        raise Mistake(f"{path}: {error}; make it with numpy.savez(path, x_train=..., "
                      "y_train=..., x_test=..., y_test=..., [classes=...])") from None
    return Dataset(x, y, x_test, y_test, classes, path.stem)


def as_labels(array) -> torch.Tensor:
    """An array of whole numbers -> int64 (N,)."""
    require((array % 1 == 0).all(), "labels must be whole numbers")
    return torch.from_numpy(array.astype(np.int64).reshape(-1))


def as_images(array) -> torch.Tensor:
    """An array of images -> uint8 (N,C,H,W). Pixels are in [0,1], or else in [0,255]."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    require(array.ndim == 4 and array.shape[1] in (1, 3),
            f"images of shape {array.shape}; wanted (N,H,W) or (N,H,W,1 or 3)")
    if array.size and (array.dtype != np.uint8 or array.max() <= 1):
        require(array.min() >= 0 and array.max() <= 255,
                "pixels that are NaN or outside [0, 255]")
        scale = 255.0 if array.max() <= 1 else 1.0
        array = (array * scale).round().astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(array))


def folder_dataset(root: Path, side: int, cache: Path) -> Dataset:
    """root/train/<class>/* and root/test/<class>/*; or <class>/*, a fifth of it for test."""
    datasets = torchvision_datasets()
    folders = [folder for folder in (root / "train", root / "test") if folder.is_dir()]
    require(folders != [root / "test"], f"{root}: there is test/ but no train/")

    def is_image(file):
        return file.lower().endswith(IMAGE_FILES)

    try:
        parts = [datasets.ImageFolder(str(folder), is_valid_file=is_image)
                 for folder in folders or [root]]
    except FileNotFoundError as error:
        raise Mistake(f"{root}: {error}; wanted one subfolder a class, images in each"
                      ) from None
    classes = parts[0].classes
    require(set(classes) >= set(parts[-1].classes),
            f"{root}: test/ has classes that train/ has not")
    files = []
    labels = []
    for part in parts:
        for file, label in part.samples:
            files.append(file)
            labels.append(classes.index(part.classes[label]))
    labels = torch.tensor(labels)
    images = read_once(files, side, cache, root)
    if len(parts) == 2:
        rows = torch.arange(len(files))
        first, last = rows.split([len(parts[0].samples), len(parts[1].samples)])
    else:                               # the fifth does not depend on --seed: test stays test
        first, last = hold_out(labels, torch.arange(len(files)), 0.2)
    return Dataset(images[first], labels[first], images[last], labels[last], classes,
                   root.name)


def read_once(files: list, side: int, cache: Path, root: Path) -> torch.Tensor:
    """uint8 (N,C,side,side) of picture files: decoded once, then mapped into memory."""
    stats = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]
    mark = fingerprint(json.dumps([FORMAT, side, stats]).encode())
    stored = cache / f"images-{mark}.npy"
    if not stored.exists():
        print(f"reading {len(files):,} images", file=sys.stderr)
        grey = all(is_grey(file) for file in files)
        shape = (len(files), 1 if grey else 3, side, side)
        require_memory(2 * math.prod(shape), root)
        temporary = cache / f"images.{RANK}.tmp"
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        try:
            with temporary.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, header)
                for file in files:
                    out.write(read_image(file, side, grey).tobytes())
            os.replace(temporary, stored)
        finally:
            temporary.unlink(missing_ok=True)
    return torch.from_numpy(np.load(stored, mmap_mode="c"))


# ---- pictures -------------------------------------------------------------------------------

@contextlib.contextmanager
def open_picture(path):
    """A PIL image; whatever is wrong with the file becomes one line that names it."""
    from PIL import Image
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Mistake(f"{path} cannot be read as an image ({error}); mend or remove it"
                      ) from None


def is_grey(path) -> bool:
    with open_picture(path) as picture:
        return picture.mode[0] in "1LIF"


def read_image(path, side: int, grey=False):
    """The middle square of a picture, uint8 (C,side,side), upright, on white."""
    from PIL import Image, ImageOps
    with open_picture(path) as picture:
        picture.draft(None, (2 * side, 2 * side))    # large JPEGs are decoded at reduced scale
        if picture.mode[0] in "IF":                     # 16 bits: keep the high byte
            deep = np.asarray(picture, dtype=np.float32) / 257
            picture = Image.fromarray(deep.clip(0, 255).round().astype(np.uint8))
        picture = ImageOps.exif_transpose(picture)
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert("L" if grey else "RGB")
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if grey else array.transpose(2, 0, 1)


def read_like(path, facts: dict):
    """A picture at a data set's side, channels, polarity -> uint8 (1,C,H,W), what was done."""
    channels, height, width = facts["shape"]
    grey = channels == 1
    image = torch.from_numpy(read_image(path, max(height, width), grey).copy())[None]
    if height != width:
        image = resize(image, (height, width))
    report = f"{path}: {'grey' if grey else 'RGB'}, {height}x{width}"
    light = image[..., [0, -1], :].float().mean().item() > 127
    if grey and abs(light - facts["light"]) > 0.95:     # ink on paper, and the set is chalk
        return 255 - image, report + ", inverted to the data set's background"
    return image, report


def resize(images, size):
    """uint8 (N,C,H,W) -> uint8 (N,C,*size), antialiased."""
    parts = []
    for part in images.split(1000):
        part = F.interpolate(part.float(), size, mode="bilinear", antialias=True)
        parts.append(part.round().clamp(0, 255).byte())
    return torch.cat(parts)


# ---- rows: which images train, which choose -------------------------------------------------

def shuffled_classes(labels, rows, seed: int) -> list:
    """The rows of each class that has some, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return [rows[labels[rows] == c] for c in labels[rows].unique()]


def hold_out(labels, rows, fraction):
    """Cut a fraction off every class, always the same one -> rows kept, rows cut; sorted."""
    kept = []
    away = []
    for part in shuffled_classes(labels, rows, 0):
        size = round(len(part) * fraction)
        if len(part) > 1:               # the only image of a class stays
            size = max(size, 1)
        away.append(part[:size])
        kept.append(part[size:])
    return torch.cat(kept).sort()[0], torch.cat(away).sort()[0]


def split(data: Dataset):
    """-> pool, validation: a tenth of the training images, cut first, never trained on."""
    rows = torch.arange(len(data.labels))
    validation = data.validation
    if validation is not None:
        pool = rows[~torch.isin(rows, validation)]
    else:
        pool, validation = hold_out(data.labels.cpu(), rows, 0.1)
    require(len(validation),
            f"{data.name}: nothing is left for validation; two images a class are needed")
    return pool, validation


def subset(data: Dataset, pool, n: int, seed: int, subsets=10) -> torch.Tensor:
    """n rows of the pool, as many of each class to within one; a smaller n is in a larger one.

    Seeds 0 to subsets-1 begin at even distances in one shuffled order of each class: they
    share no image while each class gives at most 1/subsets of its images.
    """
    require(n <= len(pool),
            f"{n} images asked for; there are {len(pool)} besides validation images")
    parts = []
    for part in shuffled_classes(data.labels.cpu(), pool, seed // subsets):
        parts.append(part.roll(-(seed % subsets) * len(part) // subsets))
    place = torch.cat([torch.arange(len(part)) for part in parts])
    turn = place.argsort(stable=True)   # the first of each class, then the second of each, ...
    return torch.cat(parts)[turn][:n]


# ---- files ----------------------------------------------------------------------------------

def write(path: Path, content):
    """Write JSON, CSV, a figure or a .pt beside `path`, then move it there in one step."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(as_bytes(content, path.suffix))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_bytes(content, suffix: str):
    """What a .json, .csv, .png or .pt file of this content holds."""
    if suffix == ".json":
        return json.dumps(content, indent=1, allow_nan=False).encode()
    if suffix == ".csv":
        return content.encode()
    buffer = io.BytesIO()
    if suffix == ".png":
        content.savefig(buffer, format="png")
    else:
        torch.save(content, buffer)
    return buffer.getbuffer()


def fingerprint(source: Path | bytes) -> str:
    """16 hexadecimal digits that tell one file, or one content, from another."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def save(path: Path, run: Run, data: Dataset, metrics: dict, made_from=(), **content):
    """Write path (its stem is its kind) and, before it, its facts as .json beside it."""
    facts = {"kind": path.stem, "format": FORMAT, "settings": run.settings, "metrics": metrics,
             "dataset": data.facts(),
             "made_from": {source.stem: fingerprint(source) for source in made_from},
             "versions": {"torch": str(torch.__version__), "numpy": str(np.__version__)}}
    write(path.with_suffix(".json"), facts)
    write(path, {**facts, **content})


def read(path: Path, device="cpu") -> dict:
    """A .pt file of plain tensors; raises where a bit has changed, which torch overlooks."""
    with zipfile.ZipFile(path) as file:
        require(not file.testzip(), f"{path} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def load(run: Run, kind: str, device="cpu") -> dict:
    """Read OUT/<kind>.pt; whatever is wrong with it becomes one line with the remedy."""
    path = run.out / f"{kind}.pt"
    remedy = f"make it with: {command_for(run, path.name)}"
    require(path.exists(), f"{path} not found; {remedy}")
    try:
        saved = read(path, device)
        stated = saved["kind"]
        version = int(saved["format"])
        sources = saved["made_from"].items()
    except Exception:                   # zip, pickle and torch each have their own errors
        raise Mistake(f"{path} is damaged; {remedy}") from None
    require(stated == kind and version <= FORMAT,
            f"{path} is a {stated} file of format {version}; wanted {kind}, {FORMAT}; "
            + remedy)
    for stem, mark in sources:
        source = run.out / f"{stem}.pt"
        require(not source.exists() or fingerprint(source) == mark,
                f"{path} was made from another {stem}.pt; {remedy}")
    return saved


def command_for(run: Run, name: str) -> str:
    """The whole command that makes OUT/name."""
    if name != "vae.pt" and (run.out / "vae.pt").exists():      # make might train another VAE
        return shlex.join(["python", f"{Path(name).stem}.py", "-o", str(run.out)])
    spec = run.dataset or (run.out.name if run.out.name in TORCHVISION else "glyphs")
    words = ["make"]
    if spec != "glyphs":
        words.append(f"DATASET={spec}")
    if run.data_dir not in (None, "data"):
        words.append(f"DATA={run.data_dir}")
    if run.out != Path("runs", Path(spec).stem):
        words.append(f"OUT={run.out}")
    return shlex.join([*words, str(run.out / name)])


# ---- scores ---------------------------------------------------------------------------------

def scores(q, y, bins=15) -> dict:
    """Accuracy, balanced accuracy, NLL (nats), Brier score, ECE of q (N,K), labels y (N,)."""
    right = (q.argmax(1) == y).float()
    recall = torch.stack([right[y == c].mean() for c in y.unique()])
    likely = q[torch.arange(len(y), device=q.device), y]
    brier = (q.square().sum(1) - 2 * likely + 1).mean()
    return {"accuracy": right.mean().item(), "balanced_accuracy": recall.mean().item(),
            "nll": -likely.clamp(min=1e-12).log().mean().item(), "brier": brier.item(),
            "ece": ece(q.amax(1), right, bins)}


def ece(confidence, right, bins=15) -> float:
    """Mean gap of confidence and accuracy (Guo et al. 2017), over bins of equal mass."""
    # Equal confidences share their mean gap: the order of the images cannot matter.
    level, row = confidence.unique(return_inverse=True)
    mean = torch.zeros_like(level).scatter_reduce(0, row, confidence - right, "mean",
                                                  include_self=False)
    gap = mean[row.sort()[0]]
    total = sum(part.sum().abs().item() for part in gap.tensor_split(bins))
    return total / len(gap)


def ece_interval(q, y, draws=200, seed=0) -> list:
    """The 95% bootstrap interval of the ECE: its lower and its upper end."""
    confidence = q.amax(1).cpu()
    right = (q.argmax(1) == y).float().cpu()
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(y), (draws, len(y)), generator=generator)
    values = torch.tensor([ece(confidence[pick], right[pick]) for pick in picks])
    return values.quantile(torch.tensor([0.025, 0.975])).tolist()


def reliability(q, y, low=0.05, high=0.95, bins=10, least=30) -> list:
    """A dict per bin of the (image, class) pairs with low < q < high, if it has `least`."""
    inside = (q > low) & (q < high)
    stated = q[inside]
    hit = F.one_hot(y, q.shape[1]).bool()[inside].float()
    index = ((stated - low) / (high - low) * bins).long().clamp(0, bins - 1)
    rows = []
    for b in range(bins):
        in_bin = index == b
        if in_bin.sum() >= least:
            rows.append({"stated": stated[in_bin].mean().item(),
                         "observed": hit[in_bin].mean().item(), "pairs": int(in_bin.sum())})
    return rows


def ranking(q, classes) -> str:
    """All percentages of q (K,), a line a class, the likeliest first."""
    return "\n".join(f"{100 * q[c]:5.1f}%  {classes[c]}" for c in q.argsort(descending=True))


# ---- training: progress, unfinished work, ranks ---------------------------------------------

class Progress:
    """What is done, and the time left: one rewriting line on a terminal, else plain lines."""

    def __init__(self, total, what, quiet=False, done=0, log: Path | None = None):
        self.total = total
        self.what = what
        self.quiet = quiet
        self.log = log
        self.first = done
        self.start = time.monotonic()
        if log and not done:
            log.write_text("")

    def __call__(self, done, words="", **row):
        if not self.quiet:
            self.show(done, words)
        if self.log:                    # rates and times, which differ from run to run
            with self.log.open("a") as file:
                file.write(json.dumps({"step": done, **row}) + "\n")

    def show(self, done, words):
        spent = time.monotonic() - self.start
        finished = done >= self.total
        when = f"in {clock(spent)}"
        if not finished:
            left = spent / max(done - self.first, 1) * (self.total - done)
            when = f"{clock(left)} left"
        line = f"{self.what} {done:,}/{self.total:,}  {words}  {when}"
        end = "\n"
        if sys.stderr.isatty():
            line = "\r\x1b[K" + line
            end = "\n" if finished else ""
        print(line, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds in human units.

    >>> clock(8), clock(185), clock(7800)
    ('8 s', '3:05 min', '2:10 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


class Checkpoint:
    """OUT/<name>.last.pt: unfinished training, written after every round, read by --resume.

    `state` and `history` are those of the last round, or None and []; work of other settings
    or other `facts`, or damaged, is as good as none.
    """

    def __init__(self, run: Run, name: str, data: Dataset, steps: int, resume: bool, **facts):
        script = Path(__file__).with_name(f"{name}.py")
        self.path = run.out / f"{name}.last.pt"
        self.facts = {**facts, "amp": run.amp, "device": run.device.type,
                      "settings": run.settings, "dataset": data.facts(), "ranks": RANKS,
                      "code": fingerprint(script)}
        self.state = None
        self.history = []
        if resume and self.path.exists():
            self.restore()
        done = self.state["step"] if self.state else 0
        self.progress = Progress(steps, name, run.quiet, done, run.out / f"{name}.log.jsonl")

    def restore(self):
        """Take up the work in the file, if it fits."""
        try:
            saved = read(self.path)
            fits = RANKS == 1 and all(saved[key] == self.facts[key] for key in self.facts)
        except Exception:               # zip, pickle and torch each have their own errors
            fits = False
        if fits:
            self.state = saved["state"]
            self.history = saved["history"]
        elif RANK == 0:
            print(f"{self.path} does not fit these settings; starting afresh", file=sys.stderr)

    def keep(self, row: dict, words: str):
        """Report a row of `fit`, add it to the history, write all of it down."""
        rate = row["images_per_second"]
        self.progress(row["step"], f"{words}  {rate:,.0f} images/s", images_per_second=rate)
        self.state = row["state"]
        self.history.append({key: value for key, value in row.items()
                             if key not in ("state", "images_per_second")})
        write(self.path, {**self.facts, "state": self.state, "history": self.history})

    def remove(self):
        self.path.unlink(missing_ok=True)


def distribute(model, run: Run, batch_size: int):
    """-> a model that averages gradients over ranks, this rank's batch size and generator."""
    require(batch_size % RANKS == 0, f"--batch-size is no multiple of the {RANKS} ranks")
    if RANKS > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        card_each = run.device.type == "cuda" and torch.cuda.device_count() >= here
        torch.distributed.init_process_group("nccl" if card_each else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator(run.device).manual_seed(run.seed + 10**6 * RANK)
    return model, batch_size // RANKS, generator


# ---- figures --------------------------------------------------------------------------------

# Petroff (2021): colours that colour-blind people tell apart, in order of use.
COLOURS = ("#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 "
           "#a96b59 #e76300 #b9ac70 #717581 #92dadd").split()
MARKERS = "osD^vP*Xhd"


def figure(width=10.0, height=5.0):
    """A matplotlib Figure by itself: no pyplot, no display. Inches."""
    import matplotlib.figure
    matplotlib.rcParams["text.parse_math"] = False      # "$5" is a class, not a formula
    return matplotlib.figure.Figure((width, height), layout="constrained", dpi=130)


def tidy(axes, title, x=None, y=None):
    """One look for all axes: title at the left, no box, a light grid."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def show_images(axes, images, columns=1, caption=""):
    """Images (N,C,H,W), uint8 or in [0,1], side by side with a white pixel between."""
    images = images.cpu()
    if images.dtype == torch.uint8:
        images = images / 255
    # White below and to the right of each image, and for the empty places of the last row.
    images = F.pad(images, (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=1)
    sheet = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)   # row, H, column, W, C
    sheet = sheet.flatten(0, 1).flatten(1, 2)[:-1, :-1].clamp(0, 1)
    axes.imshow(sheet.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=7.5, labelpad=3)
    axes.spines[:].set_visible(False)


# ---- glyphs: the embedded data set ----------------------------------------------------------

# Families of matplotlib's fonts: validation and test digits are in designs never trained on.
TRAINING_FONTS = """
    DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique
    DejaVuSansMono DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique
    DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic""".split()
VALIDATION_FONTS = "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta".split()
TEST_FONTS = "cmr10 cmb10 cmss10 cmtt10".split()


def glyphs(seed=0, side=28) -> Dataset:
    """The embedded digits: 10,000 for training, 2,000 for test; a seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for count, fonts in ((9000, TRAINING_FONTS), (1000, VALIDATION_FONTS), (2000, TEST_FONTS)):
        fields = torch.stack([distance_field(font, digit, side)
                              for font in fonts for digit in "0123456789"])
        font = torch.randint(len(fonts), (count,), generator=generator)
        which = 10 * font + torch.arange(count) % 10
        for part in which.split(500):   # fits the processor's cache
            images.append(draw_glyphs(fields[part], side, generator))
    x = torch.cat(images)
    y = torch.arange(12_000) % 10
    return Dataset(x[:10_000], y[:10_000], x[10_000:], y[10_000:], list("0123456789"),
                   "glyphs", validation=torch.arange(9000, 10_000))


def distance_field(font_name: str, digit: str, side: int):
    """(2 side, 2 side) distances to a digit's outline in image pixels, positive inside."""
    from matplotlib import ft2font, get_data_path, path
    font = ft2font.FT2Font(str(Path(get_data_path(), "fonts", "ttf", f"{font_name}.ttf")))
    font.set_size(128, 72)              # large: hinting and flattened curves stay out of sight
    font.load_char(ord(digit))
    # Points as complex numbers x + iy; fonts count y upwards and images downwards, hence conj.
    rings = []
    for ring in path.Path(*font.get_path()).to_polygons():
        rings.append(torch.view_as_complex(torch.tensor(ring)).conj())
    a = torch.cat([ring[:-1] for ring in rings])        # the outline's pieces lead from a to b
    b = torch.cat([ring[1:] for ring in rings])
    moves = a != b                      # a repeated point has no direction: 0 / 0 below
    a, b = a[moves], b[moves]
    left, right = a.real.aminmax()
    top, bottom = a.imag.aminmax()
    middle = torch.complex(left + right, top + bottom) / 2
    unit = 18 / (bottom - top)          # a digit is 18 pixels high
    a = ((a - middle) * unit).to(torch.complex64)
    b = ((b - middle) * unit).to(torch.complex64)

    axis = (torch.arange(2 * side) + 0.5) / 2 - side / 2
    p = torch.complex(axis.repeat(2 * side), axis.repeat_interleave(2 * side))[:, None]
    along = (((p - a) * (b - a).conj()).real / (b - a).abs() ** 2).clamp(0, 1)
    distance = (p - a - along * (b - a)).abs().amin(1)
    # Seen from inside, the outline turns a full circle; a hole turns back and cancels it.
    turns = ((b - p) / (a - p)).angle().sum(1).abs()
    return torch.where(turns > torch.pi, distance, -distance).view(2 * side, 2 * side)


def draw_glyphs(fields, side: int, generator):
    """Distance fields (n, ., .) -> uint8 images (n,1,side,side), each bent in its own way."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(len(fields), 1, 1, generator=generator)

    turn = uniform(-0.25, 0.25)
    shear = uniform(-0.2, 0.2)
    wide = uniform(0.85, 1.1)
    scale = uniform(0.9, 1.1)
    cos, sin = turn.cos(), turn.sin()
    # Rows lead from image to field: dividing enlarges.
    x = torch.cat([cos / wide / scale, (shear * cos - sin) / scale, uniform(-0.1, 0.1)], 2)
    y = torch.cat([sin / wide / scale, (cos + shear * sin) / scale, uniform(-0.1, 0.1)], 2)
    grid = F.affine_grid(torch.cat([x, y], 1), (len(x), 1, side, side), align_corners=False)
    # Smooth noise: two channels push pixels about, the third thickens and thins the stroke.
    noise = torch.randn(len(x), 3, 4, 4, generator=generator)
    wave = F.interpolate(noise, side, mode="bicubic", align_corners=True)
    grid = grid + 0.05 * wave[:, :2].permute(0, 2, 3, 1)
    depth = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=False)
    depth = depth[:, 0]
    # Stroke weight is where the distances are cut, edge blur how gently: no morphology.
    edge = depth + uniform(0.0, 0.7) + 0.2 * wave[:, 2]
    ink = (0.5 + edge / uniform(1.0, 2.0)).clamp(0, 1)
    noise = uniform(0.0, 0.08) * torch.randn(ink.shape, generator=generator)
    grey = (ink * uniform(0.6, 1.0) + noise).clamp(0, 1)
    return (grey * 255).round().byte()[:, None]
