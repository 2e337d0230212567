"""Train an image classifier on probabilities: real images, hybrids, or both.

    python cnn.py                                    # hybrids at first, real images in the end
    python cnn.py -o runs/mnist --hybrid-fraction 0    # the plain CNN: real images only
    python cnn.py -o runs/mnist --hybrid-fraction 0 --deform   # learned augmentation, no VAE
    python cnn.py -o runs/mnist --predict photo.png    # percentages; of a folder, as CSV

Reads:  a data set; for hybrids vae.pt and hybrids.pt; deform.pt, where images move.
Writes: cnn.pt cnn.json cnn.png, cnn.log.jsonl; cnn.last.pt while it is unfinished.
"""
import copy
import csv
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Letters: B batch, C×H×W image, F features, K classes.  x (B,C,H,W) in [0,1], or features
# (B,F); q (B,K) probabilities.
GIVEN = 1 / 8                           # of a batch's real images, where labels are spread
GIVEN_FEATURES = 1 / 2
MOMENTUM = 0.1                          # of running means, as in BatchNorm
STEPS = {100: 300, 300: 400, 1000: 800, 3000: 1600}     # up to so many images; then 2400


class NormalisedConvolution(nn.Module):
    """A 3x3 convolution with its batch normalisation, for the first layer.

    The response w.p to a patch p has mean w.m and variance w'Cw, where m and C are the mean
    and the covariance of the patches. So the weights can be scaled in place of the responses:
    at the full side of the image these are what costs most. m and C are of every second patch
    each way; their running means take their place in prediction.
    """

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        weight = nn.Conv2d(channels, outputs, 3, bias=False).weight.detach()
        self.weight = nn.Parameter(weight.permute(0, 2, 3, 1).flatten(1))      # (outputs,9C)
        self.gain = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("running_mean", torch.zeros(9 * channels))
        self.register_buffer("running_covariance", torch.eye(9 * channels))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):      # moments want float32
            if self.training:
                mean, covariance = self.moments(x.float())
            else:
                mean = self.running_mean
                covariance = self.running_covariance
            variance = ((self.weight @ covariance) * self.weight).sum(1)
            scale = self.gain * (variance + 1e-5).rsqrt()
            weight = self.weight * scale[:, None]
            bias = self.bias - weight @ mean
        # In memory the channels come last, as they do in images: else all is copied.
        kernel = weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, bias, padding=1)

    @torch.no_grad()
    def moments(self, x):
        """Mean (9C,) and covariance (9C,9C) of the patches of x (B,C,H,W)."""
        patches = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (-1, 9))     # (B,C,9,L)
        patches = patches.permute(2, 1, 0, 3).flatten(2).flatten(0, 1)          # (9C,B L)
        mean = patches.mean(1)
        centred = patches - mean[:, None]
        covariance = centred @ centred.T / patches.shape[1]
        self.running_mean.lerp_(mean, MOMENTUM)
        self.running_covariance.lerp_(covariance, MOMENTUM)
        return mean, covariance


class CNN(nn.Module):
    """Convolution blocks that halve the side, then a maximum; `width` channels in the first.

    The largest value of each feature over the image, not the mean: with 100 MNIST images 83.8%
    against 75.2% (validation, 6 subsets, an earlier network). x (B,C,H,W) in [0,1] ->
    logits (B,K).
    """

    def __init__(self, channels: int, classes: int, width: int = 24, side: int = 28):
        super().__init__()
        self.config = dict(channels=channels, classes=classes, width=width, side=side)
        widths = [2 * width, 8 * width]
        pad = 0                         # the first layer has seen the border: fewer places
        if side > 32:
            widths.append(8 * width)
            pad = 1
        layers = [NormalisedConvolution(channels, width)]
        inputs = width
        for outputs in widths:
            layers.append(nn.MaxPool2d(2))
            layers.append(nn.ReLU())                    # after the maximum: fewer pixels
            # Without a bias: the normalisation has one.
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=pad, bias=False))
            layers.append(nn.BatchNorm2d(outputs))
            inputs = outputs
        layers.append(nn.ReLU())                        # not halved: 4 x 4 of 28 x 28 pixels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)
        self.to(memory_format=torch.channels_last)      # a third faster, in float32 too

    def forward(self, x):
        # Grey in the middle is 0, as what is padded is.
        x = (x - 0.5).contiguous(memory_format=torch.channels_last)
        return self.head(self.features(x).amax((2, 3)))


