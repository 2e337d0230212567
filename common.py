"""What the scripts share: command line, data sets, files, scores, progress, figures, glyphs.

It knows nothing of models. Read from the top: a command line becomes a `Run`, a folder or a
file of images becomes a `Dataset`, and what is made of them becomes files.
"""
import argparse
import collections
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import sys
import time
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Letters: N training images, C×H×W image, K classes.
# y integer labels (N,), -1 for none; q class probabilities (N,K).
FORMAT = 6                              # of the .pt files; any other is refused
# The settings that say which images a run is about, and their defaults.
WHICH = {"dataset": "glyphs", "data_dir": "data", "image_size": 32, "labels": None,
         "labels_from": None, "skip_damaged": False, "images": None, "seed": 0}
# The scripts in the order in which they build on each other.
STEMS = "deform vae latent hybrids cnn compare".split()
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
               "emnist-letters": "EMNIST", "emnist-balanced": "EMNIST", "usps": "USPS",
               "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
NAMES = ["glyphs", *TORCHVISION]
IMAGE_FILES = tuple(".jpg .jpeg .jfif .png .gif .ppm .pgm .bmp .tif .tiff .webp".split())
PICTURE_FORMATS = "JPEG PNG GIF PPM BMP TIFF WEBP".split()      # of these files, for PIL
# Parts of a data set, in small letters, as people call their folders and arrays.
PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
         "validation": "validation", "dev": "validation", "test": "test", "testing": "test",
         "unlabelled": "unlabelled", "unlabeled": "unlabelled"}
ARRAYS = ("x_train y_train x_validation y_validation x_test y_test x_unlabelled "
          "classes").split()
# What systems put beside pictures, besides all that begins with a dot.
HIDDEN = "@eadir __macosx #recycle $recycle.bin thumbs.db desktop.ini".split()
WHITES = (1, 255, 1023, 4095, 16383, 65535)             # usual values of a white pixel


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


class Parser(argparse.ArgumentParser):
    """Mistakes in one line; `args.changed` holds what differs from the defaults."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        args.changed = {key: value for key, value in vars(args).items()
                        if value != self.get_default(key)}
        return args


def flags(script: str, doc: str, images=True) -> Parser:
    """A parser with the flags that all scripts share; --images is for those of one network."""
    parser = Parser(script, description=doc, formatter_class=Help)
    parser.set_defaults(script=script, writes=True)
    add = parser.add_argument_group("which images (if not given, as for the files that are "
                                    "in the working directory)").add_argument
    add("--dataset", metavar="NAME|FOLDER|FILE.npz",
        help="glyphs (embedded, the default), a folder of images, an .npz file, or one of "
        + " ".join(TORCHVISION))
    add("--data-dir", metavar="FOLDER", help="where named data sets are kept; else data")
    add("--image-size", type=number(int, 16, 64), metavar="PIXELS",
        help="side to which the images of a folder are scaled; else 32")
    add("--labels", type=number(int, 1), metavar="N",
        help="number of training images that keep their label, equal numbers per class; else "
        "all that have one")
    add("--labels-from", metavar="FILE.csv",
        help="table of labels to correct or to add, in its columns image and new_label")
    add("--skip-damaged", action="store_true", default=None,
        help="leave out pictures that cannot be read")
    if images:
        add("--images", type=number(int, 1), metavar="N",
            help="number of labelled training images to learn from, equal numbers per class, "
            "and no others; else all but those kept for validation")
    add("--seed", type=number(int, 0, 2**32), help="seed of every random choice; else 0")
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("-o", "--out", type=Path, metavar="FOLDER",
        help="working directory; if not given, runs/<name of the data set>")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where to compute; auto is cuda if there is one, else cpu")
    add("--threads", type=number(int, 1), default=1,
        help="processor threads; results depend on their number")
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
    threads = torch.get_num_threads()   # put back in the end, for notebooks
    backend = os.environ.pop("MPLBACKEND", None)        # figures need none, and one may fail
    try:
        run = start(args)
        command(run, args)
        print(end="", flush=True)       # a full disk or a reader that has gone shows here
        return 0
    except KeyboardInterrupt:
        code, message = 130, "interrupted; what was finished is kept"
    except (Mistake, FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        code, message = 2, explain(error, args.out)
        if message is None:
            raise
    finally:
        if run:
            run.release()
        torch.set_num_threads(threads)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    print(f"{args.script}: {' '.join(message.split())}", file=sys.stderr)
    return code


def explain(error, out) -> str | None:
    """What a user can do about an error; None where the fault is the program's own."""
    text = str(error)
    if isinstance(error, (Mistake, FloatingPointError)):
        return text
    if isinstance(error, OSError):
        drop_output()
        return f"{error.filename or f'{out} or standard output'}: {error.strerror or text}"
    if isinstance(error, MemoryError) or "alloc" in text.lower():       # torch's words vary
        return "out of memory; use fewer or smaller images, or --device cpu"
    return None


