"""What the scripts share: command line, data, files, scores, training and figures, glyphs.

It knows nothing of models. In this order: the command line, a run, data sets, pictures, rows,
files, scores, training, figures, glyphs.
"""
import argparse
import collections
import contextlib
import csv
import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Letters: N images, C×H×W image, K classes.  y integer labels (N,), q probabilities (N,K).
FORMAT = 5                              # of the .pt files; a newer one is refused
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
               "emnist-letters": "EMNIST", "emnist-balanced": "EMNIST", "usps": "USPS",
               "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
IMAGE_FILES = tuple(".jpg .jpeg .jfif .png .gif .ppm .pgm .bmp .tif .tiff .webp".split())
PICTURE_FORMATS = "JPEG PNG GIF PPM BMP TIFF WEBP".split()      # of these files, for PIL
# Folders that are parts of a data set, in small letters, as people call them.
PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
         "validation": "validation", "dev": "validation", "test": "test", "testing": "test"}
UNLABELLED = ("unlabelled", "unlabeled")                # a folder of these names is no class
# What systems put beside pictures, besides all that begins with a dot.
HIDDEN = "@eadir __macosx #recycle $recycle.bin thumbs.db desktop.ini".split()
# What brings a picture upright, by EXIF's orientation.
UPRIGHT = dict(enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 "
                         "TRANSVERSE ROTATE_90".split(), 2))
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
    add("--labels", type=number(int, 1), metavar="N",
        help="number of training images that keep their label, equal numbers per class, "
        "always the same ones; if not given, as for vae.pt, else all that have one")
    add("--labels-from", metavar="FILE.csv",
        help="table of labels to correct or to add, in its columns image and new_label, as "
        "latent.py --review writes it; if not given, as for vae.pt, else none")
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
    with own_streams(output_needed=not args.writes):
        try:
            run = start(args)
            command(run, args)
            return 0
        except KeyboardInterrupt:
            if Path(sys.argv[0]).name == args.script:   # not so a notebook, which goes on
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            message = "interrupted; what was finished is kept"
            code = 130
        except (Mistake, FloatingPointError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, BrokenPipeError) and not args.writes:
                return 0                # the reader has enough
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


@contextlib.contextmanager
def own_streams(output_needed):
    """Standard output and error on which no result depends, unless output is the result."""
    output = Stream(sys.stdout, output_needed)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(Stream(sys.stderr)):
        yield


class Stream:
    """What a full disk or a reader that has gone does not take is dropped; or, if it is
    needed, an error. What the encoding lacks is escaped.
    """

    def __init__(self, stream, needed=False):
        self.stream = stream or open(os.devnull, "w")           # None is a closed one
        self.needed = needed
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()         # Python would do it later, and complain
        except OSError:                 # this text, and all that follows, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.needed:
                raise


# ---- a run: its folder, device and arithmetic -----------------------------------------------

def whole_number(variable, otherwise):
    """The value of an environment variable."""
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return otherwise


def torchrun_rank():
    """This process and how many there are: 0 and 1, unless torchrun or its like started it."""
    rank = whole_number("RANK", -1)
    ranks = whole_number("WORLD_SIZE", 1)
    # Batch systems set some of the variables, but not those by which ranks would meet.
    meet = os.environ.get("MASTER_ADDR") and whole_number("MASTER_PORT", 0)
    return (rank, ranks) if meet and 0 <= rank < ranks else (0, 1)


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
    labels: int | None                  # as the data set: given, or of vae.pt
    labels_from: str | None
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
    os.environ.pop("MPLBACKEND", None)  # figures need none, and a wrong one ends the import
    keep_freed_memory()
    device = choose_device(args.device)
    amp = bfloat16_is_fast(device) if args.amp is None else args.amp
    locks = lock_folder(out) if args.writes else []
    return Run(args.script, out, device, amp, args.seed, args.quiet, args.dataset,
               args.data_dir, args.image_size, args.labels, args.labels_from, settings(args),
               cores, locks)


def settings(args) -> dict:
    """The flags that can change a result, for the files."""
    others = ("out script writes resume quiet export image point predict jobs gather "
              "review").split()
    return {key: vars(args)[key] for key in sorted(vars(args).keys() - others)}