class LinearClassifier(nn.Module):
    """Logistic regression: features (B,F) -> logits (B,K); `l2` holds its weights back."""

    def __init__(self, features: int, classes: int, l2: float = 0.03):
        super().__init__()
        self.config = dict(features=features, classes=classes, l2=l2)
        self.head = nn.Linear(features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(x)


def penalty(model):
    """What the weights of a model cost, beside the loss, in nats."""
    l2 = model.config.get("l2", 0)
    return l2 / 2 * model.head.weight.square().sum() if l2 else 0


def restore(saved: dict, device="cpu"):
    """The model of a loaded cnn.pt, ready to predict."""
    kind = LinearClassifier if "features" in saved["config"] else CNN
    model = kind(**saved["config"]).to(device)
    model.load_state_dict(saved["model"])
    return model.eval()


def steps_for(images, n=None, unlabelled: int = 0) -> int:
    """Optimiser steps that n labelled images like these are worth, twice as many in colour.

    Others without a label count as well, up to 1,000 images.
    """
    n = n or len(images)
    n = max(n, min(n + unlabelled, 1000))
    steps = min([STEPS[size] for size in STEPS if n <= size], default=2400)
    if images.dim() == 2:               # one layer has learnt enough by then
        return min(steps, 800)
    return 2 * steps if images.shape[1] == 3 else steps


def train(images, q, seed=0, *, made=None, pseudo_labelled=None, move=None, mix=None,
          share=(1.0, 0.0), augmentations=(), width=24, steps=None, batch_size=64, lr=3e-3,
          weight_decay=0.05, rounds=10, amp=False, state=None):
    """A classifier of labelled images, q (N,K) -> the model, and the rows of its training.

    See `batches` for what it sees. Nothing is trained before the rows are asked for: `for row
    in rows`, see `fit`.
    """
    torch.manual_seed(seed)             # the initial weights
    channels, *sides = images.shape[1:]
    if sides:
        model = CNN(channels, q.shape[1], width, max(sides)).to(images.device)
    else:                               # features, not channels
        model = LinearClassifier(channels, q.shape[1]).to(images.device)
    generator = torch.Generator(images.device).manual_seed(seed)
    next_batch = batches((images, q), batch_size, made, mix, share, augmentations, move,
                         pseudo_labelled)
    rows = fit(model, next_batch, steps=steps or steps_for(images), lr=lr,
               weight_decay=weight_decay, rounds=rounds, amp=amp, generator=generator,
               state=state)
    return model, rows


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over 15% of the steps, then linearly to zero."""
    up = (step + 1) / (0.15 * steps)
    down = (steps - step) / (0.85 * steps)
    return highest * min(up, down)


def fit(model, next_batch, *, steps, generator, lr=3e-3, weight_decay=0.05, rounds=10,
        amp=False, state=None):
    """Train on `next_batch(generator, done) -> x (B,C,H,W), q (B,K)`; yield a dict per round.

    `done` in [0,1) is how much of the training is over. The loss is the cross-entropy against
    q, hard or soft. A row holds step, loss (mean of the round), images_per_second and "state":
    given back as `state`, it resumes the run exactly.
    Raises FloatingPointError, naming the steps, when the loss is not finite any more.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay,
                                  fused=True)
    first = 0
    if state:
        model.load_state_dict(state["model"])
        # A copy: it would go on in the caller's tensors.
        optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        generator.set_state(state["generator"])
        first = state["step"]
    for i in range(rounds):
        end = math.ceil(steps * (i + 1) / rounds)
        if end <= first:
            continue
        model.train()                   # the caller may have evaluated
        total = torch.zeros((), device=device)
        start = time.perf_counter()
        for step in range(first, end):
            optimiser.param_groups[0]["lr"] = learning_rate(step, steps, lr)
            x, q = next_batch(generator, step / steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), q) + penalty(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
        mean = total.item() / (end - first)             # the only host synchronisation
        seconds = time.perf_counter() - start
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is not finite between steps {first} and "
                                     f"{end}; lower the learning rate, or use --no-amp")
        yield {"step": end, "loss": mean,
               "images_per_second": len(x) * (end - first) / seconds,
               "state": copy.deepcopy({"step": end, "model": model.state_dict(),
                                       "optimiser": optimiser.state_dict(),
                                       "generator": generator.get_state()})}
        first = end