def drop_output():
    """What standard output does not take is dropped: Python would try it again, and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- a run: what it is about, its folder, device and arithmetic -----------------------------

def torchrun_rank():
    """This process and how many there are: 0 and 1, unless torchrun started it."""
    if "MASTER_ADDR" not in os.environ:         # batch systems set the others, too
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


RANK, RANKS = torchrun_rank()


@dataclass
class Run:
    """One run of one script: where it works, how it computes, which images it is about."""
    script: str
    out: Path
    device: torch.device
    amp: bool                           # bfloat16 where autocast allows it
    quiet: bool
    cores: int                          # threads that torch would take by itself
    one_subset: bool                    # of images to learn from; compare.py has many
    settings: dict                      # every flag that can change a result
    changed: dict                       # those that differ from their defaults
    # Which images: as given, None where not; `settle` decides.
    dataset: str
    data_dir: str
    image_size: int
    labels: int | None
    labels_from: str | None
    skip_damaged: bool
    images: int | None
    seed: int
    record: dict = field(default_factory=dict)  # facts of the data set that OUT is of
    source: str = ""                    # the stem of the file that says so
    bound: bool = False                 # does this script build on that file?
    lock: io.IOBase | None = None

    @property
    def which(self) -> dict:
        """The settings that say which images."""
        return {key: getattr(self, key) for key in WHICH}

    def release(self):
        """Let other runs into the folder."""
        if self.lock:
            self.lock.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(args) -> Run:
    """Settle which images, threads, device and arithmetic; make the working directory."""
    for key in ("dataset", "data_dir", "labels_from"):
        setattr(args, key, normal(getattr(args, key)))
    out = args.out = args.out or Path("runs", name_of(args.dataset or "glyphs"))
    require(out.is_dir() or not out.exists(), f"{out} is a file; --out takes a folder")
    trains = args.script in ("vae.py", "cnn.py")
    require(RANKS == 1 or trains or args.script == "compare.py", "start without torchrun")
    cores = torch.get_num_threads()     # or OMP_NUM_THREADS, which torchrun sets to 1
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    amp = bfloat16_is_fast(device) if args.amp is None else args.amp
    which = {key: vars(args).get(key) for key in WHICH}
    run = Run(args.script, out, device, amp, args.quiet, cores, hasattr(args, "images"),
              settings(args), settings(args, args.changed), **which)
    settle(run)
    vars(args).update(run.which)
    run.settings.update(run.which)
    out.mkdir(parents=True, exist_ok=True)
    if args.writes and RANK == 0:       # torchrun's ranks are one run
        run.lock = lock_folder(out)
    if RANKS > 1 and trains:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        card_each = device.type == "cuda" and torch.cuda.device_count() >= here
        torch.distributed.init_process_group("nccl" if card_each else "gloo")
    return run


def normal(path: str | None) -> str | None:
    """One spelling for photos, photos/ and ./photos; ./mnist is a folder, and mnist is not."""
    if path is None:
        return None
    short = os.path.normpath(path)
    return os.path.abspath(path) if short in NAMES and short != path else short


def name_of(spec: str) -> str:
    """The name of a data set: the last part of its path, whole, but for .npz."""
    return Path(os.path.abspath(spec)).name.removesuffix(".npz")


def settings(args, keys=None) -> dict:
    """The flags that can change a result, for the files."""
    others = ("out script writes changed resume quiet threads export image point predict jobs "
              "gather review").split()
    keys = set(vars(args) if keys is None else keys)
    return {key: vars(args)[key] for key in sorted(keys - set(others))}


def settle(run: Run):
    """Decide which images: as the flags say, else as the folder does, else as by default.

    What a file says that the script builds on cannot be contradicted.
    """
    run.record, run.source, run.bound = folder_record(run)
    known = dict(run.record.get("which", {}))
    given = {key: value for key, value in run.which.items() if value is not None}
    numbers = ["image_size", "labels"]
    if run.one_subset:
        numbers += ["images", "seed"]
    else:
        known.pop("images", None)
    which = dict(WHICH)
    if run.bound or "dataset" not in given:
        which.update(known)
    which.update(given)
    vars(run).update(which)
    for key in numbers if run.bound else []:
        require(which[key] == known[key],
                f"--{key.replace('_', '-')} {which[key]}: {run.out}/{run.source}.pt was made "
                f"with {known[key]}; make it again with: {command_for(run, run.source)}, "
                "or give another -o")


def folder_record(run: Run):
    """-> facts of the data set that OUT is of, the stem of their file, whether it binds.

    A script is bound by what it builds on; its own files, and later ones, may be made anew.
    """
    stem = Path(run.script).stem
    upstream = {"deform": [], "vae": ["deform"]}.get(stem, ["vae", "deform"])
    for other in [*upstream, *STEMS]:
        record = record_of(run.out, other)
        if record:
            return record["dataset"], other, other in upstream
    return {}, stem, False


def record_of(out: Path, stem: str) -> dict:
    """What OUT/stem.json says, or stem.pt where that is missing; {} without either."""
    for path in (out / f"{stem}.json", out / f"{stem}.pt"):
        if path.exists():
            try:
                text = path.suffix == ".json"
                content = json.loads(path.read_text()) if text else read(path)
                require(content["format"] == FORMAT and content["dataset"]["which"], "")
                return content
            except Exception:           # json, zip and pickle each have their own errors
                raise Mistake(f"{path} is damaged, or of another version of these scripts; "
                              "remove it, or give another -o") from None
    return {}


def command_for(run: Run, name: str, **changes) -> str:
    """The whole command that makes OUT/name, with every setting that is not a default."""
    stem = Path(name).stem
    changed = run.changed
    if f"{stem}.py" != run.script:
        changed = record_of(run.out, stem).get("changed", {})
    words = ["python", f"{stem}.py"]
    for key, value in {**changed, **run.which, **changes}.items():
        if value == WHICH.get(key):
            continue
        flag = "--" + key.replace("_", "-")
        if value is False:
            flag = "--no-" + key.replace("_", "-")
        words.append(flag)
        if not isinstance(value, bool):
            words += [str(part) for part in (value if isinstance(value, list) else [value])]
    return shlex.join([*words, "-o", str(run.out)])


def lock_folder(out: Path):
    """One run at a time works in a folder -> the file that keeps others out until closed."""
    file = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait, or give another --out"
        if multiprocessing.parent_process():    # a script of the user's, imported once more
            remedy = 'a script that calls main needs: if __name__ == "__main__":'
        raise Mistake(f"another run works in {out}; {remedy}") from None
    except (ImportError, OSError):      # Windows and some network drives have no such lock
        pass
    return file


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


# ---- data sets ------------------------------------------------------------------------------

@dataclass
class Dataset:
    """Images uint8 (N,C,H,W) for training and for test, with labels int64 0..K-1, -1 for none.

    Rows are numbered once and never again: 0 to N-1 are the training images, those from N on
    in `names` the test images. `pool` and `validation` (sorted) share the rows 0 to N-1.
    """
    images: torch.Tensor
    labels: torch.Tensor                # (N,)
    test_images: torch.Tensor
    test_labels: torch.Tensor           # all have one
    classes: list
    name: str
    names: list | None = None           # N + tests: files below the folder, or "train/17"
    pool: torch.Tensor | None = None    # rows that may train, with or without a label
    validation: torch.Tensor | None = None      # rows that choose, never trained on
    features: torch.Tensor | None = None        # (N,F), of a pretrained network
    test_features: torch.Tensor | None = None
    white: int = 1                      # of the numbers read; 1, too, if all were bytes
    remarks: list = field(default_factory=list)         # what a person should know of it
    which: dict = field(default_factory=dict)   # the settings that it was read with

    def __post_init__(self):
        if self.names is None:
            self.names = [f"train/{k}" for k in range(len(self.images))]
            self.names += [f"test/{k}" for k in range(len(self.test_images))]
        if self.validation is None:
            self.validation = set_aside(self.labels, self.names, 0.1, last=True)
        if self.pool is None:
            trains = torch.ones(len(self.labels), dtype=torch.bool)
            trains[self.validation] = False
            self.pool = trains.nonzero()[:, 0]

    def labelled(self) -> torch.Tensor:
        """Rows of the pool that have a label."""
        return self.pool[self.labels[self.pool] >= 0]

    def unlabelled(self) -> torch.Tensor:
        """Rows of the pool that have none."""
        return self.pool[self.labels[self.pool] < 0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 digits that tell these images and labels from others, wherever they lie."""
        digest = hashlib.sha256()
        for part in (self.images, self.labels, self.test_images, self.test_labels):
            digest.update(str(part.shape).encode())
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def facts(self) -> dict:
        """What a file says of its data set: enough to load it again, and to know it again."""
        grounds = (ground_of(self.images) / 8).round().unique() * 8
        with_label = int((self.labels >= 0).sum())
        return {"name": self.name, "which": self.which, "shape": list(self.images.shape[1:]),
                "classes": self.classes, "images": with_label,
                "unlabelled": len(self.labels) - with_label,
                "test_images": len(self.test_images), "white": self.white,
                "ground": grounds.int().tolist(), "fingerprint": self.fingerprint}

    def to(self, device):
        """Move all tensors to the device, in place."""
        for key, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, key, value.to(device))
        return self


