"""What the scripts share: command line, data sets, files, scores, progress, figures, glyphs.

It knows nothing of models. A command line becomes a `Run`, images become a `Dataset`, and
what is made of them becomes files; the order below is that of the first line.
"""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Letters: N training images, M images of all parts, C×H×W image, K classes.
# y integer labels (N,), -1 for none; q class probabilities (N,K).
FORMAT = 7                              # of the files; any other is refused
FEW = 20                                # labels of a class of which all are for training
# The settings that say which images a run is about, and their defaults.
WHICH = {"dataset": "glyphs", "data_dir": "data", "image_size": 32, "labels": None,
         "labels_from": None, "skip_damaged": False, "images": None, "seed": 0,
         "backbone": None}
# What no file records, since it changes no result (--threads: no more than the last digits).
HARMLESS = ("out script writes resume quiet threads export image point predict jobs gather "
            "review sizes").split()
STEMS = "vae deform latent hybrids cnn compare".split()
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
               "emnist-letters": "EMNIST", "emnist-balanced": "EMNIST", "usps": "USPS",
               "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
NAMES = ["glyphs", *TORCHVISION]
IMAGE_FILES = tuple(".jpg .jpeg .jfif .png .gif .ppm .pgm .bmp .tif .tiff .webp".split())
# Parts of a data set, in small letters, as people call their folders and arrays.
PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
         "validation": "validation", "dev": "validation", "test": "test", "testing": "test",
         "unlabelled": "unlabelled", "unlabeled": "unlabelled"}
ORDER = ["train", "validation", "unlabelled", "test"]   # of the parts in a data set
ARRAYS = ("x_train y_train x_validation y_validation x_test y_test x_unlabelled f_train "
          "f_validation f_test f_unlabelled classes").split()
# What systems put beside pictures, besides all that begins with a dot.
HIDDEN = "@eadir __macosx #recycle $recycle.bin thumbs.db desktop.ini".split()
PART = 50                               # pictures that are seen, and kept, together
WHITES = (1, 255, 1023, 4095, 16383, 65535)             # usual values of a white pixel
# torchrun says which of its processes this is; batch systems set some of its variables, too.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


# ---- the command line -----------------------------------------------------------------------

class Mistake(Exception):
    """A user's mistake, told in one line that names the remedy."""


def require(ok, message):
    if not ok:
        raise Mistake(message)


def say(message):
    """A line beside the results; one rank says it for all."""
    if RANK == 0:
        print(message, file=sys.stderr, flush=True)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands; a default only where there is one."""

    def _get_help_string(self, action):
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Mistakes end in one line; `settings` are the flags that can change a result."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        args.settings = {key: value for key, value in vars(args).items()
                         if key not in HARMLESS}
        args.changed = {key: value for key, value in args.settings.items()
                        if value != self.get_default(key)}
        return args


def flags(script: str, doc: str, images=True) -> Parser:
    """A parser with the flags that all scripts share; `images`: --images, too."""
    parser = Parser(script, description=doc, formatter_class=Help)
    parser.set_defaults(script=script, writes=True)
    add = parser.add_argument_group("which images", "If not given, as for the files in the "
                                    "working directory.").add_argument
    add("--dataset", metavar="NAME|FOLDER|FILE.npz",
        help=f"a folder of images, an .npz file, or one of {' '.join(NAMES)}; else glyphs, "
        "which are embedded")
    add("--data-dir", help="folder of named data sets; else data")
    add("--image-size", type=number(int, 16, 64),
        help="side to which the images of a folder are scaled, in pixels; else 32")
    add("--labels", type=number(int, 1),
        help="number of training images that keep their label, equal numbers per class")
    add("--labels-from", help="table of labels to correct or to add, a .csv file with columns "
        "image and new_label")
    add("--backbone", metavar="NAME|FILE.py",
        help="learn from the features of a pretrained network in place of pixels: one of "
        "torchvision.models by name, or a file with a class Backbone and SIZE")
    add("--skip-damaged", action="store_true", default=None,
        help="leave out pictures that cannot be read")
    if images:
        add("--images", type=number(int, 1),
            help="learn from at most so many labelled training images, equal numbers per "
            "class, and no others; else from all but those kept for validation")
    add("--seed", type=number(int, 0, 2**32), help="seed of every random choice; else 0")
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("-o", "--out", type=Path,
        help="working directory; if not given, runs/<name of the data set>")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where to compute; auto is cuda if there is one, else cpu")
    add("--threads", type=number(int, 1), default=1, help="processor threads")
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
    threads = torch.get_num_threads()
    code = 2
    try:
        run = start(args)
        command(run, args)
        print(end="", flush=True)       # a full disk or a reader that has gone shows here
        return 0
    except KeyboardInterrupt:
        if Path(sys.argv[0]).name == args.script:       # a notebook goes on; a script ends
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        message = "interrupted; what was finished is kept"
        code = 130
    except (Mistake, FloatingPointError) as error:
        message = str(error)
    except OSError as error:
        drop_output()                   # in case that this was it
        place = error.filename or f"{args.out} or standard output"
        message = f"{place}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error).lower():           # torch's and numpy's word
            raise
        message = "out of memory; use fewer or smaller images, or --device cpu"
    finally:
        torch.set_num_threads(threads)  # a notebook goes on with its own
        if run:
            run.release()
    print(f"{args.script}: {' '.join(message.split())}", file=sys.stderr)
    return code


def drop_output():
    """Drop what standard output does not take: Python would try it again, and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- a run: which images, its folder, device and arithmetic ---------------------------------

class Run(argparse.Namespace):
    """One run of one script: its flags, and what `start` makes of them.

    `settings` are the flags that can change a result, `changed` those that differ from their
    defaults, `cores` the threads that torch would take by itself.
    """
    images = None                       # compare.py has no such flag
    record = {}                         # facts of the data set that OUT is of
    source = ""                         # the stem of the file that says so
    bound = False                       # does this script build on that file?
    binding = ["image_size", "labels", "backbone", "images", "seed"]        # by it
    lock = None

    @property
    def which(self) -> dict:
        """The settings that say which images; None where that was not said."""
        return {key: getattr(self, key) for key in WHICH}

    def release(self):
        """Let other runs into the folder."""
        if self.lock:
            self.lock.close()


def start(args) -> Run:
    """Settle which images, threads, device and arithmetic; make the working directory."""
    require(RANKS == 1 or args.script == "compare.py", "start without torchrun")
    args.out = args.out or Path("runs", name_of(args.dataset or "glyphs"))
    run = Run(**vars(args))
    run.cores = torch.get_num_threads()         # or OMP_NUM_THREADS; torchrun sets it to 1
    torch.set_num_threads(run.threads)
    run.device = choose_device(run.device)
    if run.amp is None:
        run.amp = bfloat16_is_fast(run.device)
    settle(run)
    among = holds_pictures(run.out.resolve(), Path(run.dataset).resolve())
    require(run.dataset in NAMES or not among,
            f"{run.out} holds pictures of the data set; give another -o")
    run.settings.update(run.which)
    if run.writes:
        run.out.mkdir(parents=True, exist_ok=True)
        if RANK == 0:                   # torchrun's ranks are one run
            run.lock = lock_folder(run.out)
    return run


def name_of(spec) -> str:
    """The name of a data set: the last part of its path, whole, but for .npz."""
    return Path(os.path.abspath(spec)).name.removesuffix(".npz")