@torch.no_grad()
def predict(model, images, amp=False, batch=200):
    """Logits float32 (N,K) of images (N,C,H,W), uint8 or in [0,1], or of features (N,F)."""
    training = model.training
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = torch.cat([model(as_input(part)) for part in images.split(batch)])
    model.train(training)               # as it was: a training loop may be around this
    return logits.float()


def as_input(images):
    """uint8 or floats in [0,1] (B,C,H,W) -> float32 in [0,1], channels last.

    Features (B,F) -> float32. Raises ValueError for other ranges and shapes.
    """
    x = images.float()
    if x.dim() == 2:
        return x
    if x.dim() != 4:
        raise ValueError(f"images of shape {tuple(x.shape)}; wanted (B,C,H,W)")
    if images.dtype == torch.uint8:
        x = x / 255
    elif len(x):                        # a batch may hold none of a kind
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):                # NaN fails, too
            raise ValueError(f"images span {low:g} to {high:g}; wanted floats in [0, 1], "
                             "or uint8")
    return x.contiguous(memory_format=torch.channels_last)


def batches(real, size, hybrids=None, mix=None, share=(1.0, 0.0), augmentations=(), move=None,
            pseudo_labelled=None):
    """next_batch(generator, done) -> x (size,C,H,W) in [0,1], q (size,K).

    `real`, `hybrids` and `pseudo_labelled` are pairs of images (N,C,H,W), as `as_input`
    accepts, and probabilities (N,K). `share` is the part of a batch drawn from hybrids and
    given to `mix`, see `share_at`; the others pass through `move`. It, mix and the
    `augmentations` of the whole batch map (x, q, generator) -> (x, q). Pseudo-labelled are
    real images whose labels are guesses: of what is drawn from real images a part `GIVEN` are
    of those with a given label (of features half), or more, if there are more.
    """
    def next_batch(generator, done):
        count = 0
        if hybrids or mix:
            count = round(size * share_at(done, share))
        # Without hybrids, what is mixed are real images.
        if hybrids:
            x, q = take(hybrids, count, generator)
        else:
            x, q = take_real(real, pseudo_labelled, count, generator)
        real_x, real_q = take_real(real, pseudo_labelled, size - count, generator)
        if mix:
            x, q = mix(x, q, generator)
        if move:
            real_x, real_q = move(real_x, real_q, generator)
        x = torch.cat([x, real_x])
        q = torch.cat([q, real_q])
        for augmentation in augmentations:
            x, q = augmentation(x, q, generator)
        return x, q

    return next_batch


def take(source, count, generator):
    """`count` images of a source, drawn at random, and their probabilities."""
    images, q = source
    rows = torch.randint(len(images), (count,), device=q.device, generator=generator)
    return as_input(images[rows]), q[rows]


def take_real(real, pseudo_labelled, count, generator):
    """`count` real images; where labels were spread, some of each kind."""
    if not pseudo_labelled:
        return take(real, count, generator)
    images, q = real
    part = len(q) / (len(q) + len(pseudo_labelled[1]))
    least = GIVEN_FEATURES if images.dim() == 2 else GIVEN
    given = round(max(least, part) * count)
    x, q = take(real, given, generator)
    guessed_x, guessed_q = take(pseudo_labelled, count - given, generator)
    return torch.cat([x, guessed_x]), torch.cat([q, guessed_q])


def share_at(done: float, share) -> float:
    """share = (at first, in the end): the first half, the last quarter, and linear between."""
    first, last = share
    over = min(max(4 * done - 2, 0), 1)
    return first + (last - first) * over


# ---- augmentations: (x, q, generator) -> (x, q), parameters drawn for each image by itself --

