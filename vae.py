"""Train a variational autoencoder (VAE): the latent space that every other step lives in.

What do the images look like, and how do they move? The second question is answered by random
deformations, learned from the same images.

    python vae.py                                       # embedded glyphs -> runs/glyphs/vae.pt
    python vae.py --dataset mnist --images 1000            # learn from 1,000 images only
    python vae.py --dataset mnist --labels 100             # the others without their label
    python vae.py --dataset photos --image-size 48 --latent-dim 32 --steps 4000

Reads:  a data set.
Writes: vae.pt vae.json vae.png, vae.log.jsonl; vae.last.pt until the next step has begun.
"""
import copy
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Letters: B batch, C×H×W image, D latent size.  x in [0,1]; mu, logvar, z (B,D).


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

    @classmethod
    def restore(cls, saved: dict, device="cpu"):
        """The model of a loaded vae.pt, ready to encode and decode."""
        model = cls(**saved["config"]).to(device)
        model.load_state_dict(saved["model"])
        return model.eval()

    def encode(self, x):
        """x (B,C,H,W) -> mu, logvar (B,D), float32; logvar is kept within [-10, 10]."""
        code = self.encoder(F.pad(x, self.pad)).float()
        mu, logvar = code.chunk(2, dim=1)
        return mu, logvar.clamp(-10, 10)                # exp overflows in a bad first step

    def logits(self, z):
        """z (B,D) -> logits (B,C,H,W), float32."""
        padded = self.decoder(z)
        height = self.config["height"]
        width = self.config["width"]
        return padded[..., :height, :width].float()

    def decode(self, z):
        """z (B,D) -> images in [0,1] (B,C,H,W), float32."""
        return self.logits(z).sigmoid()

    def forward(self, x, generator=None):
        """x (B,C,H,W) -> logits of one draw from q(z|x), mu, logvar."""
        mu, logvar = self.encode(x)
        noise = torch.randn(mu.shape, device=mu.device, generator=generator)
        z = mu + noise * (logvar / 2).exp()             # so mu and logvar get gradients
        return self.logits(z), mu, logvar


def elbo_terms(logits, x, mu, logvar):
    """Reconstruction (Bernoulli) and KL(q(z|x) || N(0, I)): nats per image, means over B."""
    # A sum over the pixels, not a mean: only so do its nats weigh against those of the KL.
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum()
    return reconstruction / len(x), kl / len(x)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over 15% of the steps, then linearly to zero."""
    up = (step + 1) / (0.15 * steps)
    down = (steps - step) / (0.85 * steps)
    return highest * min(up, down)


def fit(model, next_batch, *, steps, generator, lr=3e-3, momentum=0.9, beta=1, rounds=10,
        amp=False, state=None):
    """Maximise the ELBO on batches `next_batch(generator) -> x (B,C,H,W)`; a dict per round.

    A row holds step, reconstruction, kl (nats per image, means of the round),
    images_per_second and "state": given back as `state`, it resumes the run exactly.
    `momentum` is Adam's beta_1.
    Raises FloatingPointError, naming the steps, when the loss is not finite any more;
    ValueError where x is outside [0, 1].
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.Adam(model.parameters(), lr, betas=(momentum, 0.99), fused=True)
    first = 0
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state["optimiser"]})
        generator.set_state(state["generator"])
        first = state["step"]
    begin = first
    ends = {math.ceil(steps * (i + 1) / rounds) for i in range(rounds)}
    for end in sorted(ends):
        if end <= first:
            continue
        sums = torch.zeros(2, device=device)
        start = time.perf_counter()
        for step in range(first, end):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            x = next_batch(generator).contiguous(memory_format=torch.channels_last)
            if step == begin:           # once only: a GPU waits for it
                check_range(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits, mu, logvar = model(x, generator)
            reconstruction, kl = elbo_terms(logits, x, mu, logvar)
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
                                       "optimiser": optimiser.state_dict()["state"],
                                       "generator": generator.get_state()})}
        first = end


