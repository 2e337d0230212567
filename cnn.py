"""Train an image classifier on probabilities: real images, hybrids, or both.

    python cnn.py                                      # hybrids at first, real images in the end
    python cnn.py -o runs/mnist --hybrid-fraction 0    # the plain CNN: real images only
    python cnn.py --dataset mnist --hybrid-fraction 0 --augment --mixup 0.5   # no VAE needed
    python cnn.py -o runs/mnist --predict photo.png    # percentages; of a folder, as CSV

Reads:  vae.pt (which data set, which images) if it is there; hybrids.pt, for hybrids.
Writes: cnn.pt cnn.json cnn.png, cnn.log.jsonl; cnn.last.pt while it works.
"""
import csv
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Letters: B batch, C×H×W image, K classes.  x (B,C,H,W) in [0,1], q (B,K) probabilities.

class CNN(nn.Module):
    """Convolution blocks that halve the side and double the width, then the strongest response.

    The largest value of each feature over the image, not the mean: with 100 MNIST images 83.8%
    against 75.2% (validation, 6 subsets). x (B,C,H,W) in [0,1] -> logits (B,K).
    """
    def __init__(self, channels: int, classes: int, width: int = 32, side: int = 28):
        super().__init__()
        self.config = dict(channels=channels, classes=classes, width=width, side=side)
        layers, inputs, blocks = [], channels, 3 if side <= 32 else 4
        for i in range(blocks):           # the last one keeps its resolution, a side of 8 or so
            outputs = width * 2 ** min(i, 2)
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                       nn.BatchNorm2d(outputs), *[nn.MaxPool2d(2)] * (i < blocks - 1),
                       nn.ReLU(inplace=True)]             # after the maximum: a quarter of the work
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.head(self.features(x - 0.5).amax((2, 3)))

def fit(model, next_batch, *, steps, generator, lr=3e-3, weight_decay=0.05, rounds=10, amp=False,
        state=None):
    """Train on `next_batch(generator, done) -> x (B,C,H,W), q (B,K)`; yield a dict a round.

    `done` in [0,1) is how much of the training is over. The loss is the cross-entropy against q,
    hard or soft. A row holds step, loss (mean of the round), images_per_second and "state": given
    back as `state`, it resumes the run exactly.
    Raises FloatingPointError, naming the steps, when the loss is not finite any more.
    """
    device, first = next(model.parameters()).device, 0
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        first = state["step"]
    ends = {math.ceil(steps * (i + 1) / rounds) for i in range(rounds)}
    for end in sorted(end for end in ends if end > first):
        model.train()                                     # the caller may have evaluated
        total, start = torch.zeros((), device=device), time.perf_counter()
        for step in range(first, end):
            for group in optimiser.param_groups:          # linear warm-up, then linearly to zero
                group["lr"] = lr * min((step + 1) / (0.15 * steps), (steps - step) / (0.85 * steps))
            x, q = next_batch(generator, step / steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), q)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
        mean = total.item() / (end - first)               # the only host synchronisation
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is not finite between steps {first} and {end}; "
                                     "lower the learning rate, or use --no-amp")
        yield {"step": end, "loss": mean,
               "images_per_second": len(x) * (end - first) / (time.perf_counter() - start),
               "state": {"step": end, "model": model.state_dict(),
                         "optimiser": optimiser.state_dict(), "generator": generator.get_state()}}
        first = end

@torch.no_grad()
def predict(model, images, amp=False, batch=200):
    """Logits float32 (N,K) of uint8 images (N,C,H,W)."""
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return torch.cat([model((chunk.float() / 255).contiguous(
            memory_format=torch.channels_last)).float() for chunk in images.split(batch)])

def batches(real, size, hybrids=None, mix=None, share=(1.0, 0.0), transforms=()):
    """next_batch(generator, done) -> x (size,C,H,W) in [0,1], q (size,K).

    `real` and `hybrids` are pairs of uint8 images (N,C,H,W) and probabilities (N,K). `share` is
    the part of a batch drawn from hybrids and given to `mix`: in the first half and in the last
    quarter, linear between. mix and the batch's `transforms` map (x, q, generator) -> (x, q).
    """
    def next_batch(generator, done):
        part = share[0] + (share[1] - share[0]) * min(max(4 * done - 2, 0), 1)
        made, parts = round(size * part) if hybrids or mix else 0, []
        for (images, q), count in ((hybrids or real, made), (real, size - made)):
            rows = torch.randint(len(images), (count,), device=q.device, generator=generator)
            parts.append((images[rows].float() / 255, q[rows]))
        if mix:
            parts[0] = mix(*parts[0], generator)
        x, q = (torch.cat(part) for part in zip(*parts))
        for transform in transforms:
            x, q = transform(x, q, generator)
        return x, q
    return next_batch