def lock_folder(out: Path) -> list:
    """One run at a time works in a folder; torchrun's ranks are one run -> files to close."""
    shared = open(out / ".lock", "w", opener=in_place)
    own = open(out / f".lock-{RANK}", "w", opener=in_place)
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
    card = whole_number("LOCAL_RANK", 0) % torch.cuda.device_count()
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
    """Images uint8 (N,C,H,W), labels int64 (N,) in 0..K-1, and the same for test.

    `unlabelled` (M,C,H,W), M may be 0, are training images without a label. Rows count on: N
    is that of the first unlabelled image, N+M that of the first test image; so do `names`.
    """
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    name: str
    unlabelled: torch.Tensor | None = None
    names: list | None = None           # N + M + tests: files below the folder, or part/number
    validation: torch.Tensor | None = None      # rows that the set itself puts aside
    white: int = 1                      # of the numbers read; 1, too, if all were bytes
    remarks: list = field(default_factory=list)         # what a person should know of it
    source: dict = field(default_factory=dict)  # spec, data_dir, ...: to load it again

    def __post_init__(self):
        if self.unlabelled is None:
            self.unlabelled = self.images[:0]
        if self.names is None:
            self.names = []
            for part, images in (("train", self.images), ("unlabelled", self.unlabelled),
                                 ("test", self.test_images)):
                self.names += [f"{part}/{k}" for k in range(len(images))]

    def tensors(self):
        return self.images, self.labels, self.test_images, self.test_labels

    def take(self, rows):
        """The images of some rows."""
        rows = rows.to(self.images.device)
        taken = self.images.new_empty(len(rows), *self.images.shape[1:])
        first = 0
        for images in (self.images, self.unlabelled, self.test_images):
            here = (rows >= first) & (rows < first + len(images))
            taken[here] = images[rows[here] - first]
            first += len(images)
        return taken

    def labels_of(self, rows):
        """The labels of some rows, -1 where there is none."""
        none = self.labels.new_full((len(self.unlabelled),), -1)
        return torch.cat([self.labels, none, self.test_labels])[rows.to(none.device)]

    def facts(self) -> dict:
        """What a file says of its data set: enough to load it again, and to know it again."""
        parts = list(self.tensors())
        if len(self.unlabelled):        # of a set without, the mark is what it was before
            parts.append(self.unlabelled)
        marks = [fingerprint(part.cpu().numpy().tobytes()) for part in parts]
        grounds = (ground_of(self.images) / 8).round().unique() * 8
        return {"name": self.name, **self.source, "shape": list(self.images.shape[1:]),
                "classes": self.classes, "images": len(self.images),
                "unlabelled": len(self.unlabelled),
                "white": self.white, "ground": grounds.int().tolist(),
                "test_images": len(self.test_images),
                "fingerprint": fingerprint("".join(marks).encode())}


def load_dataset(run: Run, upstream=None) -> Dataset:
    """The data set that --dataset names, or the one that the `upstream` file was made from."""
    known = upstream["dataset"] if upstream else {}
    if run.dataset in (None, known.get("spec")):        # scaled as it was for vae.pt
        run.image_size = known.get("image_size", run.image_size)
        run.labels = run.labels or known.get("labels")
        run.labels_from = run.labels_from or known.get("labels_from")
    run.dataset = run.dataset or known.get("spec", "glyphs")
    run.data_dir = run.data_dir or known.get("data_dir", "data")
    source = {"data_dir": run.data_dir, "image_size": run.image_size, "labels": run.labels,
              "labels_from": run.labels_from}
    run.settings.update(source, dataset=run.dataset)

    data = open_dataset(run.dataset, run.data_dir, run.image_size, run.out)
    check(data, run.image_size)
    data.source = {"spec": run.dataset, **source}
    if run.labels:
        relabel(data, keep_labels(data, run.labels))
    if run.labels_from:
        correct_labels(data, run.labels_from)
    if known:
        facts = data.facts()
        alike = (facts["fingerprint"] == known["fingerprint"]
                 and facts["shape"] == known["shape"]
                 and len(facts["classes"]) == len(known["classes"]))
        require(alike, f"{run.out}/vae.pt was made from other images than {run.dataset}; "
                f"make it with: {command_for(run, 'vae.pt')}")
    elif RANK == 0:                     # a later script need not say it again
        if len(data.unlabelled):
            data.remarks.append(f"{len(data.images):,} training images with a label, "
                                f"{len(data.unlabelled):,} without")
        for remark in [*data.remarks, *repeated_images(data)]:
            print(f"{data.name}: {remark}", file=sys.stderr)
    data.images = data.images.to(run.device)
    data.labels = data.labels.to(run.device)
    data.unlabelled = data.unlabelled.to(run.device)
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
    """The one door that every data set passes.

    Labels become 0..K-1, colour that is none becomes grey, sides at most 64.
    """
    x, y, x_test, y_test = data.tensors()

    def expect(ok, message):
        require(ok, f"{data.name}: {message}")

    expect(len(x) == len(y) and len(x_test) == len(y_test),
           "images and labels differ in number")
    expect(len(y) and len(y_test), "no images for training, or none for test")
    expect(x.shape[1:] == x_test.shape[1:], "training and test images differ in shape")
    expect(x.shape[1:] == data.unlabelled.shape[1:],
           "images with and without a label differ in shape")
    height, width = x.shape[2:]
    expect(height and width, f"images of {height}x{width} pixels")
    kinds = y.unique()
    values = kinds.tolist()
    names = data.classes or values
    unknown = sorted(set(y_test.tolist()) - set(values))
    spoken = dict(enumerate(data.classes or []))
    unknown = [spoken.get(value, value) for value in unknown[:5]]
    expect(not unknown, f"labels {unknown} are in test but not in training")
    expect(len(values) > 1, "only one class; percentages need two or more")
    if len(names) > len(values) and set(values) <= set(range(len(names))):
        names = [names[value] for value in values]      # some classes have no image
    expect(len(names) == len(values), f"{len(names)} names for {len(values)} classes")

    data.name = readable(data.name)
    data.classes = [readable(str(name)) for name in names]
    data.labels = torch.searchsorted(kinds, y)
    data.test_labels = torch.searchsorted(kinds, y_test)
    fit_pixels(data, side)