def load_dataset(run: Run, upstream=None) -> Dataset:
    """The data set of a run, with its labels; other images than the folder's are refused.

    `upstream`, a loaded file, stands for what the folder says.
    """
    data = open_dataset(run)
    data.which = run.which
    if run.labels:
        keep_labels(data, run.labels, run.seed)
    if run.labels_from:
        correct_labels(data, Path(run.labels_from))
    if upstream:
        run.record = upstream["dataset"]
    check_folder(run, data)
    if RANK == 0 and not run.bound:     # a later script need not say it again
        for remark in [*data.remarks, *remarks_on(data)]:
            print(f"{data.name}: {remark}", file=sys.stderr)
    run.record = data.facts()
    return data.to(run.device)


def open_dataset(run: Run) -> Dataset:
    """Read the data set of a run; the pictures of a folder are scaled, once."""
    spec = run.dataset
    if spec == "glyphs":
        return glyphs()
    if spec.endswith(".npz"):
        return npz_dataset(Path(spec), run.image_size)
    if spec in TORCHVISION:
        return torchvision_dataset(spec, run.data_dir, run.image_size)
    if Path(spec).is_dir():
        return folder_dataset(run, Path(spec))
    near = difflib.get_close_matches(spec, NAMES, 1)
    hint = f"did you mean {near[0]}?" if near else f"names: {' '.join(NAMES)}"
    raise Mistake(f"no data set or folder {spec!r}; {hint}")


def check_folder(run: Run, data: Dataset):
    """A folder belongs to its data set, which is known by its content."""
    if not run.record or run.record["fingerprint"] == data.fingerprint:
        return
    before = run.record["which"]["dataset"]
    same = os.path.abspath(before) == os.path.abspath(run.dataset)
    require(same, f"{run.out} is the folder of {before}, and {run.dataset} is another data set;"
            f" give another -o, as -o runs/{data.name}")
    require(not run.bound, f"{run.out}/{run.source}.pt was made from other images or labels "
            f"than {run.dataset} has now; make it again with: "
            f"{command_for(run, run.source)}, or give another -o")


def assemble(name: str, images: dict, labels: dict, classes=None, names=None, side=32,
             remarks=(), **more) -> Dataset:
    """The one door that every data set passes: its parts become one record.

    `images` uint8 (n,C,H,W), `labels` int64 (n,) and `names` by part: train, validation,
    unlabelled, test. Labels become 0..K-1, colour that is none becomes grey, sides 16 to 64.
    """
    def expect(ok, message):
        require(ok, f"{name}: {message}")

    expect(len(images.get("train", [])) and len(images.get("test", [])),
           "no images for training, or none for test")
    for part, x in images.items():
        if part == "unlabelled":
            labels[part] = torch.full((len(x),), -1)
        expect(part in labels and len(x) == len(labels[part]),
               f"{part} images and labels differ in number")
        expect(x.shape[1:] == images["train"].shape[1:],
               f"{part} images and those for training differ in shape")
    labels, classes = number_classes(labels, classes, expect)
    training = [part for part in ("train", "validation", "unlabelled") if part in images]
    if names is None:
        names = {part: [f"{part}/{k}" for k in range(len(x))] for part, x in images.items()}
    parts = torch.cat([images[part] for part in training]), images["test"]
    parts, more_remarks = fit_pixels(parts, side)
    if "validation" in images:
        first = len(images["train"])
        more["validation"] = torch.arange(first, first + len(images["validation"]))
    every_name = sum([names[part] for part in [*training, "test"]], [])
    data = Dataset(parts[0], torch.cat([labels[part] for part in training]), parts[1],
                   labels["test"], classes, readable(name), every_name,
                   remarks=[*remarks, *more_remarks], **more)
    expect(len(data.validation), "nothing is left for validation; two images a class are needed")
    return data


def number_classes(labels: dict, classes, expect):
    """Labels by part, any whole numbers, -1 for none -> 0..K-1, and the names of the classes."""
    train = labels["train"]
    kinds = train[train >= 0].unique()
    values = kinds.tolist()
    names = classes or values
    for part, y in labels.items():
        unknown = sorted(set(y.tolist()) - {*values, -1})[:5]
        spoken = [names[value] if value in range(len(names)) else value for value in unknown]
        expect(not unknown, f"{part} images have classes that training images have not: "
               f"{spoken}")
        expect(part in ("train", "unlabelled") or (y >= 0).all(),
               f"{part} images without a label (-1); number the classes from 0")
    expect(len(values) > 1, "only one class; percentages need two or more (-1 is no label)")
    if max(values) < len(names):        # some classes may have no image
        names = [names[value] for value in values]
    expect(len(names) == len(values), f"{len(names)} names for {len(values)} classes")
    numbered = {part: torch.where(y < 0, -1, torch.searchsorted(kinds, y))
                for part, y in labels.items()}
    return numbered, [readable(str(name)) for name in names]


def fit_pixels(parts, side: int):
    """Colour that is none becomes grey, for all images or for none; sides 16 to 64."""
    remarks = []
    height, width = parts[0].shape[2:]
    require(height and width, f"images of {height}x{width} pixels")
    count = sum(int(in_colour(part).sum()) for part in parts)
    total = sum(len(part) for part in parts)
    if count == 0:
        parts = [to_grey(part) for part in parts]
    elif count < total / 10:
        remarks.append(f"{count:,} of {total:,} images have colour, so all are read in colour")
    if max(height, width) > 64 or min(height, width) < 16:
        parts = [resize(part, side) for part in parts]
        remarks.append(f"of images of {height}x{width} pixels, the middle squares are scaled "
                       f"to {side}x{side}")
    return parts, remarks


def readable(name: str) -> str:
    """A name in NFC, as all systems would write it, whose bytes that are no text are spelt."""
    name = unicodedata.normalize("NFC", name)
    return name.encode("utf-8", "backslashreplace").decode()


def remarks_on(data: Dataset) -> list:
    """What a person should know: images that are there twice, classes that are not tested."""
    remarks = []
    without = len(data.unlabelled())
    if without:
        remarks.append(f"{len(data.labelled()):,} training images with a label, {without:,} "
                       "without")
    marks = [hash(image.tobytes()) for part in (data.images, data.test_images)
             for image in part.numpy()]
    tests = torch.arange(len(data.images), len(marks))
    seen = set()
    for part, rows in (("labelled", data.labelled()), ("unlabelled", data.unlabelled()),
                       ("validation", data.validation), ("test", tests)):
        here = [marks[row] for row in rows.tolist()]
        count = sum(mark in seen for mark in here)
        if count:
            remarks.append(f"{count:,} of {len(here):,} {part} images stand among the training "
                           "images, too, pixel for pixel; move pictures, do not copy them")
        seen.update(here)
    classes = {}
    for mark, label in zip(marks, [*data.labels.tolist(), *data.test_labels.tolist()]):
        if label >= 0:
            classes.setdefault(mark, set()).add(label)
    count = sum(len(some) > 1 for some in classes.values())
    if count:
        remarks.append(f"{count:,} images are in two classes, pixel for pixel")
    untested = set(range(len(data.classes))) - set(data.test_labels.tolist())
    if untested:
        missing = ", ".join(data.classes[c] for c in sorted(untested))
        remarks.append(f"no test images of {missing}")
    return remarks