def settle(run):
    """Decide which images: as the flags say, else as the folder does, else as by default.

    What a file says that the script builds on cannot be contradicted; its own files, and
    later ones, it may make anew.
    """
    stem = Path(run.script).stem
    upstream = {"deform": [], "vae": ["deform"]}.get(stem, ["vae", "deform"])
    if stem == "vae" and run.backbone:  # features do not move
        upstream = []
    for source in [*upstream, *STEMS]:
        record = record_of(run.out, source)
        if record:
            run.record = record["dataset"]
            run.source = source
            run.bound = source in upstream
            break
    known = run.record.get("which", {})
    given = {key: value for key, value in run.which.items() if value is not None}
    inherited = known if run.bound or run.dataset is None else {}
    vars(run).update({**WHICH, **inherited, **given})
    if stem == "compare":               # it draws many subsets, and from any seed on
        run.binding = run.binding[:3]
    files = [str(which.get("backbone")).endswith(".py") for which in (known, run.which)]
    if all(files):                      # they are known by content, not by path
        run.binding = [key for key in run.binding if key != "backbone"]
    for key in run.binding if run.bound else []:
        flag = key.replace("_", "-")
        require(run.which[key] == known[key], f"--{flag} {run.which[key]}: {run.out}/"
                f"{run.source}.pt was made with {known[key]}; make it again with: "
                f"{command_for(run, run.source)}; or give another -o")


def record_of(out: Path, stem: str) -> dict:
    """What OUT/stem.json, or else stem.pt, says of how it was made; {} without either."""
    for path in (out / f"{stem}.json", out / f"{stem}.pt"):
        if path.exists():
            return read_whole(path, "remove it, or give another -o")
    return {}


def command_for(run: Run, stem: str, **changes) -> str:
    """The whole command that makes OUT/stem.pt, with every setting that is not a default."""
    changed = run.changed
    if f"{stem}.py" != run.script:
        changed = record_of(run.out, stem).get("changed", {})
    settings = {**changed, **run.which, **changes}
    recorded = run.record.get("which", {})              # else it would be taken over again
    if run.script == "compare.py" and run.record:       # which has subsets of its own
        settings["seed"] = run.record["which"]["seed"]
    # What cannot be said by a flag is said by the data set: of one that is named, nothing is
    # taken over.
    unsaid = any(settings[key] is None and recorded.get(key) for key in WHICH)
    words = []
    for key, value in settings.items():
        flag = key.replace("_", "-")
        usual = value == WHICH.get(key) == recorded.get(key, value)
        if value is None or usual and not (unsaid and key == "dataset"):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, np.ravel(value))]          # of a list all
    return shlex.join(["python", f"{stem}.py", *words, "-o", str(run.out)])


def holds_pictures(out: Path, root: Path) -> bool:
    """Is a working directory the data set, or a folder of pictures in it?"""
    return root.is_dir() and (out == root or root in out.parents and holds_some(out))


def lock_folder(out):
    """One run at a time works in a folder -> the file that keeps others out until closed."""
    file = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f"another run works in {out}; wait, or give another --out (or a script "
                      'that calls main lacks: if __name__ == "__main__":)') from None
    except (ImportError, OSError):      # Windows and some network drives have no such lock
        pass
    return file


def choose_device(name):
    """The device that --device names; on a machine of several cards the rank's own."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    require(there[name], f"--device {name}: there is none here; use --device cpu")
    if name == "cuda":
        card = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        name = f"cuda:{card}"
    return torch.device(name)


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
    """Training images and test images, with labels 0..K-1, -1 for none; `assemble` makes it.

    Rows are numbered once and never again: 0 to N-1 are the training images, and N is, in
    `names`, the first test image. `pool` and `validation`, sorted, share the rows 0 to N-1.
    """
    images: Tensor                      # uint8 (N,C,H,W)
    labels: Tensor                      # int64 (N,)
    test_images: Tensor
    test_labels: Tensor                 # all have one
    classes: list
    name: str
    names: list                         # of all: files below the folder, or "train/17"
    pool: Tensor                        # rows that may train, with or without a label
    validation: Tensor                  # rows that choose, never trained on
    white: int = 1                      # of the numbers read; 1, too, if all were bytes
    remarks: list = field(default_factory=list)         # what a person should know of it
    which: dict = field(default_factory=dict)   # the settings that it was read with
    originals: list = None              # of all: files, or arrays (C,H,W), as they came
    features: Tensor = None             # (N,F), of a pretrained network
    test_features: Tensor = None
    backbone: str = None                # its mark; features may come with the set, too
    mirrored: Tensor = None             # (N,F), of the training images' mirror images

    def labelled(self) -> Tensor:
        """Rows of the pool that have a label."""
        return self.pool[self.labels[self.pool] >= 0]

    def unlabelled(self) -> Tensor:
        """Rows of the pool that have none."""
        return self.pool[self.labels[self.pool] < 0]

    def split(self, whole):
        """What belongs to the training images, and what to the test images."""
        return whole.split([len(self.images), len(self.test_images)])

    def original(self, row: int):
        """The picture of a row as it came: a PIL image, RGB, upright."""
        from PIL import Image
        source = self.originals[row]
        if isinstance(source, Path):
            return upright(source, self.white)
        return Image.fromarray(source.transpose(1, 2, 0).squeeze()).convert("RGB")

    def mark(self, row: int) -> str:
        """What tells the picture of a row, as it came, from others."""
        source = self.originals[row]
        return fingerprint(source if isinstance(source, Path) else source.tobytes())

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 digits that tell these images and labels from others, wherever they lie."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        parts = [self.images, self.labels, self.test_images, self.test_labels, self.pool]
        if self.features is not None and not self.backbone:     # they came with the set
            parts += [self.features, self.test_features]
        for part in parts:
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def facts(self) -> dict:
        """What a file says of its data set: enough to load it again, and to know it again."""
        grounds = (ground_of(self.images) / 8).round().unique() * 8
        with_label = int((self.labels >= 0).sum())
        return {"name": self.name, "which": self.which, "fingerprint": self.fingerprint,
                "shape": list(self.images.shape[1:]), "classes": self.classes,
                "images": with_label, "unlabelled": len(self.labels) - with_label,
                "test_images": len(self.test_images), "white": self.white,
                "ground": grounds.int().tolist(), "backbone": self.backbone}

    def to(self, device):
        """Move all tensors to the device, in place."""
        for key, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, key, value.to(device))
        return self


def load_dataset(run: Run) -> Dataset:
    """The data set of a run, with its labels; other images than the folder's are refused."""
    data = open_dataset(run)
    data.which = run.which
    if run.labels:
        data = with_labels(data, run.labels, run.seed)
    if run.labels_from:
        first = "deform" if run.backbone is None else "vae"
        require(os.path.exists(run.labels_from), f"{run.labels_from} not found; put it back, "
                f"or begin without it: {command_for(run, first, labels_from=None)}")
        correct_labels(data, Path(run.labels_from))
    check_folder(run, data)
    add_features(run, data)
    if not run.bound:                   # a later script need not say it again
        for remark in [*data.remarks, *remarks_on(data)]:
            say(f"{data.name}: {remark}")
    run.record = data.facts()
    return data.to(run.device)


def open_dataset(run) -> Dataset:
    """Read the data set of a run; the pictures of a folder are scaled, once."""
    spec = run.dataset
    require(spec not in NAMES or not holds_some(Path(spec)), f"{spec} is a named data set, "
            "and a folder of pictures here; rename the folder")
    if spec == "glyphs":
        return glyphs()
    if spec.endswith(".npz"):
        return npz_dataset(spec, run.image_size)
    if spec in TORCHVISION:
        return torchvision_dataset(spec, run.data_dir, run.image_size)
    if os.path.isdir(spec):
        return folder_dataset(Path(spec), run)
    raise Mistake(f"no data set or folder {spec!r}; wanted a folder, a file .npz, or one of "
                  f"{' '.join(NAMES)}; one that was moved has to be named again, by each "
                  "command")


def holds_some(folder: Path) -> bool:
    """Is it a folder of pictures, and none that a script has worked in?"""
    return folder.is_dir() and not is_hidden(folder) and bool(pictures_in(folder))


def check_folder(run, data):
    """A folder belongs to one data set, which is known by its content."""
    if run.record.get("fingerprint", data.fingerprint) == data.fingerprint:
        return
    before = run.record["which"]
    require(os.path.abspath(before["dataset"]) == os.path.abspath(run.dataset),
            f"{run.out} is the folder of {before['dataset']}; {run.dataset} is another data "
            f"set; give another -o, as -o {run.out}-{data.name}")
    command = command_for(run, run.source)
    require(not run.bound, f"{run.out}/{run.source}.pt was made from other images or labels "
            f"than {run.dataset} has now; make it again with: {command}; or give another -o")
    say(f"{run.out} was made from other images or labels than {run.dataset} has now")


