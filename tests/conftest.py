"""Small models and inputs that many tests build."""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

import dset_d2
from dset_d2.clock import shared_step
from dset_d2.modeling.sparse import MemoryPruningConfig, MoEConfig, PruningConfig

# Processes of tests are forked from one that has imported all and done nothing else: importing it
# takes seconds.
IMPORTED = multiprocessing.get_context("forkserver")
IMPORTED.set_forkserver_preload([__name__, "dset_d2.tools.preparation"])

# The same on a command line; and a run of it on the generated scenes.
NARROW = [
    "model.encoder.hidden_dim=32",
    "model.encoder.dim_feedforward=64",
    "model.decoder.hidden_dim=32",
    "model.decoder.dim_feedforward=64",
    "model.decoder.num_queries=20",
]
TINY_RUN = [
    *NARROW,
    "dataloader.image_size=[64,96]",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.log_period=1",
    "train.report=false",
]


def tiny_config(path: str = "configs/rtdetr/rtdetrv2_r18_coco.py"):
    """A config of the project, shrunk to what a CPU trains in moments."""
    cfg = dset_d2.get_config(path)
    cfg.model.encoder.update(hidden_dim=32, dim_feedforward=64)
    cfg.model.decoder.update(
        num_classes=5, hidden_dim=32, dim_feedforward=64, num_queries=30, num_denoising=10
    )
    return cfg


def tiny_model(path: str = "configs/rtdetr/rtdetrv2_r18_coco.py", **decoder) -> torch.nn.Module:
    """A narrow model with random box heads and BatchNorm statistics, in eval mode."""
    torch.manual_seed(0)
    cfg = tiny_config(path)
    cfg.model.decoder.update(decoder)
    return randomise(instantiate(cfg.model)).eval()


def sparse_model(
    moe: bool = True, memory: float = 0.5, encoder=(), decoder=(), **pruning
) -> torch.nn.Module:
    """As :func:`tiny_model`, with all sparse mechanisms."""
    torch.manual_seed(0)
    cfg = tiny_config()
    settings = {"keep_ratio": 0.5, "min_tokens": 2} | pruning
    cfg.model.encoder.pruning = L(PruningConfig)(**settings)
    cfg.model.decoder.memory_pruning = L(MemoryPruningConfig)(keep_ratio=memory)
    if moe:
        cfg.model.encoder.moe = L(MoEConfig)(num_experts=4, top_k=2)
        cfg.model.decoder.moe = L(MoEConfig)(num_experts=4, top_k=2)
    cfg.model.encoder.update(encoder)
    cfg.model.decoder.update(decoder)
    return randomise(instantiate(cfg.model)).eval()


