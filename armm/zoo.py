"""The table of published checkpoints that armm loads, by name. Importing it costs nothing."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from armm.zoo_entry import ZooEntry
from armm.zoo_unified import UNIFIED_ENTRIES

_LLAMAGEN: dict[str, Any] = {
    "family": "llamagen",
    "licence": "MIT (code); no separate weight licence stated",
    "paper": "2406.06525",
}
_C2I_REPO, _T2I_REPO = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"


def _vq(name: str, repo: str, file: str, parameters: float, figures: dict[str, float]) -> ZooEntry:
    return ZooEntry(name, task="tokenizer", repo=repo, file=file, parameters=parameters, figures=figures, **_LLAMAGEN)


def _c2i(letter: str, size: int, parameters: float, fid_guidance: float, figures: dict[str, float]) -> ZooEntry:
    # The class-conditional demo's sampling settings; the scale of the FID runs is kept beside the figure it gave.
    return ZooEntry(
        f"llamagen-c2i-{letter.lower()}-{size}",
        task="class-to-image",
        repo=_C2I_REPO,
        file=f"c2i_{letter}_{size}.pt",
        parameters=parameters,
        image_size=size,
        tokenizer="llamagen-vq-ds16-c2i",
        generation_config={"guidance_scale": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0},
        figures={**figures, "guidance_scale of the FID run": fid_guidance},
        **_LLAMAGEN,
    )


def _t2i(stage: int, size: int) -> ZooEntry:
    return ZooEntry(
        f"llamagen-t2i-xl-{size}",
        task="text-to-image",
        repo=_T2I_REPO,
        file=f"t2i_XL_stage{stage}_{size}.pt",
        parameters=777.7,
        image_size=size,
        tokenizer="llamagen-vq-ds16-t2i",
        text_encoder="google/flan-t5-xl",
        generation_config={"guidance_scale": 7.5, "temperature": 1.0, "top_k": 1000, "top_p": 1.0},
        **_LLAMAGEN,
    )


_VAR: dict[str, Any] = {
    "family": "var",
    "licence": "MIT (code); no separate weight licence stated",
    "paper": "2404.02905",
}
_VAR_REPO = "FoundationVision/var"


def _var(depth: int, size: int, parameters: float, figures: dict[str, float]) -> ZooEntry:
    # The notebook's settings; the README's FID runs used another scale.
    return ZooEntry(
        f"var-d{depth}-{size}",
        task="class-to-image",
        repo=_VAR_REPO,
        file=f"var_d{depth}.pth",
        parameters=parameters,
        image_size=size,
        tokenizer="var-vae",
        generation_config={"guidance_scale": 4.0, "top_k": 900, "top_p": 0.95},
        figures={**figures, "guidance_scale of the FID run": 1.5, "top_p of the FID run": 0.96},
        **_VAR,
    )


def _par(size: str, group: int, parameters: float, guidance: float, fid: float) -> ZooEntry:
    return ZooEntry(
        f"par-c2i-{size.lower()}-{group}x",
        family="par",
        task="class-to-image",
        repo="Epiphqny/PAR",
        file=f"PAR-{size}-{group}x.pt",
        parameters=parameters,
        licence="none stated",
        image_size=384,
        tokenizer="llamagen-vq-ds16-c2i",
        generation_config={"guidance_scale": guidance, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        figures={_FID: fid},
        config={"grid": [24, 24]},
        paper="2412.15119",
    )


_FID = "FID 256x256 (ImageNet)"
_ENTRIES = (
    _vq("llamagen-vq-ds16-c2i", _C2I_REPO, "vq_ds16_c2i.pt", 72, {"rFID 256x256 (ImageNet val)": 2.19}),
    _vq("llamagen-vq-ds8-c2i", _C2I_REPO, "vq_ds8_c2i.pt", 70, {"rFID 256x256 (ImageNet val)": 0.59}),
    _vq("llamagen-vq-ds16-t2i", _T2I_REPO, "vq_ds16_t2i.pt", 72, {}),
    _c2i("B", 256, 110.9, 2.0, {_FID: 5.46}),
    _c2i("B", 384, 110.9, 2.0, {_FID: 6.09}),
    _c2i("L", 256, 342.9, 2.0, {_FID: 3.80}),
    _c2i("L", 384, 342.9, 2.0, {_FID: 3.07}),
    _c2i("XL", 384, 774.7, 1.75, {_FID: 2.62}),
    _c2i("XXL", 384, 1411.0, 1.75, {_FID: 2.34}),
    _c2i("3B", 384, 3096.7, 1.65, {_FID: 2.18, "IS": 263.3}),
    _t2i(1, 256),
    _t2i(2, 512),
    _par("XL", 4, 774.7, 1.5, 2.61),
    _par("XXL", 4, 1411.0, 1.435, 2.35),
    _par("3B", 4, 3096.7, 1.345, 2.29),
    _par("3B", 16, 3096.7, 1.5, 2.88),
    ZooEntry("var-vae", task="tokenizer", repo=_VAR_REPO, file="vae_ch160v4096z32.pth", parameters=108.9, **_VAR),
    _var(16, 256, 310.3, {_FID: 3.55}),
    _var(20, 256, 600.9, {_FID: 2.95}),
    _var(24, 256, 1033.4, {_FID: 2.33}),
    _var(30, 256, 2010.0, {_FID: 1.97, f"{_FID}, rejection sampling": 1.80}),
    _var(36, 512, 2317.9, {"FID 512x512 (ImageNet)": 2.63}),
)

_ELM: dict[str, Any] = {
    "family": "elm",
    "repo": "xuantonglll/ELM",
    "licence": "not stated: the repository holds no licence file",
    "paper": "2410.16257",
}


def _bae(name: str) -> ZooEntry:
    return ZooEntry(
        f"elm-bae-{name}",
        task="tokenizer",
        file=f"bae/bae_{name.replace('-', '_')}/binaryae_ema.th",
        parameters=65.5,
        **_ELM,
    )


def _elm(name: str, parameters: float, figures: dict[str, float] | None = None, **preset: Any) -> ZooEntry:
    # "L-2-10": size L, two sub-codes of ten bits. The preset is that of the FID script unless another one is known.
    sub_codes, bits = name.split("-")[-2:]
    masked = name.startswith("mlm")
    settings = {"guidance_scale": 4.0, "guidance_schedule": "linear", "temperature": 1.0}
    return ZooEntry(
        f"elm-{name.replace('mlm', 'mlm-').lower()}",
        task="class-to-image",
        file=f"gpt/{name}.pth",
        parameters=parameters,
        image_size=256,
        tokenizer=f"elm-bae-{int(sub_codes) * int(bits)}",
        generation_config={**settings, **({"num_inference_steps": 10} if masked else {"top_k": 1000}), **preset},
        figures=figures or {},
        **_ELM,
    )


_UNGUIDED = f"{_FID}, no guidance"
_ELM_ENTRIES = (
    *(_bae(name) for name in ("16", "16-deter", "20", "24")),
    _elm("L-1-16", 444),
    _elm("L-2-8", 313),
    _elm("L-2-10", 316, {_UNGUIDED: 15.95}),
    _elm("L-2-12", 328),
    _elm("XL-1-16", 901),
    _elm("XL-2-8", 737),
    _elm("XL-2-10", 741, {_UNGUIDED: 12.70}),
    _elm("XL-2-12", 757),
    _elm("XXL-1-16", 1562),
    _elm("XXL-2-10", 1372),
    _elm("XXL-2-12", 1391, {_UNGUIDED: 10.11}, guidance_scale=2.0, guidance_schedule="constant", top_k=400),
    _elm("2B-2-12", 1910, {_FID: 1.54}),
    _elm("mlmL-1-16", 378, {_FID: 3.7}),
    _elm("mlmXL-1-16", 819),
    _elm("mlmXXL-1-16", 1464),
)


_ATOKEN: dict[str, Any] = {
    "licence": "Apple Sample Code License (code); Apple ML Research Model TOU, research only (weights)", "paper": "2509.14476",
}  # fmt: skip
_ATOKEN_CONFIGS: dict[str, dict[str, Any]] = {"soc": {}, "sod": {"use_quantizer": True}, "soc-s1": {}, "soc-s2": {}}
_ATOKEN_FIGURES = {"soc": {"rFID": 0.21, "rFVD": 3.01, "ImageNet zero-shot accuracy": 82.2}}
_ATOKEN_ENTRIES = tuple(
    ZooEntry(
        f"atoken-{name}", "atoken", "tokenizer", "https://ml-site.cdn-apple.com/models/atoken", f"atoken-{name}.pt", 846,
        config=config, figures=_ATOKEN_FIGURES.get(name, {}), **_ATOKEN,
    )
    for name, config in _ATOKEN_CONFIGS.items()
)  # fmt: skip
_NO_LICENCE = "none stated: neither code nor weights have a licence file"


def _xar(name: str, parameters: float, guidance: float, steps: int, figures: dict[str, float] | None = None) -> ZooEntry:
    return ZooEntry(
        f"xar-{name}-256",
        family="xar",
        task="class-to-image",
        repo="OliverRen/xAR",
        file=f"xAR-{name[0].upper()}.pth",
        parameters=parameters,
        licence=_NO_LICENCE,
        image_size=256,
        tokenizer="kl16",
        generation_config={"guidance_scale": guidance, "num_flow_steps": steps},
        figures=figures or {},
        paper="2502.20388",
    )


def _flowar(name: str, parameters: float, preset: dict[str, Any], figures: dict[str, float] | None = None) -> ZooEntry:
    return ZooEntry(
        f"flowar-{name}-256",
        family="flowar",
        task="class-to-image",
        repo="OliverRen/FlowAR",
        file=f"FlowAR-{name[0].upper()}.pth",
        parameters=parameters,
        licence=_NO_LICENCE,
        image_size=256,
        tokenizer="kl16",
        generation_config=preset,
        figures=figures or {},
        paper="2412.15205",
    )


_MAR_REPO = "jadechoghari/mar"  # the copy that the authors link to


def _mar(name: str, parameters: float, guidance: float, figures: dict[str, float]) -> ZooEntry:
    settings = {"guidance_schedule": "linear", "temperature": 1.0, "num_inference_steps": 256, "head_steps": 100}
    return ZooEntry(
        f"mar-{name}-256",
        family="mar",
        task="class-to-image",
        repo=_MAR_REPO,
        file=f"mar-{name}.safetensors",
        parameters=parameters,
        licence="MIT",
        image_size=256,
        tokenizer="kl16",
        generation_config={"guidance_scale": guidance, **settings},
        figures=figures,
        paper="2406.11838",
    )


def _himar(name: str, parameters: float, scales: tuple[float, float], steps: int, figures: dict[str, float]) -> ZooEntry:
    return ZooEntry(
        f"himar-{name}-256",
        family="himar",
        task="class-to-image",
        repo="HiDream-ai/Hi-MAR",
        file=f"Hi-MAR-{name[0].upper()}/checkpoint-last.pth",
        parameters=parameters,
        licence="none stated in the code's repository; see the hub card",
        image_size=256,
        tokenizer="kl16",
        generation_config={"guidance_scale": scales[0], "pivot_guidance_scale": scales[1], "num_inference_steps": steps},
        figures=figures,
        paper="2505.20288",
    )


_CONTINUOUS_ENTRIES = (
    ZooEntry(
        "kl16",
        family="kl",
        task="tokenizer",
        repo=_MAR_REPO,
        file="kl16.safetensors",
        parameters=66.5,
        licence="MIT",
        paper="2406.11838",
    ),
    _mar("base", 207.9, 2.9, {_FID: 2.31, _UNGUIDED: 3.48}),
    _mar("large", 478.3, 3.0, {_FID: 1.78, _UNGUIDED: 2.60}),
    _mar("huge", 942.4, 3.2, {_FID: 1.55, _UNGUIDED: 2.35}),
    _himar("base", 244.5, (2.5, 2.7), 4, {_FID: 1.93}),
    _himar("large", 529.2, (3.5, 3.5), 4, {_FID: 1.66}),
    _himar("huge", 1090.6, (3.2, 5.5), 12, {_FID: 1.52}),
    _xar("base", 172.6, 2.7, 40),
    _xar("large", 608.4, 2.3, 50),
    _xar("huge", 1186.0, 2.2, 50, {_FID: 1.24}),
    _flowar("small", 171.7, {"guidance_scale": 4.3, "guidance_high": 0.9, "num_flow_steps": 25}),
    _flowar("large", 586.9, {"guidance_scale": 2.4, "guidance_high": 0.9, "num_flow_steps": 25}, {_FID: 1.90}),
    _flowar("huge", 1913.3, {"guidance_scale": 2.4, "guidance_high": 0.7, "num_flow_steps": 50}, {_FID: 1.65}),
)

_DAR: dict[str, Any] = {
    "family": "dar",
    "repo": "showlab/D-AR",
    "licence": "MIT (code); no separate weight licence stated",
    "paper": "2505.23660",
}


def _dar(size: str, parameters: float, figures: dict[str, float]) -> ZooEntry:
    # The demo's settings; the guidance of the FID runs is kept beside the figures it gave, where it is known.
    return ZooEntry(
        f"dar-c2i-{size.lower()}-256",
        task="class-to-image",
        file=f"D-AR-{size}-360K.pt",
        parameters=parameters,
        image_size=256,
        tokenizer="dar-tokenizer",
        generation_config={"guidance_scale": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        figures=figures,
        **_DAR,
    )


_DAR_ENTRIES = (
    ZooEntry(
        "dar-tokenizer",
        task="tokenizer",
        file="D-AR-tokenizer_v1.pt",
        parameters=300.1,
        figures={"rFID 256x256 (ImageNet val)": 1.52},
        **_DAR,
    ),
    _dar("L", 343, {_FID: 2.44, "IS": 262.9, "guidance_start of the FID run": 1.2, "guidance_scale of the FID run": 8.0}),
    _dar("XL", 775, {_FID: 2.09, "IS": 298.4}),
)
_ALL = (
    *_ENTRIES,
    *_DAR_ENTRIES,
    *_ELM_ENTRIES,
    *_CONTINUOUS_ENTRIES,
    *UNIFIED_ENTRIES,
    *_ATOKEN_ENTRIES,
)
ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _ALL}


def list_models(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """Names of the published checkpoints that match `pattern` ("llamagen-c2i-*"), sorted as in the table.

    Args:
        task: only those of one task, such as "class-to-image"; see `ZooEntry`.
    """
    tasks = {entry.task for entry in ZOO.values()}
    if task is not None and task not in tasks:
        raise ValueError(f"unknown `task` {task!r}: choose from {', '.join(sorted(tasks))}.")
    lowered = pattern.lower()
    return [name for name, entry in ZOO.items() if fnmatch.fnmatchcase(name, lowered) and task in (None, entry.task)]


def get(name: str) -> ZooEntry:
    """The entry `name`; an unknown name is a ValueError with near matches."""
    entry = ZOO.get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), ZOO, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}`armm zoo` lists all names.")
    return entry


def by_file(file_name: str) -> ZooEntry | None:
    """The entry whose authors' file is called `file_name`, if there is one."""
    return next((entry for entry in ZOO.values() if entry.file == file_name), None)
