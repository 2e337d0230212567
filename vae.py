"""Train a variational autoencoder (VAE): the latent space that every other step lives in.

    python vae.py                                          # embedded glyphs -> runs/glyphs/vae.pt
    python vae.py --dataset mnist --images 1000            # learn from 1,000 images only
    python vae.py --dataset photos --image-size 48 --latent-dim 32 --steps 4000

Reads:  a data set.
Writes: vae.pt vae.json vae.png, vae.log.jsonl; vae.last.pt while it works.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# Letters: B batch, C×H×W image, D latent size.  x in [0,1]; mu, logvar, z (B,D).

class VAE(nn.Module):
    """q(z|x) = N(mu, diag(exp(logvar))), p(x|z) = Bernoulli(sigmoid(decode(z))), p(z) = N(0, I).

    Kingma and Welling 2014. Images are cut into patches first, so that convolutions run at a
    quarter of the side (an eighth above 32 pixels): on MNIST two thirds of the time that half
    the side takes, at the same ELBO after 1,000 steps (with 64 hidden channels).
    """
    def __init__(self, channels: int, height: int, width: int, latent_dim: int = 16,
                 hidden: int = 32, units: int = 400):
        super().__init__()
        self.config = dict(channels=channels, height=height, width=width,
                           latent_dim=latent_dim, hidden=hidden, units=units)
        patch = 4 if max(height, width) <= 32 else 8
        rows, cols = -(-height // patch), -(-width // patch)
        self.pad = (0, cols * patch - width, 0, rows * patch - height)      # right and bottom
        pixels, cells = channels * patch ** 2, hidden * rows * cols
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(pixels, hidden, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(cells, units), nn.ReLU(), nn.Linear(units, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, units), nn.ReLU(), nn.Linear(units, cells), nn.ReLU(),
            nn.Unflatten(1, (hidden, rows, cols)), nn.Conv2d(hidden, pixels, 3, padding=1),
            nn.PixelShuffle(patch))

    def encode(self, x):
        """x (B,C,H,W) -> mu, logvar (B,D), float32; logvar is kept within [-10, 10]."""
        mu, logvar = self.encoder(F.pad(x, self.pad)).float().chunk(2, dim=1)
        return mu, logvar.clamp(-10, 10)

    def logits(self, z):
        """z (B,D) -> logits (B,C,H,W), float32."""
        return self.decoder(z)[..., :self.config["height"], :self.config["width"]].float()

    def decode(self, z):
        """z (B,D) -> images in [0,1] (B,C,H,W), float32."""
        return self.logits(z).sigmoid()

    def forward(self, x, generator=None):
        mu, logvar = self.encode(x)
        noise = torch.randn(mu.shape, device=mu.device, generator=generator)
        return self.logits(mu + noise * (logvar / 2).exp()), mu, logvar

def elbo_terms(logits, x, mu, logvar):
    """Reconstruction (Bernoulli) and KL(q(z|x) || N(0, I)), both in nats an image, mean over B."""
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum() / len(x)
    return reconstruction, kl

def fit(model, next_batch, *, steps, generator, lr=3e-3, momentum=0.9, beta=1, rounds=10, amp=False,
        state=None):
    """Maximise the ELBO on batches `next_batch(generator) -> x (B,C,H,W)`; yield a dict a round.

    A row holds step, reconstruction, kl (nats an image, means of the round), images_per_second
    and "state": given back as `state`, it resumes the run exactly. `momentum` is Adam's beta_1.
    Raises FloatingPointError, naming the steps, when the loss is not finite any more.
    """
    device, first = next(model.parameters()).device, 0
    optimiser = torch.optim.Adam(model.parameters(), lr, betas=(momentum, 0.99), fused=True)
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        first = state["step"]
    ends = {math.ceil(steps * (i + 1) / rounds) for i in range(rounds)}
    for end in sorted(end for end in ends if end > first):
        sums, start = torch.zeros(2, device=device), time.perf_counter()
        for step in range(first, end):
            for group in optimiser.param_groups:       # linear warm-up, then linearly to zero
                group["lr"] = lr * min((step + 1) / (0.15 * steps), (steps - step) / (0.85 * steps))
            x = next_batch(generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                outputs = model(x.contiguous(memory_format=torch.channels_last), generator)
            reconstruction, kl = elbo_terms(outputs[0], x, *outputs[1:])
            optimiser.zero_grad()
            (reconstruction + beta * kl).backward()
            optimiser.step()
            sums += torch.stack([reconstruction, kl]).detach()
        means = (sums / (end - first)).tolist()        # the only host synchronisation
        if not math.isfinite(sum(means)):
            raise FloatingPointError(f"the loss is not finite between steps {first} and {end}; "
                                     "lower the learning rate, or use --no-amp")
        yield {"step": end, "reconstruction": means[0], "kl": means[1],
               "images_per_second": len(x) * (end - first) / (time.perf_counter() - start),
               "state": {"step": end, "model": model.state_dict(),
                         "optimiser": optimiser.state_dict(), "generator": generator.get_state()}}
        first = end

def batches(images, size):
    """next_batch(generator) -> x (size,C,H,W) in [0,1], drawn from uint8 images (N,C,H,W)."""
    def next_batch(generator):
        rows = torch.randint(len(images), (size,), device=images.device, generator=generator)
        return images[rows].float() / 255
    return next_batch

def as_input(images):
    """uint8 (B,C,H,W) -> float in [0,1], channels last."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)

