"""Grounding DINO (https://arxiv.org/abs/2303.05499) and MM Grounding DINO
(https://arxiv.org/abs/2401.02361), which detect the classes that a text names.

The networks are those of ``transformers``. What stands here is around them: prompts, which tokens
are whose, what need not be computed twice, and losses.
"""

import random
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from omegaconf import OmegaConf
from torch import Tensor, nn

from .. import clock
from ..arguments import arguments, build
from .context import Knobs, forward_context
from .criterion import TokenCriterion, TokenMatcher
from .freezing import rest_frozen, train_only
from .layers import check_choice
from .meta_arch import MetaArch
from .prompts import SPECIAL, Prompt, make_prompts, phrases_of
from .sparse import PruningConfig, SwapConfig, TokenPruner, swap_config, swap_ffns
from .stand_ins import Known, MapEncoder, check_pruning, replaced
from .tokens import Padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("grounding-dino", "mm-grounding-dino")
# What a local folder must hold, and the files that each may be.
PARTS = {
    "config.json": ("config.json",),
    "weights": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "a tokenizer": ("tokenizer.json", "vocab.txt"),
}
# Whole words of the small vocabulary; others are spelled.
WORDS = """
    barrow bicycle bus car cone cyclist motorcyclist pedestrian person road traffic tricyclist
    truck van
""".split()