def torchvision_dataset(name: str, root: str, side: int) -> Dataset:
    """One of torchvision.datasets, downloaded only if it is not on disk."""
    pixels = {}
    labels = {}
    for part in ("train", "test"):
        read = torchvision_part(name, root, part)
        pixels[part] = np.asarray(read.data)
        labels[part] = torch.as_tensor(read.labels if name == "stl10" else read.targets).long()
        classes = [label.split(" - ")[0] for label in getattr(read, "classes", [])]
    images, _, _ = as_images(pixels)
    if name.startswith("emnist"):       # its images are stored lying down
        images = {part: x.transpose(2, 3).contiguous() for part, x in images.items()}
    return assemble(name, images, labels, classes or None, side=side)


def torchvision_part(name: str, root: str, part: str):
    """The training or the test part of a data set of torchvision."""
    keywords = {"train": part == "train"}
    if name == "stl10":
        keywords = {"split": part}
    if name.startswith("emnist"):
        keywords["split"] = name.removeprefix("emnist-")
    try:
        from torchvision import datasets
        kind = getattr(datasets, TORCHVISION[name])
    except (ImportError, RuntimeError) as error:
        raise Mistake(f"torchvision cannot be imported ({error}); it must be of torch's build: "
                      "pip install --upgrade --force-reinstall torch torchvision") from None
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


def npz_dataset(path: Path, side: int) -> Dataset:
    """x_train y_train x_test y_test, and if there x_val y_val x_unlabelled classes.

    Images are (N,H,W), (N,H,W,C) or (N,C,H,W); labels numbers, names or one-hot rows.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays, left_out = known_arrays(file)
        pixels = {name[2:]: array for name, array in arrays.items() if name[:2] == "x_"}
        images, white, remarks = as_images(pixels)
        labels = {name[2:]: array for name, array in arrays.items() if name[:2] == "y_"}
        labels, classes = as_labels(labels)
        if classes is None and "classes" in arrays:
            classes = arrays["classes"].astype(str).tolist()
    except Exception as error:          # zip, zlib and numpy have many
        raise Mistake(f"{path}: {error}; make it with numpy.savez(path, x_train=..., "
                      "y_train=..., x_test=..., y_test=..., [x_val=..., y_val=...], "
                      "[x_unlabelled=...], [classes=...])") from None
    if left_out:
        remarks.append(f"left out: {', '.join(left_out)}")
    return assemble(name_of(path), images, labels, classes, side=side, white=white,
                    remarks=remarks)


def known_arrays(file):
    """The arrays of an .npz file by their names in ARRAYS; the names of the others."""
    arrays = {}
    left_out = []
    for name in file.files:
        kind, _, part = name.lower().partition("_")
        known = f"{kind}_{PARTS[part]}" if part in PARTS else name.lower()
        if known not in ARRAYS:
            near = difflib.get_close_matches(known, ARRAYS, 1, 0.75)
            left_out.append(f"{name} (rename it, if it is {near[0]})" if near else name)
            continue
        require(known not in arrays, f"{known} is there twice, once as {name}")
        arrays[known] = file[name]
    return arrays, left_out


def as_labels(arrays: dict):
    """Arrays of labels -> int64 tensors (n,), -1 for none; classes, if labels are names."""
    flat = {}
    for part, y in arrays.items():
        if y.ndim == 2 and y.shape[1] > 1:
            require((y.sum(1) == 1).all() and np.isin(y, (0, 1)).all(),
                    f"y_{part} of shape {y.shape}; wanted (N,), or one-hot rows")
            y = y.argmax(1)
        flat[part] = y.reshape(-1)
    y = np.concatenate(list(flat.values()))
    classes = None
    if y.dtype.kind in "US":
        classes, y = np.unique(y.astype(str), return_inverse=True)
        if classes[0] == "":            # no label; it comes first
            classes = classes[1:]
            y = y - 1
        classes = classes.tolist()
    require(y.dtype.kind in "buif" and (y % 1 == 0).all() and y.min() >= -1,
            "labels must be whole numbers, names or one-hot rows; -1 or an empty name is none")
    y = torch.from_numpy(y.astype(np.int64))
    return dict(zip(flat, y.split([len(part) for part in flat.values()]))), classes


# ---- pixels: one rule for a whole data set --------------------------------------------------

def as_images(arrays: dict):
    """Arrays of images by part -> uint8 tensors (n,C,H,W), the highest white level, remarks.

    One scale a type: bytes beside 16-bit numbers are each read as their type is.
    """
    spans = collections.defaultdict(list)
    shaped = {}
    for part, array in arrays.items():
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4 and array.shape[3] in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        require(array.ndim == 4 and array.shape[1] in (1, 3),
                f"images of shape {array.shape}; wanted (N,H,W) or (N,H,W,1 or 3)")
        shaped[part] = array
        if array.size:
            spans[array.dtype].append(span_of(array))
    whites = {}
    remarks = []
    for dtype, some in spans.items():
        whites[dtype], words = white_of(some)
        remarks += words
        highest = [high for _, high, _ in some]
        require(whites[dtype] == 1 or not any(0 < high <= 1 for high in highest),
                f"the highest pixels of the parts are {highest}; wanted one scale")
    images = {}
    for part, array in shaped.items():
        pixels = to_bytes(array, whites.get(array.dtype, 255))
        images[part] = torch.from_numpy(np.ascontiguousarray(pixels))
    deep = [white for dtype, white in whites.items() if dtype != np.uint8]
    return images, max(deep, default=1), remarks


def span_of(pixels):
    """The lowest and the highest of the pixels, and whether all are whole numbers."""
    require(pixels.dtype.kind in "buif", f"pixels of type {pixels.dtype}; wanted numbers")
    low = float(pixels.min())
    high = float(pixels.max())
    require(low >= 0 and high <= WHITES[-1],
            f"pixels span {low:g} to {high:g}; wanted numbers in [0, 1], [0, 255] or up to "
            "65535, and no NaN")
    if pixels.dtype == np.uint8 and high > 1:
        high = 255.0                    # whatever the images use of their range
    return low, high, pixels.dtype.kind != "f" or not (pixels % 1).any()


def white_of(spans, source="", white=1):
    """The smallest usual white level, `white` at least, that holds all pixels; remarks.

    Floats may exceed 1 or 255 by a quarter, as scaled images do: they are clipped.
    """
    if not spans:
        return white, []
    lows, highs, wholes = zip(*spans)
    high = max(highs)
    whole = all(wholes)
    span = f"pixels span {min(lows):g} to {high:.8g}"
    require(whole or white > 1 or not 1.25 < high < 25,
            f"{source}{span}; wanted [0, 1] or [0, 255]")
    for level in WHITES:
        most = level if whole or level > 255 else 1.25 * level
        if level >= white and high <= most:
            break
    remarks = [] if high == level else [f"{span}, read as [0, {level}]"]
    return level, remarks


def to_bytes(pixels, white: int):
    """Pixels in [0, white] -> uint8 in [0,255]."""
    if pixels.dtype == np.uint8 and white == 255:
        return pixels
    levels = pixels * np.float32(255 / white)
    return levels.round().clip(0, 255).astype(np.uint8)


def in_colour(images):
    """Which images (N,C,H,W) have channels that differ by more than JPEG files add, 2 levels?"""
    marks = [torch.zeros(0, dtype=torch.bool)]
    for part in images.split(1000):
        spread = part.amax(1) - part.amin(1)
        marks.append(spread.flatten(1).amax(1) > 2)
    return torch.cat(marks)


def to_grey(images):
    """uint8 (N,C,H,W) -> (N,1,H,W), with the weights of ITU-R 601."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([19595, 38470, 7471])[:, None, None]         # of 2^16, as in PIL
    parts = []
    for part in images.split(1000):
        total = (part * weights).sum(1, True) + 2**15
        parts.append((total >> 16).byte())
    return torch.cat(parts)


