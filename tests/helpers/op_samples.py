"""A call of every operator of the table, and nodes of single operators."""

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten
X = object()  # where a sample's input goes


def t(*shape, seed=1):
    """Multiples of 1/64, which every dtype of these tests holds."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * 64).round() / 64


@dataclass(frozen=True)
class PerChannel:
    """An argument with one value for each channel."""

    tensor: torch.Tensor


class Sample:
    """A call: X is an input of this shape. channels: its dimension, and the result's."""

    def __init__(self, shape, *args, at="default", channels=(1, 1), **kwargs):
        self.shape, self.args, self.kwargs = shape, args, kwargs
        self.at, self.channels = at, channels

    def node(self, name):
        """The call as a node, on an input that is a placeholder."""
        graph = fx.Graph()
        x = graph.placeholder("x")
        args, kwargs = self._filled(x, lambda channel: channel.tensor)
        target = getattr(getattr(aten, name), self.at)
        node = graph.call_function(target, args, kwargs)
        graph.output(node)
        return node

    def run(self, name, x, order=None, seed=0):
        """order: of the channels, in which arguments with a value for each are given."""
        args, kwargs = self._filled(x, lambda c: c.tensor if order is None else c.tensor[order])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(getattr(aten, name), self.at)(*args, **kwargs)

    def _filled(self, x, of_channel):
        def fill(a):
            if isinstance(a, PerChannel):
                return of_channel(a)
            if isinstance(a, torch.Tensor):
                return a.clone()
            return (x.clone() if isinstance(x, torch.Tensor) else x) if a is X else a

        return pytree.tree_map(fill, (self.args, self.kwargs))


def same(names, sample):
    return dict.fromkeys(names.split(), sample)


MAP = (2, 4, 6, 5)


def recurrent(gates, state):
    """One sample through two layers, with dropout between them."""
    layer = [t(gates * 3, 3), t(gates * 3, 3), t(gates * 3), t(gates * 3)]
    options = True, 2, 0.5, True, False, True  # biases, layers, dropout, train, ..., batch first
    return Sample((1, 5, 3), X, state, [*layer, *layer], *options, at="input")


