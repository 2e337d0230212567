"""Train a variational autoencoder (VAE): the latent space that every other step lives in.

    python vae.py                                       # embedded glyphs -> runs/glyphs/vae.pt
    python vae.py --dataset mnist --images 1000            # learn from 1,000 images only
    python vae.py --dataset mnist --labels 100             # the others without their label
    python vae.py --dataset photos --image-size 48 --latent-dim 32 --steps 4000

Reads:  a data set; deform.pt, if it is there, says which.
Writes: vae.pt vae.json vae.png, vae.log.jsonl; vae.last.pt while it is unfinished.
"""
import copy
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

# Letters: B batch, C×H×W image, F features, D latent size.  x (B,C,H,W) in [0,1], or
# features (B,F); mu, logvar, z (B,D).
LOG_2PI = math.log(2 * math.pi)
DIRECTIONS = 128                        # most principal directions of features


class VAE(nn.Module):
    """q(z|x) = N(mu, diag(exp(logvar))), p(x|z) = Bernoulli(decode(z)), p(z) = N(0, I).

    Kingma and Welling 2014. Images are cut into patches first, so that convolutions run at a
    quarter of the side (an eighth above 32 pixels): on MNIST two thirds of the time that half
    the side takes, at the same ELBO after 1,000 steps (with 64 hidden channels).
    """

    def __init__(self, channels: int, height: int, width: int, latent_dim: int = 16,
                 hidden: int = 32, units: int = 400):
        super().__init__()
        self.config = dict(channels=channels, height=height, width=width,
                           latent_dim=latent_dim, hidden=hidden, units=units)
        # 8 x 8 patches of an image of 32 or of 64 pixels: the layers between are the same.
        patch = 4 if max(height, width) <= 32 else 8
        rows = math.ceil(height / patch)
        columns = math.ceil(width / patch)
        self.pad = (0, columns * patch - width, 0, rows * patch - height)   # right and bottom
        pixels = channels * patch ** 2
        cells = hidden * rows * columns
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch),                                   # (pixels,rows,columns)
            nn.Conv2d(pixels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(cells, units),
            nn.ReLU(),
            nn.Linear(units, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, units),
            nn.ReLU(),
            nn.Linear(units, cells),
            nn.ReLU(),
            nn.Unflatten(1, (hidden, rows, columns)),
            nn.Conv2d(hidden, pixels, 3, padding=1),
            nn.PixelShuffle(patch))
        self.to(memory_format=torch.channels_last)      # a third faster, in float32 too

    def encode(self, x):
        """x (B,C,H,W) -> mu, logvar (B,D), float32; logvar is kept within [-10, 10]."""
        return halves(self.encoder(F.pad(x, self.pad)))

    def logits(self, z):
        """z (B,D) -> logits (B,C,H,W), float32."""
        height = self.config["height"]
        width = self.config["width"]
        return self.decoder(z)[..., :height, :width].float()

    def decode(self, z):
        """z (B,D) -> images in [0,1] (B,C,H,W), float32."""
        return self.logits(z).sigmoid()

    def forward(self, x, generator=None):
        """x (B,C,H,W) -> reconstruction, by one draw from q(z|x), and KL(q(z|x) || N(0, I)):
        the two terms of the negative ELBO, nats per image, means over B.
        """
        mu, logvar = self.encode(x)
        logits = self.logits(draw_code(mu, logvar, generator))
        # A sum over the pixels, not a mean: only so do its nats weigh against those of the KL.
        nats = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return nats / len(x), divergence(mu, logvar)