def batches(images, size):
    """next_batch(generator) -> x (size,C,H,W) in [0,1], drawn from images as of `as_input`."""
    def next_batch(generator):
        rows = torch.randint(len(images), (size,), device=images.device, generator=generator)
        return as_input(images[rows])

    return next_batch


def as_input(images):
    """Integers in [0,255] or floats in [0,1] (B,C,H,W) -> float32 in [0,1], channels last.

    Raises ValueError for other ranges; uint8 needs no look.
    """
    x = images.float()
    if not images.is_floating_point():
        x = x / 255
    if images.dtype != torch.uint8:
        check_range(x)
    return x.contiguous(memory_format=torch.channels_last)


def check_range(x):
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):    # NaN fails, too
        raise ValueError(f"images span {low:g} to {high:g}; wanted floats in [0, 1], or uint8")


@torch.no_grad()
def encode_all(model, images, amp=False, batch=1000):
    """mu, logvar (N,D), float32, of images (N,C,H,W): uint8, or floats in [0,1]."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        parts = [model.encode(as_input(chunk)) for chunk in images.split(batch)]
    means, logvars = zip(*parts)
    return torch.cat(means), torch.cat(logvars)


@torch.no_grad()
def decode_all(model, z, amp=False, batch=1000):
    """Images in [0,1], float32 (N,C,H,W), of points z (N,D)."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=amp):
        return torch.cat([model.decode(chunk) for chunk in z.split(batch)])


@torch.no_grad()
def evaluate(model, images, *, generator, amp=False, batch=1000):
    """Reconstruction and KL in nats per image of images as of `as_input`, one z drawn each."""
    sums = torch.zeros(2, device=images.device)
    for chunk in images.split(batch):
        x = as_input(chunk)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits, mu, logvar = model(x, generator)
        # Weighed by its size: the last chunk may be smaller.
        sums += torch.stack(elbo_terms(logits, x, mu, logvar)) * len(x)
    reconstruction, kl = (sums / len(images)).tolist()
    return {"reconstruction": reconstruction, "kl": kl, "negative_elbo": reconstruction + kl}


# ---- deformations: how images of one class move into each other -----------------------------

NODES = 5                               # a side of the grid that bends a flow
LEVELS = ((2, 1.25), (2, 0.75), (1, 0.8))       # of registration: side of a pixel, then a blur
MARGIN = 0.005                          # nats per image: a smaller gain is none
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What `proof` tries: a strength, and whether images are mirrored; the last one mirrors only.
CHOICES = [*((strength, False) for strength in STRENGTHS), (0.0, True)]