@torch.no_grad()
def encode_all(model, images, amp=False, batch=1000):
    """mu, logvar (N,D), float32, of uint8 images (N,C,H,W)."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        parts = [model.encode(as_input(chunk)) for chunk in images.split(batch)]
    return tuple(torch.cat(part) for part in zip(*parts))

@torch.no_grad()
def decode_all(model, z, amp=False, batch=1000):
    """Images in [0,1], float32 (N,C,H,W), of points z (N,D)."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=amp):
        return torch.cat([model.decode(chunk) for chunk in z.split(batch)])

@torch.no_grad()
def evaluate(model, images, *, generator, amp=False, batch=1000):
    """Reconstruction and KL in nats an image over uint8 images, one noise draw an image."""
    sums = torch.zeros(2, device=images.device)
    for chunk in images.split(batch):
        x = as_input(chunk)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits, mu, logvar = model(x, generator)
        sums += torch.stack(elbo_terms(logits, x, mu, logvar)) * len(x)
    reconstruction, kl = (sums / len(images)).tolist()
    return {"reconstruction": reconstruction, "kl": kl, "negative_elbo": reconstruction + kl}

# ---- what the scripts after this one use as well ---------------------------------------------
class Progress:
    """What is done, and the time left: one rewriting line on a terminal, plain lines in a file."""
    def __init__(self, total, what, quiet=False, done=0, log: Path | None = None):
        self.total, self.what, self.quiet, self.log = total, what, quiet, log
        self.first, self.start = done, time.monotonic()
        if log and not done:
            log.write_text("")

    def __call__(self, done, words="", **row):
        spent = time.monotonic() - self.start
        left = spent / max(done - self.first, 1) * (self.total - done)
        when = f"{clock(left)} left" if done < self.total else f"in {clock(spent)}"
        live = sys.stderr.isatty()
        if not self.quiet:
            print("\r\x1b[K" * live + f"{self.what} {done:,}/{self.total:,}  {words}  {when}",
                  end="\n" if done >= self.total or not live else "", file=sys.stderr, flush=True)
        if self.log:                    # rates and times, which differ from run to run
            with self.log.open("a") as file:
                file.write(json.dumps({"step": done, **row}) + "\n")

def clock(seconds: float) -> str:
    """Seconds in human units.
    >>> clock(8), clock(185), clock(7800)
    ('8 s', '3:05 min', '2:10 h')"""
    minutes, s = divmod(round(seconds), 60)
    return f"{s} s" if not minutes else f"{minutes}:{s:02} min" if minutes < 60 else \
        f"{minutes // 60}:{minutes % 60:02} h"

