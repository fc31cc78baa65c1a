"""Trains an Energy Transformer to fill in hidden patches of digits; draws image and energy by step.

    python experiments/hopfield/complete.py --config=configs/hopfield/completion.py

Writes completion.png and results/completion.json into this folder (or --out=FOLDER).
"""

import argparse
import functools
import json
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from memseq import config as configs
from memseq.layers import EnergyTransformerBlock

PATCH, SIDE = 2, 8
PATCHES = (SIDE // PATCH) ** 2


def to_patches(images):
    """[n, 8, 8] -> [n, 16, 4]."""
    n = SIDE // PATCH
    x = images.reshape(-1, n, PATCH, n, PATCH)
    return x.transpose(0, 1, 3, 2, 4).reshape(-1, PATCHES, PATCH * PATCH)


def to_images(patches):
    """The inverse of `to_patches`, for [..., 16, 4]."""
    n, lead = SIDE // PATCH, patches.shape[:-2]
    x = patches.reshape(-1, n, n, PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    return x.reshape(*lead, SIDE, SIDE)


class Completion(nn.Module):
    """Patches and positions in, one Energy Transformer block down its energy, patches out."""

    features: int
    options: tuple = ()

    def setup(self):
        self.embedding_in = nn.Dense(self.features)
        self.head = nn.Dense(PATCH * PATCH)
        normal = nn.initializers.normal(0.02)
        self.token = self.param("token_bias", normal, (self.features,))
        self.place = self.param("place_bias", normal, (PATCHES, self.features))
        self.block = EnergyTransformerBlock(self.features, **dict(self.options))

    def __call__(self, patches, hidden):
        """Patches [n, steps + 1, 16, 4] and energies [n, steps + 1] along the descent."""
        x = jnp.where(hidden[..., None], self.token, self.embedding_in(patches)) + self.place
        _, energies, tokens = self.block.descend(x)
        return self.head(self.block.normalize(tokens)), energies


def hide(key, count, hidden):
    """bool [count, 16] with `hidden` patches True in each row."""
    order = jax.random.uniform(key, (count, PATCHES)).argsort(-1)
    return order < hidden


def error(patches, filled, hidden):
    """Mean squared error of the hidden patches."""
    return jnp.mean(jnp.square(filled - patches).mean(-1), where=hidden)


def train(config, model, data):
    """Parameters after AdamW on random hidden patches."""
    settings = config.training
    steps = len(data) // settings.batch
    schedule = optax.cosine_decay_schedule(settings.learning_rate, steps * settings.epochs)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=settings.weight_decay)
    )
    key = jax.random.key(config.seed)
    params = model.init(key, data[:1], hide(key, 1, config.hidden_patches))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params, state, key):
        order = jax.random.permutation(key, len(data))[: steps * settings.batch]

        def step(carry, chosen):
            params, state = carry
            rows, key = chosen
            hidden = hide(key, settings.batch, config.hidden_patches)

            def loss(params):
                filled, _ = model.apply(params, data[rows], hidden)
                return error(data[rows], filled[:, -1], hidden)

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        chosen = order.reshape(steps, -1), jax.random.split(key, steps)
        (params, state), losses = jax.lax.scan(step, (params, state), chosen)
        return params, state, losses.mean()

    for i in range(settings.epochs):
        params, state, loss = epoch(params, state, jax.random.fold_in(key, i))
        if (i + 1) % max(settings.epochs // 10, 1) == 0:
            print(f"epoch {i + 1}: error of hidden pixels {float(loss):.4f}", flush=True)
    return params


def draw(images, hidden, filled, energies, path):
    """Rows of images: what was shown, the hidden patches at some steps, the truth; and energies."""
    steps = energies.shape[1] - 1
    shown = sorted({0, 1, steps // 4, steps // 2, steps})
    rows = 5
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    panels = left.subplots(rows, len(shown) + 2)
    seen = to_images(np.broadcast_to(hidden[..., None], (*hidden.shape, PATCH * PATCH)))
    for i in range(rows):
        pictures = [np.where(seen[i], np.nan, images[i])]
        pictures += [np.where(seen[i], to_images(filled[i, s]), images[i]) for s in shown]
        pictures.append(images[i])
        for panel, picture in zip(panels[i], pictures, strict=True):
            panel.imshow(picture, cmap="gray_r", vmin=-1, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.set_facecolor("#cfe3f5")
    titles = ["shown", *(f"step {s}" for s in shown), "truth"]
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    axes = right.subplots()
    axes.plot(energies[:40].T - energies[:40, :1].T, color="C0", alpha=0.35)
    axes.set(xlabel="step", ylabel="energy above the start's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/hopfield/completion.py")
    parser.add_argument("--out", default=str(here))
    args, overrides = parser.parse_known_args()
    config = configs.load(args.config, overrides)
    images = load_digits().images / 8 - 1
    order = np.random.default_rng(config.seed).permutation(len(images))
    cut = int(len(images) * config.train_share)
    patches = to_patches(images[order]).astype(np.float32)
    model = Completion(config.features, tuple(config.layer.to_dict().items()))
    start = time.perf_counter()
    params = train(config, model, jnp.asarray(patches[:cut]))
    seconds = time.perf_counter() - start
    test = patches[cut:]
    hidden = np.asarray(hide(jax.random.key(config.seed + 1), len(test), config.hidden_patches))
    filled, energies = map(np.asarray, jax.jit(model.apply)(params, test, hidden))
    by_step = [float(error(test, filled[:, s], hidden)) for s in range(filled.shape[1])]
    mean = np.broadcast_to(patches[:cut].mean(0), test.shape)
    result = {
        "error of hidden pixels by step": [round(e, 4) for e in by_step],
        "error of the mean training image": round(float(error(test, mean, hidden)), 4),
        "share of steps that lower the energy": float((np.diff(energies) < 0).mean()),
        "seconds": round(seconds, 1),
    }
    out = pathlib.Path(args.out)
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "results" / "completion.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(to_images(test), hidden, filled, energies, out / "completion.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