@META_ARCH_REGISTRY.register()
class GroundingDINO(MetaArch):
    """A Grounding DINO of ``transformers`` that detects a data set's classes by their names.

    All images share the text, whose backbone therefore runs once for a batch, and in inference
    once for all batches while its weights stay as they are. Classes that exceed the text limit
    are divided over several texts. Inference reads all of them, one after the other, and joins
    their queries; the image's backbone runs once. A training step takes one of them at random.

    Args:
        folder: local folder with ``config.json``, weights and tokenizer, of a Grounding DINO or an
            MM Grounding DINO. Nothing is ever fetched.
        architecture: in the place of a folder, the settings of a ``transformers`` config, for
            random weights and a small vocabulary that spells words by their letters; its
            ``model_type`` is "grounding-dino" or "mm-grounding-dino".
        dataset: name of a registered data set, whose ``thing_classes`` are the prompts; of several
            with the same classes the first counts.
        prompts: in their place, for each class a phrase or several, of which the best one counts.
        text_limit: most tokens of a text; None is the network's own ``max_text_len``.
        criterion: None is upstream's.
        pruning: prunes tokens of the image in front of the encoder (see :class:`MapEncoder`),
            the same share of every level.
        swap: experts in the place of the dense FFNs, wherever they stand.
        trainable: patterns (``fnmatch``) of the names of the parameters that are trained; the
            others are frozen, and modules of the network that have no others stay in evaluation
            mode. None trains all.
        pixel_mean, pixel_std: normalisation of the RGB input; the default is ImageNet's.
        max_detections, multi_scale, multi_scale_end: see :class:`MetaArch`.
    """

    # Its backbones pad what they need, and images that are not padded give upstream's numbers.
    size_divisibility = 1

    @configurable
    def __init__(
        self,
        *,
        folder: str = "",
        architecture: Mapping | None = None,
        dataset: str | Sequence[str] = "",
        prompts: Sequence[str | Sequence[str]] | None = None,
        text_limit: int | None = None,
        criterion: nn.Module | None = None,
        pruning: PruningConfig | None = None,
        swap: SwapConfig | None = None,
        trainable: Sequence[str] | None = None,
        pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375),
        max_detections: int = 300,
        multi_scale: tuple[int, ...] = (),
        multi_scale_end: int = 0,
    ) -> None:
        super().__init__(pixel_mean, pixel_std, max_detections, multi_scale, multi_scale_end)
        if bool(folder) == bool(architecture):
            raise ValueError(
                f"folder={folder!r}: name a local folder that holds {', '.join(PARTS)}; an "
                "architecture, for random weights, goes without one"
            )
        if folder:
            self.network, self.tokenizer = load_folder(folder)
        else:
            self.network, self.tokenizer = random_network(plain(architecture))
        self.network.train()  # as other modules are built; libraries load for inference
        own_limit = self.network.config.max_text_len
        if text_limit is not None and not 4 <= text_limit <= own_limit:
            raise ValueError(f"text_limit={text_limit} must lie in 4..{own_limit}, or be None")
        self.text_limit = text_limit or own_limit
        self.dataset = [dataset] if isinstance(dataset, str) else list(dataset)
        self.given_prompts = None if prompts is None else phrases_of(plain(prompts))
        self.criterion = criterion or TokenCriterion()
        # By what they prune, as their records are named; one for each level.
        self.pruners = nn.ModuleDict({"encoder": nn.ModuleList()})
        if pruning is not None:
            check_pruning(pruning)
            config = self.network.config
            for _ in range(config.num_feature_levels):
                self.pruners["encoder"].append(TokenPruner(pruning, config.d_model))
        if swap is not None:
            swap_ffns(self, swap)
        self.texts: dict[Prompt, Tensor] = {}  # what the text backbone makes of prompts
        self.texts_state: tuple = ()  # of the text backbone when it did
        self.some_frozen = trainable is not None
        if trainable is not None:
            train_only(self, trainable)
            self.train()
        self.name_parts()
        if prompts is not None or self.dataset_classes():
            _ = self.prompts  # what is wrong with them is an error now

    @classmethod
    def from_config(cls, cfg) -> dict:
        node, group = cfg.MODEL.GROUNDING_DINO, "MODEL.GROUNDING_DINO"
        pruning = None
        if node.PRUNING.KEEP_RATIO not in (0, 1):
            pruning = build(PruningConfig, cfg, f"{group}.PRUNING")
        weights = {key.lower(): value for key, value in node.CRITERION.WEIGHTS.items()}
        criterion = arguments(TokenCriterion, cfg, f"{group}.CRITERION") | {
            "matcher": build(TokenMatcher, cfg, f"{group}.CRITERION.MATCHER"),
            "weights": weights,
        }
        return (
            arguments(cls, cfg, "MODEL")
            | arguments(cls, cfg, group)
            | {
                "architecture": plain(node.ARCHITECTURE) or None,
                "dataset": cfg.DATASETS.TEST or cfg.DATASETS.TRAIN,
                "criterion": TokenCriterion(**criterion),
                "pruning": pruning,
                "swap": swap_config(cfg),
                "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            }
        )

    # The text.

    def dataset_classes(self) -> list[str]:
        """Names of the data set's classes; none while it is not registered or not loaded."""
        names = [name for name in self.dataset if name]
        return list(MetadataCatalog.get(names[0]).get("thing_classes") or []) if names else []

    @cached_property
    def phrases(self) -> list[list[str]]:
        """What is looked for, for each class.

        Raises:
            ValueError: if neither prompts nor a data set's classes say it, or if these are not
                equally many.
        """
        classes = self.dataset_classes()
        if self.given_prompts is None:
            if not classes:
                raise ValueError(
                    f"dataset={', '.join(self.dataset)!r} has no thing_classes (is it registered "
                    "and loaded?); set prompts, a phrase for each class"
                )
            return phrases_of(classes)
        if classes and len(classes) != len(self.given_prompts):
            raise ValueError(
                f"prompts are for {len(self.given_prompts)} classes, but {self.dataset[0]!r} has "
                f"{len(classes)}"
            )
        return self.given_prompts

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The texts that hold all phrases."""
        return make_prompts(self.phrases, self.tokenize, self.text_limit)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.phrases)

    def tokenize(self, phrase: str) -> list[int]:
        """Tokens of a phrase.

        Raises:
            ValueError: if one is not in the vocabulary, or ends a phrase: classes would share it.
        """
        tokens = self.tokenizer(phrase, add_special_tokens=False).input_ids
        if {self.tokenizer.unk_token_id, *SPECIAL.values()} & set(tokens):
            spelled = self.tokenizer.convert_ids_to_tokens(tokens)
            raise ValueError(f"prompts: the vocabulary has no tokens for {phrase!r}: {spelled}")
        return tokens

    def text_features(self, prompt: Prompt) -> Tensor:
        """(1, T, D): what the text backbone makes of a prompt, whatever the image.

        Kept while the backbone is as it was, unless gradients are wanted.
        """
        backbone = self.network.model.text_backbone
        parameters = list(backbone.parameters())
        if (
            backbone.training
            or torch.is_grad_enabled()
            or any(p.is_inference() for p in parameters)
        ):
            return self.read(prompt)
        kind = self.device.type
        state = (
            clock.optimizer_steps,
            *((p.data_ptr(), p._version) for p in parameters),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        if state != self.texts_state:
            self.texts, self.texts_state = {}, state
        if prompt not in self.texts:
            self.texts[prompt] = self.read(prompt)
        return self.texts[prompt]

    def read(self, prompt: Prompt) -> Tensor:
        """Run the text backbone."""
        model, functions = self.network.model, import_module(type(self.network).__module__)
        ids = torch.tensor([prompt.ids], device=self.device)
        # Tokens attend to those of their own phrase, whose positions begin at 0.
        mask, positions = functions.generate_masks_with_special_tokens_and_transfer_map(
            ids, special_tokens=model.special_tokens
        )
        types = torch.zeros_like(ids)
        return model.text_backbone(ids, mask[:, None], types, positions).last_hidden_state

    def warm_up(self) -> None:
        for prompt in self.prompts:
            self.text_features(prompt)

    def train(self, mode: bool = True) -> "GroundingDINO":
        self.texts = {}
        super().train(mode)
        if self.some_frozen:
            rest_frozen(self.network)
        return self

    def _apply(self, fn, recurse: bool = True) -> "GroundingDINO":
        self.texts = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        """Without what was kept of the text: a copy, or a pickle, reads it itself."""
        return self.__dict__ | {"texts": {}}

    # The network.

    def run(
        self,
        images: Tensor,
        padding: Padding | None,
        prompt: Prompt,
        maps: list | None = None,
        loss_function: Callable | None = None,
    ) -> Any:
        """What the library's network puts out for images and one text.

        Args:
            maps: what the image backbone makes of the images, if that is known.
            loss_function: called with what the library would compute losses from, if given.

        Raises:
            ValueError: if the images are too small for the number of queries.
        """
        batch, _, height, width = images.shape
        text = self.text_features(prompt).expand(batch, -1, -1)
        parts: dict[str, nn.Module] = {
            "model.text_backbone": Known(SimpleNamespace(last_hidden_state=text))
        }
        if maps is not None:
            parts["model.backbone.conv_encoder"] = Known(maps)
        encoder = self.network.model.encoder
        parts["model.encoder"] = MapEncoder(encoder, self.pruners["encoder"], padding)
        network = replaced(self.network, parts)
        if loss_function is not None:
            network.loss_function = loss_function
        try:
            return network(
                pixel_values=images,
                pixel_mask=self.pixel_mask(images, padding),
                input_ids=torch.tensor([prompt.ids], device=images.device).expand(batch, -1),
                labels=None if loss_function is None else [],
                return_dict=True,
            )
        except RuntimeError as error:
            if "index k out of range" not in str(error):
                raise
            raise ValueError(
                f"images of {height} x {width} have fewer tokens than the network has queries, "
                f"{self.network.config.num_queries}"
            ) from error

    def pixel_mask(self, images: Tensor, padding: Padding | None) -> Tensor:
        """(B, H, W) 1 where there is image."""
        batch, _, height, width = images.shape
        if padding is None:
            return torch.ones(batch, height, width, dtype=torch.long, device=images.device)
        return padding.valid_tokens(height, width).unflatten(1, (height, width)).long()

    def predict(
        self, images: Tensor, padding: Padding | None = None, knobs: Knobs | None = None
    ) -> dict[str, Tensor]:
        """As :meth:`MetaArch.predict`; the queries of several texts stand one after the other.

        A logit is -inf where a query's text does not have the class. Records are the first text's.
        """
        logits, boxes = [], []
        maps = None
        with self.context(knobs), forward_context(padding=padding):
            if len(self.prompts) > 1:
                mask = self.pixel_mask(images, padding)
                maps = self.network.model.backbone.conv_encoder(images, mask)
            for prompt, recording in zip(self.prompts, self.recordings()):
                with recording:
                    outputs = self.run(images, padding, prompt, maps)
                logits.append(prompt.class_logits(outputs.logits))
                boxes.append(outputs.pred_boxes.float())
        return {"pred_logits": torch.cat(logits, 1), "pred_boxes": torch.cat(boxes, 1)}

    def recordings(self) -> list[AbstractContextManager]:
        """Contexts for one text after the other, of which the first may leave records."""
        silent = [forward_context(records=None) for _ in self.prompts[1:]]
        return [nullcontext(), *silent]

    def postprocess(
        self, outputs: dict[str, Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """As :meth:`MetaArch.postprocess`, without classes that a query's text does not have."""
        return [found[found.scores > 0] for found in super().postprocess(outputs, image_sizes)]

    # Training.

    def losses(
        self, images: Tensor, targets: list[dict[str, Tensor]], padding: Padding | None
    ) -> dict[str, Tensor]:
        """Losses of one text in training, the mean over all of them elsewhere."""
        prompts = self.prompts
        if self.training:
            # The step seeds the choice: all processes, and a resumed run, choose alike.
            prompts = [random.Random(self.clock.step).choice(prompts)]
        losses: dict[str, Tensor] = {}
        for prompt, recording in zip(prompts, self.recordings()):
            with recording, forward_context(padding=padding):
                layers: list[dict[str, Tensor]] = []
                outputs = self.run(images, padding, prompt, loss_function=collector(layers))
            predictions = gather_predictions(outputs, layers, len(prompt.ids))
            tokens = prompt.tokens().to(images.device)
            owned = [t | {"tokens": tokens[t["labels"]]} for t in targets]
            for name, loss in self.criterion(predictions, owned).items():
                losses[name] = losses.get(name, 0) + loss / len(prompts)
        return losses


def collector(layers: list[dict[str, Tensor]]) -> Callable:
    """A ``loss_function`` of the library that keeps what all layers predict, which it shows to no
    one else, and computes nothing.

    The library's own (5.23) looks the classes of an image up behind as many rows as it has itself,
    not as all images before it have. And it takes the encoder's boxes without their gradient, and
    as the encoder's logits those of the learned queries, so that what chooses queries never learns.
    """

    def collect(*_, outputs_class: Tensor, outputs_coord: Tensor, **__) -> tuple[None, None, None]:
        for logits, boxes in zip(outputs_class, outputs_coord):
            layers.append({"pred_logits": logits, "pred_boxes": boxes})
        return None, None, None

    return collect


def gather_predictions(outputs: Any, layers: list[dict[str, Tensor]], length: int) -> dict:
    """What :class:`TokenCriterion` takes: all layers' predictions, and those of the tokens that
    became queries, on the text's ``length`` tokens."""
    selected = []
    if outputs.enc_outputs_class is not None:
        queries = layers[-1]["pred_boxes"].shape[1]
        scores = outputs.enc_outputs_class
        index = scores.amax(-1).topk(queries, dim=1).indices[..., None]
        boxes = outputs.enc_outputs_coord_logits.gather(1, index.expand(-1, -1, 4)).sigmoid()
        logits = scores.gather(1, index.expand(-1, -1, scores.shape[-1]))
        selected.append({"pred_logits": logits, "pred_boxes": boxes})
    for layer in (*layers, *selected):
        layer["pred_logits"] = layer["pred_logits"][..., :length]
    return layers[-1] | {"aux_outputs": layers[:-1], "enc_outputs": selected}


# What the network is made of.


def plain(value: Any) -> Any:
    """Settings out of a config as lists and dicts."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def library() -> Any:
    """The ``transformers`` package.

    Raises:
        ModuleNotFoundError: if it is not there, or too old.
    """
    try:
        import transformers
        from transformers import MMGroundingDinoForObjectDetection  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "Grounding DINO needs transformers 5.23 or newer: pip install 'dset_d2[grounding]'"
        ) from error
    return transformers


def load_folder(folder: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Network and tokenizer of a local folder, as ``save_pretrained`` writes them.

    Of weights that have no place in the network the library warns.

    Raises:
        FileNotFoundError: names the folder and what it lacks.
        ValueError: if it holds another kind of network, or weights that do not make it whole.
    """
    path = Path(folder)
    present = {file.name for file in path.iterdir()} if path.is_dir() else set()
    missing = [
        part if files == (part,) else f"{part} ({' or '.join(files)})"
        for part, files in PARTS.items()
        if not present & set(files)
    ]
    if missing:
        what = "lacks" if path.is_dir() else "no such folder; it should hold"
        raise FileNotFoundError(f"{folder}: {what} {', '.join(missing)}; nothing is downloaded")
    transformers = library()
    local: dict[str, Any] = {"local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    check_choice(f"{folder}/config.json: model_type", config.model_type, KINDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    network, report = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are an error below
        output_loading_info=True,
        **local,
    )
    wrong = [
        f"{len(report[key])} {text} {sorted(map(str, report[key]))[:3]}"
        for key, text in (
            ("missing_keys", "parameters without a key"),
            ("mismatched_keys", "keys of another shape"),
        )
        if report[key]
    ]
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit config.json: {', '.join(wrong)}")
    return checked(network, tokenizer, folder)


def random_network(settings: dict) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A network of random weights, and the small vocabulary.

    Raises:
        ValueError: on a wrong ``model_type``, or a vocabulary that the network has no room for.
    """
    transformers = library()
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    check_choice("architecture: model_type", kind, KINDS)
    config = transformers.AutoConfig.for_model(kind, **settings)
    network = transformers.AutoModelForZeroShotObjectDetection.from_config(config)
    tokenizer = transformers.BertTokenizer(vocab=small_vocabulary())
    return checked(network, tokenizer, "architecture")


def small_vocabulary() -> dict[str, int]:
    """Words of the road, and all letters and digits, which spell any other word."""
    signs = string.ascii_lowercase + string.digits
    words = [*WORDS, *signs, *(f"##{sign}" for sign in signs), "'", "-", ",", "&", "(", ")", "/"]
    special = SPECIAL | {"[UNK]": 100, "[MASK]": 103}
    free = (index for index in range(104, 1012))
    return special | dict(zip(words, free))


def checked(
    network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", source: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Network and tokenizer, if they go together.

    Raises:
        ValueError: if not.
    """
    vocabulary = tokenizer.get_vocab()
    for token, index in SPECIAL.items():
        if vocabulary.get(token) != index:
            raise ValueError(
                f"{source}: the tokenizer has {token} as {vocabulary.get(token)}, which Grounding "
                f"DINO knows as {index}"
            )
    size = network.config.text_config.vocab_size
    if max(vocabulary.values()) >= size:
        raise ValueError(
            f"{source}: vocab_size={size} must exceed the tokenizer's last token, "
            f"{max(vocabulary.values())}"
        )
    # The result of this norm is read by nobody, and DDP would wait for its gradient.
    unused = getattr(network.model.backbone.conv_encoder.model, "swin", None)
    if unused is not None:
        unused.layernorm.requires_grad_(False)
    return network, tokenizer
