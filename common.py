"""What the scripts share: flags, data sets, files and figures. It knows nothing of models.

A script is main(argv) -> exit code: 0 done, 2 a user's mistake (one line that names the cure),
130 interrupted. Files appear whole or not at all.
"""
from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FORMAT = 1                              # of the .pt files; a newer one is refused
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
               "emnist-letters": "EMNIST", "emnist-balanced": "EMNIST", "usps": "USPS",
               "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Mistake(Exception):
    """A user's mistake, said in one line that names the cure."""


# ---- flags, and the way in and out -----------------------------------------------------------

class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands, and every default."""


def flags(script: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share."""
    parser = argparse.ArgumentParser(script, description=doc, formatter_class=_Help)
    parser.set_defaults(script=script)
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--dataset", metavar="NAME|FOLDER|FILE.npz", help="glyphs (embedded), a folder with one "
        "subfolder a class, an .npz file, or " + " ".join(TORCHVISION)
        + "; without it the one in vae.pt, or else glyphs")
    add("--data-dir", help="where named data sets are kept; without it as in vae.pt, or else data")
    add("--image-size", type=number(int, 16, 64), default=32,
        help="side in pixels for images from folders, and for any above 64")
    add("-o", "--out", type=Path, metavar="DIR",
        help="the working directory, read and written; without it runs/<data set>")
    add("--seed", type=number(int, 0), default=0, help="of every random choice")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto: cuda where there is one, else cpu")
    add("--threads", type=number(int, 1), help="processor threads; without it all cores")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="bfloat16 arithmetic; without it where the processor has it")
    add("--quiet", action="store_true", help="results only, no progress")
    return parser


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float within [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number ({kind.__name__})") from None
        if not low <= value <= high or math.isinf(value):           # NaN fails the first test
            raise argparse.ArgumentTypeError(f"{text} is not within [{low}, {high}]")
        return value
    return parse


def guard(command, args) -> int:
    """Run command(args); turn what a user can cause into one line and an exit code."""
    code = 2
    try:
        command(args)
        return 0
    except KeyboardInterrupt:
        code, message = 130, "interrupted; what was finished is kept"
    except (Mistake, FloatingPointError) as error:
        message = error
    except OSError as error:
        full = error.errno == errno.ENOSPC
        message = (f"{error.filename or args.out}: {error.strerror or error}"
                   + "; free some space and run the same command again" * full)
    except (MemoryError, torch.OutOfMemoryError):
        message = "out of memory; use fewer or smaller images, or --device cpu"
    print(f"{args.script}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def start(args):
    """Make the working directory, settle threads, device and arithmetic -> device, amp."""
    args.out = args.out or Path("runs", Path(args.dataset or "glyphs").stem)
    if args.out.exists() and not args.out.is_dir():
        raise Mistake(f"{args.out} is a file; --out takes a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = {"cpu": True, "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available()}
    if not here[name]:
        raise Mistake(f"--device {name}: there is none here; use --device cpu")
    if name == "cuda":                                  # TF32 for what stays in float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return torch.device(name), has_bfloat16(name) if args.amp is None else args.amp


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is fast here: asked of the processor, not assumed."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, ask, bool)() for ask in asks)


# ---- data sets -------------------------------------------------------------------------------

@dataclass
class Dataset:
    """images uint8 (N,C,H,W) and labels int64 (N,) for training and for test; K class names.

    `validation`: the rows that a data set sets aside by itself; None leaves the cut to split().
    """
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    name: str
    validation: torch.Tensor | None = None

    def facts(self, args) -> dict:
        """What a .pt file says of its data set: enough to load it again and to know it again."""
        seen = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        every = max(1, len(self.images) // 256)         # 256 images tell any two data sets apart
        seen.update(self.images[::every].cpu().numpy().tobytes())
        return {"name": self.name, "spec": args.dataset, "data_dir": args.data_dir,
                "image_size": args.image_size, "shape": list(self.images.shape[1:]),
                "light": border(self.images[::every]) > 127, "classes": self.classes, "images": len(self.images),
                "test_images": len(self.test_images), "fingerprint": seen.hexdigest()[:16]}


def load_dataset(args, device, upstream=None) -> Dataset:
    """The data set that --dataset names, or the one that the `upstream` file was made from."""
    known = upstream["dataset"] if upstream else {}
    if args.dataset is None:
        args.image_size = known.get("image_size", args.image_size)
    args.dataset = args.dataset or known.get("spec", "glyphs")
    args.data_dir = args.data_dir or known.get("data_dir", "data")
    if args.dataset == "glyphs":
        data = glyphs()
    elif args.dataset in TORCHVISION:
        data = torchvision_dataset(args.dataset, args.data_dir)
    elif args.dataset.endswith(".npz"):
        data = npz_dataset(Path(args.dataset))
    elif Path(args.dataset).is_dir():
        data = folder_dataset(Path(args.dataset), args.image_size, args.out, args.quiet)
    else:
        near = difflib.get_close_matches(args.dataset, ["glyphs", *TORCHVISION], 1)
        raise Mistake(f"no data set or folder {args.dataset!r}; " + (
            f"did you mean {near[0]}?" if near else "names: glyphs " + " ".join(TORCHVISION)))
    check(data, args.image_size)
    if known and data.facts(args)["fingerprint"] != known["fingerprint"]:
        raise Mistake(f"{args.out}/vae.pt was made from other images than {args.dataset} now "
                      f"holds; make it again with: {cure(args, 'vae.pt')}")
    for key in ("images", "labels", "test_images", "test_labels"):
        setattr(data, key, getattr(data, key).to(device))
    return data


def check(data: Dataset, side: int):
    """The one door that every data set passes: labels become 0..K-1, sides at most 64."""
    x, y, x_test, y_test = data.images, data.labels, data.test_images, data.test_labels
    values = y.unique()
    strange = sorted(set(y_test.tolist()) - set(values.tolist()))
    names = data.classes or [str(v) for v in values.tolist()]
    if len(names) > len(values):                        # a name without images is no class
        names = [names[v] for v in values.tolist()]
    for wrong, what in (
            (len(x) != len(y) or len(x_test) != len(y_test), "images and labels differ in number"),
            (not len(y) or not len(y_test), "no images for training, or none for test"),
            (x.shape[1:] != x_test.shape[1:], "training and test images differ in shape"),
            (strange, f"labels {strange[:5]} are in test but not in training"),
            (len(values) < 2, "only one class; percentages need two or more"),
            (len(names) != len(values), f"{len(names)} names for {len(values)} classes")):
        if wrong:
            raise Mistake(f"{data.name}: {what}")
    data.labels, data.test_labels = (torch.searchsorted(values, v) for v in (y, y_test))
    data.classes = [str(name) for name in names]
    if max(x.shape[2:]) > 64 or min(x.shape[2:]) < 16:
        data.images, data.test_images = (
            resize(v, (side, side)) for v in (x, x_test))


def resize(images, side):
    """uint8 (N,C,H,W) -> uint8 (N,C,*side), antialiased."""
    return torch.cat([F.interpolate(part.float(), side, mode="bilinear", antialias=True)
                      .round().clamp(0, 255).byte() for part in images.split(1000)])


def torchvision_dataset(name, root) -> Dataset:
    """One of torchvision.datasets, looked for on disk first, downloaded only if absent."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise Mistake(f"torchvision cannot be imported ({error}); it must be of the same build as "
                      "torch: pip install --upgrade --force-reinstall torch torchvision") from None
    kind, parts = getattr(datasets, TORCHVISION[name]), []
    for train in (True, False):
        keywords = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
        if name.startswith("emnist"):
            keywords["split"] = name.removeprefix("emnist-")
        try:
            part = kind(root, **keywords, download=False)
        except RuntimeError:
            print(f"{name} is not in {root}: downloading it", file=sys.stderr)
            try:
                part = kind(root, **keywords, download=True)
            except Exception as error:                  # each mirror has its own ways to fail
                raise Mistake(f"{name} is not in {root}, and downloading failed ({error}); put its "
                              f"files into {root}/{kind.__name__} as torchvision does, or use "
                              "--dataset glyphs meanwhile") from None
        x = torch.as_tensor(part.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[3] == 3 else x
        x = x.transpose(2, 3) if name.startswith("emnist") else x           # stored lying down
        y = torch.as_tensor(part.labels if name == "stl10" else part.targets).long()
        parts += [x.contiguous(), y]
    classes = [c.split(" - ")[0] for c in getattr(part, "classes", [])]
    return Dataset(*parts, classes or None, name)


def npz_dataset(path: Path) -> Dataset:
    """x_train y_train x_test y_test [classes]; images (N,H,W), (N,H,W,C) or (N,C,H,W)."""
    how = "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=..., [classes=...])"
    if not path.exists():
        raise Mistake(f"{path} not found; make it with {how}")
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {key: file[key] for key in file.files}
        x, x_test = (as_images(parts[key]) for key in ("x_train", "x_test"))
        y, y_test = (torch.from_numpy(parts[key].astype(np.int64)) for key in ("y_train", "y_test"))
        classes = parts["classes"].tolist() if "classes" in parts else None
    except Exception as error:                          # zip, zlib and numpy have many
        raise Mistake(f"{path}: {error}; make it with {how}") from None
    return Dataset(x, y, x_test, y_test, classes, path.stem)


def as_images(array) -> torch.Tensor:
    """An array of images -> uint8 (N,C,H,W). Floats are in [0,1], or else in [0,255]."""
    array = array[:, None] if array.ndim == 3 else array
    if array.ndim == 4 and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {array.shape}; wanted (N,H,W) or (N,H,W,1 or 3)")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise ValueError("pixels that are NaN, infinite or outside [0, 255]")
        array = (array * (255.0 if array.max() <= 1 else 1.0)).round().astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(array))


def folder_dataset(root: Path, side: int, cache: Path, quiet=False) -> Dataset:
    """root/train/<class>/* and root/test/<class>/*, or only <class>/* with a fifth as the test.

    Decoded once into cache/images-<key>.npy, then opened memory-mapped.
    """
    from torchvision.datasets import ImageFolder
    train = root / "train" if (root / "train").is_dir() else root
    tests = [root / "test"] if train != root and (root / "test").is_dir() else []
    try:
        parts = [ImageFolder(str(folder), is_valid_file=lambda f: f.lower().endswith(IMAGE_FILES))
                 for folder in (train, *tests)]
    except FileNotFoundError as error:
        raise Mistake(f"{root}: {error}; wanted one subfolder a class, images in each") from None
    classes = parts[0].classes
    strange = [c for part in parts for c in part.classes if c not in classes]
    if strange:
        raise Mistake(f"{root}: class {strange[0]!r} is in test but not in train")
    files = [file for part in parts for file, _ in part.samples]
    labels = torch.tensor([classes.index(part.classes[c]) for part in parts
                           for _, c in part.samples])
    about = [[f, os.path.getsize(f), os.stat(f).st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps([FORMAT, side, about]).encode()).hexdigest()[:16]
    stored = cache / f"images-{key}.npy"
    if not stored.exists():
        grey = all(read_image(f, None) == "grey" for f in files)
        progress, temporary = Progress(len(files), "reading", quiet), cache / "images.tmp.npy"
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8,
                                          (len(files), 1 if grey else 3, side, side))
        for row, file in enumerate(files):
            array[row] = read_image(file, side, grey)
            if (row + 1) % 500 == 0 or row + 1 == len(files):
                progress(row + 1)
        array.flush()
        os.replace(temporary, stored)
    images = torch.from_numpy(np.load(stored, mmap_mode="c"))      # private pages: never written
    size, rows = len(parts[0].samples), torch.arange(len(files))
    # Without a test folder the fifth does not depend on --seed: test stays test.
    first, last = (rows[:size], rows[size:]) if tests else cut(labels, rows, 0.2)
    return Dataset(images[first], labels[first], images[last], labels[last], classes, root.name)


def read_image(path, side, grey=False):
    """One picture as uint8 (C,side,side): upright, on white, cropped to the middle square.

    With side None only its header is read, and the answer is "grey" or "colour".
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as picture:
            if side is None:
                return "grey" if picture.mode[0] in "1LIF" else "colour"
            picture.draft(None, (2 * side, 2 * side))   # large JPEGs are decoded at reduced scale
            if picture.mode[0] in "IF":                 # 16 bits: keep the high byte
                deep = np.asarray(picture, dtype=np.float32) / 257
                picture = Image.fromarray(deep.clip(0, 255).round().astype(np.uint8))
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = ImageOps.fit(picture.convert("L" if grey else "RGB"), (side, side),
                                   Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Mistake(f"{path} cannot be read as an image ({error}); mend or remove it") from None
    array = np.asarray(picture)
    return array[None] if grey else array.transpose(2, 0, 1)


def read_like(path, facts):
    """A picture brought to a data set's side, channels and polarity -> uint8 (1,C,H,W), what was done."""
    channels, height, width = facts["shape"]
    array = torch.from_numpy(read_image(path, max(height, width), channels == 1).copy())[None]
    array = resize(array, (height, width)) if height != width else array
    light = border(array) > 127
    flip = channels == 1 and light != facts["light"]    # ink on paper, or chalk on a board
    return 255 - array if flip else array, (
        f"{path}: {'grey' if channels == 1 else 'RGB'}, {height}x{width}"
        + ", inverted: the data set's background is " * flip + ("light" if facts["light"] else "dark") * flip)


def border(images) -> float:
    """The mean brightness of the outermost pixels, 0 to 255."""
    edge = torch.ones(images.shape[2:], dtype=torch.bool, device=images.device)
    edge[1:-1, 1:-1] = False
    return images[..., edge].float().mean().item()


# ---- which images ----------------------------------------------------------------------------

def shuffled_classes(labels, rows, seed) -> list:
    """The rows of each class that has any, shuffled: a list of index tensors."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return [rows[labels[rows] == c] for c in labels[rows].unique()]


def cut(labels, rows, fraction):
    """Cut a fraction off every class, always the same one -> rows kept, rows cut; both sorted."""
    parts = shuffled_classes(labels, rows, 0)
    sizes = [max(round(len(p) * fraction), int(len(p) > 1)) for p in parts]   # one image stays
    away = torch.cat([p[:size] for p, size in zip(parts, sizes)])
    return torch.cat([p[size:] for p, size in zip(parts, sizes)]).sort()[0], away.sort()[0]


def split(data: Dataset):
    """-> pool, validation: a tenth of the training images is cut first and never trained on."""
    rows, labels = torch.arange(len(data.labels)), data.labels.cpu()
    if data.validation is None:
        return cut(labels, rows, 0.1)
    return rows[~torch.isin(rows, data.validation)], data.validation


def subset(data: Dataset, pool, n: int, seed: int, subsets=10) -> torch.Tensor:
    """n rows of the pool: equal counts a class to within one; a smaller n is inside a larger one.

    Seeds 0 to subsets-1 begin at even distances in one shuffled order of each class, so their
    subsets are disjoint while n is at most 1/subsets of the pool.
    """
    if n > len(pool):
        raise Mistake(f"{n} images asked for, but there are {len(pool)} to train on, besides the "
                      f"{len(data.labels) - len(pool)} for validation")
    parts = [part.roll(-(seed % subsets) * len(part) // subsets)
             for part in shuffled_classes(data.labels.cpu(), pool, seed // subsets)]
    turn = torch.cat([torch.arange(len(part)) for part in parts])       # a class in turn
    return torch.cat(parts)[turn.argsort(stable=True)][:n]


# ---- files -----------------------------------------------------------------------------------

def write(path: Path, content):
    """Write JSON (plain values), a .pt or a figure beside `path`, then move it there in one step."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        elif path.suffix == ".png":
            content.savefig(temporary, format="png")
        elif path.suffix == ".csv":
            temporary.write_text(content)
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def settings(args) -> dict:
    """The flags that decide what is made, as plain values."""
    other = {"out", "script", "resume", "quiet", "export", "image", "point", "predict", "jobs"}
    return {key: value for key, value in sorted(vars(args).items()) if key not in other}


def save(path: Path, args, data: Dataset, metrics: dict, made_from=(), **content):
    """Write path (its stem is its kind) and, before it, the same facts as .json beside it."""
    facts = {"kind": path.stem, "format": FORMAT, "settings": settings(args), "metrics": metrics,
             "dataset": data.facts(args),
             "made_from": {p.stem: fingerprint(p) for p in made_from},
             "versions": {"torch": str(torch.__version__), "numpy": str(np.__version__)}}
    write(path.with_suffix(".json"), facts)
    write(path, {**facts, **content})


def load(args, kind: str, device="cpu") -> dict:
    """Read OUT/<kind>.pt; whatever is wrong with it becomes one line with the cure."""
    path, again = args.out / f"{kind}.pt", f"make it again with: {cure(args, kind + '.pt')}"
    if not path.exists():
        raise Mistake(f"{path} not found; " + again.replace(" again", "", 1))
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found, number = saved["kind"], saved["format"]
    except Exception:                   # zip, pickle and torch each have their own errors
        raise Mistake(f"{path} is damaged; {again}") from None
    if found != kind or number > FORMAT:
        raise Mistake(f"{path} is of kind {found}, format {number}; wanted {kind}, {FORMAT}; "
                      + again)
    for stem, mark in saved["made_from"].items():
        source = args.out / f"{stem}.pt"
        if source.exists() and fingerprint(source) != mark:
            raise Mistake(f"{path} was made from another {source.name}; {again}")
    return saved


def resume(args, last: Path, work: dict):
    """-> state, history of unfinished work: None, [] where there is none of the same settings."""
    if not args.resume or not last.exists():
        return None, []
    try:
        saved = torch.load(last, map_location="cpu", weights_only=True)
    except Exception:                   # a damaged one is as good as none
        return None, []
    same = all(saved.get(key) == value for key, value in work.items())
    return (saved["state"], saved["history"]) if same else (None, [])


class Log:
    """Rows as JSON lines, for what differs from run to run: rates and times."""

    def __init__(self, path: Path, fresh=True):
        self.file = path.open("w" if fresh else "a", buffering=1)

    def __call__(self, row: dict):
        self.file.write(json.dumps(row) + "\n")


def cure(args, name: str) -> str:
    """The whole command that makes OUT/name."""
    spec = args.dataset or (args.out.name if args.out.name in TORCHVISION else "glyphs")
    words = [f"DATASET={spec}"] * (spec != "glyphs")
    words += [f"DATA={args.data_dir}"] * (args.data_dir not in (None, "data"))
    words += [f"OUT={args.out}"] * (args.out != Path("runs", Path(spec).stem))
    return shlex.join(["make", *words, str(args.out / name)])


# ---- progress and figures --------------------------------------------------------------------

class Progress:
    """What is done, and the time left: one rewriting line on a terminal, plain lines in a file."""

    def __init__(self, total, what, quiet=False, done=0):
        self.total, self.what, self.quiet = total, what, quiet
        self.first, self.start = done, time.monotonic()

    def __call__(self, done, words=""):
        spent = time.monotonic() - self.start
        left = spent / max(done - self.first, 1) * (self.total - done)
        when = f"{clock(left)} left" if done < self.total else f"in {clock(spent)}"
        live = sys.stderr.isatty()
        if not self.quiet:
            print("\r\x1b[K" * live + f"{self.what} {done:,}/{self.total:,}  {words}  {when}",
                  end="\n" if done >= self.total or not live else "", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds in human units: 8 s, 3:05 min, 2:10 h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02} h" if hours else f"{m}:{s:02} min" if minutes else f"{s} s"


# Petroff (2021): colours that colour-blind people tell apart, in order of use.
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
MARKERS = "osD^vP*Xhd"


def figure(width=10.0, height=5.0):
    """A matplotlib Figure on its own: no pyplot, no global state, no display."""
    from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained", dpi=130)


def tidy(axes, title, x=None, y=None):
    """One look for all axes: title at the left, no box, a light grid."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return axes


def picture(axes, images, columns=1, caption="", size=8):
    """Images (N,C,H,W), uint8 or in [0,1], side by side with a white pixel between."""
    images = images.cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    n, c, h, w = images.shape
    sheet = torch.ones(c, -(-n // columns) * (h + 1) - 1, columns * (w + 1) - 1)
    for k, image in enumerate(images):
        top, left = k // columns * (h + 1), k % columns * (w + 1)
        sheet[:, top:top + h, left:left + w] = image
    array = sheet.permute(1, 2, 0).clamp(0, 1).numpy()
    axes.imshow(array[..., 0] if c == 1 else array, cmap="gray", vmin=0, vmax=1,
                interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=size, labelpad=3)
    axes.spines[:].set_visible(False)
    return axes


# Type families of matplotlib's fonts: validation and test digits are in designs never trained on.
FONTS = {"train": (9000, """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique
             DejaVuSansMono DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique
             DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic"""),
         "validation": (1000, "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta"),
         "test": (2000, "cmr10 cmb10 cmss10 cmtt10")}


def glyphs(seed=0, side=28) -> Dataset:
    """The embedded digits: 10,000 for training, 2,000 for test, the same from the same seed."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    g, images, digits = torch.Generator().manual_seed(seed), [], []
    for n, names in FONTS.values():
        fields = []
        for name in names.split():
            file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
            if not file.is_file():
                raise Mistake(f"glyphs: this matplotlib lacks a font, {file}; pip install "
                              "--force-reinstall matplotlib, or use another --dataset")
            font = FT2Font(str(file))
            font.set_size(128, 72)      # large: hinting and flattened curves stay out of sight
            fields.append(torch.stack([distance_field(font, d, side) for d in "0123456789"]))
        fields, which = torch.stack(fields), torch.randint(len(fields), (n,), generator=g)
        digits.append(torch.arange(n) % 10)
        for i in range(0, n, 500):      # small batches stay in the processor's cache
            images.append(draw(fields[which[i:i + 500], digits[-1][i:i + 500]], side, g))
    x, y = torch.cat(images), torch.cat(digits)
    return Dataset(x[:10000], y[:10000], x[10000:], y[10000:], list("0123456789"), "glyphs",
                   torch.arange(9000, 10000))


def distance_field(font, digit, side):
    """(2 side, 2 side) distances to a digit's outline in image pixels, positive inside."""
    from matplotlib.path import Path as Outline
    font.load_char(ord(digit))
    # Points as complex numbers x + iy; fonts count y upwards and images downwards, hence conj.
    rings = [torch.view_as_complex(torch.tensor(ring)).conj()
             for ring in Outline(*font.get_path()).to_polygons()]
    a, b = torch.cat([r[:-1] for r in rings]), torch.cat([r[1:] for r in rings])
    a, b = a[a != b], b[a != b]         # a repeated point has no direction: 0 / 0 below
    (left, right), (top, bottom) = a.real.aminmax(), a.imag.aminmax()
    middle, unit = torch.complex(left + right, top + bottom) / 2, 18 / (bottom - top)
    a, b = (((end - middle) * unit).to(torch.complex64) for end in (a, b))
    axis = (torch.arange(2 * side) + 0.5) / 2 - side / 2
    p = torch.complex(axis.repeat(2 * side), axis.repeat_interleave(2 * side))[:, None]
    along = (((p - a) * (b - a).conj()).real / (b - a).abs() ** 2).clamp(0, 1)
    distance = (p - a - along * (b - a)).abs().amin(1)
    # Seen from inside, the outline turns a full circle; a hole turns back and cancels it.
    turns = ((b - p) / (a - p)).angle().sum(1).abs()
    return torch.where(turns > torch.pi, distance, -distance).view(2 * side, 2 * side)


def draw(fields, side, g):
    """Distance fields (n, ., .) -> uint8 images (n,1,side,side), each bent in its own way."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(len(fields), 1, 1, generator=g)
    turn, shear, wide, scale = (uniform(*r) for r in
                                ((-0.25, 0.25), (-0.2, 0.2), (0.85, 1.1), (0.9, 1.1)))
    cos, sin = turn.cos(), turn.sin()   # rows lead from image to field: dividing enlarges
    x = torch.cat([cos / wide / scale, (shear * cos - sin) / scale, uniform(-0.1, 0.1)], 2)
    y = torch.cat([sin / wide / scale, (cos + shear * sin) / scale, uniform(-0.1, 0.1)], 2)
    grid = F.affine_grid(torch.cat([x, y], 1), (len(x), 1, side, side), align_corners=False)
    # Smooth noise: two channels push the pixels about, the third thickens and thins the stroke.
    wave = F.interpolate(torch.randn(len(x), 3, 4, 4, generator=g), side, mode="bicubic",
                         align_corners=True)
    grid = grid + 0.05 * wave[:, :2].permute(0, 2, 3, 1)
    field = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    # Stroke weight is where the distances are cut, edge blur how gently: no morphology.
    ink = (0.5 + (field + uniform(0.0, 0.7) + 0.2 * wave[:, 2]) / uniform(1.0, 2.0)).clamp(0, 1)
    noise = uniform(0.0, 0.08) * torch.randn(ink.shape, generator=g)
    return ((ink * uniform(0.6, 1.0) + noise).clamp(0, 1) * 255).round().byte()[:, None]