def ground_of(images):
    """The mean level (N,) of the top and bottom rows of images (N,C,H,W)."""
    return images[:, :, [0, -1]].float().mean((1, 2, 3))


def resize(images, side: int):
    """uint8 (N,C,H,W) -> uint8 (N,C,side,side), the middle square of each, antialiased."""
    square = min(images.shape[2:])
    for axis in (2, 3):
        margin = images.shape[axis] - square
        images = images.narrow(axis, margin // 2, square)
    parts = []
    for part in images.split(1000):
        part = F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
        part = part.round().clamp(0, 255)               # byte() would cut off, and wrap round
        parts.append(part.byte())
    return torch.cat(parts)


# ---- folders of pictures --------------------------------------------------------------------

def folder_dataset(run: Run, root: Path) -> Dataset:
    """root/<class>/*, a fifth of it for test; or root/train/<class>/*, and so for test.

    root/unlabelled/**, and root/train/unlabelled/**, are training images without a label.
    """
    left_out = []
    samples = find_samples(root, left_out)
    files = [file for _, file, _ in samples]
    images, white, remarks, damaged = read_pictures(files, root, run)
    samples = [sample for sample in samples if sample[1] not in damaged]
    if left_out:
        counts = collections.Counter(left_out).most_common()
        remarks.append("left out: " + ", ".join(f"{count:,} {what}" for what, count in counts))

    parts = [part for part, _, _ in samples]
    names = [readable(file.relative_to(root).as_posix()) for _, file, _ in samples]
    classes = sorted({name for _, _, name in samples if name})
    labels = torch.tensor([classes.index(name) if name else -1 for _, _, name in samples])
    if "test" not in parts:             # the fifth does not depend on --seed: test stays test
        in_train = torch.tensor([part == "train" for part in parts])
        for row in set_aside(torch.where(in_train, labels, -1), names, 0.2).tolist():
            parts[row] = "test"
    rows = collections.defaultdict(list)
    for row, part in enumerate(parts):
        rows[part].append(row)
    return assemble(name_of(root), {part: images[some] for part, some in rows.items()},
                    {part: labels[some] for part, some in rows.items()}, classes,
                    {part: [names[row] for row in some] for part, some in rows.items()},
                    remarks=remarks, white=white)


def find_samples(root: Path, left_out: list) -> list:
    """(part, file, class) of each picture below a folder; the class is None where there is none.

    What is left out goes to the list of that name.
    """
    samples = []
    for part, folder in find_parts(root).items():
        if part == "unlabelled":
            samples += [(part, file, None) for file in pictures_in(folder, left_out)]
        else:
            samples += class_samples(folder, part, left_out)
    return samples


def find_parts(root: Path) -> dict:
    """{"train": a folder of classes, "test": ...}; of one without parts, {"train": root}."""
    parts = {}
    others = []
    hints = {}
    for folder in subfolders(root, []):
        part = PARTS.get(folder.name.lower())
        if part:
            other = parts.setdefault(part, folder)
            require(other == folder, f"{root}: {other.name}/ and {folder.name}/ are either "
                    f"both its {part} images, or two classes; rename one")
        else:
            others.append(folder)
            hints[hinted_part(folder.name)] = folder.name
    if not parts.keys() - {"unlabelled"}:
        renames = [f"{name}/ to {part}/" for part, name in hints.items() if part]
        require(len(renames) < 2, f"{root}: are these parts of the data set? then rename "
                f"{' and '.join(renames)}; else call these classes something else")
        return {"train": root}
    names = "/, ".join(folder.name for folder in parts.values())
    classes = [folder.name for folder in others if pictures_in(folder, [])]
    require(not classes, f"{root}: {names}/ beside {'/, '.join(classes)}/: either the former "
            "are parts of the data set, and the latter should be elsewhere, or all are "
            "classes; move or rename some")
    require("train" in parts, f"{root}: there is {names}/ but no train/")
    return parts


def hinted_part(name: str) -> str | None:
    """The part that seg_train, Test set or unlabeled_data may be meant for."""
    for word in re.split(r"[\W_]+", name.lower()):
        part = PARTS.get(word.removesuffix("set"))
        if part:
            return part
    return None


def class_samples(folder: Path, part: str, left_out: list) -> list:
    """(part, file, class) of each picture in a folder of classes."""
    samples = []
    classes = subfolders(folder, left_out)
    for path in list(classes):
        if PARTS.get(path.name.lower()) == "unlabelled":
            require(part == "train", f"{path}: images without a label are for training; move "
                    f"them to {folder.parent / path.name}")
            samples += [("unlabelled", file, None) for file in pictures_in(path, left_out)]
            classes.remove(path)
        require(path not in classes or hinted_part(path.name) != "unlabelled",
                f"{path}: is that a class? if its images have no label, rename it unlabelled, "
                "else anything else")
    require(len(classes) != 1 or not subfolders(classes[0], []),
            f"{folder}: all is in {classes[0].name}/; if its folders are the classes, "
            f"give {classes[0]}, or move them to {folder}" if classes else "")
    for path in classes:
        files = pictures_in(path, left_out)
        require(files, f"{folder}: no pictures in {path.name}/; remove it, or add some "
                f"({' '.join(IMAGE_FILES)})")
        samples += [(part, file, readable(path.name)) for file in files]
    require(classes, f"{folder}: no classes; wanted one subfolder a class, images in each")
    left_out += ["pictures in no class" for path in folder.iterdir() if is_picture(path)]
    return samples


def subfolders(folder: Path, left_out: list) -> list:
    """The folders in a folder, by name, but for hidden ones."""
    return [path for path in sorted(folder.iterdir())
            if path.is_dir() and not is_hidden(path, left_out)]


def is_hidden(path: Path, left_out: list) -> bool:
    """Is it what systems put beside pictures, or a folder of our results, which is noted?"""
    if path.name.startswith(".") or path.name.lower() in HIDDEN:
        return True
    # Where a script has worked is a .lock; by default that is a folder in runs/.
    ours = (path / ".lock").exists() or path.name == "runs" and any(path.glob("*/.lock"))
    if ours:
        left_out.append(f"{path.name}/ with results")
    return ours


def is_picture(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_FILES)


def pictures_in(folder: Path, left_out: list, seen=None) -> list:
    """The picture files below a folder, in order; the endings of others go to `left_out`."""
    seen = set() if seen is None else seen
    place = os.path.realpath(folder)
    if place in seen:                   # a link back to a folder above
        return []
    seen.add(place)
    files = []
    for path in folder.iterdir():
        if is_hidden(path, left_out):
            continue
        if path.is_dir():
            files += pictures_in(path, left_out, seen)
        elif is_picture(path):
            files.append(path)
        else:
            left_out.append(path.suffix.lower() or path.name)
    return sorted(files, key=lambda path: (str(path.parent), path.name))


def read_pictures(files: list, root: Path, run: Run):
    """Pictures -> uint8 (n,3,side,side), their white level, remarks, the files left out.

    OUT/images.npz keeps what has been read, also when interrupted: each is decoded once.
    """
    side = run.image_size
    cache = run.out / "images.npz"
    marks = {file: mark_of(file, root, side) for file in files}
    kept, white = read_cache(cache)
    remarks = []
    damaged = []
    if not kept.keys() >= set(marks.values()):
        print(f"reading {len(files):,} images", file=sys.stderr)
        before = white
        white, remarks = white_of(deep_spans(files), f"{root}: ")
        kept = {mark: kept[mark] for mark in marks.values() if mark in kept and white == before}
        try:
            for file, mark in marks.items():
                if mark not in kept:
                    try:
                        kept[mark] = read_image(file, (side, side), white)
                    except Mistake:
                        damaged.append(file)
        finally:
            write(cache, {"marks": list(kept), "pixels": list(kept.values()), "white": white})
    if damaged:
        words = ", ".join(file.relative_to(root).as_posix() for file in damaged)
        require(run.skip_damaged, f"{root}: {len(damaged)} of {len(files)} pictures cannot be "
                f"read: {words}; mend or remove them, or go on without: --skip-damaged")
        remarks.append(f"{len(damaged):,} damaged pictures left out: {words}")
    pixels = [kept[mark] for mark in marks.values() if mark in kept]
    require(pixels, f"{root}: no picture can be read")
    return torch.from_numpy(np.stack(pixels)), white, remarks, damaged


def mark_of(file: Path, root: Path, side: int) -> str:
    """What tells a picture, as it is now and at this size, from others."""
    about = file.stat()
    name = str(file.relative_to(root))
    return fingerprint(json.dumps([side, name, about.st_size, about.st_mtime_ns]).encode())


def read_cache(path: Path):
    """-> {mark: pixels (3,side,side)}, white level; {} and 0 where there are none."""
    try:
        with np.load(path, allow_pickle=False) as file:         # it knows a damaged one
            return dict(zip(file["marks"].tolist(), file["pixels"])), int(file["white"])
    except Exception:                   # numpy, zip and zlib each have their own errors
        return {}, 0


# ---- pictures -------------------------------------------------------------------------------

@contextlib.contextmanager
def open_picture(path):
    """A PIL image; whatever is wrong with the file becomes one line that names it."""
    from PIL import Image
    Image.MAX_IMAGE_PIXELS = 2**29      # PIL refuses twice as many; photographs have 2**28
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                yield picture
    except Exception as error:          # PIL, zlib and struct have many
        raise Mistake(f"{path} cannot be read as an image ({error}); mend or remove it"
                      ) from None


def deep_spans(files) -> list:
    """`span_of` each picture that has more than 8 bits."""
    spans = []
    for file in files:
        with contextlib.suppress(Mistake), open_picture(file) as picture:
            if picture.mode[0] in "IF":
                spans.append(span_of(np.asarray(picture)))
    return spans


def read_image(path, size, white=65535):
    """A picture, upright, on white, at size (height, width): uint8 RGB (3,H,W).

    One of that size goes through untouched; of any other the middle part of these
    proportions is scaled. `white` is that of pictures with more than 8 bits.
    """
    from PIL import Image, ImageOps
    height, width = size
    reach = 2 * max(size)
    with open_picture(path) as picture:
        picture.draft(None, (reach, reach))             # large JPEGs are decoded smaller
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":
            picture = Image.fromarray(to_bytes(np.asarray(picture), white))
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture)
        picture = picture.convert("RGB")
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture).transpose(2, 0, 1).copy()