def fit_pixels(data: Dataset, side: int):
    """Colour that is none becomes grey, for all images or for none; sides 16 to 64."""
    height, width = data.images.shape[2:]
    parts = [data.images, data.test_images, data.unlabelled]
    if all(is_grey(part) for part in parts if len(part)):
        parts = [to_grey(part) for part in parts]
    if max(height, width) > 64 or min(height, width) < 16:
        parts = [resize(part, side) for part in parts]
        data.remarks.append(f"of images of {height}x{width} pixels, the middle squares are "
                            f"scaled to {side}x{side}")
    data.images, data.test_images, data.unlabelled = parts


def readable(name: str) -> str:
    """A name that can be printed: bytes of a file name that are not UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


def repeated_images(data: Dataset) -> list:
    """Remarks on images that training has, and that should measure what it has learnt."""
    def marks(images):
        return [hash(image.tobytes()) for image in images.numpy()]

    pool, validation = split(data)
    known = set(marks(data.images[pool]))
    remarks = []
    without = marks(data.unlabelled)
    count = sum(mark in known for mark in without)
    if count:
        remarks.append(f"{count:,} of {len(without):,} images without a label are there with "
                       "one, too, pixel for pixel; move them, do not copy")
    known.update(without)
    for part, images in (("validation", data.images[validation]), ("test", data.test_images)):
        count = sum(mark in known for mark in marks(images))
        if count:
            remarks.append(f"{count:,} of {len(images):,} {part} images are training images, "
                           "too, pixel for pixel; they measure memory")
    return remarks


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
    images, _, _ = as_images(np.asarray(train.data), np.asarray(test.data))     # all are bytes
    tensors = []
    for part, x in zip((train, test), images):
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
    """x_train y_train x_test y_test [classes x_unlabelled].

    Images are (N,H,W), (N,H,W,C) or (N,C,H,W).
    """
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as file:
            size = sum(part.file_size for part in file.zip.infolist())
            require_memory(2 * size, path)
            arrays = [file["x_train"], file["x_test"]]
            arrays += [file[f"x_{name}"] for name in UNLABELLED if f"x_{name}" in file.files]
            (train, test, *others), white, remarks = as_images(*arrays)
            unlabelled = torch.cat(others) if others else None
            (y_train, y_test), classes = as_labels(file["y_train"], file["y_test"])
            if classes is None and "classes" in file.files:
                classes = file["classes"].astype(str).tolist()
    except Exception as error:          # zip, zlib and numpy have many
        raise Mistake(f"{path}: {error}; make it with numpy.savez(path, x_train=..., "
                      "y_train=..., x_test=..., y_test=..., [classes=...], "
                      "[x_unlabelled=...])") from None
    return Dataset(train, y_train, test, y_test, classes, path.stem, unlabelled, white=white,
                   remarks=remarks)


def as_labels(train, test):
    """Arrays of labels -> int64 (N,) and (M,), and the classes, if labels are their names."""
    y = np.concatenate([train, test], None)             # flat
    classes = None
    if y.dtype.kind in "US":
        classes, y = np.unique(y.astype(str), return_inverse=True)
        classes = list(classes)
    require(y.dtype.kind in "buif" and (y % 1 == 0).all(),
            "labels must be whole numbers, or names")
    y = torch.from_numpy(y.astype(np.int64))
    return y.split([train.size, test.size]), classes


# ---- pixels: one rule for a whole data set --------------------------------------------------

def as_images(*arrays):
    """Arrays of images -> uint8 tensors (N,C,H,W), the white level of all, remarks."""
    shaped = []
    for array in arrays:
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4 and array.shape[3] in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        require(array.ndim == 4 and array.shape[1] in (1, 3),
                f"images of shape {array.shape}; wanted (N,H,W) or (N,H,W,1 or 3)")
        shaped.append(array)
    spans = [span_of(array) for array in shaped if array.size]
    white, remarks = white_of(spans)
    highest = [high for _, high, _ in spans]
    require(white == 1 or not any(0 < high <= 1 for high in highest),
            f"the highest pixels of training and test are {highest}; wanted one scale")
    images = []
    for array in shaped:
        array = np.ascontiguousarray(to_bytes(array, white))    # whatever the file's layout
        images.append(torch.from_numpy(array))
    if all(array.dtype == np.uint8 for array in shaped):
        white = 1
    return images, white, remarks


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
    low = min(lows)
    high = max(highs)
    whole = all(wholes)
    span = f"pixels span {low:g} to {high:.8g}"
    known = whole or white > 1
    require(known or not 1.25 < high < 25, f"{source}{span}; wanted [0, 1] or [0, 255]")
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


def is_grey(images) -> bool:
    """Do no channels of (N,C,H,W) differ by more than 2 levels? JPEG files add so much."""
    for part in images.split(1000):     # of colour images the first says it
        spread = part.amax(1) - part.amin(1)
        if spread.max() > 2:
            return False
    return True


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

def folder_dataset(root: Path, side: int, cache: Path) -> Dataset:
    """root/<class>/*, a fifth of it for test; or root/train/<class>/*, and so for test.

    root/unlabelled/**, and root/train/unlabelled/**, are training images without a label.
    """
    left_out = []
    samples, unlabelled = find_samples(root, left_out)
    classes = sorted({name for _, name in samples["train"]})
    pairs = [*samples["train"], *samples["validation"], *samples["test"]]
    labels = torch.tensor([classes.index(name) for _, name in pairs])
    files = [file for file, _ in pairs] + unlabelled
    images, white, remarks = read_once(files, side, cache, root)
    if left_out:
        counts = collections.Counter(left_out).most_common()
        remarks.append("left out: " + ", ".join(f"{count:,} {what}" for what, count in counts))

    sizes = [len(pairs) for pairs in samples.values()]
    first, validation, last = torch.arange(len(labels)).split(sizes)
    if not samples["test"]:             # the fifth does not depend on --seed: test stays test
        first, last = hold_out(labels, first, 0.2)
    rows = torch.cat([first, validation])
    name = Path(os.path.abspath(root)).name             # of ".", too
    names = []
    for row in [*rows.tolist(), *range(len(labels), len(files)), *last.tolist()]:
        names.append(readable(Path(files[row]).relative_to(root).as_posix()))
    data = Dataset(images[rows], labels[rows], images[last], labels[last], classes, name,
                   images[len(labels):], names, white=white, remarks=remarks)
    if samples["validation"]:
        data.validation = torch.arange(len(first), len(rows))
    return data


def find_samples(root: Path, left_out: list):
    """(file, class) pairs by part of the data set, and the files without a label."""
    unlabelled = []
    samples = {"train": [], "validation": [], "test": []}
    parts = find_parts(root)
    for part, folder in parts.items():
        samples[part] = class_files(folder, left_out, unlabelled if part == "train" else None)
    if parts["train"] != root:          # else class_files has seen these
        for folder in subfolders(root, []):
            if folder.name.lower() in UNLABELLED:
                unlabelled += pictures_in(folder, left_out)
    classes = {name for _, name in samples["train"]}
    for part, pairs in samples.items():
        unknown = {name for _, name in pairs} - classes
        require(not unknown, f"{root}: its {part} images have classes that the training "
                f"images have not: {' '.join(sorted(unknown))}")
    return samples, unlabelled


def find_parts(root: Path) -> dict:
    """{"train": a folder of classes, "test": ...}; of one without parts, {"train": root}."""
    parts = {}
    others = []
    for folder in subfolders(root, []):
        part = PARTS.get(folder.name.lower())
        if part is None and folder.name.lower() not in UNLABELLED:
            others.append(folder)
        elif part:
            other = parts.setdefault(part, folder)
            require(other == folder, f"{root}: {other.name}/ and {folder.name}/ are either "
                    f"both its {part} images, or two classes; rename one")
    if not parts:
        return {"train": root}
    names = "/, ".join(folder.name for folder in parts.values())
    classes = [folder.name for folder in others if pictures_in(folder, [])]
    require(not classes, f"{root}: {names}/ beside {'/, '.join(classes)}/: either the former "
            "are parts of the data set, and the latter should be elsewhere, or all are "
            "classes; move or rename some")
    require("train" in parts, f"{root}: there is {names}/ but no train/")
    return parts


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


def pictures_in(folder: Path, left_out: list) -> list:
    """The picture files below a folder, in order; the endings of others go to `left_out`."""
    files = []
    for path in folder.iterdir():
        if is_hidden(path, left_out):
            continue
        if path.is_dir():
            files += pictures_in(path, left_out)
        elif is_picture(path):
            files.append(str(path))
        else:
            left_out.append(path.suffix.lower() or path.name)
    return sorted(files, key=os.path.split)


def class_files(folder: Path, left_out: list, unlabelled: list | None) -> list:
    """(file, class) of each picture in a folder of classes.

    Those in a folder called unlabelled go to the list of that name; None: there may be none.
    """
    samples = []
    for path in subfolders(folder, left_out):
        files = pictures_in(path, left_out)
        name = path.name.lower()
        if name in UNLABELLED:
            require(unlabelled is not None, f"{path}: images without a label are for "
                    f"training; move them to {folder.parent / name}")
            unlabelled += files
            continue
        near = difflib.get_close_matches(name, UNLABELLED, 1, 0.9)
        require(not near, f"{path}: is {path.name} a class? if its images have no label, "
                f"rename it {''.join(near)}, else anything else")
        require(files, f"{folder}: no pictures in {path.name}/; remove it, or add "
                f"some ({' '.join(IMAGE_FILES)})")
        samples += [(file, path.name) for file in files]
    require(samples, f"{folder}: no classes; wanted one subfolder a class, images in each")
    left_out += ["pictures in no class" for path in folder.iterdir() if is_picture(path)]
    return samples


def read_once(files: list, side: int, cache: Path, root: Path):
    """uint8 (N,C,side,side) of pictures, their white level, remarks.

    Decoded once, then mapped into memory.
    """
    stats = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]
    mark = fingerprint(json.dumps([FORMAT, side, stats]).encode())
    folder = fingerprint(os.fsencode(root.resolve()))
    remarks = []
    older = list(cache.glob(f"images-{folder}-*.npy"))
    stored = next(cache.glob(f"images-{folder}-{mark}-*.npy"), None)
    if stored is None:
        print(f"reading {len(files):,} images", file=sys.stderr)
        white, remarks = white_of(deep_spans(files), f"{root}: ")
        require_memory(2 * len(files) * 3 * side**2, root)
        images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        for row, file in enumerate(files):
            images[row] = torch.from_numpy(read_image(file, (side, side), white))
        if is_grey(images):
            images = to_grey(images)
        stored = cache / f"images-{folder}-{mark}-{white}.npy"
        with whole(stored, cache / f"images.{RANK}.tmp") as out:
            np.save(out, images.numpy())
        for path in older:              # of the folder as it was
            path.unlink(missing_ok=True)
    require_regular(stored)
    white = int(stored.stem.split("-")[-1])
    return torch.from_numpy(np.load(stored, mmap_mode="c")), white, remarks


# ---- pictures -------------------------------------------------------------------------------

@contextlib.contextmanager
def open_picture(path):
    """A PIL image; whatever is wrong with the file becomes one line that names it."""
    from PIL import Image
    try:
        require_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                size = os.path.getsize(path)
                require(math.prod(picture.size) < max(2**24, 2000 * size),
                        f"it claims {picture.size} pixels in {size} bytes")
                yield picture
    except Exception as error:          # PIL, zlib and struct have many
        raise Mistake(f"{path} cannot be read as an image ({error}); mend or remove it"
                      ) from None


def deep_spans(files) -> list:
    """`span_of` each picture that has more than 8 bits."""
    spans = []
    for file in files:
        with open_picture(file) as picture:
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
        picture.load()
        turn = UPRIGHT.get(picture.getexif().get(0x0112))       # PIL has turned TIFFs already
        if picture.mode[0] in "IF":
            picture = Image.fromarray(to_bytes(np.asarray(picture), white))
        if turn:
            picture = picture.transpose(Image.Transpose[turn])
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
    white, remarks = white_of(deep_spans([path]), f"{path}: ", facts.get("white", 1))
    image = torch.from_numpy(read_image(path, (height, width), white))[None]
    kind = "RGB"
    if channels == 1:
        kind = "grey"
        image = to_grey(image)
        ground = ground_of(image).item()
        # Ink on paper, where all images of the data set are chalk on a board, or the reverse.
        if distance(255 - ground, facts) + 64 < distance(ground, facts):
            image = 255 - image
            remarks.append("inverted to the data set's background")
    return image, ", ".join([f"{path}: {kind}, {height}x{width}", *remarks])


def distance(level, facts: dict) -> float:
    """From a level to the nearest ground of a data set's images."""
    grounds = facts.get("ground")
    if grounds is None:                 # older files have the share of light grounds only
        grounds = [ground for ground in (0, 255) if abs(facts["light"] - ground / 255) < 0.95]
    return min(abs(level - ground) for ground in grounds)


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
    if n < len(parts):                  # not the first classes every time
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
        parts = [parts[c] for c in order]
    places = [torch.arange(len(part)) for part in parts]
    # The first of each class, then the second of each, and so on.
    turn = torch.cat(places).argsort(stable=True)
    return torch.cat(parts)[turn][:n]


def keep_labels(data: Dataset, n: int):
    """Labels (N+M,) of all training images, -1 for none: of the pool n keep theirs."""
    pool, _ = split(data)
    kept = subset(data, pool, n, 0)
    say_if_few(n, data)
    labels = data.labels_of(torch.arange(len(data.images) + len(data.unlabelled)))
    labels[pool] = -1
    labels[kept] = data.labels[kept]
    return labels


def relabel(data: Dataset, labels):
    """Give training images these labels (N+M,), -1 for none; validation images stay that."""
    _, validation = split(data)
    images = torch.cat([data.images, data.unlabelled])
    known = labels >= 0
    order = (~known).long().argsort(stable=True)        # those with a label come first
    names = [data.names[row] for row in order.tolist()]
    data.names = names + data.names[len(labels):]
    data.images = images[known]
    data.labels = labels[known]
    data.unlabelled = images[~known]
    data.validation = torch.isin(order, validation).nonzero()[:, 0]


def correct_labels(data: Dataset, file: str):
    """Give images the labels that a table has for them in its column new_label."""
    rows = {name: row for row, name in enumerate(data.names)}
    numbers = {name: c for c, name in enumerate(data.classes)}
    labels = data.labels_of(torch.arange(len(data.names)))
    given = {}
    for line in read_table(Path(file), ["image", "new_label"]):
        image = line["image"]
        name = line["new_label"]
        if not name:
            continue
        require(image in rows, f"{file}: {data.name} has no image {image!r}; they are called "
                f"{data.names[0]} and so on, see latent.csv")
        require(name in numbers, f"{file}: {image} is given the class {name!r}; the classes "
                f"are {', '.join(data.classes[:20])}")
        require(given.setdefault(image, name) == name,
                f"{file}: {image} is both {given[image]} and {name}; remove one line")
        labels[rows[image]] = numbers[name]
    require(given, f"{file}: no line has a new label; write some into its column new_label")
    count = len(labels) - len(data.test_labels)
    data.test_labels = labels[count:]
    relabel(data, labels[:count])
    data.remarks.append(f"{len(given):,} labels are those of {file}")


def spaced(total: int, count: int) -> torch.Tensor:
    """`count` of the rows 0..total-1 at even distances: a set may be sorted by class."""
    return torch.linspace(0, total - 1, count).long()


def say_if_few(n: int, data: Dataset):
    """A word on subsets that have no image of some classes."""
    classes = len(data.classes)
    if n < classes and RANK == 0:
        print(f"{n} images for {classes} classes: --seed draws which have one",
              file=sys.stderr)


# ---- files ----------------------------------------------------------------------------------

def write(path: Path, content):
    """Write JSON, CSV, a figure or a .pt beside `path`, then move it there in one step."""
    with whole(path, path.with_name(path.name + ".tmp")) as file:
        file.write(as_bytes(content, path.suffix))


@contextlib.contextmanager
def whole(path: Path, temporary: Path):
    """A file to write bytes to, which becomes `path` when all of it is there, or nothing."""
    try:
        with create(temporary) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create(path: Path):
    """A new file in place of what was there, to write bytes to; no link is followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def in_place(path, flags):
    """An opener for files that stay: it follows no link and waits for no pipe."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)   # not on Windows
    return os.open(path, flags | careful, 0o666)


def require_regular(path):
    """Refuse a pipe or a device, which would keep its reader waiting; it may be absent."""
    path = Path(path)
    require(path.is_file() or not path.exists(), f"{path} is no regular file; remove it")


def as_bytes(content, suffix: str):
    """What a .json, .csv, .png or .pt file of this content holds."""
    if suffix == ".json":
        return json.dumps(content, indent=1, allow_nan=False).encode()
    if suffix == ".csv":                # a list of lines, each a list of cells
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(content)
        return text.getvalue().encode(errors="backslashreplace")
    buffer = io.BytesIO()
    if suffix == ".png":
        content.savefig(buffer, format="png")
    else:
        torch.save(content, buffer)
    return buffer.getbuffer()


def read_table(file: Path, columns: list) -> list:
    """A dict a line of a table with these columns, whatever program has saved it."""
    try:
        require_regular(file)
        text = file.read_text("utf-8-sig")
        mark = max(",;\t", key=text.partition("\n")[0].count)  # some spreadsheets write ";"
        lines = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
        for line in lines:
            for column in columns:
                line[column] = line[column].strip()
    except KeyError as missing:
        raise Mistake(f"{file} has no column {missing}; wanted {' and '.join(columns)}, as "
                      "latent.py --review writes them") from None
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise Mistake(f"{file} cannot be read as a table ({error}); wanted lines of "
                      f"{','.join(columns)}, as latent.py --review writes them") from None
    return lines


def fingerprint(source: Path | bytes) -> str:
    """16 hexadecimal digits that tell one file, or one content, from another."""
    if isinstance(source, Path):
        require_regular(source)
        source = source.read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]


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
    require_regular(path)
    with zipfile.ZipFile(path) as file:
        require(not file.testzip(), f"{path} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def load(run: Run, kind: str, device="cpu", restore=None, like=None) -> dict:
    """Read OUT/<kind>.pt; whatever is wrong with it becomes one line with the remedy.

    `restore` has to succeed with the content; `like` is a loaded file of the same sizes.
    """
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
    try:
        saved["sizes"] = check_content(saved, like["sizes"] if like else {})
        if restore:
            restore(saved)
    except Exception:                   # whatever a missing or a strange part leads to
        raise Mistake(f"{path} is damaged; {remedy}") from None
    return saved


# What a file must hold: place, type, lowest and highest number, and the names of its sizes.
FINITE = "float32 -1e38 1e38"
SHARES = "float32 0 1"                  # they sum to one
POSITIVE = "float32 1e-30 1e38"
CONTENT = {
    "dataset": ["dataset/image_size int64 1 1000"],
    "ground": ["dataset/ground int64 0 256 grounds", "dataset/white int64 1 65535"],
    "light": ["dataset/light float32 0.0 1.0"],         # of older files
    "vae": ["rows int64 0 last_row N", "config/channels int64 C C", "config/height int64 H H",
            "config/width int64 W W", f"model/decoder.0.weight {FINITE} units D",
            f"deformations/directions {FINITE} coefficients R",
            "deformations/height int64 H H", "deformations/width int64 W W",
            "deformations/strength float32 0.0 1.0", "deformations/mirror bool 0 1"],
    "latent": [f"mu {FINITE} N D", f"logvar {FINITE} N D", "labels int64 -1 last_class N",
               "given bool 0 1 N"],
    "hybrids": ["images uint8 0 255 M C H W", f"q {SHARES} M K",
                "flows float16 -200 200 F H W xy"],
    "cnn": ["config/channels int64 C C", "config/classes int64 K K"]}
for place in ("teaching", "calibrated/aggregate"):
    CONTENT["latent"] += [
        f"{place}/mu {FINITE} {place} D", f"{place}/variance {POSITIVE} {place} D",
        f"{place}/counts int64 0 {place} K", f"{place}/prior {SHARES} K",
        f"{place}/temperature {POSITIVE}", f"{place}/log_floor float32 -inf 1e38",
        f"{place}/image_floor float32 -inf 1e38"]


def check_content(saved: dict, sizes: dict) -> dict:
    """Raise where a file does not hold what it must -> its sizes by name, with those given."""
    facts = saved["dataset"]
    channels, height, width = facts["shape"]
    classes = len(facts["classes"])
    sizes = {"C": channels, "H": height, "W": width, "K": classes, "last_class": classes - 1,
             "coefficients": 56, "xy": 2,                       # of a flow
             "last_row": facts["images"] + facts.get("unlabelled", 0) - 1, **sizes}
    words = [facts["spec"], facts["data_dir"], facts["fingerprint"],
             facts.get("labels_from") or ""]
    require(all(isinstance(word, str) for word in words), "words")
    require(isinstance(facts.get("labels") or 1, int), "labels")
    form(saved.get("model", {}))
    ground = "ground" if "ground" in facts else "light"
    for part in CONTENT["dataset"] + CONTENT[ground] + CONTENT[saved["kind"]]:
        place, dtype, low, high, *names = part.split()
        if place == "given" and place not in saved:     # older files: all are
            continue
        x = saved
        for key in place.split("/"):
            x = x[key]
        x = torch.as_tensor(x)
        for name, size in zip(names, x.shape, strict=True):
            require(sizes.setdefault(name, size) == size, place)
        low = float(sizes.get(low, low))
        high = float(sizes.get(high, high))
        require(str(x.dtype) == f"torch.{dtype}" and low <= x.min() <= x.max() <= high + 1e-3,
                place)
        if SHARES in part:
            require((x.sum(-1) - 1).abs().max() < 1e-3, place)
        if place.endswith("counts"):
            require(x.sum() == high, place)
    return sizes


def form(content):
    """Shapes and types in nested dicts of tensors; raises where a number is not finite."""
    if isinstance(content, dict):
        return {key: form(value) for key, value in content.items()}
    if not torch.is_tensor(content):
        return type(content)
    require(content.isfinite().all(), "not finite")
    return content.shape, content.dtype


def command_for(run: Run, name: str) -> str:
    """The whole command that makes OUT/name."""
    if name != "vae.pt" and (run.out / "vae.pt").exists():      # make might train another VAE
        return shlex.join(["python", f"{Path(name).stem}.py", "-o", str(run.out)])
    return make_command(run, run.labels_from, run.out / name)


def make_all(run: Run, labels_from: Path) -> str:
    """The whole command that does all again with the labels of a table."""
    return make_command(run, labels_from, "all")


def make_command(run: Run, labels_from, target) -> str:
    """make, the variables that say which images, and what to make of them."""
    spec = run.dataset or (run.out.name if run.out.name in TORCHVISION else "glyphs")
    words = ["make"]
    if spec != "glyphs":
        words.append(f"DATASET={spec}")
    if run.data_dir not in (None, "data"):
        words.append(f"DATA={run.data_dir}")
    if run.out != Path("runs", Path(spec).stem):
        words.append(f"OUT={run.out}")
    if run.labels:
        words.append(f"LABELS={run.labels}")
    if labels_from:
        words.append(f"LABELS_FROM={labels_from}")
    return shlex.join([*words, str(target)])


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


# ---- training: progress, unfinished work, ranks ---------------------------------------------

# What the five steps take of the time of `make all`; the last one counts subsets.
CHAIN = {"vae": 0.18, "latent": 0.12, "hybrids": 0.09, "cnn": 0.08, "subsets": 0.53}


class Progress:
    """What is done, and the time left: one rewriting line on a terminal, else plain lines.

    Under `make all`, which sets IN_CHAIN, also which of its steps this is, and when all of
    them will be done.
    """

    def __init__(self, total, what, quiet=False, done=0, log: Path | None = None):
        self.total = total
        self.what = what
        self.quiet = quiet
        self.log = log
        self.first = done
        self.place = ""
        self.later = 0.0                # what later steps take, in parts of this one
        if "IN_CHAIN" in os.environ and what in CHAIN:
            step = list(CHAIN).index(what)
            self.place = f"step {step + 1} of 5: "
            self.later = sum(list(CHAIN.values())[step + 1:]) / CHAIN[what]
        self.start = time.monotonic()
        if log and not done:
            open(log, "w", opener=in_place).close()

    def __call__(self, done, words="", **row):
        if not self.quiet:
            self.show(done, words)
        if self.log:                    # rates and times, which differ from run to run
            with open(self.log, "a", opener=in_place) as file:
                file.write(json.dumps({"step": done, **row}) + "\n")

    def show(self, done, words):
        spent = time.monotonic() - self.start
        finished = done >= self.total
        when = f"in {clock(spent)}"
        if not finished:
            each = spent / max(done - self.first, 1)
            left = each * (self.total - done)
            when = f"{clock(left)} left"
            later = self.later * each * self.total
            if later:
                when += f", {clock(left + later)} for all steps"
        line = f"{self.place}{self.what} {done:,}/{self.total:,}  {words}  {when}"
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
    or other `facts`, or that does not fit `model`, is as good as none.
    """

    def __init__(self, run: Run, name: str, data: Dataset, steps: int, resume: bool, model,
                 **facts):
        script = Path(__file__).with_name(f"{name}.py")
        self.path = run.out / f"{name}.last.pt"
        self.facts = {**facts, "amp": run.amp, "device": run.device.type,
                      "settings": run.settings, "dataset": data.facts(), "ranks": RANKS,
                      "code": fingerprint(script)}
        self.state = None
        self.history = []
        if resume and self.path.exists():
            self.restore(model, run.device)
        done = self.state["step"] if self.state else 0
        self.progress = Progress(steps, name, run.quiet, done, run.out / f"{name}.log.jsonl")

    def restore(self, model, device):
        """Take up the work in the file, if it fits."""
        generator = torch.Generator(device)
        moments = {}                    # Adam's, of each parameter
        for k, weight in enumerate(model.parameters()):
            moments[k] = {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
        example = {"step": 0, "model": model.state_dict(), "optimiser": moments,
                   "generator": generator.get_state()}
        try:
            saved = read(self.path)
            state = saved["state"]
            generator.set_state(state["generator"])     # raises where it is of another kind
            fits = (RANKS == 1 and all(saved[key] == self.facts[key] for key in self.facts)
                    and form(state) == form(example)
                    and state["step"] == saved["history"][-1]["step"])
        except Exception:               # zip, pickle and torch each have their own errors
            fits = False
        if fits:
            self.state = state
            self.history = saved["history"]
        elif RANK == 0:
            print(f"{self.path} does not fit these settings; starting afresh", file=sys.stderr)

    def keep(self, row: dict, words: str):
        """Report a row of `fit`, add it to the history, write all of it down."""
        rate = row.pop("images_per_second")             # it differs from run to run
        self.state = row.pop("state")
        self.progress(row["step"], f"{words}  {rate:,.0f} images/s", images_per_second=rate)
        self.history.append(row)
        write(self.path, {**self.facts, "state": self.state, "history": self.history})


def drop_checkpoint(run: Run, name: str):
    """Remove <name>.last.pt as the next step begins, unless it is of work after <name>.pt."""
    last = run.out / f"{name}.last.pt"
    stem = run.out / f"{name}.pt"
    if last.exists() and stem.exists() and last.stat().st_mtime <= stem.stat().st_mtime:
        last.unlink()


def distribute(model, run: Run, batch_size: int):
    """-> a model that averages gradients over ranks, this rank's batch size and generator."""
    require(batch_size % RANKS == 0, f"--batch-size is no multiple of the {RANKS} ranks")
    if RANKS > 1:
        here = whole_number("LOCAL_WORLD_SIZE", 1)
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
    return matplotlib.figure.Figure((width, height), layout="constrained", dpi=130)


def legible(names: list) -> list:
    """Names as figures can show them: what the font lacks is escaped, "$" is no formula."""
    from matplotlib import font_manager as fonts
    bold = fonts.findfont(fonts.FontProperties(weight="bold"))  # it lacks more than the plain
    known = fonts.get_font(bold).get_charmap()

    def shown(letter):
        if letter == "$":
            return r"\$"
        return letter if ord(letter) in known else ascii(letter)[1:-1]

    return ["".join(map(shown, name)) for name in names]


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