class FeatureVAE(nn.Module):
    """The same of features (B,F): p(x|z) = N(decode(z), v I) in their principal directions.

    The features are centred, the numbers of about unit variance; v is learned.
    """

    def __init__(self, features: int, directions: int, latent_dim: int = 16, units: int = 256):
        super().__init__()
        self.config = dict(features=features, directions=directions, latent_dim=latent_dim,
                           units=units)
        self.register_buffer("axes", torch.zeros(features, directions))
        self.encoder = nn.Sequential(nn.Linear(directions, units), nn.ReLU(),
                                     nn.Linear(units, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, units), nn.ReLU(),
                                     nn.Linear(units, directions))
        self.log_variance = nn.Parameter(torch.zeros(()))

    @classmethod
    def of(cls, x, latent_dim: int = 16):
        """A model of features x (N,F), its directions theirs, the widest first."""
        count = min(DIRECTIONS, x.shape[1], max(len(x) - 1, 1))
        some = x[::math.ceil(len(x) / 20_000)]          # they may be sorted by class
        if len(some) < x.shape[1]:      # the smaller product has the same eigenvectors
            values, left = torch.linalg.eigh(some @ some.T)
            rank = int((values > 1e-6 * values[-1]).sum())      # less, where some are twice
            count = min(count, max(rank, 1))
            axes = some.T @ left[:, -count:]
            axes = axes / axes.norm(dim=0).clamp(min=1e-12)
        else:
            axes = torch.linalg.eigh(some.T @ some)[1][:, -count:]
        model = cls(x.shape[1], count, latent_dim)
        model.axes.copy_(axes.flip(1))
        return model

    def project(self, x):
        """x (B,F) -> its parts along the principal directions (B,P)."""
        return x @ self.axes

    def encode(self, x):
        """x (B,F) -> mu, logvar (B,D), float32; logvar is kept within [-10, 10]."""
        return halves(self.encoder(self.project(x)))

    def decode(self, z):
        """z (B,D) -> features (B,F), float32."""
        return self.decoder(z).float() @ self.axes.T

    def forward(self, x, generator=None):
        """x (B,F) -> reconstruction and KL as of VAE; nats per row."""
        mu, logvar = self.encode(x)
        mean = self.decoder(draw_code(mu, logvar, generator)).float()
        square = (self.project(x) - mean).square()
        log_variance = self.log_variance.clamp(min=-6)  # few rows could be learnt by heart
        nats = 0.5 * (square / log_variance.exp() + log_variance + LOG_2PI)
        return nats.sum() / len(x), divergence(mu, logvar)


def halves(code):
    """What an encoder makes of x (B,2D) -> mu, logvar (B,D)."""
    mu, logvar = code.float().chunk(2, dim=1)
    return mu, logvar.clamp(-10, 10)                    # exp overflows in a bad first step


def restore(saved: dict, device="cpu"):
    """The model of a loaded vae.pt, ready to encode and decode."""
    kind = FeatureVAE if "features" in saved["config"] else VAE
    model = kind(**saved["config"]).to(device)
    model.load_state_dict(saved["model"])
    return model.eval()


def draw_code(mu, logvar, generator):
    """z (B,D) from q(z|x), such that mu and logvar get gradients."""
    noise = torch.randn(mu.shape, device=mu.device, generator=generator)
    return mu + noise * (logvar / 2).exp()


def divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, the mean over B."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum() / len(mu)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over 15% of the steps, then linearly to zero."""
    up = (step + 1) / (0.15 * steps)
    down = (steps - step) / (0.85 * steps)
    return highest * min(up, down)


def steps_for(images, n=None) -> int:
    """Optimiser steps that n images like these are worth."""
    n = n or len(images)
    if n <= 1000:
        return 600
    if images.dim() == 2:               # features take no more
        return 1000
    return 1500 if n <= 10_000 else 3000


def train(images, seed=0, *, latent_dim=16, steps=None, batch_size=64, beta=1.0, lr=3e-3,
          rounds=10, amp=False, state=None):
    """A VAE of images as `as_input` accepts, or of features -> the model, and the rows of its
    training.

    Nothing is trained before the rows are asked for: `for row in rows`, see `fit`.
    """
    torch.manual_seed(seed)             # the initial weights
    if images.dim() == 2:
        model = FeatureVAE.of(images, latent_dim).to(images.device)
    else:
        model = VAE(*images.shape[1:], latent_dim=latent_dim).to(images.device)
    generator = torch.Generator(images.device).manual_seed(seed)
    rows = fit(model, batches(images, batch_size), beta=beta, rounds=rounds, amp=amp,
               steps=steps or steps_for(images), lr=lr, generator=generator, state=state)
    return model, rows


