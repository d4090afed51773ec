"""The ground floor: a few wide differentiable operators, each a folder with its contract and its truth."""

from mtml_fast.ops._define import OPERATORS as OPERATORS
from mtml_fast.ops._route import backend as backend
from mtml_fast.ops.gradient_combine import gradient_combine as gradient_combine
from mtml_fast.ops.gradient_gram import gradient_gram as gradient_gram
from mtml_fast.ops.heads import heads as heads
from mtml_fast.ops.heads_loss import heads_loss as heads_loss
from mtml_fast.ops.mlp_adapt import mlp_adapt as mlp_adapt
from mtml_fast.ops.mlp_adapt import mlp_adapt_mean as mlp_adapt_mean
from mtml_fast.ops.sgd_step import sgd_step as sgd_step