def training(name, args, data, work, rows_from, say):
    """rows_from(state): the rows of a `fit`, resumed, reported and kept -> their history.

    say(row) adds the validation score to a row and puts it into words. Work of other settings
    than `work`, or damaged, is as good as none. The ranks that only help get an empty history.
    """
    import common
    last, state, history = args.out / f"{name}.last.pt", None, []
    code = Path(__file__).with_name(f"{name}.py")
    work = {**work, "settings": common.settings(args), "dataset": data.facts(args),
            "ranks": common.RANKS, "code": common.fingerprint(code)}
    try:
        saved = common.read(last) if args.resume and common.RANKS == 1 else {}
        if all(saved[key] == value for key, value in work.items()):
            state, history = saved["state"], saved["history"]
    except Exception:                   # zip, pickle and torch each have their own errors
        pass
    if args.resume and last.exists() and not (state or common.RANK):
        print(f"{last} does not fit these settings; starting afresh", file=sys.stderr)
    progress = Progress(args.steps, name, args.quiet, state["step"] if state else 0,
                        args.out / f"{name}.log.jsonl")
    for row in rows_from(state):
        if common.RANK:
            continue                    # the first one reports and writes
        state, rate = row.pop("state"), row.pop("images_per_second")
        progress(row["step"], f"{say(row)}  {rate:,.0f} images/s", images_per_second=rate)
        history.append(row)
        common.write(last, {**work, "state": state, "history": history})
    return history

def distribute(model, args, device):
    """On torchrun's ranks -> model that averages gradients, this rank's batch size, generator."""
    from common import RANK, RANKS, need
    need(args.batch_size % RANKS == 0, f"--batch-size is no multiple of the {RANKS} ranks")
    if RANKS > 1:
        apart = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # one each
        torch.distributed.init_process_group("nccl" if apart and device.type == "cuda" else "gloo")
        model = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator(device).manual_seed(args.seed + 10**6 * RANK)
    return model, args.batch_size // RANKS, generator

def load_vae(args, device="cpu"):
    """-> the model of OUT/vae.pt, ready to encode and decode, and all that the file holds."""
    import common
    saved = common.load(args, "vae", device)
    model = VAE(**saved["config"]).to(device, memory_format=torch.channels_last)
    model.load_state_dict(saved["model"])
    return model.eval(), saved

# Petroff (2021): colours that colour-blind people tell apart, in order of use.
COLOURS = ["#" + colour for colour in
           "3f90da ffa90e bd1f01 94a4a2 832db6 a96b59 e76300 b9ac70 717581 92dadd".split()]
MARKERS = "osD^vP*Xhd"

def figure(width=10.0, height=5.0):
    """A matplotlib Figure on its own: no pyplot, no display."""
    import matplotlib.figure
    matplotlib.rcParams["text.parse_math"] = False          # "$5" is a class, not a formula
    return matplotlib.figure.Figure((width, height), layout="constrained", dpi=130)

def tidy(axes, title, x=None, y=None):
    """One look for all axes: title at the left, no box, a light grid."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)

def picture(axes, images, columns=1, caption=""):
    """Images (N,C,H,W), uint8 or in [0,1], side by side with a white pixel between."""
    images = images.cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(rows * columns, c, h + 1, w + 1)
    sheet[:n, :, :h, :w] = images
    sheet = sheet.view(rows, columns, c, h + 1, w + 1).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (h + 1), columns * (w + 1), c)[:-1, :-1].clamp(0, 1)
    axes.imshow(sheet.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=7.5, labelpad=3)
    axes.spines[:].set_visible(False)

def read_like(path, facts):
    """A picture at a data set's side, channels and polarity -> uint8 (1,C,H,W), what was done."""
    from common import read_image, resize
    channels, height, width = facts["shape"]
    array = torch.from_numpy(read_image(path, max(height, width), channels == 1).copy())[None]
    array = resize(array, (height, width)) if height != width else array
    light = array[..., [0, -1], :].float().mean().item() > 127
    flip = channels == 1 and abs(light - facts["light"]) > 0.95     # ink on paper, or chalk
    return 255 - array if flip else array, f"{path}: {'grey' if channels == 1 else 'RGB'}, " \
        f"{height}x{width}" + ", inverted to the data set's background" * flip