def fit(model, next_batch, *, steps, generator, lr=3e-3, momentum=0.9, beta=1, rounds=10,
        amp=False, state=None):
    """Maximise the ELBO on batches `next_batch(generator) -> x (B,C,H,W)`; a dict per round.

    A row holds step, reconstruction, kl (nats per image, means of the round),
    images_per_second and "state": given back as `state`, it resumes the run exactly.
    `momentum` is Adam's beta_1.
    Raises FloatingPointError, naming the steps, when the loss is not finite any more.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.Adam(model.parameters(), lr, betas=(momentum, 0.99), fused=True)
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
        sums = torch.zeros(2, device=device)
        start = time.perf_counter()
        for step in range(first, end):
            optimiser.param_groups[0]["lr"] = learning_rate(step, steps, lr)
            x = next_batch(generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                reconstruction, kl = model(x, generator)
            optimiser.zero_grad()
            (reconstruction + beta * kl).backward()
            optimiser.step()
            sums += torch.stack([reconstruction, kl]).detach()
        reconstruction, kl = (sums / (end - first)).tolist()    # the only host synchronisation
        seconds = time.perf_counter() - start
        if not math.isfinite(reconstruction + kl):
            raise FloatingPointError(f"the loss is not finite between steps {first} and "
                                     f"{end}; lower the learning rate, or use --no-amp")
        yield {"step": end, "reconstruction": reconstruction, "kl": kl,
               "images_per_second": len(x) * (end - first) / seconds,
               "state": copy.deepcopy({"step": end, "model": model.state_dict(),
                                       "optimiser": optimiser.state_dict(),
                                       "generator": generator.get_state()})}
        first = end


def train_painter(z, images, seed=0, amp=False, steps=500, batch_size=64, lr=3e-3):
    """A VAE of which the decoder is trained, alone: points z (N,D) -> their images (N,C,H,W).

    The points stay where they are; it only shows what lies there.
    """
    torch.manual_seed(seed)
    painter = VAE(*images.shape[1:], latent_dim=z.shape[1]).to(z.device)
    optimiser = torch.optim.Adam(painter.decoder.parameters(), lr, betas=(0.9, 0.99))
    generator = torch.Generator(z.device).manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        rows = torch.randint(len(z), (batch_size,), device=z.device, generator=generator)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=amp):
            logits = painter.logits(z[rows])
        loss = F.binary_cross_entropy_with_logits(logits, as_input(images[rows]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return painter.eval()


def batches(images, size):
    """next_batch(generator) -> x, `size` of the images, as `as_input` makes them."""
    def next_batch(generator):
        rows = torch.randint(len(images), (size,), device=images.device, generator=generator)
        return as_input(images[rows])

    return next_batch


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
    else:
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):                # NaN fails, too
            raise ValueError(f"images span {low:g} to {high:g}; wanted floats in [0, 1], "
                             "or uint8")
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_all(model, images, amp=False, batch=1000):
    """mu, logvar (N,D), float32, of images (N,C,H,W), uint8 or in [0,1], or of features."""
    if len(images) == 0:
        none = torch.empty(0, model.config["latent_dim"], device=images.device)
        return none, none
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        parts = [model.encode(as_input(chunk)) for chunk in images.split(batch)]
    means, logvars = zip(*parts)
    return torch.cat(means), torch.cat(logvars)


@torch.no_grad()
def decode_all(model, z, amp=False, batch=1000):
    """Images in [0,1] (N,C,H,W), or features (N,F), float32, of points z (N,D)."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=amp):
        return torch.cat([model.decode(chunk) for chunk in z.split(batch)])


@torch.no_grad()
def evaluate(model, images, *, generator, amp=False, batch=1000):
    """Reconstruction and KL, nats per image, of images as `as_input` accepts; one z each."""
    sums = torch.zeros(2, device=images.device)
    for chunk in images.split(batch):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            terms = model(as_input(chunk), generator)
        sums += torch.stack(terms) * len(chunk)         # the last one may be smaller
    reconstruction, kl = (sums / len(images)).tolist()
    return {"reconstruction": reconstruction, "kl": kl, "negative_elbo": reconstruction + kl}


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags, number
    parser = flags("vae.py", __doc__)
    add = parser.add_argument_group("the model and its training").add_argument
    add("--latent-dim", type=number(int, 1, 512), default=16, help="latent size D")
    add("--beta", type=number(float, 0, 1000), default=1.0,
        help="weight of the KL term")
    add("--steps", type=number(int, 1),
        help="number of optimiser steps; if not given, 600 to 3000 by the number of images")
    add("--batch-size", type=number(int, 1), default=64, help="images per step")
    add("--lr", type=number(float, 0, 10), default=3e-3, help="highest learning rate")
    add("--sizes", type=int, nargs="+", metavar="N",
        help="numbers of images that compare.py will be asked for: refused at once, if there "
        "are not so many")
    add("--resume", action="store_true",
        help="go on from vae.last.pt, if there is one that fits")
    return parser.parse_args(argv)


