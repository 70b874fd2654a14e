"""COCO's metrics of boxes, computed in C++ by faster-coco-eval."""

import contextlib
import io
import json
from itertools import chain
from pathlib import Path

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

try:
    from faster_coco_eval import COCO, COCOeval_faster
except ImportError:
    COCO = None


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator of boxes with the same numbers in a fraction of the time::

        dataloader.evaluator._target_=dset_d2.evaluation.FastCOCOEvaluator

    Arguments are those of COCOEvaluator; ``tasks`` can be boxes only.

    Raises:
        ImportError: without the package faster-coco-eval.
        ValueError: on other tasks.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...] = ("bbox",), *args, **kwargs):
        if COCO is None:
            raise ImportError("no faster-coco-eval: pip install 'dset_d2[evaluation]'")
        if tuple(tasks) != ("bbox",):
            raise ValueError(f"tasks={tasks!r} must be ('bbox',)")
        super().__init__(dataset_name, ("bbox",), *args, **kwargs)
        if self._do_evaluation:
            self._coco_api = COCO(PathManager.get_local_path(self._metadata.json_file))

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        found = list(chain.from_iterable(x["instances"] for x in predictions))
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if numbers is not None:
            ids = {number: category for category, number in numbers.items()}
            for detection in found:
                detection["category_id"] = ids[detection["category_id"]]
        if self._output_dir:
            with PathManager.open(
                str(Path(self._output_dir, "coco_instances_results.json")), "w"
            ) as f:
                f.write(json.dumps(found))
        if not self._do_evaluation:
            return
        evaluation = None
        if found:
            evaluation = COCOeval_faster(
                self._coco_api, self._coco_api.loadRes(found), "bbox", print_function=print
            )
            evaluation.params.maxDets = self._max_dets_per_image
            if img_ids is not None:
                evaluation.params.imgIds = img_ids
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.evaluate()
                evaluation.accumulate()
            evaluation.summarize()
        names = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(evaluation, "bbox", class_names=names)
