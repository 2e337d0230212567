"""Seconds and what they buy on MNIST: our networks beside two recipes that are often taught.

    python assets/bench.py                          # make bench; three rounds, some minutes
    python assets/bench.py --data-dir ../shared/data --rounds 1
    python assets/bench.py --scaling                # cost as work grows, in some minutes
    python assets/bench.py --cost mnist 100 1000    # of one network, plain and of hybrids

Each round runs ours and theirs in turn, so that a machine whose speed varies is fair to both;
the table has medians. A recipe is what a learner would write: PIL images, a DataLoader,
float32, default layout. No other work beside it, please.

Reads:  MNIST.
Writes: assets/bench.json; with --scaling assets/scaling.json and assets/scaling.png; with
        --cost a line of assets/cost.json.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))
import cnn          # noqa: E402
import common       # noqa: E402
import compare      # noqa: E402
import latent       # noqa: E402
import vae          # noqa: E402

SCRIPTS = ("deform.py", "vae.py", "latent.py", "hybrids.py", "cnn.py", "compare.py")
TICKS = {"seconds": (2, 5, 10, 20, 50, 100), "mebibytes": (800, 1000, 1200, 1500, 2000, 3000)}


# ---- ours -----------------------------------------------------------------------------------

def our_cnn(data, run):
    """A CNN of width 16, as accurate in the end as the recipe's -> seconds, quality."""
    real = (data.images, F.one_hot(data.labels, 10).float())
    torch.manual_seed(0)
    generator = torch.Generator(run.device).manual_seed(0)
    model = cnn.CNN(1, 10, width=16).to(run.device)
    start = time.perf_counter()
    for _ in cnn.fit(model, cnn.batches(real, 48), steps=320, lr=2e-2, rounds=1, amp=run.amp,
                     generator=generator):
        pass
    seconds = time.perf_counter() - start
    logits = cnn.predict(model, data.test_images, run.amp)
    right = logits.argmax(1) == data.test_labels
    return seconds, 100 * right.float().mean().item()


def train_vae(data, run, **settings):
    """A VAE -> the model, the generator as it left it, seconds of training."""
    torch.manual_seed(0)
    generator = torch.Generator(run.device).manual_seed(0)
    model = vae.VAE(1, 28, 28).to(run.device)
    start = time.perf_counter()
    for _ in vae.fit(model, vae.batches(data.images, 64), rounds=1, amp=run.amp,
                     generator=generator, **settings):
        pass
    return model, generator, time.perf_counter() - start


def our_vae(data, run):
    """A VAE, trained until its ELBO is that of the recipe's -> seconds, quality."""
    model, generator, seconds = train_vae(data, run, steps=1250, lr=5e-3, momentum=0.7)
    scores = vae.evaluate(model, data.test_images, generator=generator, amp=run.amp)
    return seconds, scores["negative_elbo"]


def our_percentages(data, run):
    """Codes and percentages of 60,000 images -> seconds, their accuracy."""
    model, _, _ = train_vae(data, run, steps=1000)
    start = time.perf_counter()
    mu, logvar = vae.encode_all(model, data.images, run.amp)
    some = latent.subsample(len(mu), 20_000)
    posterior = latent.Aggregate.fit(mu[some], logvar[some], data.labels[some], 10)
    right = posterior(mu).argmax(1) == data.labels
    accuracy = 100 * right.float().mean().item()        # waits for the device
    return time.perf_counter() - start, accuracy


# ---- the recipes ----------------------------------------------------------------------------

def loader(root, size, train, normalised):
    """MNIST as tutorials read it: PIL images, ToTensor, a DataLoader."""
    from torchvision import datasets, transforms
    steps = [transforms.ToTensor()]
    if normalised:
        steps.append(transforms.Normalize((0.1307,), (0.3081,)))
    images = datasets.MNIST(root, train=train, transform=transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, size, shuffle=train)


def recipe_cnn(root, device, epochs=1):
    """Two convolutions, 1.2 million weights, dropout, Adadelta, batches of 64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(128, 10)).to(device)
    optimiser = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.7)
    batches = loader(root, 64, train=True, normalised=True)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    loss.item()                         # a GPU is still at work otherwise
    seconds = time.perf_counter() - start
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in loader(root, 1000, train=False, normalised=True):
            guess = model(x.to(device)).argmax(1)
            right += int((guess == y.to(device)).sum())
    return seconds, right / 100


class Perceptron(nn.Module):
    """The VAE of tutorials: 784 pixels, 400 hidden units, 20 latent dimensions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(784, 400)
        self.heads = nn.Linear(400, 40)
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def loss(self, x):
        """Negative ELBO of images (B,1,28,28), in nats, summed over them."""
        x = x.flatten(1)
        mu, logvar = self.heads(F.relu(self.body(x))).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        nats = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return nats + len(x) * vae.divergence(mu, logvar)