def draw(history, model, codes, images, amp, generator):
    """The curve, images (N,C,H,W) as decoded from their codes (N,D), points of the prior."""
    import common
    fig = common.figure(13, 4.4)
    curve, recon, prior = fig.subplots(1, 3, width_ratios=[1.25, 1, 1])
    steps = [row["step"] for row in history]
    common.tidy(curve, "Is it still learning?", "step", "negative ELBO, nats per image")
    curve.plot(steps, [row["reconstruction"] + row["kl"] for row in history], "-o",
               color=common.COLOURS[0], label="training batches")
    if "validation" in history[0]:
        curve.plot(steps, [row["validation"] for row in history], "--s",
                   color=common.COLOURS[2], label="validation images")
    curve.legend(frameon=False)

    shown = common.spaced(len(images), 32)
    x = images[shown]
    both = torch.stack([x / 255, decode_all(model, codes[shown], amp)])
    rows = both.unflatten(1, (4, 8)).transpose(0, 1)
    common.tidy(recon, "What does the code keep?")
    common.show_images(recon, rows.flatten(0, 2), 8,
                       "rows in turn: test images, their reconstructions")

    z = torch.randn(64, codes.shape[1], device=x.device, generator=generator)
    common.tidy(prior, "What does it imagine?")
    common.show_images(prior, decode_all(model, z, amp), 8, "decoded points from N(0, I)")
    return fig


def command(run, args):
    import common
    data = common.load_dataset(run)
    if args.sizes:
        common.fit_sizes(args.sizes, True, len(data.labelled()))
    rows = common.training_rows(data, run)
    inputs = common.Inputs(data, rows)
    images = inputs[rows]               # or features
    validation = inputs[data.validation]
    steps = args.steps or steps_for(images)
    last = common.Checkpoint(run, "vae", data, steps, args.resume)
    model, training = train(images, run.seed, latent_dim=args.latent_dim, steps=steps,
                            batch_size=args.batch_size, beta=args.beta, lr=args.lr,
                            amp=run.amp, state=last.state)
    for row in training:
        words = f"negative ELBO {row['reconstruction'] + row['kl']:.1f} nats"
        if len(validation):
            row["validation"] = score(model, validation, run)["negative_elbo"]
            words += f" ({row['validation']:.1f} on validation)"
        last.keep(row, words)

    metrics = {"train": score(model, images, run), "test": score(model, inputs.test(), run),
               "history": last.history}
    painter = model
    content = dict(inputs.normal)
    if data.features is not None:       # so that every point has a picture
        if not run.quiet:
            common.say("learning to paint the points")
        codes, _ = encode_all(model, images, run.amp)
        painter = train_painter(codes, data.images[rows], run.seed, run.amp)
        content["painter"] = {"config": painter.config, "model": painter.state_dict()}
    codes, _ = encode_all(model, inputs.test(), run.amp)
    fresh = torch.Generator(run.device).manual_seed(run.seed)
    picture = draw(last.history, painter, codes, data.test_images, run.amp, fresh)
    common.write(run.out / "vae.png", picture)
    common.save(run.out / "vae.pt", run, data, metrics, config=model.config, rows=rows.cpu(),
                model=model.cpu().state_dict(), **content)
    report(metrics)
    print(run.out / "vae.png", run.out / "vae.pt", sep="\n")


def score(model, images, run) -> dict:
    """The ELBO of at most 10,000 images, the same noise every time."""
    import common
    fresh = torch.Generator(run.device).manual_seed(run.seed + 1)
    some = common.spaced(len(images), min(len(images), 10_000))
    return evaluate(model, images[some], generator=fresh, amp=run.amp)


def report(metrics):
    """Reconstruction and KL of training and of test images."""
    for part in ("train", "test"):
        print("{:>5}: {reconstruction:.1f} reconstruction + {kl:.1f} KL = {negative_elbo:.1f} "
              "nats per image (negative ELBO)".format(part, **metrics[part]))
    if metrics["test"]["kl"] < 0.1:
        print("the latent space has collapsed: KL below 0.1 nats; "
              "lower --beta, or train longer")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