def remarks_on(data) -> list:
    """On pictures that are there twice, pixel for pixel, and on classes without a test."""
    images = [*data.images.numpy(), *data.test_images.numpy()]
    marks = [hash(image.tobytes()) for image in images]
    labels = data.labels.tolist() + data.test_labels.tolist()
    pool = set(data.pool.tolist())
    training = {marks[row] for row in pool}
    others = [mark for row, mark in enumerate(marks) if row not in pool]
    remarks = []
    twice = sum(mark in training for mark in others)
    if twice:
        remarks.append(f"{twice:,} of {len(others):,} validation and test images are training "
                       "images, too, pixel for pixel; they measure memory")
    two = len(set(zip(marks, labels))) - len(set(marks))
    if two:
        remarks.append(f"{two:,} images are in two classes, or with and without a label")
    for c in set(range(len(data.classes))) - set(data.test_labels.tolist()):
        remarks.append(f"no test images of {data.classes[c]}")
    return remarks


def assemble(name, images, labels, parts, names, classes=None, side=32, white=1,
             remarks=(), originals=None) -> Dataset:
    """The one door that every data set passes.

    `images` uint8 (M,C,H,W), `labels` (M,) numbers or names, -1 or "" for none; `parts` and
    `names` of the M images, those of train first, then validation, unlabelled and test.
    Labels become 0..K-1, colour that is none becomes grey, sides 16 to 64. `originals` are the
    files of the images, if not these themselves.
    """
    originals = originals or images.numpy()
    counts = Counter(parts)
    train = counts["train"]
    n = len(parts) - counts["test"]
    require(train and n < len(parts), f"{name}: no training images, or no test images; a "
            "class wants two or more")
    y, classes = number_classes(name, labels, np.array(parts), classes)
    images, more_remarks = fit_pixels(images, side)
    validation = torch.arange(train, train + counts["validation"])
    if len(validation) == 0:
        validation = set_aside(y[:n].tolist(), names, 0.1, least=FEW, last=True)
    if len(validation) == 0:
        remarks = [*remarks, f"fewer than {FEW} images a class: none is left for validation"]
    every = torch.arange(n)
    pool = every[~torch.isin(every, validation)]
    return Dataset(images[:n], y[:n], images[n:], y[n:], classes, readable(name), names, pool,
                   validation, white, [*remarks, *more_remarks], originals=originals)


def number_classes(name, labels, parts, classes):
    """Labels (M,) -> int64 0..K-1, -1 for none; the names of the classes."""
    none = "" if labels.dtype.kind == "U" else -1
    values = np.unique(labels[parts == "train"])
    values = values[values != none]
    unknown = np.setdiff1d(labels, [*values, none]).tolist()
    require(not unknown, f"{name}: classes without training images: {unknown[:5]}")
    require(none not in labels[(parts == "validation") | (parts == "test")],
            f"{name}: validation or test images without a label ({none!r})")
    require(len(values) > 1, f"{name}: only one class; percentages need two or more")
    if none == "" or not classes:
        classes = values.tolist()
    elif values[-1] < len(classes):     # some classes may have no image
        classes = [classes[value] for value in values]
    require(len(classes) == len(values),
            f"{name}: {len(classes)} names for {len(values)} classes")
    y = np.where(labels == none, -1, np.searchsorted(values, labels))
    classes = [readable(str(value)) for value in classes]
    twice = [label for label, count in Counter(classes).items() if count > 1]
    require(not twice, f"{name}: several classes are called {twice}")
    return torch.from_numpy(y), classes


def fit_pixels(images, side):
    """Colour that is none becomes grey, for all images or for none; sides 16 to 64."""
    remarks = []
    height, width = images.shape[2:]
    count = int(in_parts(in_colour, images).sum())
    if count == 0:
        images = in_parts(to_grey, images)
    elif count < len(images) / 10:
        remarks.append(f"only {count:,} of {len(images):,} images have colour")
    if max(height, width) > 64 or min(height, width) < 16:
        images = in_parts(functools.partial(resize, side=side), images)
        remarks.append(f"of images of {height}x{width} pixels, the middle squares are scaled "
                       f"to {side}x{side}")
    return images, remarks


def readable(name: str) -> str:
    """A name, stripped, in NFC as most systems write it; bytes that are no text spelt out."""
    name = unicodedata.normalize("NFC", name.strip())
    return name.encode("utf-8", "backslashreplace").decode()


# ---- data sets: arrays ----------------------------------------------------------------------

def torchvision_dataset(name, root, side):
    """One of torchvision.datasets, downloaded only if it is not on disk."""
    arrays = {}
    for part in ("train", "test"):
        keywords = {"train": part == "train"}
        if name == "stl10":
            keywords = {"split": part}
        if name.startswith("emnist"):
            keywords["split"] = name.removeprefix("emnist-")
        try:
            from torchvision import datasets
            read = getattr(datasets, TORCHVISION[name])(root, **keywords, download=True)
        except Exception as error:      # a build that does not fit torch, each mirror's errors
            raise Mistake(f"{name} is neither in {root}, nor can it be downloaded ({error}); "
                          f"put its files into {root}, as torchvision does, or use --dataset "
                          "glyphs meanwhile") from None
        arrays[f"x_{part}"] = np.asarray(read.data)
        arrays[f"y_{part}"] = np.asarray(read.labels if name == "stl10" else read.targets)
        if name.startswith("emnist"):   # its images are stored lying down
            arrays[f"x_{part}"] = arrays[f"x_{part}"].swapaxes(1, 2)
    arrays["classes"] = [label.split(" - ")[0] for label in getattr(read, "classes", [])]
    return array_dataset(name, arrays, side)


def npz_dataset(path, side):
    """x_train y_train x_test y_test, and if there x_val y_val x_unlabelled classes."""
    try:
        arrays = {}
        left_out = []
        with np.load(path) as file:
            for name in file.files:
                kind, _, part = name.lower().partition("_")
                known = f"{kind}_{PARTS[part]}" if part in PARTS else name.lower()
                near = difflib.get_close_matches(known, ARRAYS, 1, 0.75)
                require(known not in arrays, f"there are two arrays {known}")
                if known in ARRAYS:
                    arrays[known] = file[name]
                else:
                    left_out.append(f"{name} (is it {near[0]}?)" if near else name)
        remarks = [f"left out: {', '.join(left_out)}"] if left_out else []
        return array_dataset(name_of(path), arrays, side, remarks)
    except Exception as error:          # zip, zlib and numpy have many
        raise Mistake(f"{path}: {error}; make it with numpy.savez(path, x_train=..., "
                      "y_train=..., x_test=..., y_test=..., [x_val=..., y_val=...], "
                      "[x_unlabelled=...], [classes=...])") from None


def array_dataset(name, arrays, side, remarks=()):
    """`arrays` by the names in ARRAYS: images (n,H,W), (n,H,W,C) or (n,C,H,W), and labels."""
    images = []
    labels = []
    parts = []
    names = []
    for part in ORDER:
        x = arrays.get(f"x_{part}", [])
        y = arrays.get(f"y_{part}", [])
        if len(x) == 0:
            continue
        if part == "unlabelled":
            y = np.full(len(x), "" if labels[0].dtype.kind == "U" else -1)
        require(len(x) == len(y), f"x_{part} and y_{part} differ in number")
        images.append(x)
        labels.append(as_labels(y))
        parts += len(x) * [part]
        names += [f"{part}/{k}" for k in range(len(x))]
    images, white, more_remarks = as_images(images)
    classes = np.array(arrays.get("classes", [])).astype(str).tolist()
    data = assemble(name, images, np.concatenate(labels), parts, names, classes, side, white,
                    [*remarks, *more_remarks])
    features = [arrays[f"f_{part}"] for part in ORDER if f"f_{part}" in arrays]
    if features:
        for part in ORDER:
            require(len(arrays.get(f"f_{part}", [])) == parts.count(part),
                    f"f_{part} is not of as many images as x_{part}")
        features = np.concatenate(features)
        if features.dtype != np.float16:                # that takes half of the memory
            features = features.astype(np.float32)
        features = torch.from_numpy(features)
        require(features.dim() == 2 and features.isfinite().all(),
                f"features of shape {tuple(features.shape)}, or NaN; wanted (N,F), finite")
        data.features, data.test_features = data.split(features)
    return data