# Augmentations: (x, q, generator) -> (x, q), parameters drawn for each image by itself.

def uniform(x, low, high, generator):
    """(B,) numbers from [low, high), on the device of x."""
    return low + (high - low) * torch.rand(len(x), device=x.device, generator=generator)

def affine(x, q, generator, degrees=15.0, scale=0.15, shift=0.1, shear=0.15):
    """Rotate, stretch, shear and shift, the border continued: for grey images."""
    turn, slant = (uniform(x, -s, s, generator) for s in (math.radians(degrees), shear))
    wide, high = (uniform(x, -scale, scale, generator).exp() for _ in range(2))
    right, down = (uniform(x, -2 * shift, 2 * shift, generator) for _ in range(2))
    cos, sin = turn.cos(), turn.sin()
    rows = torch.stack([cos * wide, (slant * cos - sin) * high, right,
                        sin * wide, (slant * sin + cos) * high, down], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(rows, list(x.shape), align_corners=False),
                         padding_mode="border", align_corners=False), q

def flip_crop(x, q, generator, pad=4):
    """Mirror half of the images, shift each by up to `pad` pixels, edges reflected: for colour."""
    n, c, h, w = x.shape
    x = torch.where(uniform(x, 0, 1, generator)[:, None, None, None] < 0.5, x.flip(3), x)
    down, right = torch.randint(2 * pad + 1, (2, n), device=x.device, generator=generator)
    rows = down[:, None, None, None] + torch.arange(h, device=x.device)[:, None]
    columns = right[:, None, None, None] + torch.arange(w, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4, mode="reflect")[image, channel, rows, columns], q

def augment(x, q, generator):
    """What suits digits and the like, if grey; what suits photographs, if colour."""
    return (affine if x.shape[1] == 1 else flip_crop)(x, q, generator)

def beta(x, alpha, generator):
    """(B,) draws from Beta(alpha, alpha), by its quantiles on a logit grid: any generator."""
    grid = torch.linspace(-20 / min(alpha, 1), 20 / min(alpha, 1), 4097, device=x.device)
    mass = (min(alpha, 1e6) * (F.logsigmoid(grid) + F.logsigmoid(-grid))).softmax(0).cumsum(0)
    return grid[torch.searchsorted(mass, uniform(x, 0, 1, generator) * mass[-1])].sigmoid()

def mixup(x, q, generator, alpha=math.inf):
    """A convex combination of two images and their labels (Zhang et al. 2018); at best, halves."""
    t = beta(x, alpha, generator)[:, None]
    other, w = torch.randperm(len(x), device=x.device, generator=generator), t[..., None, None]
    return w * x + (1 - w) * x[other], t * q + (1 - t) * q[other]

def cutmix(x, q, generator, alpha=1.0):
    """A rectangle of another image pasted in, labels by area (Yun et al. 2019)."""
    n, _, h, w = x.shape
    side = (1 - beta(x, alpha, generator)).sqrt()
    rows, columns = (((torch.arange(size, device=x.device) + 0.5) / size - uniform(
        x, 0, 1, generator)[:, None]).abs() < side[:, None] / 2 for size in (h, w))
    inside = rows[:, :, None] & columns[:, None, :]
    t = 1 - inside.float().mean((1, 2))[:, None]          # what the border cut off counts as kept
    other = torch.randperm(n, device=x.device, generator=generator)
    return torch.where(inside[:, None], x[other], x), t * q + (1 - t) * q[other]

def corrupt(images, seed=0):
    """Named harder copies of uint8 images: noise of 0.15, a 3x3 blur, a shift by two pixels."""
    x, g = images.float() / 255, torch.Generator(images.device).manual_seed(seed)
    harder = {"noise": x + 0.15 * torch.randn(x.shape, device=x.device, generator=g),
              "blur": F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1),
              "shift": F.pad(x, (2, 0, 2, 0), mode="replicate")[..., :-2, :-2]}
    return {name: (v.clamp(0, 1) * 255).round().byte() for name, v in harder.items()}

