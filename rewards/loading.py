"""Loading of networks for rewards: a folder or a hub id, safetensors only, no remote code, nothing left random.

transformers fills weights that a checkpoint lacks with random numbers and says so in its log; a reward that stands on
random numbers looks healthy, so here it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowrl.errors import UserError

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


class OnDevice:
    """Networks of a reward and the device they work on; a reward that is not needed for a while can leave it.

    device: "auto" (cuda where there is one), "cpu", "cuda:1" ...
    """

    def __init__(self, device: str = "auto") -> None:
        import torch

        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.device = torch.device(chosen)
        except RuntimeError as error:
            raise UserError(f"rewards: device is {device!r}; use auto, cpu, cuda or cuda:N") from error
        self.networks: list[torch.nn.Module] = []

    def hold(self, network: torch.nn.Module) -> Any:
        """Freeze a network, put it on the device, and remember it for ``offload``."""
        network.requires_grad_(False).eval().to(self.device)
        self.networks.append(network)
        return network

    def offload(self) -> None:
        """Move the networks to main memory."""
        for network in self.networks:
            network.to("cpu")

    def onload(self) -> None:
        """Move the networks back to the device."""
        for network in self.networks:
            network.to(self.device)


def load_network(
    model_class: Any, source: str, reward: str, dtype: Dtype = "float32", optional: tuple[str, ...] = ()
) -> Any:
    """``model_class.from_pretrained`` of a folder or hub id, from safetensors alone.

    optional: starts of the names of weights that the reward does not use and that may be missing.

    Raises UserError where the folder or its weights are missing, or weights of the network are not in the file (another
    architecture).
    """
    import torch

    _check_folder(source, reward)
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise UserError(f"{reward}: dtype is {dtype!r}; use {', '.join(types)}")
    with quiet():
        try:
            network, report = model_class.from_pretrained(
                source, use_safetensors=True, trust_remote_code=False, dtype=types[dtype], output_loading_info=True
            )
        except _BROKEN as error:
            raise UserError(_unusable(source, reward, model_class.__name__, error)) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(optional))
    if missing:
        raise UserError(
            f"{reward}: {source!r} lacks {len(missing)} weights of {type(network).__name__} ({missing[0]}, ...): it holds "
            "another network; give the checkpoint that this reward asks for"
        )
    return network


def load_tokenizer(source: str, reward: str) -> Any:
    """The checkpoint's tokenizer. Raises UserError where its files are missing."""
    from transformers import AutoTokenizer

    _check_folder(source, reward)
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except _BROKEN as error:
            raise UserError(_unusable(source, reward, "a tokenizer", error)) from error


def load_image_processor(source: str, reward: str) -> Any:
    """The checkpoint's image processor on PIL and numpy, which needs no torchvision. Raises UserError without one."""
    from transformers import AutoImageProcessor

    _check_folder(source, reward)
    with quiet():
        try:
            loader: Any = AutoImageProcessor
            return loader.from_pretrained(source, backend="pil", trust_remote_code=False)
        except _BROKEN as error:
            raise UserError(_unusable(source, reward, "an image processor", error)) from error


def load_head(path: str, reward: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Named float32 tensors of a small safetensors file. shapes: what must be in it, -1 for any size.

    path: the file, a folder with ``head.safetensors``, or ``owner/name/file`` on the hub. Raises UserError for a file
    that is missing, is no safetensors, or holds other tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    file = file / "head.safetensors" if file.is_dir() else file
    if not file.is_file() and path.count("/") >= 2 and not path.startswith((".", "/", "~")):
        file = _from_hub(path, reward)
    if not file.is_file():
        advice = "convert an upstream .pt with flowrl rewards convert"
        raise UserError(f"{reward}: no file {str(file)!r}; give a .safetensors of the head ({advice})")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{reward}: {str(file)!r} is no safetensors file ({error}); convert an upstream .pt with flowrl rewards convert"
        ) from error
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if (
            found is None
            or len(found) != len(shape)
            or any(w not in (-1, g) for w, g in zip(shape, found, strict=True))
        ):
            raise UserError(
                f"{reward}: {str(file)!r}: expected tensor {name!r} of shape {list(shape)}, found "
                f"{'none' if found is None else list(found)}; it is another head"
            )
    return {name: tensors[name].float() for name in shapes}


def read_config(folder: str, file: str, reward: str) -> dict[str, Any]:
    """A JSON object from a local folder. Raises UserError where it is missing or wrong."""
    path = Path(folder) / file
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{reward}: cannot read {str(path)!r}: {error}; give the folder that the model was saved to"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{reward}: {str(path)!r} must be a JSON object")
    return value


def pooled(output: Any) -> torch.Tensor:
    """Features of ``get_image_features`` and the like: a tensor in transformers 4, an output object in 5."""
    import torch

    value: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return value


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports away; what matters of them is raised."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_folder(source: str, reward: str) -> None:
    local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if local and not Path(source).is_dir():
        raise UserError(f"{reward}: no folder {source!r}; give a folder with the model, or a hub id owner/name")


def _unusable(source: str, reward: str, what: str, error: BaseException) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{reward}: {source!r} cannot be loaded as {what}: {first}; give a folder written by save_pretrained (safetensors, "
        "with its preprocessor and tokenizer files), or a hub id that is downloaded or reachable"
    )


def _from_hub(path: str, reward: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, file = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (OSError, ValueError) as error:
        raise UserError(_unusable(path, reward, "a head", error)) from error