def read_like(path, facts: dict):
    """A picture as those of a data set are -> uint8 (1,C,H,W), what was done."""
    channels, height, width = facts["shape"]
    white, remarks = white_of(deep_spans([path]), f"{path}: ", facts["white"])
    image = torch.from_numpy(read_image(path, (height, width), white))[None]
    kind = "RGB"
    if channels == 1:
        kind = "grey"
        image = to_grey(image)
        ground = ground_of(image).item()

        def distance(level):
            return min(abs(level - other) for other in facts["ground"])

        # Ink on paper, where all images of the data set are chalk on a board, or the reverse.
        if distance(255 - ground) + 64 < distance(ground):
            image = 255 - image
            remarks.append("inverted to the data set's background")
    return image, ", ".join([f"{path}: {kind}, {height}x{width}", *remarks])


# ---- rows: which images train, which choose, which labels count -----------------------------

def set_aside(labels, names: list, share: float, last=False) -> torch.Tensor:
    """Rows, sorted: of each class a share, but one at least, unless it has only one image.

    A hash of their names picks them, the smallest or the `last`: so a new image moves no
    more than one other of its class.
    """
    rows = []
    for c in labels[labels >= 0].unique():
        mine = (labels == c).nonzero()[:, 0].tolist()
        mine.sort(key=lambda row: hashlib.sha256(names[row].encode()).digest(), reverse=last)
        count = max(round(len(mine) * share), int(len(mine) > 1))
        rows += mine[:count]
    return torch.tensor(sorted(rows), dtype=torch.long)