def recipe_vae(root, device, epochs=10):
    """A perceptron of one hidden layer on either side, Adam at 0.001, batches of 128."""
    torch.manual_seed(0)
    model = Perceptron().to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = loader(root, 128, train=True, normalised=False)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, _ in batches:
            loss = model.loss(x.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    loss.item()
    seconds = time.perf_counter() - start
    total = 0.0
    with torch.no_grad():
        for x, _ in loader(root, 1000, train=False, normalised=False):
            total += model.loss(x.to(device)).item()
    return seconds, total / 10_000


# ---- side by side ---------------------------------------------------------------------------

def machine(run) -> dict:
    """What a time depends on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": run.device.type, "threads": torch.get_num_threads(),
            "features": capability + (" and bfloat16" if run.amp else ", no bfloat16"),
            "machine": platform.machine(), "python": platform.python_version(),
            "torch": str(torch.__version__)}


def side_by_side(data, run, root, rounds):
    """Every piece of work, `rounds` times in turn -> rows of the table."""
    ours = (data, run)
    theirs = (root, run.device)
    work = {"CNN": (our_cnn, ours), "CNN, as taught": (recipe_cnn, theirs),
            "VAE": (our_vae, ours), "VAE, as taught": (recipe_vae, theirs),
            "codes and percentages": (our_percentages, ours)}
    seconds = {name: [] for name in work}
    quality = {}
    for _ in range(rounds):
        for name, (measure, arguments) in work.items():
            spent, quality[name] = measure(*arguments)
            seconds[name].append(round(spent, 2))
            print(f"{name:24}{spent:8.2f} s{quality[name]:9.2f}", flush=True)
    rows = []
    for name in work:
        median = statistics.median(seconds[name])
        row = {"work": name, "quality": round(quality[name], 2), "seconds": median,
               "rounds": seconds[name]}
        taught = seconds.get(f"{name}, as taught")
        if taught:
            row["times_as_fast"] = round(statistics.median(taught) / median, 1)
        rows.append(row)
    return rows


def record(facts):
    """Put a run into bench.json, in place of the last one of such a processor."""
    path = ASSETS / "bench.json"
    runs = []
    if path.exists():
        runs = json.loads(path.read_text())["runs"]
    runs = [run for run in runs if run["features"] != facts["features"]]
    runs = sorted([*runs, facts], key=lambda run: run["features"])
    common.write(path, {"command": "make bench", "runs": runs})


# ---- cost as work grows ---------------------------------------------------------------------

def make_set(folder, data, count, classes):
    """`count` training images of MNIST in so many classes, by label and by row in turn."""
    rows = torch.arange(count)
    labels = data.labels[:count]
    test_labels = data.test_labels
    if classes > 10:                    # each digit stands for several classes
        labels = labels + 10 * (rows % (classes // 10))
        test_rows = torch.arange(len(test_labels))
        test_labels = test_labels + 10 * (test_rows % (classes // 10))
    else:
        labels = labels % classes
        test_labels = test_labels % classes
    path = folder / f"images-{count}-{classes}.npz"
    np.savez(path, x_train=data.images[:count, 0].numpy(), y_train=labels.numpy(),
             x_test=data.test_images[:2000, 0].numpy(), y_test=test_labels[:2000].numpy())
    return path


def chain_cost(folder, path, latent_dim, threads):
    """{script: seconds and peak memory (MiB)} of the six steps, with their default flags; the
    comparison is of one subset of 900 images, in a process of one thread.
    """
    out = folder / f"{path.stem}-{latent_dim}"
    costs = {}
    for script in SCRIPTS:
        words = [sys.executable, str(ASSETS.parent / script), "-o", str(out), "--quiet",
                 "--threads", str(threads)]
        if script == "deform.py":
            words += ["--dataset", str(path)]
        if script == "vae.py":
            words += ["--latent-dim", str(latent_dim)]
        if script == "compare.py":
            words += ["--sizes", "900", "--seeds", "1", "--latent-dim", str(latent_dim)]
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"{' '.join(words)} failed")
        costs[script] = {"seconds": round(time.perf_counter() - start, 2),
                         "mebibytes": round(usage.ru_maxrss / 1024)}
    return costs


def scaling(data, threads):
    """Cost of the chain against numbers of images, latent sizes and classes -> rows."""
    # Images, latent size and classes; one of them varies at a time.
    grid = {"images": [(1_000, 16, 10), (4_000, 16, 10), (16_000, 16, 10), (60_000, 16, 10)],
            "latent size": [(16_000, 2, 10), (16_000, 16, 10), (16_000, 128, 10)],
            "classes": [(16_000, 16, 2), (16_000, 16, 10), (16_000, 16, 50),
                        (16_000, 16, 200)]}
    rows = []
    measured = {}                       # three axes meet in one setting: once is enough
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for axis, settings in grid.items():
            for setting in settings:
                count, dim, classes = setting
                if setting not in measured:
                    path = make_set(folder, data, count, classes)
                    measured[setting] = chain_cost(folder, path, dim, threads)
                costs = measured[setting]
                value = {"images": count, "latent size": dim, "classes": classes}[axis]
                rows.append({"axis": axis, "value": value, "costs": costs})
                print(axis, value, json.dumps(costs), flush=True)
    return rows


def slope(rows, script, what):
    """d log cost / d log value over the last step: 1 is linear."""
    first, last = rows[-2:]
    rise = np.log(last["costs"][script][what] / first["costs"][script][what])
    return float(rise / np.log(last["value"] / first["value"]))


def draw_scaling(rows):
    """Seconds above, memory below, one column an axis; slopes of the last steps beside."""
    fig = common.figure(13, 7)
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    grid = fig.subplots(2, len(axes_names), sharex="col", sharey="row")
    titles = {"seconds": "How long", "mebibytes": "How much memory"}
    for row_of_axes, (what, title) in zip(grid, titles.items()):
        for axes, name in zip(row_of_axes, axes_names):
            part = [row for row in rows if row["axis"] == name]
            values = [row["value"] for row in part]
            for k, script in enumerate(SCRIPTS):
                costs = [row["costs"][script][what] for row in part]
                label = f"{script}, slope {slope(part, script, what):.2f}"
                axes.plot(values, costs, marker=common.MARKERS[k], color=common.COLOURS[k],
                          ls=("-", "--", ":", "-.", "-")[k], label=label)
            axes.set_xscale("log", subs=[])
            axes.set_yscale("log", subs=[])
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.set_yticks(TICKS[what], [f"{tick:,}" for tick in TICKS[what]])
            axes.minorticks_off()
            common.tidy(axes, f"{title}, by {name}?")
            axes.legend(frameon=False, fontsize=8)
        row_of_axes[0].set_ylabel("seconds" if what == "seconds" else "peak memory, MiB")
    for axes, name in zip(grid[1], axes_names):
        axes.set_xlabel(name)
    return fig


# ---- cost of one network --------------------------------------------------------------------

def network_cost(dataset, root, n):
    """Seconds of one core to train on subset 0 of n images: plain, and with all of hybrids."""
    with tempfile.TemporaryDirectory() as out:
        args = compare.parse_args(["--dataset", dataset, "--data-dir", root, "-o", out,
                                   "--sizes", str(n), "--seeds", "1"])
        run = common.start(args)
        grid = compare.plan(run, args)
        unit = compare.Unit(grid, n, 0)
        start = time.process_time()
        unit.train(compare.ARMS["real"])
        plain = time.process_time() - start
        unit.train(compare.ARMS["real+hybrid"])         # deformations, VAE, hybrids, network
        both = time.process_time() - start
        run.release()
    return {"set": grid.data.name, "n": n, "plain": round(plain, 1),
            "hybrids": round(both - plain, 1)}


def record_cost(line, facts):
    """Put a line into cost.json, in place of the last one of its kind."""
    path = ASSETS / "cost.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if (row["set"], row["n"]) != (line["set"], line["n"])]
    common.write(path, {"command": "python assets/bench.py --cost", "machine": facts,
                        "rows": [*rows, line]})


# ---- command --------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    parser.add_argument("--data-dir", help="folder of MNIST; if not given, ../shared/data "
                        "where it is there, else data")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--scaling", action="store_true", help="measure cost as work grows")
    parser.add_argument("--cost", nargs="+", metavar=("DATASET", "N"),
                        help="measure the seconds of one network of so many images")
    args = parser.parse_args()
    root = args.data_dir
    if root is None:
        shared = ASSETS.parent.parent / "shared" / "data"
        root = str(shared) if (shared / "MNIST").is_dir() else "data"
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    with tempfile.TemporaryDirectory() as out:
        words = ["--dataset", "mnist", "--data-dir", root, "-o", out,
                 "--threads", str(threads)]
        run = common.start(vae.parse_args(words))
        data = common.load_dataset(run)
        facts = machine(run)
        if args.scaling:
            rows = scaling(data, threads)
            common.write(ASSETS / "scaling.json",
                         {"command": "assets/bench.py --scaling", **facts, "rows": rows})
            common.write(ASSETS / "scaling.png", draw_scaling(rows))
        elif args.cost:
            dataset, *sizes = args.cost
            for n in map(int, sizes):
                record_cost(network_cost(dataset, root, n), {**facts, "threads": 1})
        else:
            facts["rows"] = side_by_side(data, run, root, args.rounds)
            record(facts)
        run.release()


if __name__ == "__main__":
    try:
        main()
    except common.Mistake as mistake:
        raise SystemExit(f"bench.py: {mistake}") from None