# ---- what compare.py uses as well ------------------------------------------------------------
def judge(logits_of, images, y, held, held_y) -> dict:
    """Scores on images, plain, after one temperature fitted on held-out images, and made harder."""
    from latent import scores, subsample
    logits, held_logits, few = logits_of(images), logits_of(held), subsample(len(y), 2000)
    best = min(torch.logspace(-2, 4, 61, base=2).tolist(),
               key=lambda t: F.cross_entropy(held_logits / t, held_y).item())
    scaled = scores((logits / best).softmax(1), y)
    return {**scores(logits.softmax(1), y), "temperature": best,
            "scaled_nll": scaled["nll"], "scaled_ece": scaled["ece"],
            **{name: (logits_of(harder).argmax(1) == y[few]).float().mean().item()
               for name, harder in corrupt(images[few]).items()}}

# ---- command ---------------------------------------------------------------------------------
def parse_args(argv=None):
    import common
    parser = common.flags("cnn.py", __doc__)
    add = parser.add_argument_group("the classifier and its training").add_argument
    add("--images", type=common.number(int, 1), help="train on this many real images, equal "
        "numbers a class; without it on those that the VAE saw")
    add("--hybrid-fraction", type=common.number(float, 0, 1), default=[1.0, 0.0], nargs="+",
        metavar="SHARE", help="in the first half and in the last quarter, linear between; or "
        "always; 0 is the plain CNN, 1 sees no real image")
    add("--augment", action="store_true", help="random affine maps (grey), flips and shifts (RGB)")
    add("--mixup", type=common.number(float, 0, 100), default=0.0, metavar="ALPHA",
        help="mixup by Beta(ALPHA, ALPHA), best near 100, in that share; without hybrids "
        "all, then none")
    add("--cutmix", type=common.number(float, 0, 100), default=0.0, metavar="ALPHA",
        help="cutmix likewise; 0 is off")
    add("--width", type=common.number(int, 1, 1024), default=32, help="channels of the first block")
    add("--steps", type=common.number(int, 1), default=600, help="optimiser steps")
    add("--batch-size", type=common.number(int, 2), default=64, help="images a step")
    add("--lr", type=common.number(float, 0, 10), default=3e-3, help="highest learning rate")
    add("--weight-decay", type=common.number(float, 0, 10), default=0.05, help="of AdamW")
    add("--resume", action="store_true", help="go on from cnn.last.pt, if there is one that fits")
    add("--predict", type=Path, metavar="PATH", help="print the percentages of a picture, or of "
        "all pictures in a folder as CSV, and stop")
    args = parser.parse_args(argv)
    if len(args.hybrid_fraction) > 2:
        parser.error("--hybrid-fraction takes one share, or one at first and one in the end")
    return args

def draw(history, q, y, classes):
    """Training curves and the confusion matrix on test images."""
    from vae import COLOURS, figure, tidy
    fig = figure(12, 4.8)
    curve, matrix = fig.subplots(1, 2, width_ratios=[1.2, 1])
    steps = [row["step"] for row in history]
    tidy(curve, "Has it learnt enough?", "step", "accuracy on validation images, %")
    tidy(matrix, "Which classes does it confuse?", "predicted", "true (numbers: % of the row)")
    matrix.grid(False)
    curve.plot(steps, [100 * row["validation"] for row in history], "-o", ms=4, color=COLOURS[0])
    loss = curve.twinx()
    loss.plot(steps, [row["loss"] for row in history], "--s", ms=4, color=COLOURS[2])
    loss.set_ylabel("training loss, nats (dashed)")
    loss.spines[["top"]].set_visible(False)
    k = len(classes)
    counts = torch.zeros(k, k).index_put_((y, q.argmax(1)), torch.ones(len(y)), accumulate=True)
    rates = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    matrix.imshow(rates.numpy(), cmap="Greys", vmin=0, vmax=100)
    if k <= 12:
        long = max(map(len, classes)) > 3
        matrix.set_xticks(range(k), classes, rotation=45 * long, ha="right" if long else "center")
        matrix.set_yticks(range(k), classes)
        for row, column in (rates >= 0.5).nonzero().tolist():
            matrix.text(column, row, f"{rates[row, column]:.0f}", ha="center", va="center",
                        fontsize=8, color="white" if rates[row, column] > 50 else "black")
    return fig

