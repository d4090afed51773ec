"""The library of operators and its native part."""

import torch

LIB = torch.library.Library("mtml_fast", "DEF")
