"""Names of parts: built-in tables of lazy ``module:attr`` strings, entry points of other packages, and files of one's
own.

Nothing is imported before it is resolved. A name is a registry key, ``package.module:attr``, or
``path/to/file.py:attr``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowrl.errors import UserError

PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "flux": "flowrl.pipelines.flux:FluxAdapter",
        "flux_kontext": "flowrl.pipelines.flux_kontext:FluxKontextAdapter",
        "qwen_image": "flowrl.pipelines.qwen_image:QwenImageAdapter",
        "sd3": "flowrl.pipelines.sd3:Sd3Adapter",
        "sdxl": "flowrl.pipelines.sdxl:StableDiffusionXLAdapter",
        "stable_diffusion": "flowrl.pipelines.stable_diffusion:StableDiffusionAdapter",
        "wan": "flowrl.pipelines.wan:WanAdapter",
        "wan_image": "flowrl.pipelines.wan_image:WanImageAdapter",
    }
)
REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "aesthetic": "flowrl.rewards.aesthetic:Aesthetic",
        "clip_similarity": "flowrl.rewards.similarity:ClipSimilarity",
        "clipscore": "flowrl.rewards.clip:ClipScore",
        "colour_class": "flowrl.rewards.pixels:ColourClass",
        "compositional": "flowrl.rewards.compositional:Compositional",
        "dino_similarity": "flowrl.rewards.similarity:DinoSimilarity",
        "geneval": "flowrl.rewards.geneval:GenEval",
        "hpsv2": "flowrl.rewards.clip:HpsV2",
        "hpsv3": "flowrl.rewards.ranking:HpsV3",
        "image_reward": "flowrl.rewards.image_reward:ImageReward",
        "jpeg": "flowrl.rewards.jpeg:JpegSize",
        "latent_model": "flowrl.rewards.latent_model:LatentModel",
        "moving_consistency": "flowrl.rewards.moving:MovingConsistency",
        "moving_direction": "flowrl.rewards.moving:MovingDirection",
        "moving_identity": "flowrl.rewards.moving:MovingIdentity",
        "moving_object": "flowrl.rewards.moving:MovingObject",
        "nsfw": "flowrl.rewards.safety:NsfwGate",
        "ocr": "flowrl.rewards.ocr:Ocr",
        "ocr_tesseract": "flowrl.rewards.ocr:TesseractOcr",
        "pickscore": "flowrl.rewards.clip:PickScore",
        "pixels": "flowrl.rewards.pixels:PixelStatistic",
        "pref_grpo": "flowrl.rewards.judge:PrefGrpo",
        "siglip2": "flowrl.rewards.clip:SigLip2",
        "statistics": "flowrl.rewards.statistics:ImageStatistics",
        "tiny_clip": "flowrl.rewards.tiny_clip:TinyClipScore",
        "unified_reward": "flowrl.rewards.judge:UnifiedReward",
        "video_flicker": "flowrl.rewards.video:VideoFlicker",
        "video_identity": "flowrl.rewards.video:VideoIdentity",
        "video_motion": "flowrl.rewards.video:VideoMotion",
        "video_reward": "flowrl.rewards.ranking:VideoReward",
        "vlm_rubric": "flowrl.rewards.judge:Rubric",
        "vlm_yes_no": "flowrl.rewards.judge:YesNo",
    }
)

FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "cells": "flowrl.rewards.embeddings:Cells",
        "clip": "flowrl.rewards.embeddings:Clip",
        "dino": "flowrl.rewards.embeddings:DinoV2",
        "siglip": "flowrl.rewards.embeddings:Siglip",
        "tiny_clip": "flowrl.rewards.embeddings:TinyClip",
    }
)
"""Networks whose features an evaluation measures diversity and distances in."""


def _engine(modules: Mapping[str, str]) -> Mapping[str, str]:
    """Map names to the engine's functions; a name stands for the function of that name, or is written name=function."""
    pairs = [(module, *item.partition("=")[::2]) for module, items in modules.items() for item in items.split()]
    return MappingProxyType({name: f"flowrl.advantage.{module}:{other or name}" for module, name, other in pairs})