def as_labels(y):
    """Labels as whole numbers, names, or one-hot rows -> (n,) int64, or names."""
    if y.ndim == 2 and y.shape[1] > 1:
        rows = y
        y = rows.argmax(1)
        require((rows == np.eye(rows.shape[1])[y]).all(),
                f"labels of shape {rows.shape}; wanted (N,), or one-hot rows")
    y = y.reshape(-1)
    if y.dtype.kind in "US":
        return y.astype(str)
    require((y % 1 == 0).all() and (y >= -1).all(),
            "labels must be numbers from 0, names, or one-hot rows; -1 or no name is no label")
    return y.astype(np.int64)


# ---- pixels: one rule for a whole data set --------------------------------------------------

def as_images(arrays):
    """Arrays of images of one shape and type -> uint8 (M,C,H,W), white level, remarks."""
    shaped = []
    for array in arrays:
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[-1] in (1, 3):
            array = np.moveaxis(array, -1, 1)
        shaped.append(array)
    kinds = {(*array.shape[1:], str(array.dtype)) for array in shaped}
    require(len(kinds) == 1, f"images of {sorted(kinds)}; wanted one shape and one type")
    pixels = np.concatenate(shaped)
    require(pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.size,
            f"images of shape {pixels.shape}; wanted (N,H,W) or (N,H,W,1 or 3)")
    peaks = [peak_of(array) for array in shaped]
    white, remarks = white_of(max(peaks), pixels.dtype.kind != "f")
    require(white == 1 or not any(0 < peak <= 1 for peak in peaks),
            f"the highest pixels of the parts are {peaks}; wanted one scale")
    if len({white_of(peak, True)[0] for peak in peaks}) > 1:
        remarks = [f"the highest pixels of the parts are {peaks}: all are read as [0, "
                   f"{white}]"]
    images = torch.from_numpy(np.ascontiguousarray(to_bytes(pixels, white)))
    return images, 1 if pixels.dtype == np.uint8 else white, remarks


def peak_of(pixels) -> float:
    """The highest of the pixels; 255 for bytes, whatever they use of their range."""
    low = float(pixels.min(initial=0))
    high = float(pixels.max(initial=0))
    require(low == 0 and high <= WHITES[-1],
            f"pixels span {low:g} to {high:g}; wanted numbers in [0, 1], [0, 255] or up to "
            "65535, and no NaN")
    return 255.0 if pixels.dtype == np.uint8 and high > 1 else high


def white_of(high, whole, least=1):
    """The lowest usual white level, `least` or above, that holds pixels up to `high`; remarks.

    Floats, not `whole`, may exceed it by a quarter, as scaled images do.
    """
    slack = 1 if whole else 1.25
    for level in WHITES:
        if level >= least and high <= slack * level:
            break
    if high in (0, level):
        return level, []
    return level, [f"pixels of up to {high:.8g} are read as [0, {level}]"]


def to_bytes(pixels, white):
    """Pixels in [0, white] -> uint8 in [0,255]."""
    if pixels.dtype == np.uint8 and white == 255:
        return pixels
    levels = pixels * np.float32(255 / white)
    return levels.round().clip(0, 255).astype(np.uint8)


def in_parts(function, images):
    """The function's result for images (M,C,H,W), 1,000 at a time: it takes less memory."""
    return torch.cat([function(part) for part in images.split(1000)])


def in_colour(images):
    """In which images (M,) channels differ by more than 2 levels, which JPEG files add?"""
    spread = images.amax(1) - images.amin(1)
    return spread.flatten(1).amax(1) > 2


def to_grey(images):
    """uint8 (M,C,H,W) -> (M,1,H,W), with the weights of ITU-R 601."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([19595, 38470, 7471])[:, None, None]         # of 2^16, as in PIL
    total = (images * weights).sum(1, True) + 2**15
    return (total >> 16).byte()


def ground_of(images):
    """The mean level (M,) of the top and bottom rows of images (M,C,H,W)."""
    return images[:, :, [0, -1]].float().mean((1, 2, 3))


def resize(images, side):
    """uint8 (M,C,H,W) -> uint8 (M,C,side,side), the middle square of each, antialiased."""
    square = min(images.shape[2:])
    for axis in (2, 3):
        margin = images.shape[axis] - square
        images = images.narrow(axis, margin // 2, square)
    images = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return images.round().clamp(0, 255).byte()          # byte() would cut off, and wrap round


# ---- data sets: folders of pictures ---------------------------------------------------------

def folder_dataset(root, run):
    """root/<class>/*, a fifth of it for test; or root/train/<class>/*, and so for test.

    root/unlabelled/**, and root/train/unlabelled/**, are training images without a label.
    """
    samples = find_samples(root)
    others = [file for file in files_below(root) if file not in samples]
    kinds = Counter(file.suffix.lower() or "others" for file in others)
    words = [f"{count:,} {kind}" for kind, count in kinds.items()]
    remarks = [f"left out: {', '.join(words)}"] if words else []
    pixels, white, more_remarks = read_pictures(samples, root, run)
    parts, labels = map(list, zip(*[samples[file] for file in pixels]))
    names = [readable(file.relative_to(root).as_posix()) for file in pixels]
    if "test" not in parts:
        # The fifth does not depend on --seed: what tests stays what tests.
        training = [label if part == "train" else "" for part, label in zip(parts, labels)]
        for row in set_aside(training, names, 0.2).tolist():
            parts[row] = "test"
    lines = zip(parts, labels, names, pixels.items())
    lines = sorted(lines, key=lambda line: ORDER.index(line[0]))
    parts, labels, names, pictures = zip(*lines)
    files, images = zip(*pictures)
    return assemble(name_of(root), torch.from_numpy(np.stack(images)), np.array(labels), parts,
                    names, None, run.image_size, white, remarks + more_remarks, files)


def find_samples(root) -> dict:
    """{file: (part, class)} of the pictures below a folder; the class is "" if it has none."""
    samples = {}
    for part, folder in find_parts(root).items():
        if part == "unlabelled":
            samples |= {file: (part, "") for file in pictures_in(folder)}
        else:
            samples |= class_samples(folder, part)
    return samples


def find_parts(root) -> dict:
    """{"train": a folder of classes, "test": ...}; of one without parts, {"train": root}."""
    parts = {}
    renames = {}
    for path in subfolders(root):
        hint = hinted_part(path.name)
        part = PARTS.get(path.name.lower())
        if part:
            require(part not in parts, f"{root}: {path.name}/ and {parts.get(part)} are one "
                    "part; leave one of them")
            parts[part] = path
        elif hint:
            renames[hint] = f"{path.name}/ to {hint}/"
    of_classes = parts.keys() <= {"unlabelled"}         # one of them may be called test strip
    require(len(renames) <= of_classes, f"{root}: are these parts of the data set? then "
            f"rename {' and '.join(renames.values())}; else call them something else")
    require(of_classes or "train" in parts, f"{root}: no train/; move the classes there")
    return {"train": root} if of_classes else parts


def hinted_part(name) -> str | None:
    """The part that a folder called seg_train, Test set or unlabeled_data may be meant for."""
    for word in re.split(r"[\W_]+", name.lower()):
        part = PARTS.get(word.removesuffix("set"))
        if part:
            return part
    return None


def class_samples(folder, part) -> dict:
    """{file: (part, class)} of the pictures in a folder of classes."""
    samples = {}
    classes = subfolders(folder)
    for path in subfolders(folder):
        if part == "train" and PARTS.get(path.name.lower()) == "unlabelled":
            classes.remove(path)
            samples |= {file: ("unlabelled", "") for file in pictures_in(path)}
    require(classes, f"{folder}: no classes; wanted one subfolder a class, images in each; if "
            f"{folder.name} is a class, call it otherwise")
    require(len(classes) > 1 or not subfolders(classes[0]), f"{folder}: all is in "
            f"{classes[0].name}/; if the folders there are the classes, give {classes[0]}, or "
            "move them one up")
    for path in classes:
        for place in subfolders(path):
            require(place.name.lower() not in PARTS, f"{place}: is this a part of the data "
                    f"set? then call it {folder}/{place.name}/{path.name}; else something "
                    "else")
        require(hinted_part(path.name) != "unlabelled", f"{path}: have these images no label? "
                "then rename it unlabelled, among those for training; else call it otherwise")
        files = pictures_in(path)
        require(files, f"{folder}: no pictures in {path.name}/; remove it, or add some "
                f"({' '.join(IMAGE_FILES)})")
        samples |= {file: (part, readable(path.name)) for file in files}
    return samples


def subfolders(folder):
    """The folders in a folder, by name, but for hidden ones."""
    return [path for path in sorted(Path(folder).iterdir())
            if path.is_dir() and not is_hidden(path)]


def is_hidden(path: Path) -> bool:
    """Is it what systems put beside pictures, or a folder that a script has worked in?"""
    ours = (path / ".lock").exists() or path.name == "runs" and any(path.glob("*/.lock"))
    return ours or path.name.startswith(".") or path.name.lower() in HIDDEN