def uniform(x, generator):
    """(B,) numbers from [0, 1), on the device of x."""
    return torch.rand(len(x), device=x.device, generator=generator)


def affine(x, q, generator, degrees=15.0, scale=0.15, shift=0.1, shear=0.15, bend=0.0):
    """Rotate, stretch, shear and shift, the border continued: for grey images.

    `bend`, in pixels: the deviation of smooth random displacements (Simard et al. 2003).
    """
    def up_to(limit):
        return 2 * limit * uniform(x, generator) - limit

    turn = up_to(math.radians(degrees))
    slant = up_to(shear)
    wide = up_to(scale).exp()
    high = up_to(scale).exp()
    right = up_to(2 * shift)            # the image is 2 units wide
    down = up_to(2 * shift)
    cos, sin = turn.cos(), turn.sin()
    # From the pixels of the result to those of x, as affine_grid wants it: both sides are 2
    # units long, so that an angle needs their true ratio.
    height, width = x.shape[2:]
    tall = height / width
    rows = torch.stack([cos * wide, (slant * cos - sin) * high * tall, right,
                        sin * wide / tall, (slant * sin + cos) * high, down], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    if bend:
        nodes = torch.randn(len(x), 2, 5, 5, device=x.device, generator=generator)
        wave = F.interpolate(nodes, (height, width), mode="bicubic", align_corners=True)
        sides = torch.tensor([width, height], device=x.device)
        grid = grid + wave.permute(0, 2, 3, 1) * 2 * bend / sides
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False), q