ADVANTAGES: Mapping[str, str] = _engine(
    {
        "estimators": "grpo dr_grpo rloo lite_ppo gdpo",
        "anchors": "gigpo",
        "baselines": "poise v0 remax pass_at_k gpg",
        "branches": "branch_grpo tree_grpo seed_grpo",
        "local_terms": "mt_grpo a2tgpo capo_credit",
        "macro_returns": "ma_rlhf hae mt_ppo eapo",
        "normalisation": "bnpo copo dgpo_difficulty adora",
        "optimal_baselines": "opo otb oblr_po=optimal_baseline",
        "process_terms": "oprl prl prorag",
        "returns": "gae open_reasoner_zero t_ppo pdppo reinforce_pp reinforce_pp_baseline",
        "stages": "rubricem brpo grpo_vps full_rollout graph_grpo",
        "step_values": "step_credit vgpo dense_grpo stepwise tp_grpo",
        "streams": "spo_single_stream dcpo_smoothed",
        "tempered": "dcpo_distribution",
        "token_terms": "ktae gtpo",
        "trees": "spo_tree spo_chain grpo_ma",
        "weighting": "empg r3l",
    }
)
POLICY_LOSSES: Mapping[str, str] = _engine(
    {
        "clipping": "ppo dual_clip dapo bapo gppo dcpo_dynamic",
        "contrastive_losses": "copg real",
        "regularised_losses": "r2vpo rapo bgpo",
        "sequence_losses": "gspo gmpo luspo vespo dhpo",
        "unified": "upge scope otr",
        "weighted_losses": "cispo sapo dppo dro clip_cov kl_cov",
    }
)
_OBJECTIVES = {
    "forms:FORMS": "flow_grpo flow_grpo_fast dance_grpo mix_grpo grpo_guard tempflow flash_grpo flow_dppo pcpo policy_flow ddpo "
    "dpok neighbor_grpo euphonium",
    "forward:FORWARD": "nft awm orw ram dpo dpo_online dgpo crd ac_flow",
    "differentiable:DIRECT": "refl draft draft_lv alignprop ctrl adjoint_matching",
}
OBJECTIVES: Mapping[str, str] = MappingProxyType(
    {name: f"flowrl.objectives.{table}" for table, names in _OBJECTIVES.items() for name in names.split()}
)
"""Named objectives: keys of a table of forms (ratio, step weight, loss), or of another family's."""
KERNELS: Mapping[str, str] = MappingProxyType(
    {
        name: f"flowrl.dynamics.kernels:{name}"
        for name in (
            *("ode", "flow_sde", "dance_sde", "cps", "precise", "ddim"),
            *("memoryless", "precise_dance", "wan_sde"),
        )
    }
)

SURROGATES: Mapping[str, str] = MappingProxyType(
    {name: f"flowrl.objectives.surrogates:{name}" for name in ("pcpo", "flow_dppo", "dpok")}
)
"""Policy losses of denoising steps that the engine does not have."""

PROCESS_REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "x0": "flowrl.credit.process.extrapolation:Extrapolation",
        "latent": "flowrl.credit.process.learned:LatentReward",
        "features": "flowrl.credit.process.learned:FeatureReward",
    }
)

_TABLES: Mapping[str, tuple[Mapping[str, str], str | None]] = MappingProxyType(
    {
        "pipeline": (PIPELINES, "flowrl.pipelines"),
        "reward": (REWARDS, "flowrl.rewards"),
        "process_reward": (PROCESS_REWARDS, "flowrl.process_rewards"),
        "advantage": (ADVANTAGES, None),
        "policy_loss": (POLICY_LOSSES, None),
        "objective": (OBJECTIVES, None),
        "surrogate": (SURROGATES, None),
        "kernel": (KERNELS, None),
        "method": (MappingProxyType({}), "flowrl.methods"),
        "feature": (FEATURES, "flowrl.features"),
    }
)
_OPEN = ("reward", "process_reward", "pipeline", "feature")
"""Kinds whose names may be ``module:attr`` or ``path.py:attr`` as well."""
RUNTIME_PARAMETERS = frozenset(
    {
        *("batch", "images", "videos", "completions", "prompts", "metadata", "group_ids", "reference", "latents"),
        *("first", "second", "log_extra", "log_metric"),
    }
)
"""What the scoring runtime itself passes to a reward that is a plain function; never an argument of a config."""


def targets(kind: str) -> dict[str, str]:
    """Map every name of a kind to its ``module:attr``: built-in ones first, then entry points of other packages.

    kind: pipeline, reward, process_reward, feature, advantage, policy_loss, objective, surrogate, kernel, method. Raises
    UserError where two packages claim one name.
    """
    table, group = _table(kind)
    found = dict(table)
    owners = dict.fromkeys(table, "flowrl")
    for entry in importlib.metadata.entry_points(group=group) if group else ():
        owner = entry.dist.name if entry.dist else "an unnamed package"
        if entry.name in found:
            raise UserError(
                f"the {kind} name {entry.name!r} is claimed by {owners[entry.name]} and by {owner}; uninstall one of "
                "the packages, or rename the entry point"
            )
        found[entry.name], owners[entry.name] = entry.value, owner
    return found


def names(kind: str) -> list[str]:
    """List the names of a kind, sorted, importing none of them."""
    return sorted(targets(kind))


def unknown(kind: str, name: str) -> str:
    """Say that a name is unknown, with the nearest one and the list."""
    known = names(kind)
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]}? Known are" if close else "use one of"
    own = ", package.module:name or path/to/file.py:name" if kind in _OPEN else ""
    return f"unknown {kind} {name!r}; {advice} {', '.join(known)}{own}"


