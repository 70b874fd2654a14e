"""Exported files, really run: equal to PyTorch, sparse where the model is, refused where wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import nn

from dset_d2.inference import (
    ExportedDetector,
    ExportInfo,
    Predictor,
    export_detector,
    optimize_for_inference,
)
from dset_d2.inference import export as export_module
from dset_d2.inference.export import (
    KEY,
    TracedDetector,
    agreement,
    onnx_model,
    save_onnx,
    trace,
)
from dset_d2.modeling.sparse import MoEConfig, ViTPruningConfig

from ..conftest import make_inputs, sparse_model, tiny_dinov3, tiny_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = (96, 128)
NAMES = tuple("abcde")
# An export takes as long as there are operators, so models are shallow.
FAMILIES = {
    "D-FINE": lambda: tiny_model("configs/dfine/dfine_n_coco.py", num_layers=2),
    "pruned ViT": lambda: tiny_dinov3(
        depth=4,
        decoder={"num_layers": 1},
        pruning=[ViTPruningConfig(keep_ratio=0.5, min_tokens=2, block=1)],
        moe=MoEConfig(num_experts=4, layers=(3,)),
    ).eval(),
}


def shallow_dset() -> nn.Module:
    return sparse_model(decoder={"num_layers": 1})


def info(**changes) -> ExportInfo:
    return ExportInfo(**{"classes": NAMES, "image_size": SIZE, "max_detections": 50} | changes)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """A model and its ONNX file with post-processing."""
    model = FAMILIES[request.param]()
    model.max_detections = 50
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_detector(model, path, "onnx", info())
    return model, path


def assert_same(detector, model: nn.Module, inputs: list[dict]) -> None:
    with torch.no_grad():
        expected = [x["instances"] for x in model(inputs)]
    for found, wanted in zip(detector(inputs), expected):
        assert found["instances"].image_size == wanted.image_size
        assert len(wanted) == 50 and agreement(found["instances"], wanted) > 0.97  # one of 100


def test_onnxruntime_gives_the_same_for_batches_of_any_length(exported):
    model, path = exported
    detector = ExportedDetector(path)
    assert detector.info == info()
    for count in (1, 3):
        inputs = [
            x | {"height": 480, "width": 640} for x in make_inputs([SIZE] * count, seed=count)
        ]
        assert_same(detector, model, inputs)


def test_no_operator_depends_on_the_number_of_true_values(exported):
    _, path = exported
    graph = onnx.load(path).graph
    operators = {node.op_type for node in graph.node}
    assert operators.isdisjoint({"NonZero", "Compress", "Unique"}), operators
    assert "BatchNormalization" not in operators
    assert not any(node.metadata_props for node in graph.node)  # names of this machine's files


@pytest.fixture(scope="module")
def dset():
    """A model and its ONNX model, which takes longest to make."""
    model = shallow_dset()
    model.max_detections = 50
    return model, onnx_model(trace(model, info()), "detections")


def test_openvino_gives_the_same(dset, tmp_path):
    pytest.importorskip("openvino")
    model, proto = dset
    save_onnx(proto, tmp_path / "model.xml", "openvino", info())
    detector = ExportedDetector(tmp_path / "model.xml")
    assert detector.info == info()
    for count in (1, 2):
        assert_same(detector, model, make_inputs([SIZE] * count, seed=count))


def test_torch_export_gives_the_same(tmp_path):
    model = shallow_dset()
    model.max_detections = 50
    export_detector(model, tmp_path / "model.pt2", "torch_export", info())
    assert_same(TracedDetector(tmp_path / "model.pt2"), model, make_inputs([SIZE] * 2))
    with pytest.raises(ValueError, match="model.pt2: must end in one of .onnx, .xml"):
        ExportedDetector(tmp_path / "model.pt2")


def test_raw_predictions_of_any_size(tmp_path):
    model = tiny_model(num_layers=1)
    model.max_detections = 50
    said = info(outputs="raw", dynamic_size=True)
    export_detector(model, tmp_path / "model.onnx", "onnx", said)
    detector = ExportedDetector(tmp_path / "model.onnx")
    assert_same(detector, model, make_inputs([SIZE, (160, 96), SIZE, (64, 64)]))
    with pytest.raises(ValueError, match="an image of 70 x 96: the file takes whole multiples"):
        detector(make_inputs([(70, 96)]))


def test_a_pruner_needs_to_know_the_size():
    with pytest.raises(ValueError, match="a part that needs to know the size: pruning/encoder_0"):
        trace(sparse_model(), info(dynamic_size=True))


def test_images_of_another_size_are_refused(exported):
    _, path = exported
    with pytest.raises(ValueError, match="an image of 64 x 64: the file takes 96 x 128 only"):
        ExportedDetector(path)(make_inputs([(64, 64)]))
    with pytest.raises(ValueError, match="an image of torch.float32: the file takes torch.uint8"):
        ExportedDetector(path)([{"image": torch.zeros(3, *SIZE)}])


def experts(encoder: str) -> nn.Module:
    """A model whose decoder's experts alone have products of 16 columns.

    Args:
        encoder: dispatch of the encoder's experts, of 20 columns.
    """
    config = MoEConfig(num_experts=4, top_k=1)
    decoder = {"num_layers": 1, "moe": replace(config, expert_dim=16)}
    encoder = {"moe": replace(config, expert_dim=20, dispatch=encoder)}
    model = sparse_model(memory=1.0, keep_ratio=1.0, decoder=decoder, encoder=encoder)
    model.max_detections = 50
    return model


def rows_of_experts(path: Path, columns: int) -> list[int]:
    """Rows that onnxruntime really multiplies with each expert's first weights for one image."""
    proto = onnx.load(path)
    products = [node for node in proto.graph.node if node.op_type in ("Gemm", "MatMul")]
    for node in products:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    image = make_inputs([SIZE])[0]["image"].numpy()[None]
    results = session.run([node.output[0] for node in products], {"images": image})
    return [result.size // columns for result in results if result.shape[-1] == columns]


def test_experts_compute_routed_rows_only(tmp_path):
    """Counted in the runtime: one of four experts for each of the decoder's 30 queries, but for
    those of the encoder, whose dense form is one product of all experts' columns."""
    sparse, mixed = experts("auto"), experts("dense")
    assert sparse.state_dict().keys() == mixed.state_dict().keys()
    path = tmp_path / "mixed.onnx"
    export_detector(mixed, path, "onnx", info())
    rows = rows_of_experts(path, 16)
    assert len(rows) == 4 and sum(rows) == 30
    assert len(set(rows)) > 1  # as many as are routed to each
    assert rows_of_experts(path, 20) == []
    assert rows_of_experts(path, 4 * 20) == [12]  # tokens of the coarsest level
    assert_same(ExportedDetector(path), sparse, make_inputs([SIZE]))


# What a file says of itself.


def test_infos_survive_as_json():
    for said in (info(), info(outputs="raw", dynamic_size=True, random_weights=True)):
        assert ExportInfo.from_json(said.to_json()) == said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": []}, r"classes=\(\) must be names, at least one"),
        ({"classes": [1]}, r"classes=\(1,\) must be names"),
        ({"classes": "car"}, "classes='car' must be a list"),
        ({"image_size": [96]}, "must be a height and a width"),
        ({"image_size": [96, 100]}, r"image_size=\[96, 100\] must be whole multiples of 32"),
        ({"outputs": "masks"}, "outputs='masks' is not one of"),
        ({"max_detections": True}, "max_detections=True must be a positive whole number"),
        ({"divisor": 0}, "divisor=0 must be a positive whole number"),
        ({"dynamic_size": 1}, "dynamic_size=1 must be true or false"),
        ({"code": "x"}, "must have the entries classes"),
    ],
)
def test_wrong_infos_are_named(changes, message):
    values = json.loads(info().to_json()) | changes
    with pytest.raises(ValueError, match=message):
        ExportInfo.from_json(json.dumps(values))