@dataclass(eq=False)
class Deformations:
    """Random flows s B w, w ~ N(0, I), learned from images: a latent space of movements.

    A flow is linear in 56 numbers: an affine map, and a smooth displacement on a grid. Those
    that bring images of one class into register have a Gaussian, with B its square root; its
    mean is left out, so that an image stays where it is on average (compare Hauberg et al.
    2016, Dreaming more data). The images also say how strong, s, and whether mirror images
    are of the same kind; see `fit`. As a transform, (x, q, generator) -> (x, q), it
    deforms each image of a batch in its own way, and leaves the probabilities.
    """
    directions: torch.Tensor            # B (56,R), the widest first
    height: int
    width: int
    strength: float = 1.0               # s in [0,1]
    mirror: bool = False
    nll: list | None = None             # what `proof` said of each choice, of a fitted one

    @classmethod
    def fit(cls, images, y, generator, most=1000):
        """From images (N,C,H,W) as of `as_input` and labels y (N,), at most so many of them.

        The strength is the one under which held-out images are predicted best (`proof`), if
        the gain is above MARGIN; mirror images are allowed if their gain is above two standard
        errors, too. Without two images of one class nothing moves.
        """
        order = torch.randperm(len(images), device=images.device, generator=generator)
        rows = order[:most]
        x = as_input(images[rows]).mean(1, keepdim=True)            # where, not which colour
        x = small(x)
        y = y[rows].long()
        i, j = same_class_pairs(y, generator)
        v = register(x[i], x[j])
        losses = proof(x, y, i, j, v, generator)
        nll = losses.mean(0).tolist()
        least, strength = min(zip(nll, STRENGTHS))      # zip leaves out the mirrored one
        if nll[0] - least < MARGIN:
            strength = 0.0
        gain = losses[:, 0] - losses[:, -1]
        error = gain.std(correction=0) / len(gain) ** 0.5
        mirror = gain.mean() > max(MARGIN, 2 * error)
        return cls(square_root(v), *images.shape[2:], strength, bool(mirror), nll)

    @classmethod
    def restore(cls, saved: dict, device="cpu"):
        """The deformations of a loaded vae.pt."""
        deform = cls(**saved["deformations"])
        deform.directions = deform.directions.to(device)
        return deform

    def fields(self) -> dict:
        """As plain tensors and numbers: Deformations(**fields) equals it."""
        return dict(directions=self.directions.cpu(), height=self.height, width=self.width,
                    strength=self.strength, mirror=self.mirror)

    def words(self) -> str:
        """What it does, for people."""
        mirrored = ", mirrored or not" if self.mirror else ""
        if self.strength > 0:
            return f"deformations of strength {self.strength:g}{mirrored}"
        return f"no deformations{mirrored}"

    def moves(self) -> bool:
        """Does it change any image?"""
        return self.strength > 0 or self.mirror

    def flow(self, w):
        """w (B,R) -> flows (B,H,W,2)."""
        v = self.strength * w @ self.directions.T
        v = v.unflatten(1, (2, -1))     # to the right, and down
        return flow_of(v, self.height, self.width)

    def sample(self, count, generator):
        """Random flows (count,H,W,2)."""
        rank = self.directions.shape[1]
        device = self.directions.device
        return self.flow(torch.randn(count, rank, device=device, generator=generator))

    def repertoire(self, count, generator):
        """Flows (count,H,W,2) for images that stay what they are: a part 1-s is none, and
        where mirror images are of the same kind, half of them mirror.
        """
        flows = self.sample(count, generator)
        chance = torch.rand(2, count, 1, 1, 1, device=flows.device, generator=generator)
        flows = flows.where(chance[0] < self.strength, torch.zeros(()))
        if self.mirror:
            # At p lies the image at -p + flow(-p), seen from the middle.
            turned = flows.flip(2) + mirror_flow(self.height, self.width, flows.device)
            flows = flows.where(chance[1] < 0.5, turned)
        return flows

    def __call__(self, x, q, generator):
        """x (B,C,H,W) in [0,1], q (B,K) -> each image deformed, q as it is."""
        if self.mirror:
            chance = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator)
            x = torch.where(chance < 0.5, x.flip(3), x)
        if self.strength > 0 and len(x):                # a batch may hold none of a kind
            x = warp(x, self.sample(len(x), generator))
        return x, q

    def distances(self, images, near):
        """Squared distances (N,k) from images (N,C,H,W) as of `as_input` to those in the rows
        near (N,k), once each has come as close to them as a deformation brings it.

        The tangent distance (Simard et al. 1993): a deformation w moves an image along its
        tangents, by `tangents`, and costs |w|^2, so that the likelier ones are free to act.
        """
        x = torch.cat([coarse(part) for part in images.split(1000)])
        pixels = x.flatten(1)
        # What no deformation explains, per pixel: half of what is between nearest images.
        some = torch.linspace(0, len(x) - 1, min(len(x), 1000), device=x.device).long()
        noise = (pixels[near[some, 0]] - pixels[some]).square().mean() / 2 + 1e-6
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(250):
            difference = pixels[near[rows]] - pixels[rows, None]            # (B,k,P)
            tangent = tangents(x[rows], self.strength * self.directions)    # (B,P,R)
            along = difference @ tangent
            square = tangent.mT @ tangent
            square.diagonal(dim1=1, dim2=2).add_(noise)
            w = torch.linalg.solve(square, along.mT).mT                     # least squares
            explained = (along * w).sum(2)
            left = difference.square().sum(2) - explained
            parts.append(left.clamp(min=0))             # rounding may leave it below
        return torch.cat(parts)


