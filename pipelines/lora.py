"""LoRA on any diffusers network: add, switch off, read, write. peft is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from flowrl.errors import UserError


def add_lora(module: torch.nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze ``module`` and add float32 LoRA layers to the linear layers whose names end in ``targets``.

    The added update is (alpha / rank) B A x with B = 0, so the network's output does not change; A is drawn from ``seed``.
    """
    from peft import LoraConfig

    module.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(config)  # type: ignore[operator]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def lora_off(module: torch.nn.Module) -> Iterator[None]:
    """Run the network without its LoRA layers: the reference policy, at no memory cost."""
    module.disable_adapters()  # type: ignore[operator]
    try:
        yield
    finally:
        module.enable_adapters()  # type: ignore[operator]


def save_lora(pipeline_class: Any, module_name: str, module: torch.nn.Module, folder: str) -> None:
    """Write ``pytorch_lora_weights.safetensors`` with rank and alpha, so that ``load_lora_weights(folder)`` takes it."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    state = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(module).items()}
    layers = {f"{module_name}_lora_layers": state}
    metadata = _collate_lora_metadata({module_name: module})
    pipeline_class.save_lora_weights(folder, safe_serialization=True, **layers, **metadata)


def load_lora(pipe: Any, folder: str, options: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Load ``pytorch_lora_weights.safetensors`` of a folder with the pipeline's own ``load_lora_weights`` and ``options``.

    Raises UserError for a file that cannot be read, that changes a text encoder too (``lora_off`` would leave that in), or
    that has no layer of this pipeline: diffusers would go on without it.
    """
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError, safe_open

    logging: Any = diffusers_logging
    file = Path(folder) / "pytorch_lora_weights.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error}); export or download it again") from error
    spoken = [name for name in names if name.startswith("text_encoder")]
    if spoken:
        raise UserError(
            f"{file}: changes a text encoder as well ({spoken[0]}); only LoRAs of the denoising network are judged"
        )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it says of every text encoder that there is nothing for it, which is as it should be
    try:
        pipe.load_lora_weights(folder, **options)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: does not fit {type(pipe).__name__}: {error}") from error
    finally:
        logging.set_verbosity(level)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if not any("lora_" in name for part in networks for name, _ in part.named_parameters()):
        raise UserError(f"{file}: has no layer of {type(pipe).__name__}; it belongs to another model")