# ---- command ---------------------------------------------------------------------------------
def parse_args(argv=None):
    import common
    parser = common.flags("vae.py", __doc__)
    add = parser.add_argument_group("the model and its training").add_argument
    add("--images", type=common.number(int, 1), help="learn from this many images of the training "
        "set, equal numbers a class; without it from all, less the validation tenth")
    add("--latent-dim", type=common.number(int, 1, 512), default=16, help="latent size D")
    add("--beta", type=common.number(float, 0, 1000), default=1.0, help="weight of the KL term")
    add("--steps", type=common.number(int, 1), default=1500, help="optimiser steps")
    add("--batch-size", type=common.number(int, 1), default=128, help="images a step")
    add("--lr", type=common.number(float, 0, 10), default=3e-3, help="highest learning rate")
    add("--resume", action="store_true", help="go on from vae.last.pt, if there is one that fits")
    return parser.parse_args(argv)

def draw(history, model, data, amp, generator):
    """The curve, reconstructions of test images, samples from the prior."""
    fig = figure(13, 4.2)
    curve, recon, prior = fig.subplots(1, 3, width_ratios=[1.25, 1, 1])
    steps = [row["step"] for row in history]
    tidy(curve, "Is it still learning?", "step", "negative ELBO, nats an image")
    curve.plot(steps, [row["reconstruction"] + row["kl"] for row in history], "-o", ms=4,
               color=COLOURS[0], label="training batches")
    curve.plot(steps, [row["validation"] for row in history], "--s", ms=4,
               color=COLOURS[2], label="validation images")
    curve.legend(frameon=False)
    x = data.test_images[torch.linspace(0, len(data.test_images) - 1, 32).long()]
    made = decode_all(model, encode_all(model, x, amp)[0], amp)
    pairs = torch.stack([v.unflatten(0, (4, 8)) for v in (x / 255, made)], 1).flatten(0, 2)
    tidy(recon, "What does the code keep?")
    picture(recon, pairs, 8, "rows in turn: a test image, its reconstruction")
    tidy(prior, "What does it imagine?")
    z = torch.randn(64, model.config["latent_dim"], device=x.device, generator=generator)
    picture(prior, decode_all(model, z, amp), 8, "decoded points from N(0, I)")
    return fig

def command(args):
    import common
    device, amp = common.start(args)
    data = common.load_dataset(args, device)
    pool, validation = common.split(data)
    rows = pool if args.images is None else common.subset(data, pool, args.images, args.seed)
    images, held_out = data.images[rows.to(device)], data.images[validation.to(device)]
    torch.manual_seed(args.seed)                       # the initial weights
    model = VAE(*data.images.shape[1:], latent_dim=args.latent_dim)
    model = model.to(device, memory_format=torch.channels_last)
    net, size, generator = distribute(model, args, device)

    def score(part):
        fresh = torch.Generator(device).manual_seed(args.seed + 1)
        some = torch.linspace(0, len(part) - 1, min(len(part), 10_000)).long()
        return evaluate(model, part[some.to(device)], generator=fresh, amp=amp)

    def say(row):
        row["validation"] = score(held_out)["negative_elbo"]
        return f"negative ELBO {row['reconstruction'] + row['kl']:.1f} nats " \
            f"({row['validation']:.1f} on validation)"

    history = training("vae", args, data, {"amp": amp, "device": device.type}, lambda state: fit(
        net, batches(images, size), steps=args.steps, lr=args.lr, beta=args.beta, amp=amp,
        generator=generator, state=state), say)
    if not history:
        return
    metrics = {"train": score(images), "test": score(data.test_images), "history": history}
    common.write(args.out / "vae.png", draw(history, model, data, amp, generator))
    common.save(args.out / "vae.pt", args, data, metrics, config=model.config, rows=rows,
                model=model.cpu().state_dict())
    (args.out / "vae.last.pt").unlink(missing_ok=True)
    for part in ("train", "test"):
        m = metrics[part]
        print(f"{part:>5}: {m['reconstruction']:.1f} reconstruction + {m['kl']:.1f} KL = "
              f"{m['negative_elbo']:.1f} nats an image (negative ELBO)")
    if metrics["test"]["kl"] < 0.1:
        print("the latent space has collapsed: KL below 0.1 nats; lower --beta, or train longer")
    print(args.out / "vae.png", args.out / "vae.pt", sep="\n")

def main(argv=None) -> int:
    import common
    return common.guard(command, parse_args(argv))

if __name__ == "__main__":
    raise SystemExit(main())