def pictures_in(folder: Path) -> list:
    """The picture files below a folder, in order."""
    return [file for file in files_below(folder) if file.name.lower().endswith(IMAGE_FILES)]


def files_below(folder):
    """The files below a folder, in order, but for hidden ones; links to folders are left."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [path.name for path in subfolders(place)]          # to walk through
        paths = [Path(place, name) for name in sorted(names)]
        files += [path for path in paths if not is_hidden(path)]
    return files


def read_pictures(files, root, run):
    """-> {file: uint8 (3,side,side)} of all that can be read, their white level, remarks."""
    file_of = {mark_of(file, root): file for file in files}
    marks = list(file_of)

    def ask(question, some):
        """{mark: answer} of those of some pictures that are not damaged."""
        answers = {}
        for mark in some:
            with contextlib.suppress(Mistake):          # which are named below
                answers[mark] = question(file_of[mark])
        return answers

    peaks = cached(run, "peaks", "white levels", marks, functools.partial(ask, deep_peak))
    found = np.array([(0, True), *peaks.values()])
    white, remarks = white_of(found[:, 0].max(), found[:, 1].all())
    read = functools.partial(read_image, size=(run.image_size, run.image_size), white=white)
    kind = f"images-{run.image_size}-{white}"
    kept = cached(run, kind, "pictures", marks, functools.partial(ask, read))
    damaged = [file.relative_to(root).as_posix()
               for mark, file in file_of.items() if mark not in kept]
    if damaged:
        words = f"{len(damaged):,} pictures that cannot be read: {', '.join(damaged)}"
        require(run.skip_damaged, f"{root}: {words}; mend or remove them, or go on without "
                "them with --skip-damaged")
        remarks.append(f"left out: {words}")
    return {file_of[mark]: pixels for mark, pixels in kept.items()}, white, remarks


def mark_of(file, root) -> str:
    """What tells a picture, as it is now, from others."""
    about = file.stat() if file.exists() else file.lstat()      # a link to nowhere
    facts = ascii([file.relative_to(root), about.st_size, about.st_mtime_ns])
    return fingerprint(facts.encode())


def cached(run, name: str, what: str, keys: list, make) -> dict:
    """{key: array}: those that OUT keeps under this name, and of missing ones make(keys).

    These are made and kept PART at a time: an interruption loses little. `what` they are, the
    progress says.
    """
    folder = run.out / "cache" / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = {}
    for path in folder.iterdir():
        with contextlib.suppress(Exception):            # a damaged file is made anew
            with np.load(path) as file:
                values = file["values"]
                require(file["mark"] == fingerprint(values.tobytes()), "")
                kept.update(zip(file["keys"].tolist(), values))
    missing = [key for key in keys if key not in kept]
    progress = Progress(len(missing), what, run.quiet)
    for start in range(0, len(missing), PART):
        made = make(missing[start:start + PART])
        values = np.array(list(made.values()))
        content = {"keys": list(made), "values": values,
                   "mark": fingerprint(values.tobytes())}
        write(folder / f"{missing[start]}.npz", content)
        kept.update(made)
        progress(min(start + PART, len(missing)))
    return {key: kept[key] for key in keys if key in kept}


# ---- pictures -------------------------------------------------------------------------------

@contextlib.contextmanager
def open_picture(path):
    """A PIL image; whatever is wrong with the file becomes one line that names it."""
    from PIL import Image
    Image.MAX_IMAGE_PIXELS = 2**29      # PIL refuses twice as many; cameras make 2**28
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                yield picture
    except Exception as error:          # PIL, zlib and struct have many
        raise Mistake(f"{path} cannot be read as an image ({error}); mend or remove it"
                      ) from None


def deep_peak(path):
    """The highest pixel of a picture of more than 8 bits, else 0; is it a whole number?"""
    with open_picture(path) as picture:
        if picture.mode[0] in "IF":
            return peak_of(np.asarray(picture)), picture.mode[0] == "I"
    return 0, True


def read_image(path, size, white=65535):
    """A picture, upright, on white, at size (height, width): uint8 RGB (3,H,W).

    One of that size goes through untouched; of any other the middle part of these
    proportions is scaled. `white` is that of pictures with more than 8 bits.
    """
    from PIL import Image, ImageOps
    height, width = size
    picture = upright(path, white, 2 * max(size))
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture).transpose(2, 0, 1).copy()


def upright(path, white, reach=512):
    """A picture as PIL's RGB image, upright, on white; large JPEGs no smaller than `reach`."""
    from PIL import Image, ImageOps
    with open_picture(path) as picture:
        picture.draft(None, (reach, reach))             # they are decoded faster so
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode[0] in "IF":
            pixels = np.asarray(picture)
            peak_of(pixels)             # refuses numbers below 0, and what is no number
            picture = Image.fromarray(to_bytes(pixels, white))
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture)
        return picture.convert("RGB")