def shuffled_classes(labels, rows, seed: int) -> list:
    """The rows of each class that has some, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return [rows[labels[rows] == c] for c in labels[rows].unique()]


def subset(data: Dataset, n: int, seed: int, subsets=10) -> torch.Tensor:
    """n rows with a label, as many of each class to within one; a smaller n is in a larger one.

    Seeds 0 to subsets-1 begin at even distances in one shuffled order of each class: they
    share no image while each class gives at most 1/subsets of its images.
    """
    rows = data.labelled()
    require(n <= len(rows),
            f"{n} images asked for; there are {len(rows)} besides validation images")
    parts = []
    for part in shuffled_classes(data.labels.cpu(), rows.cpu(), seed // subsets):
        parts.append(part.roll(-(seed % subsets) * len(part) // subsets))
    if n < len(parts):                  # not the first classes every time
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
        parts = [parts[c] for c in order]
    places = [torch.arange(len(part)) for part in parts]
    # The first of each class, then the second of each, and so on.
    turn = torch.cat(places).argsort(stable=True)
    return torch.cat(parts)[turn][:n].to(rows.device)


def say_if_few(n: int, data: Dataset):
    """A word on subsets that have no image of some classes."""
    classes = len(data.classes)
    if n < classes and RANK == 0:
        print(f"{n} images for {classes} classes: --seed draws which have one",
              file=sys.stderr)


def training_rows(data: Dataset, run: Run) -> torch.Tensor:
    """Rows to learn from: --images N of them, all with a label, or else the whole pool."""
    if run.images is None:
        return data.pool
    say_if_few(run.images, data)
    return subset(data, run.images, run.seed)


def fit_sizes(sizes: list, asked: bool, available: int) -> list:
    """Sizes, sorted, that `available` images allow; those that were `asked` for are not cut."""
    fitting = sorted({min(n, available) for n in sizes})
    if max(sizes) > available:
        require(not asked, f"{max(sizes)} images asked for; there are {available} besides "
                f"validation images; give smaller SIZES (--sizes)")
        print(f"{available} images to train on: sizes are {fitting}", file=sys.stderr)
    return fitting


def keep_labels(data: Dataset, n: int, seed: int):
    """Of the pool n images keep their label."""
    kept = subset(data, n, seed)
    say_if_few(n, data)
    labels = data.labels.clone()
    data.labels[data.pool] = -1
    data.labels[kept] = labels[kept]


def correct_labels(data: Dataset, file: Path):
    """Give images the labels that a table has for them in its column new_label."""
    rows = {name.strip(): row for row, name in enumerate(data.names)}
    numbers = {name.strip(): c for c, name in enumerate(data.classes)}
    labels = torch.cat([data.labels, data.test_labels])
    # A picture that was moved into the folder of its class has that label by now.
    moved = {(Path(name).name, label) for name, label in zip(rows, labels.tolist())}
    given = {}
    for line in read_table(file, ["image", "new_label"]):
        image = line["image"]
        name = line["new_label"]
        if not name:
            continue
        require(name in numbers, f"{file}: {image} is given the class {name!r}; the classes "
                f"are {', '.join(data.classes[:20])}")
        require(given.setdefault(image, name) == name,
                f"{file}: {image} is both {given[image]} and {name}; remove one line")
        if image in rows:
            labels[rows[image]] = numbers[name]
            continue
        require((Path(image).name, numbers[name]) in moved,
                f"{file}: {data.name} has no image {image!r}; they are called "
                f"{data.names[0]} and so on, see latent.csv")
    require(given, f"{file}: no line has a new label; write some into its column new_label")
    data.labels, data.test_labels = labels.split([len(data.labels), len(data.test_labels)])
    data.remarks.append(f"{len(given):,} labels are those of {file}")


def spaced(total: int, count: int) -> torch.Tensor:
    """`count` of the rows 0..total-1 at even distances: a set may be sorted by class."""
    return torch.linspace(0, total - 1, count).long()


# ---- files ----------------------------------------------------------------------------------

def write(path: Path, content):
    """Write JSON, CSV, a figure, arrays or a .pt beside `path`, then move it there in one step."""
    write_all({path: content})


def write_all(contents: dict):
    """Write files beside their places, and when all are whole, move them there in turn."""
    temporary = {path: path.with_name(f"{path.name}.{RANK}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            temporary[path].write_bytes(as_bytes(content, path.suffix))
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def as_bytes(content, suffix: str):
    """What a .json, .csv, .png, .npz or .pt file of this content holds."""
    if suffix == ".json":
        return json.dumps(content, indent=1, allow_nan=False).encode()
    if suffix == ".csv":                # a list of lines, each a list of cells
        text = io.StringIO()
        csv.writer(text).writerows(content)     # which end in CR LF: so a lone CR is quoted
        return text.getvalue().encode()
    buffer = io.BytesIO()
    if suffix == ".png":
        content.savefig(buffer, format="png")
    elif suffix == ".npz":
        np.savez(buffer, **content)
    else:
        torch.save(content, buffer)
    return buffer.getbuffer()


def columns(first: list, classes: list) -> list:
    """Names of the columns of a table, in which a class may be called like one of the first."""
    return [*first, *(f"class {name}" if name in first else name for name in classes)]


def read_table(file: Path, wanted: list) -> list:
    """A dict a line of a table that has these columns; their cells in NFC, without blanks."""
    try:
        text = file.read_text("utf-8-sig")
        mark = max(",;\t", key=text.partition("\n")[0].count)  # some spreadsheets write ";"
        lines = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
    except (UnicodeDecodeError, csv.Error):
        raise Mistake(f"{file} is no table in UTF-8; save it as CSV UTF-8") from None
    for line in lines:
        for column in wanted:
            require(column in line, f"{file} has no column {column}; wanted "
                    f"{' and '.join(wanted)}, as latent.py --review writes them")
            line[column] = readable(line[column] or "").strip()
    return lines


def fingerprint(source: Path | bytes) -> str:
    """16 hexadecimal digits that tell one file, or one content, from another."""
    if isinstance(source, Path):
        source = source.read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]


def save(path: Path, run: Run, data: Dataset, metrics: dict, made_from=(), **content):
    """Write path (its stem is its kind) and its facts as .json; the work is no longer unfinished."""
    facts = {"kind": path.stem, "format": FORMAT, "settings": run.settings,
             "changed": run.changed, "metrics": metrics, "dataset": data.facts(),
             "made_from": {source.stem: fingerprint(source) for source in made_from},
             "versions": versions()}
    write_all({path.with_suffix(".json"): facts, path: {**facts, **content}})
    path.with_suffix(".last.pt").unlink(missing_ok=True)


def versions() -> dict:
    """Of the libraries that a result depends on."""
    return {"torch": str(torch.__version__), "numpy": str(np.__version__)}


def read(path: Path, device="cpu") -> dict:
    """A .pt file of plain tensors; raises where a bit has changed, which torch overlooks."""
    with zipfile.ZipFile(path) as file:
        require(not file.testzip(), f"{path} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def load(run: Run, kind: str, device="cpu") -> dict:
    """Read OUT/<kind>.pt; whatever is wrong with it becomes one line with the remedy."""
    path = run.out / f"{kind}.pt"
    remedy = f"make it with: {command_for(run, kind)}"
    require(path.exists(), f"{path} not found; {remedy}")
    try:
        saved = read(path, device)
        stated = saved["kind"], saved["format"]
    except Exception:                   # zip, pickle and torch each have their own errors
        raise Mistake(f"{path} is damaged; {remedy}") from None
    require(stated == (kind, FORMAT), f"{path} is a {stated[0]} file of format {stated[1]}; "
            f"wanted {kind}, {FORMAT}; {remedy}")
    for stem, mark in saved["made_from"].items():
        source = run.out / f"{stem}.pt"
        require(not source.exists() or fingerprint(source) == mark,
                f"{path} was made from another {stem}.pt; {remedy}")
    facts = saved["dataset"]
    require(facts["fingerprint"] == run.record.get("fingerprint", facts["fingerprint"]),
            f"{path} was made from other images or labels; {remedy}")
    for key in ("images", "seed") if run.one_subset else ():
        require(facts["which"][key] == run.which[key], f"{path} was made with --{key} "
                f"{facts['which'][key]}, not {run.which[key]}; {remedy}")
    return saved


# ---- scores ---------------------------------------------------------------------------------

def scores(q, y, bins=15) -> dict:
    """Accuracy, balanced accuracy, NLL (nats), Brier score, ECE of q (N,K), labels y (N,)."""
    right = (q.argmax(1) == y).float()
    recall = torch.stack([right[y == c].mean() for c in y.unique()])
    stated = q.gather(1, y[:, None]).squeeze(1)         # of the true class
    nll = -stated.clamp(min=1e-12).log().mean()         # a stated 0 costs 28 nats, not inf
    brier = (q.square().sum(1) - 2 * stated + 1).mean()
    return {"accuracy": right.mean().item(), "balanced_accuracy": recall.mean().item(),
            "nll": nll.item(), "brier": brier.item(), "ece": ece(q.amax(1), right, bins)}


def ece(confidence, right, bins=15) -> float:
    """Mean gap of confidence and accuracy (Guo et al. 2017), over bins of equal mass."""
    # Equal confidences share their mean gap: the order of the images cannot matter.
    level, row = confidence.unique(return_inverse=True)
    mean = torch.zeros_like(level).scatter_reduce(0, row, confidence - right, "mean",
                                                  include_self=False)
    gap = mean[row.sort()[0]]
    sums = [part.sum().abs() for part in gap.tensor_split(bins)]
    return sum(part.item() for part in sums) / len(gap)


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


# ---- progress and unfinished work -----------------------------------------------------------

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
            each = spent / max(done - self.first, 1)
            when = f"{clock(each * (self.total - done))} left"
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

    `state` and `history` are those of the last round, or None and []. What is not taken up is
    renamed, never overwritten; `save` removes the file when the work is done.
    """

    def __init__(self, run: Run, name: str, data: Dataset, steps: int, resume: bool, **facts):
        self.path = run.out / f"{name}.last.pt"
        self.facts = {**run.settings, **facts, "steps": steps, "ranks": RANKS, "amp": run.amp,
                      "device": run.device.type, "data": data.fingerprint,
                      "code": fingerprint(Path(__file__).with_name(f"{name}.py"))}
        for key in ("dataset", "data_dir", "labels_from"):      # known by content
            self.facts.pop(key)
        self.state = None
        self.history = []
        if RANK == 0 and self.path.exists():
            self.take_up(resume)
        done = self.history[-1]["step"] if self.history else 0
        self.progress = Progress(steps, name, run.quiet, done, run.out / f"{name}.log.jsonl")

    def take_up(self, resume: bool):
        """Go on from the file, if it fits; else keep it under another name."""
        try:
            saved = read(self.path)
            before = saved["facts"]
            differing = [f"{key} {before.get(key)}, now {value}"
                         for key, value in self.facts.items() if before.get(key) != value]
        except Exception:               # zip, pickle and torch each have their own errors
            differing = ["damaged"]
        if RANKS > 1:                   # it has the random numbers of one rank only
            differing.append(f"{RANKS} ranks")
        if resume and not differing:
            self.state = saved["state"]
            self.history = saved["history"]
            return
        for k in itertools.count(1):
            other = self.path.with_suffix(f".{k}.pt")
            if not other.exists():
                break
        self.path.rename(other)
        why = f"does not fit ({'; '.join(differing)})" if resume else "is not resumed"
        print(f"{self.path} {why}; kept as {other.name}, starting afresh", file=sys.stderr)

    def keep(self, row: dict, words: str):
        """Report a row of training, add it to the history, write all of it down."""
        rate = row.pop("images_per_second")             # it differs from run to run
        self.state = row.pop("state")
        self.progress(row["step"], f"{words}  {rate:,.0f} images/s", images_per_second=rate)
        self.history.append(row)
        write(self.path, {"facts": self.facts, "state": self.state, "history": self.history})


