"""The table of published models, and loading them by name from a stand-in for the hub on loopback."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import HubServer
from tiny_llamagen import text_encoder

import armm
from armm import zoo
from armm.auto import FAMILY_PIPELINES
from armm.convert import FAMILIES, UnreadableCheckpointError
from armm.convert.containers import load_state_dict
from armm.hub import DownloadError, fetch, resolve_file

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).parent / "parity" / "cases" / "llamagen"
REPO, MODEL, TOKENIZER = "FoundationVision/LlamaGen", "c2i_B_256.pt", "vq_ds16_c2i.pt"
CONFIG = {"n_head": 4, "block_size": 25}  # what the tiny golden checkpoint's config.json says


# ---------------------------------------------------------------------- the table


def test_the_table_holds_every_published_checkpoint():
    families = ("elm", "flowar", "himar", "kl", "llamagen", "mar", "par", "var", "xar")
    published = {name: {(e.repo, e.file) for e in zoo.ZOO.values() if e.family == name} for name in families}
    assert published["llamagen"] == {
        *((REPO, f"vq_ds{f}_c2i.pt") for f in (8, 16)),
        *((REPO, f"c2i_{name}.pt") for name in ("B_256", "B_384", "L_256", "L_384", "XL_384", "XXL_384", "3B_384")),
        *(
            ("peizesun/llamagen_t2i", f"{name}.pt")
            for name in ("vq_ds16_t2i", "t2i_XL_stage1_256", "t2i_XL_stage2_512")
        ),
    }
    assert published["par"] == {("Epiphqny/PAR", f"PAR-{name}.pt") for name in ("XL-4x", "XXL-4x", "3B-4x", "3B-16x")}
    files = ("vae_ch160v4096z32", *(f"var_d{depth}" for depth in (16, 20, 24, 30, 36)))
    assert published["var"] == {("FoundationVision/var", f"{name}.pth") for name in files}
    sizes = {"L": (8, 10, 12), "XL": (8, 10, 12), "XXL": (10, 12), "2B": (12,)}
    names = [f"{size}-2-{bits}" for size, lengths in sizes.items() for bits in lengths]
    names += [f"{prefix}{size}-1-16" for prefix in ("", "mlm") for size in ("L", "XL", "XXL")]
    coders = {f"bae/bae_{name}/binaryae_ema.th" for name in ("16", "16_deter", "20", "24")}
    assert published["elm"] == {("xuantonglll/ELM", file) for file in coders | {f"gpt/{name}.pth" for name in names}}
    names = {f"mar-{size}.safetensors" for size in ("base", "large", "huge")} | {"kl16.safetensors"}
    assert published["mar"] | published["kl"] == {("jadechoghari/mar", name) for name in names}
    assert published["himar"] == {("HiDream-ai/Hi-MAR", f"Hi-MAR-{size}/checkpoint-last.pth") for size in "BLH"}
    assert published["xar"] == {("OliverRen/xAR", f"xAR-{size}.pth") for size in "BLH"}
    hub = {name: {(e.repo, e.file) for e in zoo.ZOO.values() if e.family == name} for name in ("mingtok", "ming_univision")}
    assert hub == {name: {(f"inclusionAI/{repo}", "")} for name, repo in
                   (("mingtok", "MingTok-Vision"), ("ming_univision", "Ming-UniVision-16B-A3B"))}  # fmt: skip
    names = {e.file for e in zoo.ZOO.values() if e.family == "atoken"}
    assert names == {f"atoken-{name}.pt" for name in ("soc", "sod", "soc-s1", "soc-s2")}
    assert published["flowar"] == {("OliverRen/FlowAR", f"FlowAR-{size}.pth") for size in "SLH"}


def test_entries_are_complete():
    for entry in zoo.ZOO.values():
        assert entry.licence and entry.paper and entry.parameters > 0
        if entry.family not in FAMILY_PIPELINES:  # a family of tokenizers
            assert entry.task == "tokenizer" and entry.family in FAMILIES
            continue
        module, class_name = FAMILY_PIPELINES[entry.family]
        pipeline_class = getattr(importlib.import_module(module), class_name)
        assert set(entry.generation_config) <= set(pipeline_class.generation_settings)
        if entry.family in ("janus", "lavit", "ming_univision"):
            assert not entry.file and entry.tokenizer is None  # the repository holds all of it
        elif entry.task != "tokenizer":
            assert zoo.get(entry.tokenizer).task == "tokenizer"
            if entry.family == "llamagen":
                assert zoo.get(entry.tokenizer).repo == entry.repo
                assert str(entry.image_size) in entry.file and entry.name.endswith(str(entry.image_size))
        assert (entry.text_encoder is not None) == (entry.task == "text-to-image")


def test_names_are_listed_by_pattern_and_task():
    assert armm.list_models("llamagen-c2i-b-*") == ["llamagen-c2i-b-256", "llamagen-c2i-b-384"]
    assert armm.list_models(task="text-to-image") == ["llamagen-t2i-xl-256", "llamagen-t2i-xl-512"]
    assert len(armm.list_models()) == len(zoo.ZOO) and armm.list_models("nothing*") == []
    with pytest.raises(ValueError, match="unknown `task`"):
        armm.list_models(task="text to image")


def test_near_misses_are_answered():
    assert zoo.get("LlamaGen-C2I-B-256").file == MODEL
    with pytest.raises(ValueError, match="did you mean 'llamagen-c2i-b-256'"):
        zoo.get("llamagen-b-256")
    with pytest.raises(ValueError, match="Did you mean 'llamagen-c2i-b-256'"):
        armm.pipeline("llamagen-c2i-b256")
    with pytest.raises(ValueError, match="Did you mean 'text-to-image'"):
        armm.pipeline("text-to-images")
    with pytest.raises(ValueError, match="is a tokenizer.*llamagen-c2i-b-256"):
        armm.pipeline("llamagen-vq-ds16-c2i")


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def repository(tmp_path) -> Path:
    """Golden checkpoints under the names of the real repository; the tokenizer's codebook gets the transformer's size."""
    folder = tmp_path / "served" / REPO
    folder.mkdir(parents=True)
    (folder / MODEL).write_bytes((CASES / "c2i" / "checkpoint.pt").read_bytes())
    state = load_state_dict(CASES / "tokenizer" / "checkpoint.pt")
    codes = state["quantize.embedding.weight"]
    state["quantize.embedding.weight"] = torch.cat([codes, -codes[:32]])
    torch.save({"model": state}, folder / TOKENIZER)
    return folder


def use_endpoint(monkeypatch, url: str) -> None:
    """What HF_ENDPOINT does, for a process that has imported huggingface_hub already."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """The running stand-in, with this process's hub client pointed at it and fresh caches."""
    with HubServer(repository.parents[1]) as server:
        use_endpoint(monkeypatch, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("ARMM_CACHE", str(tmp_path / "armm"))
        yield server


def generate(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([3, 5], generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_a_published_tokenizer_is_downloaded_converted_and_cached(hub, repository, tmp_path):
    by_name, of_model = armm.tokenizer("llamagen-vq-ds16-c2i"), armm.tokenizer("llamagen-c2i-b-256")
    assert hub.downloads(TOKENIZER) == 1 and hub.downloads(MODEL) == 0
    (converted,) = (tmp_path / "armm" / "converted").iterdir()
    assert (converted / "config.json").is_file()
    tokenizers = (by_name, of_model, armm.tokenizer(repository / TOKENIZER))
    ours, others = tokenizers[0].state_dict(), [other.state_dict() for other in tokenizers[1:]]
    assert all(torch.equal(ours[name], other[name]) for other in others for name in ours)


def test_a_published_model_is_downloaded_converted_and_cached(hub, tmp_path):
    pipe = armm.pipeline("llamagen-c2i-b-256", config=CONFIG)
    assert hub.downloads(MODEL) == hub.downloads(TOKENIZER) == 1
    assert pipe.generation_config["guidance_scale"] == 4.0 and pipe.generation_config["top_k"] == 2000
    images = generate(pipe)
    assert images.shape == (2, 3, 20, 20)
    (converted,) = (tmp_path / "armm" / "converted").iterdir()
    assert (converted / "model_index.json").is_file()
    stamp = (converted / "model_index.json").stat().st_mtime_ns

    again = armm.pipeline("llamagen-c2i-b-256", config=CONFIG, dtype=torch.float32)  # both caches are hit
    assert hub.downloads(MODEL) == hub.downloads(TOKENIZER) == 1
    assert (converted / "model_index.json").stat().st_mtime_ns == stamp
    assert torch.equal(generate(again), images)


def test_a_cached_model_works_without_the_hub(hub, monkeypatch):
    images = generate(armm.pipeline("llamagen-c2i-b-256", config=CONFIG))
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    assert torch.equal(generate(armm.pipeline("llamagen-c2i-b-256", config=CONFIG)), images)
    asked = len(hub.requests)
    pipe = armm.pipeline("llamagen-c2i-b-256", config=CONFIG, local_files_only=True)
    assert torch.equal(generate(pipe), images) and len(hub.requests) == asked


def test_a_model_that_is_not_cached_needs_the_hub(hub, tmp_path):
    with pytest.raises(DownloadError, match="c2i_B_256.pt of FoundationVision/LlamaGen is not in the local hub cache"):
        armm.pipeline("llamagen-c2i-b-256", local_files_only=True)
    assert not (tmp_path / "armm").exists()


def test_a_missing_file_and_a_missing_repository_are_named(hub, tmp_path):
    with pytest.raises(DownloadError, match="FoundationVision/LlamaGen does not have c2i_L_256.pt"):
        armm.pipeline("llamagen-c2i-l-256")
    with pytest.raises(DownloadError, match="no repository peizesun/llamagen_t2i"):
        armm.pipeline("llamagen-t2i-xl-256", text_encoder=None)
    with pytest.raises(DownloadError, match="not a valid hub id"):
        fetch("not valid/name/", "x.pt")
    assert not (tmp_path / "armm").exists()


def test_a_download_that_breaks_off_is_an_error_and_can_be_repeated(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its retries
    hub.truncated.add(MODEL)
    with pytest.raises(DownloadError, match=MODEL):
        fetch(REPO, MODEL)
    hub.truncated.clear()
    assert fetch(REPO, MODEL).read_bytes() == (CASES / "c2i" / "checkpoint.pt").read_bytes()


def test_a_file_that_is_truncated_on_the_hub_is_refused(hub, repository, tmp_path):
    content = (repository / MODEL).read_bytes()
    (repository / MODEL).write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableCheckpointError, match="truncated"):
        armm.pipeline("llamagen-c2i-b-256", config=CONFIG)
    assert not (tmp_path / "armm").exists()


def test_single_files_come_from_links_and_short_names(hub):
    link = f"https://hub.example.org/{REPO}/blob/main/{MODEL}"
    pipe = armm.LlamaGenPipeline.from_single_file(link, tokenizer=f"{REPO}/{TOKENIZER}", config=CONFIG)
    assert pipe.transformer.grid == (5, 5) and hub.downloads(MODEL) == 1
    for bad, match in (
        ("nothing.pt", "there is no file"),
        ("https://example.org/c2i.pt", "not a link to a file on the hub"),
    ):
        with pytest.raises(DownloadError, match=match):
            resolve_file(bad)


def test_pipelines_load_from_a_hub_id(hub, repository, tmp_path):
    pipe = armm.LlamaGenPipeline.from_single_file(repository / MODEL, tokenizer=repository / TOKENIZER, config=CONFIG)
    pipe.save_pretrained(repository.parent / "converted")
    images = generate(pipe)
    for load in (armm.pipeline, armm.ARPipeline.from_pretrained, armm.LlamaGenPipeline.from_pretrained):
        loaded = load("FoundationVision/converted")
        assert isinstance(loaded, armm.LlamaGenPipeline) and torch.equal(generate(loaded), images)
    assert hub.downloads("diffusion_pytorch_model.safetensors") == 2  # one for each of the two components, once
    offline = armm.pipeline("FoundationVision/converted", local_files_only=True)
    assert torch.equal(generate(offline), images)
    with pytest.raises(DownloadError, match="no repository"):
        armm.pipeline("FoundationVision/nothing")


def test_a_text_model_brings_its_text_encoder(hub, repository, tmp_path):
    served = repository.parents[1]
    for name, case in (("t2i_XL_stage1_256.pt", "t2i"), ("vq_ds16_t2i.pt", "tokenizer")):
        (served / "peizesun" / "llamagen_t2i").mkdir(parents=True, exist_ok=True)
        content = (CASES / case / "checkpoint.pt").read_bytes()
        (served / "peizesun" / "llamagen_t2i" / name).write_bytes(content)
    for component in text_encoder().values():  # a tiny one, under the name of the real one
        component.save_pretrained(served / "google" / "flan-t5-xl")
    pipe = armm.pipeline("llamagen-t2i-xl-256", config={"n_head": 4, "block_size": 16})
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red cube", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert pipe.generation_config["guidance_scale"] == 7.5 and pipe.generation_config["top_k"] == 1000
    (converted,) = (tmp_path / "armm" / "converted").iterdir()
    assert not (converted / "text_encoder").exists()  # not copied: it stays in the hub's cache


def test_a_fresh_process_follows_hf_endpoint(repository, tmp_path):
    """The whole way as a user goes it: environment variables and one call, then the same without a network."""
    code = (
        "import json, sys, torch, armm;"
        f"pipe = armm.pipeline('llamagen-c2i-b-256', config={CONFIG!r});"
        "pipe.set_progress_bar_config(disable=True);"
        "out = pipe(3, generator=torch.Generator().manual_seed(0), output_type='latent');"
        "print(json.dumps(out.images.tolist()))"
    )
    with HubServer(repository.parents[1]) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        runs = []
        for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, cwd=ROOT, env={**environment, **extra}, capture_output=True, text=True, check=True
            )
            runs.append((json.loads(done.stdout.splitlines()[-1]), len(server.requests)))
    (first, asked), (second, asked_offline) = runs
    assert first == second and asked == asked_offline > 0
    assert server.downloads(MODEL) == 1
