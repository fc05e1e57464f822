"""An independent implementation of the model in plain PyTorch, to compare logits with."""

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, mlp_dim, num_heads):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.hidden = nn.Linear(width, mlp_dim)
        self.output = nn.Linear(mlp_dim, width)

    def forward(self, x):
        y = self.attention_norm(x)
        y, scores = self.attention(y, y, y, average_attn_weights=False)
        x = x + y
        y = self.output(nn.functional.gelu(self.hidden(self.mlp_norm(x)), approximate="none"))
        return x + y, scores


class TorchVisionTransformer(nn.Module):
    """Raw pixels `(B, H, W, C)` to logits `(B, num_classes)` and scores `(B, L, A, T, T)`."""

    def __init__(
        self, image_shape, num_classes, patch_size, embed_dim, mlp_dim, num_heads, depth,
        pooling="token",
    ):  # fmt: skip
        super().__init__()
        self.pooling = pooling
        height, width, channels = image_shape
        tokens = (height // patch_size) * (width // patch_size) + (pooling == "token")
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        # A convolution with stride P reads each patch once: the usual implementation in PyTorch.
        self.embedding = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.position = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, mlp_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        x = (images.float() - self.mean) / self.deviation
        x = self.embedding(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.pooling == "token":
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position
        scores = []
        for block in self.blocks:
            x, block_scores = block(x)
            scores.append(block_scores)
        x = self.norm(x)
        read = x[:, 0] if self.pooling == "token" else x.mean(dim=1)
        return self.head(read), torch.stack(scores, dim=1)


def reference_of(model, train_images, **sizes):
    """The reference with the weights of a Keras model and the statistics of its training images."""
    reference = TorchVisionTransformer(**sizes).eval()

    def weights(name):
        return [torch.tensor(np.array(array)) for array in model.get_layer(name).get_weights()]

    def copy_norm(ours, name):
        ours.weight.data, ours.bias.data = weights(name)

    def copy_dense(ours, name):
        kernel, bias = weights(name)
        ours.weight.data, ours.bias.data = kernel.T.contiguous(), bias

    pixels = train_images.reshape(-1, train_images.shape[-1]).astype("float64")
    reference.mean = torch.tensor(pixels.mean(axis=0)).float()
    reference.deviation = torch.tensor(pixels.std(axis=0)).float()

    kernel, bias = weights("patch_embedding")
    side, channels = sizes["patch_size"], sizes["image_shape"][-1]
    kernel = kernel.reshape(side, side, channels, -1).permute(3, 2, 0, 1)
    reference.embedding.weight.data, reference.embedding.bias.data = kernel.contiguous(), bias
    if reference.pooling == "token":
        (reference.class_token.data,) = weights("class_token")
    (reference.position.data,) = weights("position_embedding")
    width = sizes["embed_dim"]
    for number, block in enumerate(reference.blocks, start=1):
        copy_norm(block.attention_norm, f"block_{number}_attention_norm")
        # Query, key and value have kernels (D, A, D / A), the output (A, D / A, D).
        *inward, output_kernel, output_bias = weights(f"block_{number}_attention")
        kernels, biases = inward[0::2], inward[1::2]
        block.attention.in_proj_weight.data = torch.cat([k.reshape(width, -1).T for k in kernels])
        block.attention.in_proj_bias.data = torch.cat([b.reshape(-1) for b in biases])
        block.attention.out_proj.weight.data = output_kernel.reshape(-1, width).T.contiguous()
        block.attention.out_proj.bias.data = output_bias
        copy_norm(block.mlp_norm, f"block_{number}_mlp_norm")
        copy_dense(block.hidden, f"block_{number}_mlp_hidden")
        copy_dense(block.output, f"block_{number}_mlp_output")
    copy_norm(reference.norm, "norm")
    copy_dense(reference.head, "head")
    return reference