SAMPLES = {
    "linear": Sample((3, 5), X, t(4, 5), torch.zeros(4).double()),
    "addmm": Sample((3, 5), torch.zeros(4).double(), X, t(5, 4)),
    "mm": Sample((3, 5), X, t(5, 4)),
    "matmul": Sample((2, 3, 5), X, t(5, 4)),
    "bmm": Sample((2, 3, 5), X, t(2, 5, 4)),
    "baddbmm": Sample((2, 3, 5), torch.zeros(2, 3, 4).double(), X, t(2, 5, 4)),
    "einsum": Sample((3, 5), "ij,jk->ik", [X, t(5, 4)]),
    "scaled_dot_product_attention": Sample((3, 2, 4, 6), X, X, X, None, 0.5),
    "conv1d": Sample((2, 3, 7), X, t(4, 3, 2)),
    "conv2d": Sample((2, 3, 7, 6), X, t(4, 3, 2, 3)),
    "conv3d": Sample((2, 3, 4, 5, 6), X, t(4, 3, 2, 1, 3)),
    "conv_transpose1d": Sample((2, 3, 7), X, t(3, 3, 1)),
    "conv_transpose2d": Sample((2, 3, 7, 6), X, t(3, 3, 1, 1), at="input"),
    "conv_transpose3d": Sample((2, 3, 4, 5, 6), X, t(3, 3, 1, 1, 1), at="input"),
    "convolution": Sample(
        (2, 3, 7, 6), X, t(4, 3, 2, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    ),
    "batch_norm": Sample(
        MAP, X, *(PerChannel(t(4, seed=i).abs() + i) for i in range(1, 5)), True, 0.1, 1e-5, False
    ),
    "instance_norm": Sample(
        MAP, X, *(PerChannel(t(4, seed=i).abs() + i) for i in range(1, 5)), True, 0.1, 1e-5, False
    ),
    "layer_norm": Sample(
        (2, 3, 4), X, [4], *(PerChannel(t(4, seed=i)) for i in (1, 2)), channels=(2, 2)
    ),
    "rms_norm": Sample((2, 3, 4), X, [4], PerChannel(t(4)), channels=(2, 2)),
    "max_pool2d": Sample(MAP, X, [2, 3], [1, 2]),
    "avg_pool2d": Sample(MAP, X, [2, 3], [1, 2]),
    **same("dropout feature_dropout alpha_dropout", Sample(MAP, X, 0.2, True)),
    "lstm": recurrent(4, [t(2, 1, 3), t(2, 1, 3)]),
    "gru": recurrent(3, t(2, 1, 3)),
    **same("rnn_tanh rnn_relu", recurrent(1, t(2, 1, 3))),
    "rrelu": Sample(MAP, X, 0.1, 0.9, True),
    "prelu": Sample(MAP, X, PerChannel(t(4))),
    **same(
        "gelu hardswish hardsigmoid mish selu celu relu6 log_sigmoid detach alias lift_fresh_copy "
        "clone contiguous",
        Sample(MAP, X),
    ),
    **same("softmax log_softmax", Sample(MAP, X, 1, at="int")),
    "to": Sample(MAP, X, torch.float32, at="dtype"),
    "_to_copy": Sample(MAP, X, dtype=torch.float32),
    **same("view reshape _unsafe_view", Sample((2, 3, 4), X, [2, 12])),
    "flatten": Sample((2, 3, 4), X, 0, 1, at="using_ints"),
    "unflatten": Sample((2, 3, 4), X, 2, [2, 2], at="int"),
    "unsqueeze": Sample((2, 3), X, 1),
    "squeeze": Sample((2, 1, 3), X, 1, at="dim"),
    "permute": Sample((2, 3, 4), X, [0, 2, 1], channels=(2, 1)),
    "transpose": Sample((2, 3, 4), X, 1, 2, at="int", channels=(1, 2)),
    **same("movedim moveaxis", Sample((2, 3, 4), X, 1, -1, at="int", channels=(1, 2))),
    **same("swapaxes swapdims", Sample((2, 3, 4), X, 1, 2, channels=(1, 2))),
    **same("t numpy_T mT adjoint", Sample((2, 3), X)),
    "slice": Sample((2, 4, 6), X, 2, 1, 5, 2, at="Tensor"),
    "chunk": Sample((2, 6, 3), X, 2, 1),
    "split": Sample((2, 6, 3), X, 2, 1, at="Tensor"),
    "split_with_sizes": Sample((2, 6, 3), X, [1, 5], 1),
    "glu": Sample((2, 6, 3), X, 1),
    **same("new_ones new_zeros new_empty", Sample((2, 3), X, [4])),
    "new_full": Sample((2, 3), X, [4], 7.0),
    **same("zeros_like ones_like empty_like rand_like randn_like sym_numel", Sample((2, 3), X)),
    "full_like": Sample((2, 3), X, 7.0),
    "sym_size": Sample((2, 3), X, 1, at="int"),
    "_assert_scalar": Sample((), 1, "no"),
    "_assert_tensor_metadata": Sample((2, 3), X, [2, 3], [3, 1], torch.float64),
    "sym_constrain_range": Sample((), 3, min=2, max=4),
    "sym_constrain_range_for_size": Sample((), 3, min=2, max=4),
}
SAYS_POSITIONS = {
    "group_norm", "channel_shuffle", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum",
    "amax", "cat", "pad", "constant_pad_nd",
}  # fmt: skip


def call(target, *args, **kwargs):
    """A node; args that are strings are placeholders."""
    graph = fx.Graph()
    known = {}

    def fill(a):
        if isinstance(a, str) and a.startswith("%"):
            known[a] = known.get(a) or graph.placeholder(a[1:])
            return known[a]
        return a

    args, kwargs = pytree.tree_map(fill, (args, kwargs))
    node = graph.call_function(target, args, kwargs)
    graph.output(node)
    return node