def flow_functions(height, width, device=None):
    """What flows are sums of (28,H,W): x, y, 1, and a smooth bump for each node of a grid."""
    down = places_along(height, device)
    right = places_along(width, device)
    y, x = torch.meshgrid(down, right, indexing="ij")
    affine = torch.stack([x, y, torch.ones_like(x)])
    nodes = torch.eye(NODES ** 2, device=device)        # one image a node, 1 there and 0 else
    nodes = nodes.view(-1, 1, NODES, NODES)
    bumps = F.interpolate(nodes, (height, width), mode="bicubic", align_corners=True)
    return torch.cat([affine, bumps[:, 0]])


def places_along(side, device):
    """The middles of the pixels of a side, which leads from -1 to 1."""
    pixel = torch.arange(side, device=device) + 0.5
    return pixel / side * 2 - 1


def flow_of(v, height, width):
    """Coefficients v (B,2,28), to the right and down, in half sides -> flow (B,H,W,2)."""
    functions = flow_functions(height, width, v.device).flatten(1)
    flow = (v @ functions).unflatten(2, (height, width))
    return flow.permute(0, 2, 3, 1) * half_sides(height, width, v.device)


def half_sides(height, width, device):
    return torch.tensor([width / 2, height / 2], device=device)


def mirror_flow(height, width, device=None):
    """The flow (H,W,2) that turns left to right."""
    right = torch.arange(width, device=device)
    turn = width - 1.0 - 2 * right
    row = torch.stack([turn, torch.zeros_like(turn)], 1)
    return row.expand(height, width, 2)


def warp(x, flow):
    """x (B,C,H,W) as seen through flow (B,H,W,2) in pixels, the border continued.

    The image at p + flow(p) is what is seen at p.
    """
    height, width = x.shape[2:]
    still = torch.eye(2, 3, device=x.device)[None]
    places = F.affine_grid(still, [1, 1, height, width], align_corners=False)
    places = places + flow / half_sides(height, width, x.device)
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def coarse(images):
    """Images as of `as_input` -> grey ones (B,1,h,w), half the side, so smooth that small
    flows change them in proportion.
    """
    x = small(as_input(images).mean(1, keepdim=True))
    return F.avg_pool2d(blur(x, 1), 2)


def tangents(x, directions):
    """How images x (B,1,H,W) change along directions (56,R) of flows: (B,H W,R)."""
    height, width = x.shape[2:]
    framed = F.pad(x, (1, 1, 1, 1), mode="replicate")
    right = (framed[:, 0, 1:-1, 2:] - framed[:, 0, 1:-1, :-2]).flatten(1) / 2
    down = (framed[:, 0, 2:, 1:-1] - framed[:, 0, :-2, 1:-1]).flatten(1) / 2
    functions = flow_functions(height, width, x.device).flatten(1)          # (28,H W)
    moves = functions.T @ directions.unflatten(0, (2, -1))                  # (2,H W,R)
    across, along = moves * half_sides(height, width, x.device)[:, None, None]
    return right[:, :, None] * across + down[:, :, None] * along


def blur(x, sigma):
    """x (B,C,H,W) under a Gaussian of so many pixels, the border continued."""
    reach = math.ceil(2.5 * sigma)
    channels = x.shape[1]
    steps = torch.arange(-reach, reach + 1, device=x.device)
    bell = (-0.5 * (steps / sigma) ** 2).exp()
    row = (bell / bell.sum()).expand(channels, 1, 1, -1)
    x = F.pad(x, [reach] * 4, mode="replicate")
    # A Gaussian is separable: along the rows, then along the columns.
    x = F.conv2d(x, row, groups=channels)
    return F.conv2d(x, row.transpose(2, 3), groups=channels)


