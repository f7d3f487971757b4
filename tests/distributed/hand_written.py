"""Hand-written models, each with something that sharding must know how to treat."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject
from tests import models


class VisionTransformer(nn.Module):
    """The shape of timm's ViT: a class token and positions beside blocks in an ``nn.Sequential``."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """The shape of LitGPT's GPT: ``transformer`` is an ``nn.ModuleDict``, its blocks sit under ``h``."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.attn, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.attn(self.norm_1(x)).chunk(3, -1)
            return x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(16, models.VOCAB, bias=False)
        blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(models.VOCAB, 16), "h": blocks, "ln_f": nn.LayerNorm(16)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class ReadsItsTable(GPT):
    """Ties by reading the embedding's weight, past its forward."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x)
        return self.transformer["ln_f"](x) @ self.transformer["wte"].weight.t() + 0 * self.lm_head(x)


class TwoSided(nn.Module):
    """An adapted layer that only odd inputs reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.odd(y) if x[0, 0] > 0 else y


class Scalars(nn.Module):
    """Blocks of odd sizes with a scalar each, and one beside them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.gate = nn.Linear(5, 7), nn.Linear(7, 5), nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.down(self.up(x).tanh())

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.scale = nn.Sequential(self.Block(), self.Block()), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.blocks(x)


class Routed(nn.Module):
    """Blocks that reach one of two adapted layers, by the sign of their input, and never a third."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("even", "odd", "never")})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.experts["odd" if x[0, 0] > 0 else "even"](x)[:, :1] * 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Outside(nn.Module):
    """An adapted model, a head tied to its embedding, and a frozen head, both outside of it."""

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__()
        self.model = inject(models.llama(), config)
        self.tied = nn.Linear(32, models.VOCAB, bias=False)
        self.tied.weight = self.model.model.embed_tokens.weight
        self.frozen = models._seeded(lambda: nn.Linear(32, 3)).requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=batch).last_hidden_state
        return self.tied(hidden).square().mean() + self.frozen(hidden).square().mean()


class Positions(nn.Module):
    """A buffer that no checkpoint holds, and, in a subclass, the code to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("scale", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


class Computed(Positions):
    def reset_parameters(self) -> None:
        self.scale.copy_(torch.arange(4.0))