def resolve(kind: str, name: str) -> Any:
    """Import what a name stands for and return it (a class or a function; nothing is called).

    Raises UserError for an unknown name, a module or file that is missing or fails to import, and a missing attribute.
    """
    known = targets(kind)
    if name in known:
        return _load(known[name], name)
    if ":" in name:
        return _load(name, name)
    raise UserError(unknown(kind, name))


def check_arguments(kind: str, name: str, args: Mapping[str, Any]) -> list[str]:
    """Compare keyword arguments with the signature of a plug-in: unknown, missing and mistyped ones, one line each.

    A class is checked by its constructor. A plain function takes RUNTIME_PARAMETERS from the runtime and, without a
    default, a metadata column of its name, so none of its arguments is missing. Annotations that are not plain types
    are not checked. Raises UserError where the plug-in cannot be resolved.
    """
    parameters, open_ended = _parameters(resolve(kind, name))
    problems = []
    for key, value in args.items():
        if key not in parameters:
            if not open_ended:
                problems.append(_unknown_argument(name, key, parameters))
        elif not _fits(value, parameters[key][0]):
            problems.append(
                f"{key}: expected {_type_name(parameters[key][0])}, found {value!r} ({type(value).__name__})"
            )
    for key, (_, required) in parameters.items():
        if required and key not in args:
            problems.append(f"{key}: missing; {name} needs it")
    return problems


def _table(kind: str) -> tuple[Mapping[str, str], str | None]:
    if kind not in _TABLES:
        raise ValueError(f"unknown kind {kind!r}; use {', '.join(_TABLES)}")
    return _TABLES[kind]


def _load(target: str, name: str) -> Any:
    module_name, _, attribute = target.rpartition(":")
    if not module_name or not attribute:
        raise UserError(f"{name!r}: expected package.module:name or path/to/file.py:name")
    module = _from_file(Path(module_name)) if module_name.endswith(".py") else _from_package(module_name, name)
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            close = difflib.get_close_matches(part, [key for key in dir(value) if not key.startswith("_")], n=1)
            hint = f"did you mean {close[0]}?" if close else "check its spelling"
            raise UserError(f"{name}: {module_name} has no {part!r}; {hint}") from error
    return value


def _from_package(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            file = Path(*module_name.split(".")).with_suffix(".py")
            advice = f"write {file}:{name.rpartition(':')[2]}" if file.is_file() else "install the package that has it"
            raise UserError(f"{name}: no module named {error.name!r}; {advice}") from error
        raise UserError(_import_failure(name, error)) from error
    except Exception as error:
        raise UserError(_import_failure(name, error)) from error


def _from_file(path: Path) -> ModuleType:
    """Import a Python file once under a name of its own, so that two files called alike do not meet."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path (it is relative to where you run)")
    full = path.resolve()
    module_name = f"flowrl_file_{full.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, full)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(_import_failure(str(path), error)) from error
    return module


def _import_failure(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{name}: needs the package {error.name!r}, which is not installed; install it"
    if isinstance(error, SyntaxError):
        return f"{name}: line {error.lineno} is not Python ({error.msg}); mend it"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{name}: fails to import: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}); mend it"
    )


def _parameters(target: Any) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """Keyword arguments of a plug-in: name to (annotation, required), and whether it takes any others."""
    is_class = isinstance(target, type)
    if not is_class and (hasattr(target, "score") or not callable(target)):
        return {}, False  # an object that is made already
    try:
        signature = inspect.signature(target)
    except ValueError:  # written in C without a signature
        return {}, True
    annotations = _annotations(target)
    offered: dict[str, tuple[Any, bool]] = {}
    open_ended = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = is_class
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            continue
        elif is_class or parameter.name not in RUNTIME_PARAMETERS:
            required = is_class and parameter.default is parameter.empty
            offered[parameter.name] = (annotations.get(parameter.name, Any), required)
    return offered, open_ended


def _annotations(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(vars(target).get("__init__", target) if isinstance(target, type) else target)
    except (NameError, TypeError):  # names imported for type checkers alone, callable objects: names are still checked
        return {}


def _unknown_argument(name: str, key: str, parameters: Iterable[str]) -> str:
    known = list(parameters)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"{key}: unknown argument of {name}; did you mean {close[0]}?"
    return f"{key}: unknown argument; {name} takes {', '.join(known) or 'none'}"


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value suits an annotation; True for annotations that this does not know."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if annotation is float:
        return type(value) in (int, float)
    if annotation in (bool, int, str):
        return type(value) is annotation
    if annotation is type(None):
        return value is None
    outer = origin or annotation
    if outer in (list, tuple, dict):
        return isinstance(value, dict) if outer is dict else isinstance(value, list | tuple)
    return True


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
