"""Conversations that remember: multi-round image generation that reads the whole history.

Importing the package makes one choice for the whole process: attention never runs on cuDNN. There, with a mask, torch
2.11 gives gradients that are not numbers where a sequence ends in the middle of a tile of 128 and scores are low
(https://github.com/pytorch/pytorch/issues/196678), and every new length costs seconds.
"""

import torch

torch.backends.cuda.enable_cudnn_sdp(False)
