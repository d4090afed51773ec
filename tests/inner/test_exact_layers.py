"""The functional plan's meta-gradient, layer by layer, against a plain loop in float64.

torch.func.vmap has silently wrong second derivatives for some of torch's own layers; the plan must have none.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mtml_fast as mf
from tests.algorithms.test_maml import episode, hand_written_loss


class Apply(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def after_linear(layer, width=8):
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh(), nn.Linear(width, 3))


def after_conv(layer, width):
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Tanh(), layer, nn.Flatten(), nn.Linear(width, 3)
    )


def recurrent(cell, width=8):
    outputs = Apply(lambda x, cell: cell(x)[0].flatten(1), cell)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), outputs, nn.Linear(width, 3))


LAYERS = {
    "batch_norm": lambda: after_linear(nn.BatchNorm1d(8)),
    "batch_norm_3d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3, 1, 1)), nn.BatchNorm3d(2), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)
    ),
    "layer_norm": lambda: after_linear(nn.LayerNorm(8)),
    "layer_norm_plain": lambda: after_linear(nn.LayerNorm(8, elementwise_affine=False)),
    "rms_norm": lambda: after_linear(nn.RMSNorm(8)),
    "group_norm": lambda: after_linear(nn.GroupNorm(2, 8)),
    "instance_norm": lambda: after_conv(nn.InstanceNorm1d(4, affine=True), 16),
    "instance_norm_tracked": lambda: after_conv(nn.InstanceNorm1d(4, track_running_stats=True), 16),
    "local_response_norm": lambda: after_conv(nn.LocalResponseNorm(2), 16),
    "softmax": lambda: after_linear(nn.Softmax(1)),
    "log_softmax": lambda: after_linear(nn.LogSoftmax(1)),
    "prelu": lambda: after_linear(nn.PReLU(8)),
    "glu": lambda: after_linear(nn.GLU(1), 4),
    "mish": lambda: after_linear(nn.Mish()),
    "bilinear": lambda: nn.Sequential(Apply(lambda x, b: b(x, x), nn.Bilinear(6, 6, 4)), nn.Linear(4, 3)),
    "conv_strided": lambda: after_conv(nn.Conv1d(4, 4, 3, stride=2), 4),
    "conv_grouped": lambda: after_conv(nn.Conv1d(4, 4, 2, groups=2), 12),
    "conv_transposed": lambda: after_conv(nn.ConvTranspose1d(4, 2, 2), 10),
    "average_pool": lambda: after_conv(nn.AvgPool1d(2), 8),
    "adaptive_pool": lambda: after_conv(nn.AdaptiveAvgPool1d(2), 8),
    "max_pool": lambda: after_conv(nn.MaxPool1d(2), 8),
    "upsample": lambda: after_conv(nn.Upsample(scale_factor=2, mode="linear"), 32),
    "lstm": lambda: recurrent(nn.LSTM(3, 4, batch_first=True)),
    "gru": lambda: recurrent(nn.GRU(3, 4, batch_first=True)),
    "embedding": lambda: nn.Sequential(
        Apply(lambda x, table: table((x.abs() * 10).long().clamp(max=9)).flatten(1), nn.Embedding(10, 3)),
        nn.Linear(18, 3),
    ),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "cosine": lambda: Apply(
        lambda x, body, head: F.cosine_similarity(body(x)[:, None], head.weight[None], dim=2),
        nn.Linear(6, 4),
        nn.Linear(4, 3, bias=False),
    ),
    "normalize": lambda: after_linear(Apply(lambda x: F.normalize(x, dim=1))),
    "weight_norm": lambda: nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
}
# what vmap cannot take runs task by task, and says so
LOOPED = {"lstm", "gru"}


@pytest.mark.filterwarnings("ignore:.*performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("name", LAYERS)
def test_meta_gradient(name):
    torch.manual_seed(0)
    model = LAYERS[name]().double()
    batch = episode((6,))
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.grad(hand_written_loss(model, batch, 0.3, 2, F.cross_entropy), model.parameters())
    maml = mf.MAML(model, lr=0.3, steps=2, plan="functional")
    if name in LOOPED:
        with pytest.warns(RuntimeWarning, match="runs one task after the other, torch.func.vmap cannot take it"):
            maml(batch)
    mine = torch.autograd.grad(maml(batch).loss, model.parameters())
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
