"""Models that route already: their own experts, in the forms that models write."""

import torch
from torch import nn

SIZES = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "attention_dropout": 0.0,
}  # fmt: skip


def build(name):
    import transformers as tf

    torch.manual_seed(0)
    if name == "Qwen3Moe":
        config = tf.Qwen3MoeConfig(
            **SIZES, intermediate_size=32, moe_intermediate_size=12, head_dim=8, num_experts=4
        )
        model = tf.Qwen3MoeForCausalLM(config)
    else:
        model = tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=3)
        )
    with torch.no_grad():  # so that the model's own choices are not close
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


def ids(batch, length, seed=0):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


class Own(nn.Module):
    """Experts of its own, of which each row has one, two or all, in the forms that models write."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.up, self.down = (
            nn.Parameter(torch.randn(3, 6, 4)),
            nn.Parameter(torch.randn(3, 4, 6)),
        )
        self.last, self.form = nn.Linear(6, 6), form

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x + FORMS[self.form](self, x).view(x.shape))


def every(m, x):
    hidden = torch.einsum("td,edh->teh", x.flatten(0, 1), m.up).tanh()
    return torch.einsum("teh,ehd->td", hidden, m.down)


def every_in_place(m, x):
    hidden = torch.einsum("bsd,edh->bseh", x, m.up).tanh()
    return torch.einsum("bseh,ehd->bsed", hidden, m.down).sum(2)


def tiled(m, x):
    flat = x.flatten(0, 1)
    hidden = torch.bmm((flat.repeat(3, 1) * 0.5).view(3, -1, 6), m.up).tanh()
    return torch.bmm(hidden, m.down).sum(0)


def spread(m, x):
    flat = x.reshape(-1, 6)
    hidden = torch.matmul(flat.unsqueeze(0).expand(3, -1, -1), m.up).tanh()
    return torch.bmm(hidden, m.down).transpose(0, 1).sum(1)


def each(m, x):
    flat = x.flatten(0, 1)
    own = flat[:, :3].argmax(-1)
    hidden = torch.bmm(flat.unsqueeze(1), m.up[own]).tanh()
    return torch.bmm(m.down[own].transpose(1, 2), hidden.transpose(1, 2)).squeeze(2)


def two(m, x):
    flat = x.flatten(0, 1)
    own = flat[:, :3].topk(2).indices
    hidden = torch.einsum("bedh,bd->beh", m.up[own], flat).tanh()
    return torch.einsum("beh,behd->bed", hidden, m.down[own]).sum(1)


def repeated(m, x):
    flat = x.flatten(0, 1)
    own = flat[:, :3].topk(2).indices.reshape(-1)
    rows = flat.repeat_interleave(2, dim=0)
    hidden = torch.bmm(rows.unsqueeze(1), m.up[own]).tanh()
    return torch.bmm(hidden, m.down[own]).squeeze(1).view(-1, 2, 6).sum(1)


FORMS = {f.__name__: f for f in (every, every_in_place, tiled, spread, each, two, repeated)}