def test_other_files_are_refused(exported, tmp_path):
    _, path = exported
    with pytest.raises(FileNotFoundError, match="absent.onnx: no such file"):
        ExportedDetector(tmp_path / "absent.onnx")
    (tmp_path / "odd.onnx").write_bytes(b"odd")
    with pytest.raises(ValueError, match="odd.onnx: cannot be read"):
        ExportedDetector(tmp_path / "odd.onnx")
    proto = onnx.load(path)
    proto.metadata_props[0].value = '{"classes": "x"}'
    onnx.save(proto, tmp_path / "wrong.onnx")
    with pytest.raises(ValueError, match=f"wrong.onnx: its entry '{KEY}' is wrong"):
        ExportedDetector(tmp_path / "wrong.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="foreign.onnx: was not exported by dset_d2"):
        ExportedDetector(tmp_path / "foreign.onnx")


def test_a_missing_library_says_what_to_install(monkeypatch, exported):
    _, path = exported

    def absent(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(export_module, "import_module", absent)
    with pytest.raises(ImportError, match=r"'onnxruntime': pip install 'dset_d2\[export\]'"):
        ExportedDetector(path)


# Comparing.


def instances(boxes, scores, classes) -> Instances:
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return found


def test_agreement_tells_what_differs():
    boxes = [[10, 10, 50, 50], [20, 20, 80, 80]]
    one = instances(boxes, [0.9, 0.8], [0, 1])
    assert agreement(one, one) == 1
    assert agreement(instances([], [], []), instances([], [], [])) == 1
    assert agreement(one, instances([], [], [])) == 0
    assert agreement(one, instances(boxes[::-1], [0.8, 0.9], [1, 0])) == 1  # in any order
    assert agreement(one, instances(boxes, [0.9, 0.8011], [0, 1])) == 0.5
    assert agreement(one, instances(boxes, [0.9, 0.8], [0, 0])) == 0.5
    assert agreement(one, instances([boxes[0], [20, 20, 80, 81]], [0.9, 0.8], [0, 1])) == 0.5
    assert agreement(one, instances(boxes[:1], [0.9], [0])) == pytest.approx(2 / 3)


# The predictor on top of both.


def test_predictors_of_model_and_file_agree(exported):
    model, path = exported
    resize = T.Resize(SIZE)
    of_file, of_model = Predictor.from_file(path), Predictor(model, resize=resize, classes=NAMES)
    assert of_file.classes == of_model.classes == NAMES
    photo = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    found, expected = of_file(photo).instances, of_model(photo).instances
    assert found.image_size == expected.image_size == (50, 70)
    assert agreement(found, expected) > 0.97
    optimised = Predictor(optimize_for_inference(model), resize=resize)
    assert agreement(optimised(photo).instances, expected) > 0.97


# Eight bits.


def test_quantised_files_keep_a_float_decoder_and_experts(dset, tmp_path):
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    model, proto = dset
    images = [x["image"] for x in make_inputs([SIZE] * 4, seed=5)]
    path = tmp_path / "model.xml"
    save_onnx(proto, path, "openvino", info(precision="int8"), images)
    operators = openvino.Core().read_model(path).get_ops()

    def quantised(kind: str) -> list[bool]:
        """Of each product with weights, whether they are of eight bits and so scaled."""
        products = [x for x in operators if x.get_type_name() == kind]
        sources = [x.input_value(1).get_node().get_type_name() for x in products]
        return [source == "Multiply" for source in sources if source in ("Multiply", "Constant")]

    convolutions, products = quantised("Convolution"), quantised("MatMul")
    assert len(convolutions) > 40
    assert convolutions.count(False) == len(model.decoder.input_proj)
    assert 4 <= products.count(True) < products.count(False)  # of the encoder's attention

    detector = ExportedDetector(path)
    assert detector.info.precision == "int8"
    inputs = make_inputs([SIZE])
    found = detector(inputs)[0]["instances"]
    with torch.no_grad():
        expected = model(inputs)[0]["instances"]
    assert (found.scores - expected.scores).abs().mean() < 0.2 * expected.scores.mean()


def test_quantising_needs_images(tmp_path):
    for kind in ("onnx", "openvino"):
        images = make_inputs([SIZE])[:1] if kind == "onnx" else []
        with pytest.raises(ValueError, match="precision='int8' needs calibration images"):
            export_detector(tiny_model(), tmp_path / "x", kind, info(precision="int8"), images)