def tiny_dinov3(depth: int = 6, decoder=(), **backbone) -> torch.nn.Module:
    """A detector of the DINOv3 project with a narrow ViT whose layer scales let it matter."""
    torch.manual_seed(0)
    cfg = tiny_config("projects/dfine_dinov3/configs/dfine_dinov3_s_coco.py").model
    cfg.multi_scale = []
    cfg.decoder.update(decoder)
    cfg.backbone.vit = dict(embed_dim=32, depth=depth, num_heads=2, init_values=0.5)
    cfg.backbone.taps = [depth // 3 - 1, 2 * depth // 3 - 1, depth - 1]
    cfg.backbone.adapter.update(in_channels=32, out_channels=32, conv_channels=4)
    for name, value in backbone.items():
        if isinstance(value, dict):
            cfg.backbone[name].update(value)
        else:
            cfg.backbone[name] = value
    return randomise(instantiate(cfg))


# Settings of a transformers config; without dropout, so that runs can be compared.
GROUNDING = dict(
    model_type="grounding-dino",
    backbone_config=dict(
        model_type="swin",
        image_size=64,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage2", "stage3", "stage4"],
    ),
    text_config=dict(
        model_type="bert",
        vocab_size=1100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    d_model=64,
    encoder_layers=1,
    encoder_ffn_dim=96,
    encoder_attention_heads=4,
    decoder_layers=2,
    decoder_ffn_dim=96,
    decoder_attention_heads=4,
    num_queries=20,
    max_text_len=64,
    dropout=0.0,
    fusion_droppath=0.0,
)
PROMPTS = ["car", "TrafficCone", ["person", "cyclist"], "xylophone", "van"]


def tiny_grounding(kind: str = "grounding-dino", **settings) -> torch.nn.Module:
    """A Grounding DINO of five classes in eval mode, all of whose parameters matter.

    Skips the test where its library is not there, or too old.
    """
    pytest.importorskip("transformers", minversion="5.23")
    torch.manual_seed(0)
    settings = {"prompts": PROMPTS} | settings
    if "folder" not in settings:
        settings["architecture"] = (
            GROUNDING | {"model_type": kind} | settings.get("architecture", {})
        )
    model = dset_d2.modeling.GroundingDINO(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(scope="session")
def grounding_folder(tmp_path_factory) -> str:
    """A local folder as released ones are, of a network of random weights."""
    folder = str(tmp_path_factory.mktemp("grounding-dino"))
    model = tiny_grounding()
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Leave the initial state: heads that are zero and unit statistics hide mistakes."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.8, 1.2)
            elif name.endswith("running_mean"):
                value.normal_(std=0.1)
            elif "bbox_head" in name and ".layers.2." in name:
                value.normal_(std=0.1)
            elif any(
                part in name
                for part in ("sampling_offsets", "attention_weights", "reg_conf", ".gate.", ".lab.")
            ):
                value.add_(torch.randn_like(value) * 0.1)
    return model


def make_inputs(sizes, boxes_per_image=3, num_classes=5, seed=0) -> list[dict]:
    """Detectron2 dicts with random images of the (height, width) sizes and random boxes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        scale = torch.tensor([width, height, width, height])
        low = torch.rand(boxes_per_image, 2, generator=generator) * 0.6
        size = 0.1 + 0.25 * torch.rand(boxes_per_image, 2, generator=generator)
        instances.gt_boxes = Boxes(torch.cat([low, low + size], 1) * scale)
        shape = (boxes_per_image,)
        instances.gt_classes = torch.randint(num_classes, shape, generator=generator)
        shape = (3, height, width)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def make_targets(batch, count, num_classes=5, seed=0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for _ in range(batch):
        centre = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
        size = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(num_classes, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([centre, size], 1)})
    return targets


def in_two_processes(worker: Callable, *args) -> None:
    """Run ``worker(rank, *args)`` in two processes of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_join, (port, worker, args), nprocs=2, start_method="forkserver")


def _join(rank: int, port: int, worker: Callable, args: tuple) -> None:
    shared_step.__init__()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    worker(rank, *args)
    dist.destroy_process_group()


def run_python(words: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """As ``subprocess.run`` of ``python -W ignore`` with these words, a script's or a module's, but
    for the time to import the libraries."""
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = IMPORTED.Process(target=_main, args=(words, cwd, env, files))
        process.start()
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{words}: {files[1].read_text()}")
        output = [file.read_text() for file in files]
    return subprocess.CompletedProcess(words, process.exitcode, *output)


def _main(words: list[str], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    shared_step.__init__()  # else one for all that are forked from the same process
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method(None, force=True)  # the default, not the parent's
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


@pytest.fixture(autouse=True)
def own_data_sets() -> Iterator[None]:
    """Names that a test registers, or moves to another folder, and files that its evaluators wrote,
    are no other test's."""
    known = dict(DatasetCatalog.data)
    written = {name: vars(MetadataCatalog.get(name)).get("json_file") for name in known}
    yield
    DatasetCatalog.data = known
    for name in set(MetadataCatalog) - set(known):
        MetadataCatalog.remove(name)
    for name in known:
        if vars(MetadataCatalog.get(name)).get("json_file") != written[name]:
            vars(MetadataCatalog.get(name)).pop("json_file")


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model()
