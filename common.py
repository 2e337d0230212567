"""What the scripts share: flags, data sets and files. It knows nothing of models."""
import argparse
import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import shlex
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FORMAT = 3                              # of the .pt files; a newer one is refused
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
               "emnist-letters": "EMNIST", "emnist-balanced": "EMNIST", "usps": "USPS",
               "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# This process and how many there are: 0 and 1, unless torchrun started it.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

class Mistake(Exception):
    """A user's mistake, said in one line that names the cure."""

def need(ok, message):
    if not ok:
        raise Mistake(message)

def flags(script: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share."""
    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """The docstring as it stands, and every default."""
    parser = argparse.ArgumentParser(script, description=doc, formatter_class=Help)
    parser.error = lambda message: parser.exit(2, f"{script}: {message}; see {script} --help\n")
    parser.set_defaults(script=script)
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--dataset", metavar="NAME|FOLDER|FILE.npz", help="glyphs (embedded), a folder, an .npz, "
        "or " + " ".join(TORCHVISION) + "; without it the one in vae.pt, or else glyphs")
    add("--data-dir", help="where named data sets are kept; without it as in vae.pt, or else data")
    add("--image-size", type=number(int, 16, 64), default=32, help="side in pixels, for folders")
    add("-o", "--out", type=Path, help="the working directory; without it runs/<data set>")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of every random choice")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: not mps")
    add("--threads", type=number(int, 1), help="of the processor; without it all, or 1 a cell")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 or not; else the faster")
    add("--quiet", action="store_true", help="results only, no progress")
    return parser

def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float within [low, high]."""
    def parse(text):
        value = kind(text)                              # argparse turns a ValueError into a line
        if low <= value <= high and value != math.inf:                  # NaN fails the first test
            return value
        raise argparse.ArgumentTypeError(f"{text} is not within [{low}, {high}]")
    parse.__name__ = kind.__name__
    return parse

def guard(command, args) -> int:
    """Run command(args) -> 0; or say in one line what a user can mend -> 2; interrupted -> 130."""
    try:
        command(args)
        return 0
    except (KeyboardInterrupt, BrokenPipeError):        # or the reader of a pipe has gone
        message, code = "interrupted; what was finished is kept", 130
    except (Mistake, FloatingPointError) as error:
        message, code = str(error), 2
    except OSError as error:
        message, code = f"{error.filename or args.out}: {error.strerror or error}; mend that", 2
    except (MemoryError, RuntimeError) as error:        # torch's own, on every device
        strange = "no kernel image" in str(error)       # a GPU too old or too new for this torch
        if not strange and "memory" not in repr(error).lower() or "illegal memory" in str(error):
            raise
        message, code = "this torch has no code for this GPU; use --device cpu" if strange else \
            "out of memory; use fewer or smaller images, or --device cpu", 2
    finally:
        args.lock = None                # closes the files
    print(f"{args.script}: {' '.join(message.split())}", file=sys.stderr)
    return code

def start(args):
    """Make the working directory, settle threads, device and arithmetic -> device, amp."""
    args.out = args.out or Path("runs", Path(args.dataset or "glyphs").stem)
    need(args.out.is_dir() or not args.out.exists(), f"{args.out} is a file; --out takes a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    if not any(vars(args).get(key) for key in ("image", "point", "predict")):
        need(RANKS == 1 or args.script not in ("latent.py", "hybrids.py"), "start without torchrun")
        args.lock = [(args.out / name).open("w") for name in (".lock", f".lock-{RANK}")]
        try:                            # one run at a time, where torchrun's ranks are one
            import fcntl
            for file, alone in zip(args.lock, (RANKS == 1, True)):
                fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        except BlockingIOError:
            raise Mistake(f"another run works in {args.out}; wait, or give another --out") from None
        except (ImportError, OSError):  # Windows and some network drives have no such lock
            pass
    torch.set_num_threads(args.threads or torch.get_num_threads())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", min) if os.name == "posix" else min
    mallopt(-1, 2**29), mallopt(-3, 2**25)      # glibc: keep what is freed; processes to come, too
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": f"{2**29}", "MALLOC_MMAP_THRESHOLD_": f"{2**25}"}
    cuda = torch.cuda.is_available()
    name = args.device if args.device != "auto" else "cuda" if cuda else "cpu"
    need({"cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}[name],
         f"--device {name}: there is none here; use --device cpu")
    # Is bfloat16 fast here? The processor is asked; a torch that cannot tell says no.
    fast = {"cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(), "mps": False,
            "cuda": cuda and torch.cuda.is_bf16_supported(including_emulation=False)}[name]
    card = f":{int(os.environ.get('LOCAL_RANK', 0)) % (torch.cuda.device_count() or 1)}"
    return torch.device(name + card * (name == "cuda")), fast if args.amp is None else args.amp

def need_memory(size, what):
    """Refuse what takes more bytes than the machine has, before the system kills somebody."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if os.name == "posix" else 1e18
    need(size < there, f"{what} needs {size / 2**30:.1f} GiB of memory, and this machine has "
         f"{there / 2**30:.1f}; use fewer or smaller images")

@dataclass
class Dataset:
    """Images uint8 (N,C,H,W), labels int64 (N,); `validation`: rows set aside by the set itself."""
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    name: str
    validation: torch.Tensor | None = None

    def facts(self, args) -> dict:
        """What a file says of its data set: enough to load it again, and to know it again."""
        parts = self.images, self.labels, self.test_images, self.test_labels
        seen = "".join(fingerprint(part.cpu().numpy().tobytes()) for part in parts)
        light = (self.images[:, :, [0, -1]].float().mean((1, 2, 3)) > 127).float().mean().item()
        return {"name": self.name, "spec": args.dataset, "data_dir": args.data_dir,
                "image_size": args.image_size, "shape": list(self.images.shape[1:]),
                "classes": self.classes, "images": len(self.images), "light": light,
                "test_images": len(self.test_images), "fingerprint": fingerprint(seen.encode())}

def load_dataset(args, device, upstream=None) -> Dataset:
    """The data set that --dataset names, or the one that the `upstream` file was made from."""
    known = upstream["dataset"] if upstream else {}
    if args.dataset in (None, known.get("spec")):
        args.image_size = known.get("image_size", args.image_size)
    spec = args.dataset = args.dataset or known.get("spec", "glyphs")
    args.data_dir = args.data_dir or known.get("data_dir", "data")
    if spec == "glyphs" or spec.endswith(".npz"):
        data = glyphs() if spec == "glyphs" else npz_dataset(Path(spec))
    elif spec in TORCHVISION or Path(spec).is_dir():
        try:
            from torchvision import datasets
        except (ImportError, RuntimeError) as error:
            raise Mistake(f"torchvision cannot be imported ({error}); it must be of torch's build: "
                          "pip install --upgrade --force-reinstall torch torchvision") from None
        data = torchvision_dataset(datasets, spec, args.data_dir) if spec in TORCHVISION else \
            folder_dataset(datasets, Path(spec), args.image_size, args.out)
    else:
        near = difflib.get_close_matches(spec, ["glyphs", *TORCHVISION], 1)
        hint = f"did you mean {near[0]}?" if near else "names: glyphs " + " ".join(TORCHVISION)
        raise Mistake(f"no data set or folder {spec!r}; {hint}")
    check(data, args.image_size)
    need(not known or data.facts(args)["fingerprint"] == known["fingerprint"], f"{args.out}/vae.pt "
         f"was made from other images than {spec}; make it with: {cure(args, 'vae.pt')}")
    for key in ("images", "labels", "test_images", "test_labels"):
        setattr(data, key, getattr(data, key).to(device))
    return data

def check(data: Dataset, side: int):
    """The one door that every data set passes: labels become 0..K-1, sides at most 64."""
    x, y, x_test, y_test = data.images, data.labels, data.test_images, data.test_labels
    values, names = y.unique(), data.classes or y.unique().tolist()
    strange = sorted(set(y_test.tolist()) - set(values.tolist()))
    if len(names) > len(values) and set(values.tolist()) <= set(range(len(names))):     # unused
        names = [names[v] for v in values.tolist()]
    for ok, what in (
            (len(x) == len(y) and len(x_test) == len(y_test), "images and labels differ in number"),
            (len(y) and len(y_test), "no images for training, or none for test"),
            (x.shape[1:] == x_test.shape[1:], "training and test images differ in shape"),
            (not strange, f"labels {strange[:5]} are in test but not in training"),
            (len(values) > 1, "only one class; percentages need two or more"),
            (len(names) == len(values), f"{len(names)} names for {len(values)} classes")):
        need(ok, f"{data.name}: {what}")
    data.labels, data.test_labels = (torch.searchsorted(values, v) for v in (y, y_test))
    data.classes = [str(name) for name in names]
    if max(x.shape[2:]) > 64 or min(x.shape[2:]) < 16:
        data.images, data.test_images = (resize(v, (side, side)) for v in (x, x_test))

def resize(images, size):
    """uint8 (N,C,H,W) -> uint8 (N,C,*size), antialiased."""
    return torch.cat([F.interpolate(part.float(), size, mode="bilinear", antialias=True)
                      .round().clamp(0, 255).byte() for part in images.split(1000)])

def torchvision_dataset(datasets, name, root) -> Dataset:
    """One of torchvision.datasets, downloaded only if it is not on disk."""
    kind, parts, emnist = getattr(datasets, TORCHVISION[name]), [], name.startswith("emnist")
    for train in (True, False):
        keywords = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
        keywords |= {"split": name.removeprefix("emnist-")} if emnist else {}
        for download in (False, True):
            try:
                part = kind(root, **keywords, download=download)
                break
            except Exception as error:                  # each mirror has its own ways to fail
                need(not download, f"{name} is not in {root}, and downloading failed ({error}); "
                     f"put its files into {root}, as torchvision.datasets.{kind.__name__} "
                     "does, or use --dataset glyphs meanwhile")
                print(f"{name} is not in {root}: downloading it", file=sys.stderr)
        x = as_images(np.asarray(part.data))
        x = x.transpose(2, 3).contiguous() if emnist else x             # stored lying down
        parts += [x, torch.as_tensor(part.labels if name == "stl10" else part.targets).long()]
    return Dataset(*parts, [c.split(" - ")[0] for c in getattr(part, "classes", [])] or None, name)

def npz_dataset(path: Path) -> Dataset:
    """x_train y_train x_test y_test [classes]; images (N,H,W), (N,H,W,C) or (N,C,H,W)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            need_memory(2 * sum(part.file_size for part in file.zip.infolist()), path)
            x, x_test = (as_images(file[key]) for key in ("x_train", "x_test"))
            y, y_test = (file[key] for key in ("y_train", "y_test"))
            need(not any((v % 1 != 0).any() for v in (y, y_test)), "labels must be whole numbers")
            y, y_test = (torch.from_numpy(v.astype(np.int64).reshape(-1)) for v in (y, y_test))
            classes = file["classes"].tolist() if "classes" in file.files else None
    except Exception as error:                          # zip, zlib and numpy have many
        raise Mistake(f"{path}: {error}; make it with numpy.savez(path, x_train=..., y_train=..., "
                      "x_test=..., y_test=..., [classes=...])") from None
    return Dataset(x, y, x_test, y_test, classes, path.stem)

def as_images(array) -> torch.Tensor:
    """An array of images -> uint8 (N,C,H,W). Pixels are in [0,1], or else in [0,255]."""
    array = array[:, None] if array.ndim == 3 else array
    array = array.transpose(0, 3, 1, 2) if array.ndim == 4 and array.shape[3] in (1, 3) else array
    need(array.ndim == 4 and array.shape[1] in (1, 3),
         f"images of shape {array.shape}; wanted (N,H,W) or (N,H,W,1 or 3)")
    if array.size and (array.dtype != np.uint8 or array.max() <= 1):
        need(array.min() >= 0 and array.max() <= 255, "pixels that are NaN or outside [0, 255]")
        array = (array * (255.0 if array.max() <= 1 else 1.0)).round().astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(array))

def folder_dataset(datasets, root: Path, side: int, cache: Path) -> Dataset:
    """root/train/<class>/* and root/test/<class>/*, or only <class>/*, a fifth of it for test."""
    folders = [f for f in (root / "train", root / "test") if f.is_dir()]
    need(len(folders) != 1 or root / "train" in folders, f"{root}: there is test/ but no train/")
    try:
        wanted = lambda file: file.lower().endswith(IMAGE_FILES)
        parts = [datasets.ImageFolder(str(folder), is_valid_file=wanted)
                 for folder in (folders or [root])]
    except FileNotFoundError as error:
        raise Mistake(f"{root}: {error}; wanted one subfolder a class, images in each") from None
    classes, size = parts[0].classes, len(parts[0].samples)
    need(set(classes) >= set(parts[-1].classes), f"{root}: test/ has classes that train/ has not")
    files, names = zip(*[(f, part.classes[c]) for part in parts for f, c in part.samples])
    labels, rows = torch.tensor([classes.index(name) for name in names]), torch.arange(len(files))
    about = [FORMAT, side, [[f, os.path.getsize(f), os.stat(f).st_mtime_ns] for f in files]]
    # Decoded once, then opened memory-mapped; named by a digest of what made it.
    stored = cache / f"images-{fingerprint(json.dumps(about).encode())}.npy"
    if not stored.exists():
        grey, temporary = all(read_image(f, None) for f in files), cache / f"images.{RANK}.tmp"
        print(f"reading {len(files):,} images", file=sys.stderr)
        about = {"descr": "|u1", "fortran_order": False,
                 "shape": (len(files), 1 if grey else 3, side, side)}
        need_memory(2 * math.prod(about["shape"]), root)
        try:
            with temporary.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, about)
                out.writelines(read_image(file, side, grey).tobytes() for file in files)
            os.replace(temporary, stored)
        finally:
            temporary.unlink(missing_ok=True)
    images = torch.from_numpy(np.load(stored, mmap_mode="c"))
    # The fifth does not depend on --seed: test stays test.
    first, last = (rows[:size], rows[size:]) if len(parts) == 2 else cut(labels, rows, 0.2)
    return Dataset(images[first], labels[first], images[last], labels[last], classes, root.name)

def read_image(path, side, grey=False):
    """The middle square of a picture, uint8 (C,side,side), upright, on white. Side None: grey?"""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as picture:
            if side is None:
                return picture.mode[0] in "1LIF"        # only the header has been read
            picture.draft(None, (2 * side, 2 * side))   # large JPEGs are decoded at reduced scale
            if picture.mode[0] in "IF":                 # 16 bits: keep the high byte
                deep = np.asarray(picture, dtype=np.float32) / 257
                picture = Image.fromarray(deep.clip(0, 255).round().astype(np.uint8))
            picture = ImageOps.exif_transpose(picture)
            if "A" in picture.mode or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = ImageOps.fit(picture.convert("L" if grey else "RGB"), (side, side),
                                   Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Mistake(f"{path} cannot be read as an image ({error}); mend or remove it") from None
    return np.asarray(picture)[None] if grey else np.asarray(picture).transpose(2, 0, 1)

def shuffled_classes(labels, rows, seed) -> list:
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return [rows[labels[rows] == c] for c in labels[rows].unique()]

def cut(labels, rows, fraction):
    """Cut a fraction off every class, always the same one -> rows kept, rows cut; both sorted."""
    parts = shuffled_classes(labels, rows, 0)
    sizes = [max(round(len(p) * fraction), int(len(p) > 1)) for p in parts]   # one image stays
    away = torch.cat([p[:size] for p, size in zip(parts, sizes)])
    return torch.cat([p[size:] for p, size in zip(parts, sizes)]).sort()[0], away.sort()[0]

def split(data: Dataset):
    """-> pool, validation: a tenth of the training images is cut first and never trained on."""
    rows, aside = torch.arange(len(data.labels)), data.validation
    pool, aside = (rows[~torch.isin(rows, aside)], aside) if aside is not None else \
        cut(data.labels.cpu(), rows, 0.1)
    need(len(aside), f"{data.name}: nothing is left for validation; two images a class are needed")
    return pool, aside

def subset(data: Dataset, pool, n: int, seed: int, subsets=10) -> torch.Tensor:
    """n rows of the pool: equal counts a class to within one; a smaller n is inside a larger one.

    Seeds 0 to subsets-1 begin at even distances in one shuffled order of each class: they share
    no image while each class gives at most 1/subsets of its images.
    """
    need(n <= len(pool), f"{n} images asked for; there are {len(pool)} besides validation images")
    parts = [part.roll(-(seed % subsets) * len(part) // subsets)
             for part in shuffled_classes(data.labels.cpu(), pool, seed // subsets)]
    turn = torch.cat([torch.arange(len(part)) for part in parts])       # a class in turn
    return torch.cat(parts)[turn.argsort(stable=True)][:n]

def write(path: Path, content):
    """Write JSON, CSV, a figure or a .pt beside `path`, then move it there in one step."""
    temporary, whole = path.with_name(path.name + ".tmp"), io.BytesIO()
    put = {".json": lambda: temporary.write_text(json.dumps(content, indent=1, allow_nan=False)),
           ".csv": lambda: temporary.write_text(content),
           ".png": lambda: content.savefig(temporary, format="png"),
           ".pt": lambda: (torch.save(content, whole), temporary.write_bytes(whole.getbuffer()))}
    try:
        put[path.suffix]()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def fingerprint(it: Path | bytes) -> str:
    return hashlib.sha256(it if isinstance(it, bytes) else it.read_bytes()).hexdigest()[:16]

def settings(args) -> dict:
    other = "out script resume quiet export image point predict jobs gather lock".split()
    return {key: value for key, value in sorted(vars(args).items()) if key not in other}

def save(path: Path, args, data: Dataset, metrics: dict, made_from=(), **content):
    """Write path (its stem is its kind) and, before it, its facts as .json beside it."""
    facts = {"kind": path.stem, "format": FORMAT, "settings": settings(args), "metrics": metrics,
             "dataset": data.facts(args), "made_from": {p.stem: fingerprint(p) for p in made_from},
             "versions": {"torch": str(torch.__version__), "numpy": str(np.__version__)}}
    write(path.with_suffix(".json"), facts)
    write(path, {**facts, **content})

def read(path: Path, device="cpu") -> dict:
    """A .pt file of plain tensors; raises where a bit has changed, which torch does not check."""
    with zipfile.ZipFile(path) as file:
        need(not file.testzip(), f"{path} is damaged")
    return torch.load(path, map_location=device, weights_only=True)

def load(args, kind: str, device="cpu") -> dict:
    """Read OUT/<kind>.pt; whatever is wrong with it becomes one line with the cure."""
    path, cured = args.out / f"{kind}.pt", f"make it with: {cure(args, f'{kind}.pt')}"
    need(path.exists(), f"{path} not found; {cured}")
    try:
        saved = read(path, device)
        found, version, sources = saved["kind"], int(saved["format"]), saved["made_from"].items()
    except Exception:                   # zip, pickle and torch each have their own errors
        raise Mistake(f"{path} is damaged; {cured}") from None
    need(found == kind and version <= FORMAT,
         f"{path} is a {found} file of format {version}; wanted {kind}, {FORMAT}; {cured}")
    for stem, mark in sources:
        source = args.out / f"{stem}.pt"
        need(not source.exists() or fingerprint(source) == mark,
             f"{path} was made from another {stem}.pt; {cured}")
    return saved

def cure(args, name: str) -> str:
    """The whole command that makes OUT/name."""
    if name != "vae.pt" and (args.out / "vae.pt").exists():     # make might train another VAE
        return shlex.join(["python", f"{Path(name).stem}.py", "-o", str(args.out)])
    spec = args.dataset or (args.out.name if args.out.name in TORCHVISION else "glyphs")
    words = [f"DATASET={spec}"] * (spec != "glyphs")
    words += [f"DATA={args.data_dir}"] * (args.data_dir not in (None, "data"))
    words += [f"OUT={args.out}"] * (args.out != Path("runs", Path(spec).stem))
    return shlex.join(["make", *words, str(args.out / name)])

# Type families of matplotlib's fonts: validation and test digits are in designs never trained on.
FONTS = {"train": (9000, [f"DejaVu{face}{style}" for face, slant in (
             ("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
             for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")]),
         "validation": (1000, [f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")]),
         "test": (2000, ["cmr10", "cmb10", "cmss10", "cmtt10"])}

def glyphs(seed=0, side=28) -> Dataset:
    """The embedded digits: 10,000 for training, 2,000 for test, the same from the same seed."""
    g, images = torch.Generator().manual_seed(seed), []
    for n, names in FONTS.values():
        fields = torch.stack([distance_field(name, d, side)
                              for name in names for d in "0123456789"])
        which = 10 * torch.randint(len(fields) // 10, (n,), generator=g) + torch.arange(n) % 10
        images += [draw(fields[part], side, g) for part in which.split(500)]    # fits the cache
    x, y = torch.cat(images), torch.arange(12_000) % 10
    return Dataset(x[:10_000], y[:10_000], x[10_000:], y[10_000:], list("0123456789"), "glyphs",
                   torch.arange(9000, 10_000))

def distance_field(name, digit, side):
    """(2 side, 2 side) distances to a font's digit's outline in image pixels, positive inside."""
    from matplotlib import ft2font, get_data_path, path
    font = ft2font.FT2Font(str(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")))
    font.set_size(128, 72)              # large: hinting and flattened curves stay out of sight
    font.load_char(ord(digit))
    # Points as complex numbers x + iy; fonts count y upwards and images downwards, hence conj.
    rings = [torch.view_as_complex(torch.tensor(ring)).conj()
             for ring in path.Path(*font.get_path()).to_polygons()]
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