# ---- figures --------------------------------------------------------------------------------

# Petroff (2021): colours that colour-blind people tell apart, in order of use.
COLOURS = ("#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 "
           "#a96b59 #e76300 #b9ac70 #717581 #92dadd").split()
MARKERS = "osD^vP*Xhd"


def figure(width=10.0, height=5.0):
    """A matplotlib Figure by itself: no pyplot, no display. Inches."""
    import matplotlib.figure
    return matplotlib.figure.Figure((width, height), layout="constrained", dpi=130)


def legible(names: list) -> list:
    """Names as figures can show them: short, what the font lacks escaped, "$" no formula."""
    from matplotlib import font_manager as fonts
    bold = fonts.findfont(fonts.FontProperties(weight="bold"))  # it lacks more than the plain
    known = fonts.get_font(bold).get_charmap()

    def shown(letter):
        if letter == "$":
            return r"\$"
        return letter if ord(letter) in known else ascii(letter)[1:-1]

    short = [name if len(name) <= 20 else name[:19] + "…" for name in names]
    return ["".join(map(shown, name)) for name in short]


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
SIDE = 28                               # pixels


def glyphs() -> Dataset:
    """The embedded digits: 10,000 for training, 2,000 for test; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for count, fonts in ((9000, TRAINING_FONTS), (1000, VALIDATION_FONTS), (2000, TEST_FONTS)):
        fields = torch.stack([distance_field(font, digit)
                              for font in fonts for digit in "0123456789"])
        font = torch.randint(len(fonts), (count,), generator=generator)
        which = 10 * font + torch.arange(count) % 10
        for part in which.split(500):   # fits the processor's cache
            images.append(draw_glyphs(fields[part], generator))
    x = torch.cat(images)
    y = torch.arange(12_000) % 10
    return Dataset(x[:10_000], y[:10_000], x[10_000:], y[10_000:], list("0123456789"),
                   "glyphs", validation=torch.arange(9000, 10_000))


def distance_field(font_name: str, digit: str):
    """(2 SIDE, 2 SIDE) distances to a digit's outline in image pixels, positive inside."""
    from matplotlib import ft2font, get_data_path, path
    file = Path(get_data_path(), "fonts", "ttf", f"{font_name}.ttf")
    font = ft2font.FT2Font(str(file))
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

    fine = 2 * SIDE
    axis = (torch.arange(fine) + 0.5) / 2 - SIDE / 2
    p = torch.complex(axis.repeat(fine), axis.repeat_interleave(fine))[:, None]
    along = (((p - a) * (b - a).conj()).real / (b - a).abs() ** 2).clamp(0, 1)
    distance = (p - a - along * (b - a)).abs().amin(1)
    # Seen from inside, the outline turns a full circle; a hole turns back and cancels it.
    turns = ((b - p) / (a - p)).angle().sum(1).abs()
    return torch.where(turns > torch.pi, distance, -distance).view(fine, fine)


def draw_glyphs(fields, generator):
    """Distance fields (n, ., .) -> uint8 images (n,1,SIDE,SIDE), each bent in its own way."""
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
    grid = F.affine_grid(torch.cat([x, y], 1), (len(x), 1, SIDE, SIDE), align_corners=False)
    # Smooth noise: two channels push pixels about, the third thickens and thins the stroke.
    noise = torch.randn(len(x), 3, 4, 4, generator=generator)
    wave = F.interpolate(noise, SIDE, mode="bicubic", align_corners=True)
    grid = grid + 0.05 * wave[:, :2].permute(0, 2, 3, 1)
    depth = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=False)
    depth = depth[:, 0]
    # Stroke weight is where the distances are cut, edge blur how gently: no morphology.
    edge = depth + uniform(0.0, 0.7) + 0.2 * wave[:, 2]
    ink = (0.5 + edge / uniform(1.0, 2.0)).clamp(0, 1)
    noise = uniform(0.0, 0.08) * torch.randn(ink.shape, generator=generator)
    grey = (ink * uniform(0.6, 1.0) + noise).clamp(0, 1)
    return (grey * 255).round().byte()[:, None]