def answer(args):
    """Print the percentages of a picture, or those of a folder's pictures as CSV."""
    import common
    from latent import ranking
    from vae import read_like
    saved = common.load(args, "cnn")
    model, classes = CNN(**saved["config"]), saved["dataset"]["classes"]
    model.load_state_dict(saved["model"])
    if not args.predict.is_dir():
        image, how = read_like(args.predict, saved["dataset"])
        print(how)
        return print(ranking(predict(model, image)[0].softmax(0), classes))
    files = sorted(f for f in args.predict.rglob("*") if f.suffix.lower() in common.IMAGE_FILES)
    common.need(files, f"{args.predict} holds no images ({' '.join(common.IMAGE_FILES)})")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", "likeliest", *classes])
    for file in files:
        image, how = read_like(file, saved["dataset"])
        print(how, file=sys.stderr)
        q = predict(model, image)[0].softmax(0)
        table.writerow([file, classes[int(q.argmax())], *(f"{p:.4f}" for p in q.tolist())])

def command(args):
    import common
    from latent import scores
    from vae import distribute, training
    device, amp = common.start(args)
    if args.predict:
        return answer(args)
    hybrid = any(args.hybrid_fraction)
    stems = [args.out / "vae.pt"] if hybrid or (args.out / "vae.pt").exists() else []
    upstream = common.load(args, "vae", device) if stems else None
    data = common.load_dataset(args, device, upstream)
    pool, validation = common.split(data)
    validation, rows = validation.to(device), upstream["rows"] if upstream else pool
    if args.images:
        rows = common.subset(data, pool, args.images, args.seed)
    x, y, classes = data.images[rows.to(device)], data.labels[rows.to(device)], len(data.classes)
    real, made, made_from = (x, F.one_hot(y, classes).float()), None, stems
    if hybrid:
        saved = common.load(args, "hybrids", device)
        made, made_from = (saved["images"], saved["q"]), [*made_from, args.out / "hybrids.pt"]
    share = args.hybrid_fraction[0], args.hybrid_fraction[-1]

    def mix(x, q, g):
        x, q = mixup(x, q, g, args.mixup) if args.mixup else (x, q)
        return cutmix(x, q, g, args.cutmix) if args.cutmix else (x, q)
    how = dict(mix=mix if args.mixup or args.cutmix else None, share=share if hybrid else (1, 0),
               transforms=[augment] * args.augment)
    torch.manual_seed(args.seed)                          # the initial weights
    model = CNN(x.shape[1], classes, args.width, max(x.shape[2:]))
    model = model.to(device, memory_format=torch.channels_last)
    net, size, generator = distribute(model, args, device)

    def say(row):
        q = predict(model, data.images[validation], amp).softmax(1)
        row["validation"] = scores(q, data.labels[validation])["accuracy"]
        return f"loss {row['loss']:.3f}  validation {row['validation']:.1%}"

    work = {"amp": amp, "device": device.type, "from": [common.fingerprint(f) for f in made_from]}
    history = training("cnn", args, data, work, lambda state: fit(
        net, batches(real, size, made, **how), steps=args.steps, lr=args.lr, generator=generator,
        weight_decay=args.weight_decay, amp=amp, state=state), say)
    if not history:
        return
    q = predict(model, data.test_images, amp).softmax(1)
    metrics = {**scores(q, data.test_labels), "history": history, "real_images": len(x)}
    common.write(args.out / "cnn.png", draw(history, q.cpu(), data.test_labels.cpu(), data.classes))
    common.save(args.out / "cnn.pt", args, data, metrics, made_from, config=model.config,
                model=model.cpu().state_dict())
    (args.out / "cnn.last.pt").unlink(missing_ok=True)
    print(f"{len(x):,} real images, {(5 * share[0] + 3 * share[1]) / 8:.0%} hybrids on average; "
          f"on {len(q):,} test:")
    print("accuracy {accuracy:.2%}  (balanced {balanced_accuracy:.2%})  NLL {nll:.3f}  "
          "ECE {ece:.3f}".format(**metrics))
    print(args.out / "cnn.png", args.out / "cnn.pt", sep="\n")

def main(argv=None) -> int:
    import common
    return common.guard(command, parse_args(argv))

if __name__ == "__main__":
    raise SystemExit(main())