@torch.enable_grad()
def register(target, moving, steps=60):
    """Coefficients v (B,2,28) of flows with warp(moving, flow_of(v, H, W)) close to target.

    target, moving (B,C,H,W), float. All pairs at once, from coarse to fine, by Adam on the
    mean square of the difference and what holds the flow back, `stiffness`.
    """
    target = small(target)
    moving = small(moving)
    v = torch.zeros(len(target), 2, 3 + NODES ** 2, device=target.device, requires_grad=True)
    optimiser = torch.optim.Adam([v], betas=(0.9, 0.99))
    step = 0
    for scale, sigma in LEVELS:
        source = blur(F.avg_pool2d(moving, scale), sigma)
        goal = blur(F.avg_pool2d(target, scale), sigma)
        for _ in range(steps // len(LEVELS)):
            for group in optimiser.param_groups:
                group["lr"] = 0.03 * min(1, 2 - 2 * step / steps)
            seen = warp(source, flow_of(v, *source.shape[2:]))
            error = (seen - goal).square().mean((1, 2, 3))
            optimiser.zero_grad()
            (error + stiffness(v)).sum().backward()     # the pairs have nothing in common
            optimiser.step()
            step += 1
    return v.detach()


def small(x):
    """x (B,C,H,W) with at most 32 pixels a side: flows are as smooth in fewer pixels."""
    factor = math.ceil(max(x.shape[2:]) / 32)
    return F.avg_pool2d(x, factor)


def stiffness(v):
    """What a flow costs (B,): the square of its affine map, the differences in its grid."""
    affine = v[:, :, :3].square().sum((1, 2))
    grid = v[:, :, 3:].unflatten(2, (NODES, NODES))
    across = grid.diff(dim=2).square().mean((1, 2, 3))
    along = grid.diff(dim=3).square().mean((1, 2, 3))
    return 0.02 * affine + 0.6 * (across + along)


class Morph:
    """Pairs of images in register, and where their parts are on the way between the two.

    `strength`: they come so far towards each other, 1 all the way; that of the deformations,
    so that nothing moves further than images of its kind do.
    """

    def __init__(self, first, second, strength=1.0, batch=1000):
        """first, second (P,C,H,W), float."""
        parts = []
        for a, b in zip(first.split(batch), second.split(batch)):
            target = a.mean(1, keepdim=True)            # where, not which colour
            moving = b.mean(1, keepdim=True)
            parts.append(register(target, moving))
        self.v = strength * torch.cat(parts)            # (P,2,28), of second towards first

    def __call__(self, first, second, rows, t):
        """Of some pairs (M,) what belongs to each image (M,C,H,W), moved to where both meet.

        t (M,) in [0,1]: at 1 first stays as it is and second lies on it, at 0 the reverse.
        """
        flow = flow_of(self.v[rows], *first.shape[2:])
        t = t[:, None, None, None]
        return warp(first, (t - 1) * flow), warp(second, t * flow)


def square_root(v):
    """B (56,56) of coefficients v (P,2,28): B w, w ~ N(0, I), has their second moments about
    the mean. Its columns are the principal directions, the widest first.
    """
    v = v.flatten(1)
    if len(v):
        v = v - v.mean(0)
    covariance = v.T @ v / max(len(v), 1)
    variances, axes = torch.linalg.eigh(covariance)
    return (axes * variances.clamp(min=0).sqrt()).flip(1)


def same_class_pairs(y, generator, each=10, most=3000):
    """Rows i, j of ordered pairs of one class: up to `each` partners j per i, at random."""
    share = math.ceil(most / max(len(y), 1))
    each = min(each, share, len(y))
    alike = (y[:, None] == y).fill_diagonal_(False)
    numbers = torch.rand(alike.shape, device=y.device, generator=generator)
    # Random numbers lie in [0, 1): with 1 added, one's own class comes before the others.
    j = (numbers + alike).topk(each, dim=1).indices
    i = torch.arange(len(y), device=y.device)
    i = i[:, None].expand_as(j)
    kept = alike.gather(1, j)           # a small class has fewer
    return i[kept], j[kept]


def proof(x, y, i, j, v, generator, splits=10, most=150):
    """How well does half of the images, deformed, predict the other half?

    x (N,1,H,W) in [0,1], y (N,), flows v of the pairs i, j. -> NLL in nats per image, a row
    for each of random halves, a column for each of CHOICES. Of a half only flows of pairs
    inside it count, and `most` images.
    """
    x = blur(x, 1)                      # the neighbour a pixel further counts, too
    rows = []
    for _ in range(splits):
        first = random_half(y, generator)
        for half in (first, ~first):
            inside = half[i] & half[j]
            if inside.any():
                known = half.nonzero()[:most, 0]
                asked = (~half).nonzero()[:most, 0]
                directions = square_root(v[inside])
                rows.append(held_out_nll(x, y, known, asked, directions, generator))
    if not rows:                        # no half has a pair: every choice is as good
        return torch.zeros(1, len(CHOICES))
    return torch.tensor(rows)


def held_out_nll(x, y, known, asked, directions, generator, copies=10):
    """NLL of `asked` images, predicted from deformed copies of `known` ones, by choice.

    The random numbers are the same for each, so that only the choice makes a difference.
    """
    rows = known.repeat(copies)
    state = generator.get_state()
    losses = []
    for choice in CHOICES:
        generator.set_state(state)
        deform = Deformations(directions, *x.shape[2:], *choice)
        seen, _ = deform(x[rows], None, generator)
        losses.append(kernel_nll(seen, y[rows], x[asked], y[asked]))
    return losses


def random_half(y, generator):
    """(N,) bool: half of each class, at random; of an odd one the smaller half."""
    shuffled = torch.randperm(len(y), device=y.device, generator=generator)
    order = shuffled[y[shuffled].argsort(stable=True)]              # by class
    counts = y.bincount()
    start = (counts.cumsum(0) - counts)[y[order]]
    place = torch.arange(len(y), device=y.device) - start
    half = torch.empty(len(y), dtype=torch.bool, device=y.device)
    half[order] = place < counts[y[order]] // 2
    return half


def kernel_nll(x, y, asked, asked_y, floor=0.02):
    """NLL of labels under a kernel classifier of images x (N,C,H,W), y (N,), in nats.

    Its bandwidth is the best of a few, up to one that knows nothing: else what blurs would
    seem to help where nothing can be known. A part `floor` is spread over the classes.
    """
    classes = int(max(y.max(), asked_y.max())) + 1
    square = torch.cdist(asked.flatten(1), x.flatten(1)).square()
    nearest = square.amin(1).median().clamp(min=1e-12)
    one_hot = F.one_hot(y, classes).float()
    losses = []
    for factor in (0.05, 0.1, 0.2, 0.4, 1, 100):
        weight = (-square / (2 * factor * nearest)).softmax(1)
        q = (1 - floor) * weight @ one_hot + floor / classes
        losses.append(F.nll_loss(q.log(), asked_y))
    return min(losses).item()


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags, number
    parser = flags("vae.py", __doc__)
    add = parser.add_argument_group("the model and its training").add_argument
    add("--images", type=number(int, 1),
        help="number of labelled training images to learn from, equal numbers per class; if "
        "not given, all but the tenth kept for validation; besides those without a label")
    add("--latent-dim", type=number(int, 1, 512), default=16, help="latent size D")
    add("--beta", type=number(float, 0, 1000), default=1.0,
        help="weight of the KL term")
    add("--steps", type=number(int, 1), default=1500, help="number of optimiser steps")
    add("--batch-size", type=number(int, 1), default=128, help="images per step")
    add("--lr", type=number(float, 0, 10), default=3e-3, help="highest learning rate")
    add("--resume", action="store_true",
        help="go on from vae.last.pt, if there is one that fits")
    return parser.parse_args(argv)


def draw(history, model, deform, images, data, amp, generator):
    """The curve, reconstructions of test images, samples from the prior, deformed images."""
    import common
    fig = common.figure(16, 4.2)
    curve, recon, prior, moves = fig.subplots(1, 4, width_ratios=[1.25, 1, 1, 1])
    steps = [row["step"] for row in history]
    common.tidy(curve, "Is it still learning?", "step", "negative ELBO, nats per image")
    curve.plot(steps, [row["reconstruction"] + row["kl"] for row in history], "-o", ms=4,
               color=common.COLOURS[0], label="training batches")
    curve.plot(steps, [row["validation"] for row in history], "--s", ms=4,
               color=common.COLOURS[2], label="validation images")
    curve.legend(frameon=False)

    x = data.test_images[common.spaced(len(data.test_images), 32)]
    mu, _ = encode_all(model, x, amp)
    both = torch.stack([x / 255, decode_all(model, mu, amp)])
    rows = both.unflatten(1, (4, 8)).transpose(0, 1)
    common.tidy(recon, "What does the code keep?")
    common.show_images(recon, rows.flatten(0, 2), 8,
                       "rows in turn: test images, their reconstructions")

    dim = model.config["latent_dim"]
    z = torch.randn(64, dim, device=x.device, generator=generator)
    common.tidy(prior, "What does it imagine?")
    common.show_images(prior, decode_all(model, z, amp), 8, "decoded points from N(0, I)")

    still = as_input(images[common.spaced(len(images), 8)])
    moved, _ = deform(still.repeat_interleave(7, 0), None, generator)
    moved = moved.unflatten(0, (8, 7))
    rows = torch.cat([still[:, None], moved], 1)
    common.tidy(moves, "How may they move?")
    common.show_images(moves, rows.flatten(0, 1), 8,
                       f"a training image, then {deform.words()}")
    return fig


def command(run, args):
    import common
    data = common.load_dataset(run)
    rows, validation = common.split(data)
    if args.images is not None:
        rows = common.subset(data, rows, args.images, args.seed)
        common.say_if_few(args.images, data)
    labelled = len(rows)
    labels = data.labels[rows]
    without = torch.arange(len(data.unlabelled)) + len(data.images)
    rows = torch.cat([rows, without])   # those with a label come first
    images = data.take(rows)
    validation = data.images[validation]
    torch.manual_seed(args.seed)                        # the initial weights
    model = VAE(*data.images.shape[1:], latent_dim=args.latent_dim).to(run.device)
    net, size, generator = common.distribute(model, run, args.batch_size)

    def score(part):
        """The ELBO of at most 10,000 images, the same noise every time."""
        fresh = torch.Generator(run.device).manual_seed(args.seed + 1)
        some = common.spaced(len(part), min(len(part), 10_000))
        return evaluate(model, part[some], generator=fresh, amp=run.amp)

    last = common.Checkpoint(run, "vae", data, args.steps, args.resume, net)
    for row in fit(net, batches(images, size), steps=args.steps, lr=args.lr, beta=args.beta,
                   amp=run.amp, generator=generator, state=last.state):
        if common.RANK == 0:            # the first rank reports and writes
            row["validation"] = score(validation)["negative_elbo"]
            last.keep(row, f"negative ELBO {row['reconstruction'] + row['kl']:.1f} nats "
                      f"({row['validation']:.1f} on validation)")
    if common.RANK > 0:
        return

    fresh = torch.Generator(run.device).manual_seed(args.seed)
    deform = Deformations.fit(images[:labelled], labels, fresh)
    *nll, mirrored = deform.nll
    tried = {"strengths": list(STRENGTHS), "nll": nll, "nll_mirrored": mirrored}
    metrics = {"train": score(images), "test": score(data.test_images),
               "proof": tried,
               "strength": deform.strength, "mirror": deform.mirror,
               "history": last.history}
    picture = draw(last.history, model, deform, images, data, run.amp, generator)
    common.write(run.out / "vae.png", picture)
    common.save(run.out / "vae.pt", run, data, metrics, config=model.config, rows=rows,
                model=model.cpu().state_dict(), deformations=deform.fields())
    if len(without):
        print(f"learnt from {labelled:,} images with a label, {len(without):,} without")
    for part in ("train", "test"):
        print("{:>5}: {reconstruction:.1f} reconstruction + {kl:.1f} KL = {negative_elbo:.1f} "
              "nats per image (negative ELBO)".format(part, **metrics[part]))
    print(f"what an image may become: {deform.words()}, as held-out images decided")
    if metrics["test"]["kl"] < 0.1:
        print("the latent space has collapsed: KL below 0.1 nats; "
              "lower --beta, or train longer")
    print(run.out / "vae.png", run.out / "vae.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
