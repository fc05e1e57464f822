"""The model as different libraries write it: each function returns one training step.

All have the sizes, dropout, optimizer and loss of the baseline recipe, take raw uint8 pixels and
normalize them.
"""

import numpy as np

SIDE, CLASSES, PATCH, WIDTH, HIDDEN, HEADS, DEPTH, RATE = 32, 10, 4, 256, 512, 8, 6, 0.2
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 0.01


def operations_per_image():
    """Floating point operations of a training step on one image, last block and all."""
    tokens = (SIDE // PATCH) ** 2 + 1
    block = 4 * WIDTH**2 + 2 * WIDTH * HIDDEN + 2 * tokens * WIDTH
    forward = tokens * DEPTH * block + (tokens - 1) * PATCH**2 * 3 * WIDTH
    return 3 * 2 * forward


def batch(size, side=SIDE):
    """Noise as images `(B, H, W, C)` and their labels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, side, side, 3), dtype="uint8")
    return images, random.integers(0, CLASSES, size)


def ours(batch_size, dtype, augmentation=None, **sizes):
    """`sizes` are arguments of `VisionTransformer` that differ from the baseline's."""
    import keras

    from keras_vit import VisionTransformer
    from keras_vit.training import compile_model
    from keras_vit_cli.recipes import RECIPES

    keras.utils.set_random_seed(0)
    model = VisionTransformer(augmentation=augmentation, dtype=dtype, **sizes)
    compile_model(model, RECIPES["baseline"])
    images, labels = batch(batch_size, model.input_shape[1])
    return lambda: model.train_on_batch(images, labels)


def stock_keras(batch_size, dtype, jit_compile):
    """Keras's own layers, with the augmentation that comes nearest: a flip and a zoom."""
    import keras

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    layers = keras.layers
    images = x = keras.Input((SIDE, SIDE, 3))
    x = layers.RandomFlip("horizontal", dtype="float32")(x)
    x = layers.RandomZoom((-0.2, 0.0), dtype="float32")(x)
    x = layers.Normalization(dtype="float32")(x)
    x = layers.Conv2D(WIDTH, PATCH, PATCH)(x)
    x = layers.Reshape((-1, WIDTH))(x)
    x = layers.ZeroPadding1D((1, 0))(x)
    places = layers.Embedding(x.shape[1], WIDTH)
    x = x + places(np.arange(x.shape[1])[None])
    x = layers.Dropout(RATE)(x)
    for _ in range(DEPTH):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=RATE)(y, y)
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dropout(RATE)(layers.Dense(HIDDEN, activation="gelu")(y))
        x = x + layers.Dropout(RATE)(layers.Dense(WIDTH)(y))
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    logits = layers.Dense(CLASSES, dtype="float32")(x[:, 0])
    return _keras_step(keras.Model(images, logits), batch_size, jit_compile)


def keras_hub(batch_size, dtype, jit_compile):
    """KerasHub's `ViTBackbone` with a head on its class token, and the same augmentation."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = x = keras.Input((SIDE, SIDE, 3))
    x = layers.RandomFlip("horizontal")(x)
    x = layers.Rescaling(1 / 255)(layers.RandomZoom((-0.2, 0.0))(x))
    backbone = keras_hub.models.ViTBackbone(
        (SIDE, SIDE, 3),
        PATCH,
        DEPTH,
        HEADS,
        WIDTH,
        HIDDEN,
        dropout_rate=RATE,
        attention_dropout=RATE,
        dtype=dtype,
    )
    logits = layers.Dense(CLASSES, dtype="float32")(backbone(x)[:, 0])
    return _keras_step(keras.Model(images, logits), batch_size, jit_compile)


def _keras_step(model, batch_size, jit_compile):
    import keras

    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    images, labels = batch(batch_size)
    return lambda: model.train_on_batch(images, labels)


def pytorch(batch_size, dtype, attention, compiled=False):
    """Plain PyTorch with a flip of each image; `attention` is "module" or "sdpa"."""
    import torch

    learn, device = _pytorch_learner(dtype, attention, compiled)
    images, labels = (torch.from_numpy(array).to(device) for array in batch(batch_size))
    return lambda: learn(images, labels).item()


def pytorch_epoch(batch_size, dtype, count, compiled=False):
    """An epoch of plain PyTorch over `count` images that lie on the GPU, shuffled there."""
    import torch

    learn, device = _pytorch_learner(dtype, "sdpa", compiled)
    images, labels = (torch.from_numpy(array).to(device) for array in batch(count))

    def epoch():
        for chosen in torch.randperm(len(images), device=device).split(batch_size):
            loss = learn(images[chosen], labels[chosen])
        return loss.item()

    return epoch


def ours_epoch(batch_size, dtype, count):
    """An epoch of `fit` over `count` images, as `train.py` calls it."""
    import keras

    from keras_vit import VisionTransformer
    from keras_vit.data.batches import batches_of
    from keras_vit.training import compile_model
    from keras_vit_cli.recipes import RECIPES

    keras.utils.set_random_seed(0)
    model = VisionTransformer(dtype=dtype)
    compile_model(model, RECIPES["baseline"])
    batches = batches_of(*batch(count), batch_size, seed=0)
    return lambda: model.fit(batches, shuffle=False, verbose=0)


def _pytorch_learner(dtype, attention, compiled):
    """A function of images `(B, H, W, C)` and labels that learns from them, and its device."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            heads = self.inward(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            rate = RATE if self.training else 0.0
            y = functional.scaled_dot_product_attention(*heads, dropout_p=rate)
            return self.outward(y.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
            if attention == "module":
                self.attention = nn.MultiheadAttention(WIDTH, HEADS, RATE, batch_first=True)
            else:
                self.attention = Attention()
            drop = nn.Dropout(RATE)
            lines = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
            self.mlp = nn.Sequential(lines[0], nn.GELU(), drop, lines[1], drop)

        def forward(self, x):
            y = self.norms[0](x)
            if attention == "module":
                x = x + self.attention(y, y, y, need_weights=False)[0]
            else:
                x = x + self.attention(y)
            return x + self.mlp(self.norms[1](x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
            self.token = nn.Parameter(0.2 * torch.randn(1, 1, WIDTH))
            self.position = nn.Parameter(0.2 * torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH))
            self.drop = nn.Dropout(RATE)
            self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
            self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, CLASSES)

        def forward(self, images):
            x = images.permute(0, 3, 1, 2).float() / 255
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
            x = self.embedding(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
            return self.head(self.norm(self.blocks(self.drop(x)))[:, 0])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device).train()
    options = {"weight_decay": WEIGHT_DECAY, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, **options)
    forward = torch.compile(model) if compiled else model

    def learn(images, labels):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "mixed_bfloat16"):
            loss = functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return learn, device


def matrix_product(dtype, side):
    """Eight products of two square matrices, the yardstick of what the machine can do."""
    import torch

    kind = torch.bfloat16 if dtype == "mixed_bfloat16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, side, side, device=device).to(kind)

    def step():
        for _ in range(8):
            product = a @ b
        return product[0, 0].item()  # A GPU answers only when it is done.

    return step


def product_operations(side):
    """Floating point operations of `matrix_product`'s step."""
    return 8 * 2 * side**3
