"""What every process of a test imports, once, before it is forked."""

import accelerate
import diffusers
import flowrl.pipelines.sd3
import peft
import torch
import transformers
from diffusers import StableDiffusion3Pipeline

import flowrl.evaluation.report
import flowrl.training.build
import flowrl.training.learners.direct
import flowrl.training.learners.forward
import flowrl.training.learners.trajectory
import flowrl.training.run
import tests.training.toy

torch.set_num_threads(1)
LOADED = (accelerate, diffusers, peft, transformers, flowrl, tests, StableDiffusion3Pipeline)