def flip_crop(x, q, generator, pad=4):
    """Mirror half of them, shift each by up to `pad` pixels, edges reflected: for colour."""
    size = 2 * pad + 1
    mirrored = uniform(x, generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(size, (2, len(x)), device=x.device, generator=generator)
    # A view of all shifts (B,C,size,size,H,W), and one shift of each image copied from it.
    height, width = x.shape[2:]
    padded = F.pad(x, [pad] * 4, mode="reflect")
    shifts = padded.unfold(2, height, 1).unfold(3, width, 1)
    return shifts[torch.arange(len(x), device=x.device), :, down, right], q


def augment(x, q, generator, **limits):
    """What suits digits and the like, if grey; what suits photographs, if colour."""
    if x.shape[1] == 3:
        return flip_crop(x, q, generator)
    return affine(x, q, generator, **limits)


def elastic(x, q, generator):
    """As `augment`, but grey images bend, too: the best of 20 settings on MNIST and glyphs."""
    return augment(x, q, generator, degrees=0.75 * 15, scale=0.75 * 0.15, shift=0.75 * 0.1,
                   shear=0.75 * 0.15, bend=1.5)


def random_beta(x, alpha, generator):
    """(B,) draws from Beta(alpha, alpha), by its quantiles on a logit grid: any generator."""
    reach = 20 / min(alpha, 1)          # a small alpha has its mass far out
    grid = torch.linspace(-reach, reach, 4097, device=x.device)
    log_density = min(alpha, 1e6) * (F.logsigmoid(grid) + F.logsigmoid(-grid))
    mass = log_density.softmax(0).cumsum(0)
    place = torch.searchsorted(mass, uniform(x, generator) * mass[-1])
    return grid[place].sigmoid()


def mixup(x, q, generator, alpha=math.inf):
    """A convex combination of two images and their labels (Zhang et al. 2018), or halves."""
    t = random_beta(x, alpha, generator)[:, None]
    other = torch.randperm(len(x), device=x.device, generator=generator)
    w = t.view(-1, *[1] * (x.dim() - 1))
    return w * x + (1 - w) * x[other], t * q + (1 - t) * q[other]


def cutmix(x, q, generator, alpha=1.0):
    """A rectangle of another image pasted in, labels by area (Yun et al. 2019)."""
    side = (1 - random_beta(x, alpha, generator)).sqrt()
    rows = covered(x.shape[2], uniform(x, generator), side)
    columns = covered(x.shape[3], uniform(x, generator), side)
    inside = rows[:, :, None] & columns[:, None, :]
    t = 1 - inside.float().mean((1, 2))[:, None]       # what the border cut off counts as kept
    other = torch.randperm(len(x), device=x.device, generator=generator)
    return torch.where(inside[:, None], x[other], x), t * q + (1 - t) * q[other]


def covered(size, centre, side):
    """(B,size) bool: pixels within side / 2 of a centre (B,); both in parts of the image."""
    pixel = (torch.arange(size, device=centre.device) + 0.5) / size
    return (pixel - centre[:, None]).abs() < side[:, None] / 2


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags, number
    parser = flags("cnn.py", __doc__)
    add = parser.add_argument_group("the classifier and its training").add_argument
    add("--hybrid-fraction", type=number(float, 0, 1), default=[1.0, 0.0], nargs="+",
        metavar="SHARE", help="share of hybrids in a batch: one number, or one for the first "
        "half of the training and one for its last quarter, linear between; 0 is the plain "
        "CNN, 1 sees no real image")
    add("--augment", action="store_true",
        help="change images at random: affine maps if grey, mirroring and shifts if colour")
    add("--deform", action="store_true",
        help="move all images at random, as deform.py has learned that they move")
    add("--width", type=number(int, 1, 1024), default=24,
        help="number of channels of the first block")
    add("--steps", type=number(int, 1),
        help="number of optimiser steps; if not given, 300 to 4800 by the number of images")
    add("--batch-size", type=number(int, 2), default=64, help="images per step")
    add("--lr", type=number(float, 0, 10), default=3e-3, help="highest learning rate")
    add("--weight-decay", type=number(float, 0, 10), default=0.05,
        help="weight decay of AdamW")
    add("--resume", action="store_true",
        help="go on from cnn.last.pt, if there is one that fits")
    add("--predict", type=Path, metavar="PATH",
        help="print the percentages of a picture, or of all pictures in a folder as CSV, "
        "and stop")
    args = parser.parse_args(argv)
    args.writes = args.predict is None
    if len(args.hybrid_fraction) > 2:
        parser.error("--hybrid-fraction takes one share, or one at first and one in the end")
    return args


def draw(history, q, y, classes):
    """Training curves and the confusion matrix on test images."""
    import common
    fig = common.figure(12, 4.8)
    curve, matrix = fig.subplots(1, 2, width_ratios=[1.2, 1])
    common.tidy(curve, "Has it learnt enough?", "step", "accuracy on validation images, %")
    steps = [row["step"] for row in history]
    if "validation" in history[0]:
        curve.plot(steps, [100 * row["validation"] for row in history], "-o",
                   color=common.COLOURS[0])
    loss = curve.twinx()
    loss.plot(steps, [row["loss"] for row in history], "--s", color=common.COLOURS[2])
    loss.set_ylabel("training loss, nats (dashed)")
    draw_confusion(matrix, q, y, classes)
    return fig


def draw_confusion(axes, q, y, classes):
    """How often an image of one class (rows) is taken for another (columns), in %."""
    import common
    k = len(classes)
    pairs = k * y + q.argmax(1)         # each pair of true and predicted class has a number
    counts = pairs.bincount(minlength=k * k).view(k, k)
    rates = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    common.tidy(axes, "Which classes does it confuse?", "predicted",
                "true (numbers: % of the row)")
    axes.grid(False)
    axes.imshow(rates.numpy(), cmap="Greys", vmin=0, vmax=100)
    if k > 12:                          # numbers and names would not be readable
        return
    axes.set_xticks(range(k), classes, rotation=45, ha="right")
    axes.set_yticks(range(k), classes)
    for row, column in (rates >= 0.5).nonzero().tolist():
        rate = rates[row, column]
        axes.text(column, row, f"{rate:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if rate > 50 else "black")


def answer(run, path):
    """Print the percentages of a picture, or those of a folder's pictures as CSV."""
    import common
    saved = common.load(run, "cnn")
    model = restore(saved)
    classes = saved["dataset"]["classes"]
    read = common.reader(run, saved, saved.get("mean"), saved.get("scale"))
    if not path.is_dir():
        image, report = read(path)
        q, = predict(model, image).softmax(1)
        print(report, common.ranking(q, classes), sep="\n")
        return
    files = common.pictures_in(path)
    common.require(files, f"{path} holds no images ({' '.join(common.IMAGE_FILES)})")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(common.columns(["file", "likeliest"], classes))
    failed = 0
    for file in files:
        try:
            image, report = read(file)
        except common.Mistake as error:
            failed += 1
            common.say(error)
            continue
        common.say(report)
        q, = predict(model, image).softmax(1)
        numbers = [f"{p:.4f}" for p in q.tolist()]
        table.writerow([common.readable(str(file)), classes[q.argmax()], *numbers])
    common.require(not failed, f"{failed} of {len(files)} pictures cannot be read")


def with_hybrids(run, inputs) -> dict:
    """What `train` is given besides labelled images."""
    import common
    from deform import Deformations
    made = common.load(run, "hybrids", run.device)
    given = {"made": (made.get("features", made["images"]), made["q"])}
    if made["settings"]["deform"]:
        saved = common.load(run, "deform", run.device)
        given["move"] = Deformations.restore(saved).gently
    if len(made["pseudo_rows"]):
        given["pseudo_labelled"] = (inputs[made["pseudo_rows"]], made["pseudo_labels"])
    return given


def command(run, args):
    import common
    from deform import Deformations
    if args.predict:
        return answer(run, args.predict)
    share = (args.hybrid_fraction[0], args.hybrid_fraction[-1])
    if any(share):
        common.load(run, "vae")         # or a line that says how to make it
    data = common.load_dataset(run)
    for_images = {"augment", "deform", "width"} & run.changed.keys()
    common.require(data.features is None or not for_images, "features do not move, nor have "
                   f"they channels; leave out --{' and --'.join(sorted(for_images))}")
    rows = common.training_rows(data, run)
    labelled = rows[data.labels[rows] >= 0]
    inputs = common.Inputs(data, rows)
    images = inputs[labelled]           # or features
    q = F.one_hot(data.labels[labelled], len(data.classes)).float()
    steps = args.steps or steps_for(images, unlabelled=len(rows) - len(labelled))
    given = {}
    sources = []                        # the files that the result depends on
    if any(share):
        given = with_hybrids(run, inputs)
        sources.append(run.out / "hybrids.pt")
    augmentations = [augment] if args.augment else []
    if args.deform:
        saved = common.load(run, "deform", run.device)
        augmentations.append(Deformations.restore(saved))
        sources.append(run.out / "deform.pt")

    marks = [common.fingerprint(source) for source in sources]
    last = common.Checkpoint(run, "cnn", data, steps, args.resume, made_from=marks)
    model, training = train(
        images, q, run.seed, **given, share=share, augmentations=augmentations,
        width=args.width, steps=steps, batch_size=args.batch_size, lr=args.lr,
        weight_decay=args.weight_decay, amp=run.amp, state=last.state)
    validation = inputs[data.validation]
    for row in training:
        words = f"loss {row['loss']:.3f}"
        if len(validation):
            q = predict(model, validation, run.amp).softmax(1)
            scores = common.scores(q, data.labels[data.validation])
            row["validation"] = scores["accuracy"]
            words += f"  validation {row['validation']:.1%}"
        last.keep(row, words)

    q = predict(model, inputs.test(), run.amp).softmax(1)
    _, guessed = given.get("pseudo_labelled", ([], []))
    metrics = {**common.scores(q, data.test_labels), "history": last.history,
               "real_images": len(labelled), "pseudo_labelled": len(guessed)}
    picture = draw(last.history, q.cpu(), data.test_labels.cpu(),
                   common.legible(data.classes))
    common.write(run.out / "cnn.png", picture)
    common.save(run.out / "cnn.pt", run, data, metrics, sources, config=model.config,
                model=model.cpu().state_dict(), **inputs.normal)
    print("{real_images:,} images with a label, {pseudo_labelled:,} with one that was spread\n"
          "accuracy {accuracy:.2%}  (balanced {balanced_accuracy:.2%})  NLL {nll:.3f}  "
          "ECE {ece:.3f}".format(**metrics))
    print(run.out / "cnn.png", run.out / "cnn.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