def square(picture, side):
    """The middle of a PIL image as floats in [0,1] (3,side,side)."""
    from PIL import ImageOps
    picture = ImageOps.fit(picture, (side, side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def read_like(path, facts: dict):
    """A picture as those of a data set are -> uint8 (1,C,H,W), what was done."""
    channels, height, width = facts["shape"]
    white, remarks = white_of(*deep_peak(path), facts["white"])
    image = torch.from_numpy(read_image(path, (height, width), white))[None]
    if channels == 1:
        image = to_grey(image)
        ground = ground_of(image).item()
        levels = np.array(facts["ground"])
        # Ink on paper, where all images of the data set are chalk on a board, or the reverse.
        if abs(levels - (255 - ground)).min() + 64 < abs(levels - ground).min():
            image = 255 - image
            remarks.append("inverted to the data set's background")
    colour = "RGB" if channels == 3 else "grey"
    return image, ", ".join([f"{path}: {colour}, {height}x{width}", *remarks])


# ---- features: what a pretrained network sees in the pictures -------------------------------

class Backbone:
    """A pretrained network and its preprocessing: PIL pictures -> features (B,F), float16,
    of unit length.

    `spec` is a file of the user's with a class Backbone and its SIZE, or the name of a
    classification network of torchvision.models, whose weights are downloaded once.
    """

    def __init__(self, spec: str, device):
        self.spec = spec
        self.device = device
        make = backbone_of_file if spec.endswith(".py") else backbone_of_torchvision
        network, self.prepare = make(spec)
        self.network = network.to(device, memory_format=torch.channels_last).eval()
        weights = [value.cpu().numpy().tobytes() for value in network.state_dict().values()]
        about = Path(spec).read_bytes() if spec.endswith(".py") else spec.encode()
        self.mark = fingerprint(b"".join([about, *weights]))

    @torch.inference_mode()
    def __call__(self, pictures):
        batch = torch.stack([self.prepare(picture) for picture in pictures]).to(self.device)
        with lines_of(self.spec):
            features = self.network(batch.contiguous(memory_format=torch.channels_last))
            shape = tuple(features.shape)
        require(len(shape) == 2 and len(features) == len(batch), f"{self.spec} makes features "
                f"{shape} of images {tuple(batch.shape)}; wanted (B,F)")
        require(features.isfinite().all(), f"{self.spec} makes features that are not finite")
        return unit_length(features).half().cpu()       # else half precision lacks the range


def backbone_of_file(spec: str):
    """The network of a file of the user's, and what makes a picture its input."""
    about = importlib.util.spec_from_file_location("backbone", spec)
    module = importlib.util.module_from_spec(about)
    with lines_of(spec):
        about.loader.exec_module(module)
        side = int(module.SIZE)
        network = module.Backbone().eval()
    return network, functools.partial(square, side=side)


@contextlib.contextmanager
def lines_of(spec: str):
    """Whatever goes wrong in a file of the user's becomes one line that names its own line."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == os.path.abspath(spec)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{spec}, line {line}" if line else spec
        raise Mistake(f"{where}: {type(error).__name__}: {error}; wanted a class Backbone, "
                      "images (B,3,S,S) -> features (B,F), and SIZE") from None


def backbone_of_torchvision(name: str):
    """A network of torchvision.models without its last layer, and its own preprocessing."""
    from torchvision import models
    names = models.list_models(module=models)
    near = difflib.get_close_matches(name, names, 3)
    require(name in names, f"--backbone {name}: no such network in torchvision.models"
            + (f"; did you mean {' or '.join(near)}?" if near else ", and no file .py"))
    weights = models.get_model_weights(name).DEFAULT
    place = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        network = models.get_model(name, weights=weights)
    except Exception as error:          # each part of the network has its own
        raise Mistake(f"--backbone {name}: {place} is missing or damaged ({error}); put the "
                      f"file of {weights.url} there") from None
    last = [key for key, layer in network.named_modules()
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    parent, _, key = last.rpartition(".")
    setattr(network.get_submodule(parent), key, torch.nn.Identity())
    return network, weights.transforms()


def add_features(run, data):
    """Give a data set the features of its pictures: those that OUT keeps, and missing ones."""
    if run.backbone is None:
        return
    require(data.features is None, f"{data.name} has features of its own; leave out "
            "--backbone")
    backbone = functools.cache(functools.partial(named_backbone, run))      # when it is asked
    mark = run.record.get("backbone")
    if mark is None or "backbone" in run.changed:
        require(not run.bound or backbone().mark == mark, f"{run.out}/{run.source}.pt is of "
                f"another network than {run.backbone} is now; make it again with: "
                f"{command_for(run, run.source)}; or give another -o")
        mark = backbone().mark
    images = [*data.images.numpy(), *data.test_images.numpy()]
    features = look_at(run, data, images, f"features-{mark}", backbone)
    data.features, data.test_features = data.split(features)
    data.backbone = mark
    if data.images.shape[1] == 1:
        data.remarks.append("the network sees grey pictures in three equal channels")


def add_mirrored(run, data):
    """Give a data set the features of its training pictures, mirrored."""
    require(data.backbone, f"features came with {data.name}, not those of mirror images; "
            "leave out augment")
    backbone = functools.cache(functools.partial(named_backbone, run))
    name = f"features-{data.backbone}-mirrored"
    images = data.images.cpu().numpy()
    mirrored = look_at(run, data, images, name, backbone, mirror=True)
    data.mirrored = mirrored.to(data.features.device)


def look_at(run, data, images, name, backbone, mirror=False) -> Tensor:
    """Features (n,F) of the first n pictures: those that OUT keeps, and missing ones."""
    from PIL import ImageOps
    keys = [fingerprint(called.encode() + image.tobytes())
            for called, image in zip(data.names, images)]
    row_of = {key: row for row, key in enumerate(keys)}

    def look(some):
        pictures = [data.original(row_of[key]) for key in some]
        if mirror:
            pictures = [ImageOps.mirror(picture) for picture in pictures]
        return dict(zip(some, backbone()(pictures).numpy()))

    threads = torch.get_num_threads()
    torch.set_num_threads(max(run.cores, threads))      # one step of many that wait for it
    known = cached(run, name, "features", keys, look)
    torch.set_num_threads(threads)
    return torch.from_numpy(np.stack([known[key] for key in keys]))


def named_backbone(run) -> Backbone:
    """The network of a run; a file of the user's runs only when the command names it."""
    require("backbone" in run.changed or not run.backbone.endswith(".py"),
            f"for new pictures name the network again: --backbone {run.backbone}")
    return Backbone(run.backbone, run.device)


class Inputs:
    """What models see of a data set: its images or, if it has them, its features.

    These are brought to unit length, centred on the mean of some rows, and scaled so that a
    number is as large as its standard deviation there, on average.
    """

    def __init__(self, data: Dataset, rows):
        self.images = data.images
        self.test_images = data.test_images
        self.normal = {}                # by what features are normalised
        if data.features is not None:
            self.images = data.features
            self.test_images = data.test_features
            parts = rows.split(5000)    # all at once take much memory
            mean = sum(unit_length(self.images[part]).sum(0) for part in parts) / len(rows)
            square = sum((unit_length(self.images[part]) - mean).square().sum()
                         for part in parts)
            scale = float((square / len(rows) / len(mean)).rsqrt())
            require(math.isfinite(scale), "the features are the same for all images")
            self.normal = {"mean": mean, "scale": scale}

    def __getitem__(self, rows):
        """Of some training rows: uint8 (n,C,H,W), or float32 (n,F)."""
        return self.of(self.images[rows])

    def test(self):
        """Of the test images."""
        return self.of(self.test_images)

    def of(self, x):
        """Images as they are; features normalised."""
        return normalised(x, **self.normal) if self.normal else x


def reader(run, saved, mean=None, scale=1.0):
    """What makes a picture's file an input like those of a loaded file -> a function of the
    path: (input (1,...), what was done).
    """
    facts = saved["dataset"]
    if mean is None:
        return functools.partial(read_like, facts=facts)
    require(facts["backbone"], f"the features came with {facts['name']}; of a new picture "
            "there are none")
    backbone = named_backbone(run)
    require(backbone.mark == facts["backbone"], f"{run.out} is of another network than "
            f"{run.backbone} is now")

    def read_input(path):
        features = backbone([upright(path, facts["white"])])
        return normalised(features, mean, scale), f"{path}: seen by {run.backbone}"

    return read_input


def unit_length(features):
    """A copy, in float32: as F.normalize makes it, in less memory."""
    x = features.to(torch.float32, copy=True)
    return x.div_(x.norm(dim=1, keepdim=True).clamp(min=1e-12))


def normalised(features, mean, scale: float):
    """Features (n,F), as a network makes them -> as models see them."""
    return unit_length(features).sub_(mean).mul_(scale)


# ---- rows: which images train, which choose, which labels count -----------------------------

def set_aside(labels: list, names: list, share: float, least=2, last=False) -> Tensor:
    """Rows, sorted: a share of each class of `least` images or more, and at least one of it.

    The hashes of their names pick them, the smallest or the `last` ones: so a new image moves
    at most one other. Rows of the label -1 or "" belong to no class.
    """
    hashes = [fingerprint(name.encode()) for name in names]
    rows = []
    for c in set(labels) - {-1, ""}:
        mine = [row for row, label in enumerate(labels) if label == c]
        mine.sort(key=hashes.__getitem__, reverse=last)
        if len(mine) >= least:
            rows += mine[:max(round(len(mine) * share), 1)]
    return torch.tensor(sorted(rows), dtype=torch.long)


def subset(data: Dataset, n: int, seed: int) -> Tensor:
    """n rows with a label, equally many a class to within one; a smaller n is in a larger one.

    Ten seeds, as 0 to 9, begin at even distances in one shuffled order of each class: they
    share no image while each class gives at most a tenth of its images.
    """
    rows = data.labelled().cpu()
    require(n <= len(rows),
            f"{n} images asked for; there are {len(rows)} besides validation images")
    generator = torch.Generator().manual_seed(seed // 10)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    y = data.labels.cpu()[rows]
    parts = []
    for c in y.unique():
        part = rows[y == c]
        parts.append(part.roll(-(seed % 10) * len(part) // 10))
    if n < len(parts):                  # not the first classes every time
        order = torch.randperm(len(parts), generator=generator.manual_seed(seed))
        parts = [parts[c] for c in order]
    # The first of each class, then the second of each, and so on.
    places = torch.cat([torch.arange(len(part)) for part in parts])
    turn = places.argsort(stable=True)
    return torch.cat(parts)[turn][:n].to(data.labels.device)


def training_rows(data: Dataset, run: Run) -> Tensor:
    """Rows to learn from: at most --images N, all with a label, or else the whole pool."""
    if run.images is None:
        return data.pool
    count = min(run.images, len(data.labelled()))
    if count < run.images and not run.bound:
        say(f"there are {count} images with a label besides validation images: all are used")
    return subset(data, count, run.seed)


def fit_sizes(sizes: list, asked: bool, available: int) -> list:
    """Sizes, sorted, that `available` images allow; what was `asked` for is not cut."""
    fitting = sorted({min(n, available) for n in sizes})
    if max(sizes) > available:
        require(not asked, f"{max(sizes)} images asked for; there are {available} besides "
                "validation images; give smaller SIZES (--sizes)")
        say(f"there are {available} images to train on; sizes: {fitting}")
    return fitting


def with_labels(data: Dataset, n: int, seed: int, judged=False) -> Dataset:
    """The same data set as somebody has it who knows n labels only: of the pool n keep theirs.

    Few labels are all wanted for training: below FEW a class none is left for validation,
    whose images then have no label either, unless they are to be `judged`.
    """
    kept = subset(data, n, seed)
    labels = data.labels.clone()
    labels[data.pool] = -1
    pool = data.pool
    validation = data.validation
    if n < FEW * len(data.classes) and not judged:
        labels[validation] = -1
        pool = torch.cat([pool, validation]).sort()[0]
        validation = validation[:0]
    labels[kept] = data.labels[kept]
    return dataclasses.replace(data, labels=labels, pool=pool, validation=validation)


def correct_labels(data, file):
    """Give images the labels that a table has for them in its column new_label."""
    rows = {name: row for row, name in enumerate(data.names)}
    labels = torch.cat([data.labels, data.test_labels])
    # A picture that was moved into the folder of its class is there by now.
    placed = {}
    for name, row in rows.items():
        *folders, file_name = Path(name).parts
        placed.update({(file_name, readable(folder)): row for folder in folders})
    given = {}
    moved = 0
    for line in read_table(file, ["image", "new_label"]):
        image = Path(line["image"]).as_posix()          # without ./
        name = line["new_label"]
        if not name:
            continue
        require(given.setdefault(image, name) == name,
                f"{file}: {image} is both {given[image]} and {name}; remove one line")
        require(name in data.classes, f"{file}: {image} is given the class {name!r}; the "
                f"classes are {', '.join(data.classes[:20])}")
        row = rows.get(image, placed.get((Path(image).name, name)))
        require(row is not None, f"{file}: {data.name} has no image {image!r}; they are "
                f"called {data.names[0]} and so on, see latent.csv")
        before = line.get("fingerprint")
        require(not before or before == data.mark(row), f"{file}: {image} is another picture "
                "than the one that was looked at; remove the line, or its fingerprint")
        labels[row] = data.classes.index(name)
        moved += image not in rows
    require(given, f"{file}: no line has a new label; write some into its column new_label")
    data.labels, data.test_labels = data.split(labels)
    data.remarks.append(f"{len(given):,} labels are those of {file}")
    if moved:
        data.remarks.append(f"{moved:,} of these are of pictures that are not there, but "
                            "lie in the folder of their class")


def spaced(total: int, count: int) -> torch.Tensor:
    """`count` of the rows 0..total-1 at even distances: a set may be sorted by class."""
    return torch.linspace(0, total - 1, count).long()


# ---- files ----------------------------------------------------------------------------------

def write(path: Path, content, beside: dict = {}):
    """Write JSON, CSV, a figure, arrays or a .pt; `path` is whole, or as it was before.

    Files `beside` it move to their places with it, when all are whole.
    """
    contents = {**beside, path: content}
    with tempfile.TemporaryDirectory(prefix=".tmp", dir=path.parent) as folder:
        for path, content in contents.items():
            put(Path(folder, path.name), content)
        for path in contents:
            os.replace(Path(folder, path.name), path)


def put(path, content):
    """Write a file as its suffix says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1, allow_nan=False))
    elif path.suffix == ".csv":         # a list of lines, each a list of cells
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(content)     # they end in CR LF: a lone CR is quoted
    elif path.suffix == ".png":
        content.savefig(path)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        buffer = io.BytesIO()           # of a full disk torch has errors of its own
        torch.save(content, buffer)
        path.write_bytes(buffer.getbuffer())


def columns(first: list, classes: list) -> list:
    """Names of a table's columns; a class may be called like one of the first."""
    return [*first, *(f"class {name}" if name in first else name for name in classes)]


def read_table(file: Path, wanted: list) -> list:
    """A dict a line of a table with these columns, whose cells are in NFC and stripped."""
    try:
        text = file.read_bytes().decode("utf-8-sig")    # with every CR
        if text.startswith("sep="):     # which says what is between cells, to spreadsheets
            text = text.partition("\n")[2]
        mark = max(",;\t", key=text.partition("\n")[0].count)  # some spreadsheets write ";"
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        heads = [head.strip().lower() for head in next(rows, [])]
        lines = [dict(zip(heads, row + [""] * len(heads))) for row in rows if row]
    except (UnicodeDecodeError, csv.Error):
        raise Mistake(f"{file} is no table of text in UTF-8; save it as CSV UTF-8") from None
    for line in lines:
        for column in wanted:
            require(column in line,
                    f"{file} has no column {column}; wanted {','.join(wanted)}")
            line[column] = readable(line[column])
    return lines


def fingerprint(source: Path | bytes) -> str:
    """16 hexadecimal digits that tell one file, or one content, from another."""
    if isinstance(source, Path):
        source = source.read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]


def save(path: Path, run: Run, data: Dataset, metrics: dict, made_from=(), **content):
    """Write path, whose stem is its kind, and its facts as .json; the work is finished."""
    facts = {"kind": path.stem, "format": FORMAT, "settings": run.settings,
             "changed": run.changed, "metrics": metrics, "dataset": data.facts(),
             "made_from": {source.stem: fingerprint(source) for source in made_from},
             "versions": versions()}
    write(path, {**facts, **content}, {path.with_suffix(".json"): facts})
    path.with_suffix(".last.pt").unlink(missing_ok=True)


def versions() -> dict:
    """Those of the libraries that a result depends on."""
    return {"torch": str(torch.__version__), "numpy": str(np.__version__)}


def read(path: Path, device="cpu") -> dict:
    """A .json, or a .pt of plain tensors; raises, as torch does not, if a bit has changed."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with zipfile.ZipFile(path) as file:
        require(not file.testzip(), f"{path} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def read_whole(path: Path, remedy: str, device="cpu") -> dict:
    """A .json or .pt of ours; whatever is wrong with it becomes one line with the remedy."""
    try:
        content = read(path, device)
        require([content["kind"], content["format"]] == [path.stem, FORMAT], "")
        require(content["dataset"]["which"], "")
        return content
    except Exception:                   # json, zip and pickle each have their own errors
        raise Mistake(f"{path} is damaged, or of another version of these scripts; {remedy}"
                      ) from None


def load(run: Run, kind: str, device="cpu") -> dict:
    """Read OUT/<kind>.pt; if it does not fit the run, one line says how to make it again."""
    path = run.out / f"{kind}.pt"
    remedy = f"make it with: {command_for(run, kind)}"
    require(path.exists(), f"{path} not found; {remedy}")
    saved = read_whole(path, remedy, device)
    for stem, mark in saved["made_from"].items():
        source = run.out / f"{stem}.pt"
        require(not source.exists() or fingerprint(source) == mark,
                f"{path} was made from another {stem}.pt; {remedy}")
    facts = saved["dataset"]
    require(run.record.get("fingerprint", facts["fingerprint"]) == facts["fingerprint"],
            f"{path} was made from other images or labels; {remedy}")
    for key in run.binding:
        require(facts["which"][key] == run.which[key], f"{path} was made with {key} "
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


def reliability(q, y) -> list:
    """A dict a bin, of ten, of the (image, class) pairs, 0.05 < q <= 0.95, if it has 30."""
    hits = F.one_hot(y, q.shape[1]).float()
    edges = torch.linspace(0.05, 0.95, 11).tolist()
    rows = []
    for low, high in zip(edges, edges[1:]):
        here = (q > low) & (q <= high)
        if here.sum() >= 30:
            rows.append({"stated": q[here].mean().item(),
                         "observed": hits[here].mean().item(), "pairs": int(here.sum())})
    return rows


def ranking(q, classes) -> str:
    """All percentages of q (K,), a line a class, the likeliest first."""
    return "\n".join(f"{100 * q[c]:5.1f}%  {classes[c]}" for c in q.argsort(descending=True))


# ---- progress and unfinished work -----------------------------------------------------------

class Progress:
    """What is done, and the time left: a line a second at most."""

    def __init__(self, total, what, quiet=False, done=0):
        self.total = total
        self.what = what
        self.quiet = quiet
        self.first = done
        self.start = time.monotonic()
        self.said = -1.0

    def __call__(self, done, words=""):
        now = time.monotonic()
        if self.quiet or now < self.said + 1 and done < self.total:
            return
        self.said = now
        rate = (now - self.start) / max(done - self.first, 1)
        left = timedelta(seconds=round(rate * (self.total - done)))
        say(f"{self.what} {done:,}/{self.total:,}  {words}  {left} left")


class Checkpoint:
    """OUT/<name>.last.pt: unfinished training, written after every round, read by --resume.

    `state` and `history` are those of the last round, or None and []. What is not taken up is
    renamed, never overwritten; `save` removes the file when the work is done.
    """

    def __init__(self, run: Run, name: str, data: Dataset, steps: int, resume: bool, **facts):
        self.path = run.out / f"{name}.last.pt"
        self.log = run.out / f"{name}.log.jsonl"        # rates, which differ from run to run
        self.facts = {**run.settings, **facts, "steps": steps, "amp": run.amp,
                      "device": run.device.type, "data": data.fingerprint,
                      "backbone": data.backbone,
                      "code": fingerprint(Path(__file__).with_name(f"{name}.py"))}
        for key in ("dataset", "data_dir", "labels_from"):      # known by content
            self.facts.pop(key, "")
        self.state = None
        self.history = []
        if self.path.exists():
            self.take_up(resume)
        done = 0
        if self.history:
            done = self.history[-1]["step"]
        else:
            self.log.write_text("")
        self.progress = Progress(steps, name, run.quiet, done)

    def take_up(self, resume):
        """Go on from the file, if it fits; else keep it under another name."""
        before = {}
        with contextlib.suppress(Exception):            # a damaged file fits nothing
            saved = read(self.path)
            before = saved["facts"]
        differing = [f"{key} {before.get(key)}, now {value}"
                     for key, value in self.facts.items() if before.get(key) != value]
        if resume and not differing:
            self.state = saved["state"]
            self.history = saved["history"]
            return
        k = 1
        while self.path.with_suffix(f".{k}.pt").exists():
            k += 1
        other = self.path.rename(self.path.with_suffix(f".{k}.pt"))
        why = "; ".join(differing) if before else "damaged"
        say(f"{self.path} is not resumed ({why or 'not asked for'}); kept as {other.name}")

    def keep(self, row: dict, words: str):
        """Report a row of training, add it to the history, write all of it down."""
        rate = row.pop("images_per_second")
        self.state = row.pop("state")
        self.progress(row["step"], f"{words}  {rate:,.0f} images/s")
        with self.log.open("a") as file:
            print(json.dumps({"step": row["step"], "images_per_second": rate}), file=file)
        self.history.append(row)
        write(self.path, {"facts": self.facts, "state": self.state, "history": self.history})


# ---- figures --------------------------------------------------------------------------------

# Petroff (2021): colours that colour-blind people tell apart, in order of use.
COLOURS = ("#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 "
           "#a96b59 #e76300 #b9ac70 #717581 #92dadd").split()
MARKERS = "osD^vP*Xhd"


def figure(width, height):
    """A matplotlib Figure by itself: no pyplot, no display. Inches."""
    import matplotlib.figure
    return matplotlib.figure.Figure((width, height), layout="constrained", dpi=130)


def legible(names: list) -> list:
    """Names as figures can show them: short, what the font lacks escaped, "$" no formula."""
    from matplotlib import font_manager as fonts
    bold = fonts.findfont(fonts.FontProperties(weight="bold"))  # it lacks more than the plain
    known = fonts.get_font(bold).get_charmap()
    shown = []
    for name in names:
        short = name if len(name) <= 20 else f"{name[:19]}…"
        letters = [letter if ord(letter) in known else ascii(letter)[1:-1] for letter in short]
        shown.append("".join(letters).replace("$", r"\$"))
    return shown


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
    rows = images.clamp(0, 1).unflatten(0, (-1, columns))           # (rows, columns, C, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-1, :-1]
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
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
    arrays = {}
    for part, count, fonts in (("train", 9000, TRAINING_FONTS),
                               ("validation", 1000, VALIDATION_FONTS),
                               ("test", 2000, TEST_FONTS)):
        fields = torch.stack([distance_field(font, digit)
                              for font in fonts for digit in "0123456789"])
        font = torch.randint(len(fonts), (count,), generator=generator)
        digit = torch.arange(count) % 10
        images = []
        for which in (10 * font + digit).split(500):    # fits the processor's cache
            images.append(draw_glyphs(fields[which], generator))
        arrays[f"x_{part}"] = torch.cat(images).numpy()
        arrays[f"y_{part}"] = digit.numpy()
    return array_dataset("glyphs", arrays, SIDE)


def distance_field(font_name: str, digit: str):
    """(2 SIDE, 2 SIDE) distances to a digit's outline in image pixels, positive inside."""
    from matplotlib import ft2font, get_data_path, path
    file = Path(get_data_path(), "fonts", "ttf", f"{font_name}.ttf")
    font = ft2font.FT2Font(str(file))
    font.set_size(128, 72)              # large: hinting and flattened curves stay out of sight
    font.load_char(ord(digit))
    # Points as complex numbers x + iy; fonts count y upwards and images downwards, hence conj.
    rings = [torch.view_as_complex(torch.tensor(ring)).conj()
             for ring in path.Path(*font.get_path()).to_polygons()]
    a = torch.cat([ring[:-1] for ring in rings])        # the outline's pieces lead from a to b
    b = torch.cat([ring[1:] for ring in rings])
    moves = a != b                      # a repeated point has no direction: 0 / 0 below
    a, b = a[moves], b[moves]
    least, most = torch.view_as_real(a).aminmax(dim=0)
    middle = torch.view_as_complex(least + most) / 2
    unit = 18 / (most - least)[1]       # a digit is 18 pixels high
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
    # Stroke weight is where the distances are cut, edge blur how gently: no morphology.
    edge = depth[:, 0] + uniform(0.0, 0.7) + 0.2 * wave[:, 2]
    ink = (0.5 + edge / uniform(1.0, 2.0)).clamp(0, 1)
    noise = uniform(0.0, 0.08) * torch.randn(ink.shape, generator=generator)
    grey = (ink * uniform(0.6, 1.0) + noise).clamp(0, 1)
    return (grey * 255).round().byte()[:, None]
